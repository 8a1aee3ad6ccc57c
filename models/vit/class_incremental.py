"""Class-incremental learning: a task sequence of classes, a pretrained backbone, and accuracy on all classes seen.

    learner.begin_task(task)      # new classes: the classifier gains rows
    learner.train_task()
    logits = learner.classify(learner.features(images))
    accuracy_of(learner, tasks=task + 1).correct      # images of each task

Test images are read once a task, after its training.
"""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from models.base import Interrupted, Learner
from models.experiment import Parts, Scores
from models.vit.config import ClassIncrementalConfig
from models.vit.pretrained import Backbone, create_backbone, find_weights
from utils.cache.decoded_images import IMAGES
from utils.cache.tensor_cache import TensorCache
from utils.console import progress
from utils.data.datasets import ImageCache, load_dataset
from utils.data.tasks import DataManager
from utils.data.transforms import ViewSpec
from utils.errors import UserError
from utils.runs.figures import class_incremental_figures
from utils.runs.metrics import AccuracyMatrix, accuracy_table, summary_table
from utils.runs.run_log import RunLog
from utils.training.device import dead_worker_advice, predictions
from utils.training.distributed import World


@dataclass(frozen=True)
class ClassIncrementalParts(Parts):
    """Adds the task sequence, the pretrained backbone, and where what is computed once may be kept."""

    config: ClassIncrementalConfig
    data: DataManager
    backbone: Backbone
    cache: TensorCache

    @classmethod
    def prepare(
        cls,
        config: ClassIncrementalConfig,
        *,
        seed: int,
        device: torch.device,
        world: World,
        warnings: list[str],
    ) -> Self:
        cache = TensorCache(config.cache_root, config.cache_gb)
        images = ImageCache(Path(config.cache_root) / IMAGES, config.cache_gb)
        try:
            dataset = load_dataset(config.dataset, config.data_root, images)
        except UserError as error:
            raise UserError("\n".join([str(error), *_missing_weights(config)])) from error
        backbone = create_backbone(
            config.backbone_type,
            weights=config.weights,
            weights_root=Path(config.weights_root),
            image_size=config.image_size,
        )
        norm = (backbone.mean, backbone.std) if config.input_normalization == "weights" else (None, None)
        size = backbone.image_size
        data = DataManager(
            dataset,
            seed=seed,
            shuffle=config.shuffle,
            init_cls=config.init_cls,
            increment=config.increment,
            max_tasks=config.max_tasks,
            max_train_per_class=config.max_train_per_class,
            max_test_per_class=config.max_test_per_class,
            train_view=ViewSpec(size, config.augmentation, *norm),
            test_view=ViewSpec(size, "none", *norm),
            num_workers=default_workers(device) if config.num_workers is None else config.num_workers,
            rank=world.rank,
            world_size=world.size,
        )
        return cls(config, seed, device, world, warnings, data, backbone, cache)

    @property
    def nb_tasks(self) -> int:
        return self.data.nb_tasks

    @property
    def keeps_every_task(self) -> bool:
        return self.config.checkpoints == "all"

    def introduction(self) -> str:
        return f"{self.data.describe()}. Backbone {self.backbone.tag}, {self.backbone.image_size} px"

    def opening(self, task: int) -> str:
        classes = self.data.task_classes(task)
        return f"Learning on {classes.start}-{classes.stop} (task {task} of {self.nb_tasks})"

    def weights(self) -> dict[str, str]:
        return {"tag": self.backbone.tag, "note": self.backbone.note}

    def manifest(self) -> dict[str, Any]:
        return {
            "weights": {
                "tag": self.backbone.tag,
                "sha256": self.backbone.sha256,
                "architecture": self.backbone.architecture,
                "options_sha256": self.backbone.options_sha256,
                "note": self.backbone.note,
            },
            "image_size": self.backbone.image_size,
            "data": {"name": self.config.dataset, "sha256": self.data.dataset.sha256},
            "data_of_tasks": self.data_read(self.nb_tasks, self.nb_tasks),
            "class_order": list(self.data.class_order),
        }

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            **self.backbone.identity(),
            "class_order": list(self.data.class_order),
        }

    def data_read(self, trained: int, tested: int) -> dict[str, list[str]]:
        counts = {"train": trained, "test": tested}
        return {
            source: [self.data.content_sha256(task, source) for task in range(min(count, self.nb_tasks))]
            for source, count in counts.items()
        }


class Counts(NamedTuple):
    """Images of each task seen that were classified right, and how many there are."""

    correct: list[int]
    total: list[int]


