"""Base class of methods for class-incremental learning on a frozen pretrained ViT: data, features, accuracy.

    learner.begin_task(task)      # new classes: the classifier gains rows
    learner.train_task()
    logits = learner.classify(learner.features(images))
    learner.evaluate()            # {"correct": [...], "total": [...]}: test images of each task seen

Test images are read once per task, after its training; with a `validation_share` images held out of training
are read instead, and test images only by `evaluate("test")`. Task labels are unknown in evaluation.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.frozen_block import speed_up
from models.base import Learner, Report, RunContext, continued
from models.vit.activations import ActivationStore
from models.vit.analysis import TaskNetwork, analysis_inputs
from models.vit.closed_form import ClosedFormHead
from models.vit.config import ClassIncrementalConfig
from models.vit.report import description, report
from models.vit.sources import load_backbone, load_data_and_backbone
from models.vit.task_inputs import TaskInputs
from utils.analysis import calibration
from utils.analysis.calibration import Calibration
from utils.analysis.representations import ANALYSES, AnalysisInputs
from utils.cache.tensor_cache import TensorCache
from utils.inc_net import IncrementalHead
from utils.runs.classes import confusion_counts
from utils.runs.figures import CAPTIONS, class_incremental_figures
from utils.runs.manifest import library_versions
from utils.training.device import dead_worker_advice, predictions, require_finite
from utils.training.optim import GroupedOptimizer, ParameterGroup, assert_complete, trainable
from utils.training.random import seed_generators
from utils.wording import counted, shortened, spans

logger = logging.getLogger("nested_lora")

COMPUTED = {"bases", "directions", "records"}  # parts of networks that no gradient updates
UNTRAINED = {"adapters", "routers", "merging", "average"}  # parts of no effect before functional training


class ClassIncrementalLearner(Learner):
    """A class-incremental method on a frozen ViT.

    A method names its modules in `build`: "backbone", the ViT with what the method adds to it, and
    classifiers: "head", rows trained by gradient, and "closed_form", a head computed from features at the end
    of a task. Where there is a closed-form head, it classifies instead of the rows.

    Attributes:
        data: the task sequence; absent where the context reads no data.
        backbone: provenance of the pretrained weights.
        calibration: temperature of the scores; None before the first one is fitted.
        confusion: test images by true and predicted class in the newest evaluation, (C, C); None before one.
        updated: names of the parameters of slow branches that a step has updated.
    """

    Config = ClassIncrementalConfig
    Store, Inputs = ActivationStore, TaskInputs
    figures = staticmethod(class_incremental_figures)
    captions = CAPTIONS
    analyses = ANALYSES
    config: ClassIncrementalConfig

    def __init__(self, config: ClassIncrementalConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.calibration: Calibration | None = None
        self.cache = TensorCache(config.cache_root, config.cache_gb)
        self.confusion: np.ndarray | None = None
        self.updated: set[str] = set()
        if context.reads_data:
            self.data, self.backbone = load_data_and_backbone(config, context)
        else:
            self.backbone = load_backbone(config)
        seed_generators(self.seed, self.device)
        torch.backends.cudnn.benchmark = False
        if getattr(config, "engine", "fast") == "fast":
            speed_up(self.backbone.vit)
        self.modules = self.build(self.backbone.vit).to(self.device)

    # --- what a method defines ------------------------------------------------------------------------------

    @abstractmethod
    def build(self, vit: nn.Module) -> nn.ModuleDict:
        """The method's modules on a pretrained timm ViT."""

    def learning_groups(self) -> list[ParameterGroup]:
        """Parameter groups of a functional phase, with the learning rates that the config gives their names.

        By default the groups of the network; the newest classifier rows join the last one, "other".
        """
        groups = self.network.parameter_groups()
        groups["other"] = [*groups.pop("other", []), *self.head.trainable()]
        return [
            ParameterGroup(name, trainable(parameters), **self.config.group_options(name))
            for name, parameters in groups.items()
        ]

    def training_logits(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over the open task's classes (B, C_t), and the positions of the targets (B,) among them."""
        return self.head.newest(features), targets - self.classes.start

    def loss(self, logits: Tensor, targets: Tensor, features: Tensor) -> Tensor:
        """The method's loss on a micro-batch, a scalar, its mean over samples: by default cross-entropy.

        Args:
            logits, targets: as `training_logits` gives them, (B, C_t) and int64 (B,).
            features: class tokens that the logits are computed from, (B, d), float32.
        """
        return F.cross_entropy(logits, targets)

    # --- model ----------------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        return self.modules["backbone"]

    @property
    def head(self) -> IncrementalHead:
        """The classifier rows that are trained by gradient."""
        return self.modules["head"]

    @property
    def closed_form(self) -> ClosedFormHead | None:
        """The head in closed form, where one classifies."""
        return dict(self.modules.items()).get("closed_form")

    def features(self, images: Tensor) -> Tensor:
        """Features of images as the network returns them, (B, 3, S, S) -> (B, d), float32; no hook.

        Training and tests, which start from stored activations, call the network itself.
        """
        self.before_features()
        with self.autocast():
            return self.network(images).float()

    def before_features(self) -> None:
        """Bring the network into the form that is tested; called before features of it are computed."""

    def classify(self, features: Tensor) -> Tensor:
        """Logits over all classes seen, (B, d) -> (B, C)."""
        return (self.closed_form or self.head)(features)

    def adapter_weights(self) -> dict[int, float]:
        """Weight in evaluation of the adapter that each task grew; empty where no gate gives them weights."""
        return {}

    def frozen_names(self) -> set[str]:
        return {f"backbone.{name}" for name in self.network.frozen_names()}

    # --- data -----------------------------------------------------------------------------------------------

    @property
    def nb_tasks(self) -> int:
        return self.data.nb_tasks

    @property
    def classes(self) -> range:
        """The open task's classes, in incremental labels."""
        return self.data.task_classes(self.task)

    @cached_property
    def inputs(self) -> TaskInputs:
        """Batches and features of the tasks' images, from stored activations of the frozen blocks."""
        identity = {
            **self.backbone.identity(),
            "cpu_kernels": self.config.cpu_kernels,
            "versions": library_versions(),
        }
        batch_size = self.config.eval_batch_size
        store = self.Store(self.network, self.data, self.cache, self.context, batch_size, identity)
        return self.Inputs(store, self.config, self.shared_views)

    def shared_views(self) -> int:
        """Number of the open task's first views that several of its phases read, as far as is known."""
        return 0

    def features_of(self, task: int, source: str) -> Tensor:
        """`features` (n, d) of a task's images of one source, test view, stored order, on all ranks."""
        self.before_features()
        return self.inputs.features_of(task, source)

    # --- steps of a task ------------------------------------------------------------------------------------

    def open_task(self) -> None:
        if "head" in self.modules:
            self.head.grow(len(self.classes))

    def update_optimizer_and_scheduler(self, num_epoch: int) -> GroupedOptimizer:
        """The optimizer of a phase that trains the functional side, over exactly what learns now.

        Raises:
            RuntimeError: the groups are not exactly the parameters that learn.
        """
        groups = self.learning_groups()
        assert_complete(groups, self.functional_parameters())
        return self.optimizer_over(groups, num_epoch)

    def functional_parameters(self) -> list[nn.Parameter]:
        """The parameters that learn now in a functional phase: by default all that learn."""
        return trainable(self.modules.parameters())

    def optimizer_over(self, groups: Sequence[ParameterGroup], num_epoch: int) -> GroupedOptimizer:
        """The configured optimizer over some groups."""
        config = self.config
        return GroupedOptimizer(
            config.optimizer,
            groups,
            weight_decay=config.weight_decay,
            epochs=num_epoch,
            min_lr=config.min_lr,
        )

    def remember_features(self) -> None:
        """Keep the task's features before training, where the head's statistics are corrected for drift."""
        if self.closed_form is not None and self.task and self.config.head_drift == "linear":
            self.method_tensors["features_before"] = self.training_features().cpu()

    @torch.no_grad()
    def fit_head(self) -> None:
        """Add the task's training features to the closed-form head, where one classifies."""
        if self.closed_form is not None:
            features = self.training_features()
            before = self.method_tensors.pop("features_before", None)
            if before is not None:
                self._compensate_drift(before, features.cpu())
            targets = self.data.targets(self.data.indices(self.classes, "train"), "train")
            self.closed_form.add(features, targets)
        self.inputs.store.drop_own("train")

    def training_features(self) -> Tensor:
        """Features of the open task's training images in the test view, (n, d).

        Raises:
            UserError: one is not finite.
        """
        what = f"the features of task {self.task}'s training images"
        return require_finite(self.features_of(self.task, "train"), what, self.config.precision)

    def _compensate_drift(self, before: Tensor, after: Tensor) -> None:
        """Correct the head's class statistics for the movement of features, and log how far these moved."""
        tiny = torch.finfo(before.dtype).tiny
        moved, explained = float((after - before).norm() / before.norm().clamp_min(tiny)), None
        if moved:
            explained = self.closed_form.compensate_drift(before, after)
            shown = f"features moved by {moved:.3f} (relative), {explained:.3f} of it explained"
            logger.info(f"Task {self.task}: {shown}")
        self.log.metric("feature_drift", task=self.task, moved=moved, explained=explained)

    def close_run(self) -> None:
        self.inputs.store.drop_own()

    # --- calibration ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self) -> None:
        """Fit the temperature of the scores; it is left unchanged if a class has no such image any more."""
        head, source, fitted_on = self.closed_form, "train", calibration.TRAINED_ON
        if self.config.validation_share:
            head, source, fitted_on = None, "validation", calibration.VALIDATION
        elif head is not None:
            fitted_on = head.unseen
        images: dict[int, np.ndarray] = {}  # stored positions of each class, by its label in the data set
        for classes in map(self.data.task_classes, range(self.task + 1)):
            indices = self.data.indices(classes, source)
            if len(self.data.targets(indices, source).unique()) < len(classes):
                return
            if head is not None:
                indices = indices[head.unseen_rows(len(indices), classes.stop).numpy()]
            labels = self.data.targets(indices, source).numpy()
            images |= {self.data.class_order[label]: indices[labels == label] for label in classes}
        chosen, ever = calibration.chosen_images(images), calibration.chosen_images(images, ever=True)
        self.before_features()
        features = self.inputs.features_of_images(range(self.classes.stop), chosen, source, among=ever)
        targets = self.data.targets(chosen, source)
        if fitted_on in (calibration.TRAINED_ON, calibration.VALIDATION):
            scores = self.classify(features.to(self.device)).cpu()
        else:
            scores = head.unseen_scores(features, targets)
        if scores is not None:
            self.calibration = calibration.fit(scores, targets, fitted_on)

    # --- evaluation -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, images: str | None = None) -> dict[str, Any]:
        """Evaluate on each task seen: counts "correct" and "total" per task, "class_correct" per class.

        "ece" and "nll" are taken over all images; "images" names them if they are not test images.
        `confusion` is set to their counts by true and predicted class.

        Args:
            images: "test" or "validation"; None for those that the run is measured on.

        Raises:
            UserError: a score is not finite, or images cannot be read.
        """
        scored, predicted, source = [], [], images or self.data.evaluated
        self.before_features()
        with dead_worker_advice():
            seen = self.inputs.seen_features(self.task + 1, source)
        tasks = [self.data.task_classes(task) for task in range(self.task + 1)]
        for task, features in enumerate(seen.split([self.data.count(classes, source) for classes in tasks])):
            scores = self.classify(features.to(self.device)).cpu()
            what = f"the {source} images of task {task}"
            predicted.append(predictions(scores, what, self.config.precision))
            untaught = self.classes.stop - scores.shape[1]  # new classes that a closed-form head lacks yet
            scored.append(F.pad(scores, (0, untaught), value=-torch.inf))
        true = self.data.targets(self.data.seen_indices(len(tasks), source), source)
        self.confusion = confusion_counts(true.numpy(), torch.cat(predicted).numpy(), self.classes.stop)
        totals, right = self.confusion.sum(axis=1), self.confusion.diagonal()
        found = {
            "correct": [int(right[classes].sum()) for classes in tasks],
            "total": [int(totals[classes].sum()) for classes in tasks],
            "class_correct": right.tolist(),
        } | ({} if source == "test" else {"images": source})
        if self.calibration is not None:
            p = calibration.probabilities(torch.cat(scored), self.calibration.temperature)
            found |= calibration.errors(p, true)
        return found

    def report(self, evaluations: Sequence[dict[str, Any]]) -> Report:
        adapters, parameters = self.network.adapters_per_block(), self.parameter_counts
        added = sum(adapters.values()) - self.adapters_of_first_task * len(adapters)
        return report(evaluations, self.data, adapters, added, parameters, self.calibration, self.confusion)

    def describe_evaluation(self, evaluation: dict[str, Any]) -> str:
        return description(evaluation, self.data, self.calibration)

    def analysis_inputs(
        self, checkpoints: Sequence[Path], load: Callable[[Path], None], images_per_class: int | None
    ) -> AnalysisInputs:
        def networks() -> Iterator[TaskNetwork]:
            for checkpoint in checkpoints:
                load(checkpoint)
                yield TaskNetwork(checkpoint.name, self.network, self.features, self.adapter_weights())

        return analysis_inputs(networks(), self.data, self.config, self.device, images_per_class)

    # --- record ---------------------------------------------------------------------------------------------

    @property
    def adapters_of_first_task(self) -> int:
        """Number of adapters after the first task in each block that has any; of `expansions`."""
        return 1

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super().state()
        seen = self.classes.stop if self.task >= 0 else 0
        own = {"class_names": self.data.class_names[:seen], "calibration": self.calibration}
        return state | own | {"updated": sorted(self.updated)}, tensors

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_state(state, tensors)
        saved = state.get("calibration")
        self.calibration = None if saved is None else Calibration(*saved)
        self.updated = set(state.get("updated", ()))
        slow = self.network.parameter_groups().get("slow")
        if slow and "updated" not in state and self.config.group_options("slow")["lr"]:
            self.note_updated(slow)  # as earlier versions counted

    def summary(self) -> dict[str, Any]:
        return {"adapters": self.network.adapters_per_block(), **super().summary()}

    def parameter_counts(self) -> dict[str, int]:
        counts = self.network.parameter_counts() if self.network.adapters_per_block() else {}
        counts |= {
            name: module.stored_numbers()
            for name, module in self.modules.items()
            if hasattr(module, "stored_numbers")
        }
        if not self.trains_functional:  # then adapters have zero output
            counts = {part: numbers for part, numbers in counts.items() if part not in UNTRAINED}
        if self.closed_form is None or self.closed_form.needs_rows:
            counts["head"] = self.trained_rows()
        return counts | {"trained": self.trained_numbers(), "stored": sum(counts.values())}

    def trained_numbers(self) -> int:
        """Numbers that a gradient has updated, in the network and in classifier rows."""
        parts = self.network.parameter_counts()
        if not self.trains_functional:
            return parts.get("descriptors", 0)
        learned = sum(numbers for part, numbers in parts.items() if part not in COMPUTED)
        for name, parameters in self.network.parameter_groups().items():
            if name == "slow":  # in a phase with fewer steps than its interval it is not updated
                parameters = [p for name, p in self._named(parameters) if name not in self.updated]
            elif parameters and self.config.group_options(name)["lr"]:
                parameters = []
            learned -= sum(parameter.numel() for parameter in parameters)
        return learned + self.trained_rows()

    def note_updated(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add parameters to those that a step has updated."""
        self.updated |= {name for name, _ in self._named(parameters)}

    def _named(self, parameters: Iterable[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
        """Parameters with their names in `modules`."""
        chosen = set(map(id, parameters))
        return [(name, p) for name, p in self.modules.named_parameters() if id(p) in chosen]

    @property
    def trains_functional(self) -> bool:
        """Whether any epoch trains adapters, routers and classifier rows."""
        return getattr(self.config, "func_epoch", 1) > 0

    @property
    def epochs(self) -> int:
        """Epochs of the open task's functional phases."""
        return self.config.func_epoch

    def trained_rows(self) -> int:
        """Numbers in the classifier's rows."""
        rows = self.modules["head"].parameters() if "head" in self.modules else []
        return sum(parameter.numel() for parameter in rows)

    @property
    def keeps_every_task(self) -> bool:
        return self.config.checkpoints == "all"

    def describe_run(self) -> list[str]:
        backbone, note = self.backbone, f" ({self.backbone.note})" if self.backbone.note else ""
        lines = [self.data.describe(), f"Backbone {backbone.tag}, {backbone.image_size} px{note}"]
        if self.config.input_normalization == "weights":
            known = backbone.normalized_as == backbone.tag
            own = "of" if known else "which these weights do not say; taken from"
            values = f"mean {list(backbone.mean)}, std {list(backbone.std)}"
            lines.append(f"Inputs are normalised by {values}, {own} timm's {backbone.normalized_as}")
        return lines

    def describe_task(self, task: int) -> str:
        classes = self.data.task_classes(task)
        names = shortened(self.data.class_names[classes.start : classes.stop])
        images = counted(self.data.count(classes, "train"), "image")
        return f"Learning on {spans(classes)} ({names}), {images}"

    def weights(self) -> dict[str, str]:
        return {"tag": self.backbone.tag, "note": self.backbone.note}

    def manifest(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        weights = ("tag", "sha256", "architecture", "note")
        learned = self.context.trains_from or 0
        classes = self.data.task_classes(learned - 1).stop if learned else 0
        images = {source: self.data.images_per_class(source) for source in self.data.sources}
        read = self.data_read(self.nb_tasks, self.nb_tasks)
        return {
            "weights": {name: getattr(self.backbone, name) for name in weights},
            "image_size": self.backbone.image_size,
            "data": {"name": self.config.dataset, "sha256": self.data.data_sha256(self.data.evaluated)},
            "images_per_class": continued(earlier.get("images_per_class", {}), images, classes),
            "data_of_tasks": continued(earlier.get("data_of_tasks", {}), read, learned),
            "class_order": list(self.data.class_order),
            "class_names": self.data.class_names,
        }

    def identity(self) -> dict[str, Any]:
        order = {"class_order": list(self.data.class_order)}
        return super().identity() | self.backbone.identity() | order

    def data_read(self, trained: int, tested: int) -> dict[str, list[str]]:
        return {
            source: [self.data.content_sha256(task, source) for task in range(min(count, self.nb_tasks))]
            for source, count in zip(self.data.sources, (trained, tested), strict=True)
        }