class AccuracyScores(Scores):
    """Test accuracy on every task seen, as a matrix over tasks."""

    def __init__(self) -> None:
        self.matrix = AccuracyMatrix()

    def __len__(self) -> int:
        return len(self.matrix)

    @staticmethod
    def measure(learner: "ClassIncrementalLearner") -> Counts:
        return accuracy_of(learner, learner.task + 1)

    @staticmethod
    def describe(measured: Counts, parts: ClassIncrementalParts) -> str:
        lines = ["accuracy (%) on the test images of each task seen, class-incremental"]
        for task, (right, images) in enumerate(zip(*measured, strict=True)):
            classes = parts.data.task_classes(task)
            share = f"{100 * right / images:6.2f}  ({right} of {images})"
            lines.append(f"task {task:>3}  classes {classes.start:>3}-{classes.stop - 1:<3}  {share}")
        right, images = map(sum, measured)
        return "\n".join([*lines, f"total {'':>19}{100 * right / images:6.2f}  ({right} of {images})"])

    def add(self, measured: Counts) -> None:
        self.matrix.add(*measured)

    def event(self) -> dict[str, Any]:
        return {"accuracy": self.matrix.rows[-1], "total": self.matrix.curve[-1]}

    def record(self, log: RunLog) -> None:
        log.accuracy_csv(self.matrix.rows)

    def lines(self, summary: dict[str, Any]) -> list[str]:
        matrix, task = self.matrix, len(self) - 1
        per_task = ", ".join(f"{value:.2f}" for value in matrix.rows[-1])
        forgetting = "" if matrix.forgetting is None else f", forgetting {matrix.forgetting:.2f}"
        return [
            f"CNN top1 curve: {[round(value, 2) for value in matrix.curve]}",
            f"Average Accuracy (CNN): {matrix.average:.2f}",
            f"Task {task}: accuracy per task [{per_task}], total {matrix.curve[-1]:.2f}{forgetting}",
            f"Task {task}: adapters per block {_compact(summary['adapters'])}",
        ]

    def result(self, summary: dict[str, Any]) -> dict[str, Any]:
        return {
            "metrics": self.matrix.summary() | {"expansions": _expansions(summary)},
            "accuracy": self.matrix.rows,
            "curve": self.matrix.curve,
            "adapters": summary["adapters"],
        }

    def tables(self, summary: dict[str, Any]) -> list[str]:
        closing = summary_table(self.matrix, _expansions(summary), summary["parameters"])
        return [accuracy_table(self.matrix), closing]

    def to_json(self) -> dict[str, Any]:
        return self.matrix.to_json()

    def load_json(self, values: dict[str, Any]) -> None:
        self.matrix = AccuracyMatrix.from_json(values)


class ClassIncrementalLearner(Learner):
    """A class-incremental method on a frozen backbone.

    Attributes:
        data: the task sequence.
        cache: where what is computed once may be kept.
    """

    Config = ClassIncrementalConfig
    Parts = ClassIncrementalParts
    Scores = AccuracyScores
    figures = staticmethod(class_incremental_figures)
    config: ClassIncrementalConfig

    def __init__(self, parts: ClassIncrementalParts, **record: Any) -> None:
        super().__init__(parts, **record)
        self.data, self.cache = parts.data, parts.cache
        self.data.stop_requested = self._stop_requested
        self.modules = self.build(parts.backbone).to(self.device)

    @abstractmethod
    def build(self, backbone: Backbone) -> nn.ModuleDict:
        """The method's modules; their state (the frozen backbone's apart) is the checkpoint."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """What the classifier reads, (B, 3, S, S) -> (B, d), float32."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Logits over all classes seen, (B, d) -> (B, C)."""

    def features_of(self, task: int, source: str) -> Tensor:
        """`features` of a task's "train" or "test" images in the test view, in stored order, (n, d), on every rank."""
        classes, size = self.data.task_classes(task), self.config.eval_batch_size
        batches = self.data.batches(classes, source=source, mode="test", batch_size=size)
        left, parts = self.data.count(classes, source), []
        for images, _ in progress(batches, desc=f"Features of {source} images of task {task}", unit="batch"):
            if self.stopping():
                raise Interrupted
            with torch.no_grad():
                features = self.features(images.to(self.device))
            parts.append(self.world.gather_rows(features, min(size, left)))
            left -= size
        return torch.cat(parts)

    def class_tokens(self, images: Tensor) -> Tensor:
        """Class token after each of the L transformer blocks, (B, 3, S, S) -> (L, B, d), float32: what is analysed.

        Raises:
            UserError: the method has no such blocks.
        """
        raise UserError(
            f"model_name = {self.config.model_name!r}: this method has no transformer blocks to analyse"
        )

    def branch_spaces(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """What each branch of nested adapters can write to: (block, adapter) -> "fast" and "slow", bases (d, k)."""
        return {}

    @property
    def classes(self) -> range:
        """The open task's classes, in incremental labels."""
        return self.data.task_classes(self.task)


@torch.no_grad()
def accuracy_of(learner: ClassIncrementalLearner, tasks: int) -> Counts:
    """Test a learner on the first so many tasks: class-incremental, no task label given.

    Raises:
        UserError: a score is not finite.
    """
    correct, total = [], []
    for task in range(tasks):
        targets = learner.data.targets(learner.data.indices(learner.data.task_classes(task), "test"), "test")
        with dead_worker_advice():
            features = learner.features_of(task, "test").to(learner.device)
        what = f"the test images of task {task}"
        predicted = predictions(learner.classify(features), what, learner.config.precision).cpu()
        correct.append(int((predicted == targets).sum()))
        total.append(len(targets))
    return Counts(correct, total)


def _missing_weights(config: ClassIncrementalConfig) -> list[str]:
    """What is wrong with the weights, without fetching them: told with what is wrong with the data."""
    try:
        find_weights(config.backbone_type, weights=config.weights, weights_root=Path(config.weights_root))
    except UserError as error:
        return [str(error)]
    return []


def default_workers(device: torch.device) -> int:
    """Data workers where the config leaves it open: none beside a computing CPU, else up to 8."""
    return 0 if device.type == "cpu" else min(8, torch.multiprocessing.cpu_count())


def _expansions(summary: dict[str, Any]) -> int:
    """Adapters that growth added to the first in each block."""
    return sum(summary["adapters"].values()) - len(summary["adapters"])


def _compact(adapters: dict[int, int]) -> str:
    """{0: 1, ..., 9: 2} as "1 x 9, block 9: 2": the blocks that grew stand out."""
    single = sum(count == 1 for count in adapters.values())
    return ", ".join([f"1 in {single} blocks", *(f"{n} in block {b}" for b, n in adapters.items() if n > 1)])
