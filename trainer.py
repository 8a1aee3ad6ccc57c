"""The story of a run: tasks one after the other, evaluation at the end of each, record and checkpoints.

    results = train(config)                       # one run a seed; result.json contents
    results = resume(Path("logs/sema/..."))       # goes on from the last checkpoint of a run folder
    parts = assemble(config, seed=1993)           # data, backbone and device of a run, nothing written

Test images are read once a task, after its training. What a run leaves behind is described in `utils/run_log.py`.
"""

import json
import logging
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import safetensors
import timm
import torch
import torchvision

from models import LEARNERS, SCHEMAS
from models.base import Interrupted, Learner
from utils.cache import IMAGES
from utils.checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint, save_checkpoint
from utils.config import RunConfig, config_from_dict
from utils.data import load_dataset
from utils.data_manager import DataManager
from utils.distributed import World, backend_for, local_device, process_group, world_from_environment
from utils.errors import UserError
from utils.factory import Backbone, create_backbone
from utils.metrics import AccuracyMatrix, accuracy_table, seeds_table, summary_table
from utils.plots import draw_figures
from utils.run_log import RunLog, SilentLog, folder_of
from utils.tensor_cache import TensorCache
from utils.toolkit import out_of_memory_advice, peak_memory_mb, resolve_device, resolve_precision
from utils.views import ViewSpec

logger = logging.getLogger("nested_lora")

CHECKPOINTS = "checkpoints"
ALONE = World()


@dataclass(frozen=True)
class Parts:
    """What a configuration and a seed determine before anything is trained or written."""

    config: RunConfig
    seed: int
    data: DataManager
    backbone: Backbone
    device: torch.device
    warnings: list[str]
    cache: TensorCache
    world: World

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run to belong to it."""
        return {
            "model_name": self.config.model_name,
            "seed": self.seed,
            "weights_sha256": self.backbone.sha256,
            "data_sha256": self.data.dataset.sha256,
            "class_order": list(self.data.class_order),
        }


def train(
    config: RunConfig, *, overwrite: bool = False, notes: Sequence[str] = (), world: World = ALONE
) -> list[dict[str, Any]]:
    """Run every seed of the configuration, each in its own folder; returns their results.

    Raises:
        UserError: data, weights or device cannot be had, before any folder is made.
        Interrupted: stopped by a signal, after saving.
    """
    results = []
    for seed in config.seed:
        parts = assemble(config, seed, world)
        with open_log(parts, overwrite) as log:
            for note in notes:
                logger.info(note)
            results.append(Run(parts, log).to_the_end())
    if len(results) > 1:
        logger.info(seeds_table(results))
    return results


def open_log(parts: Parts, overwrite: bool) -> RunLog:
    """A new run's record: written by the first rank, the others keep none."""
    config, world = parts.config, parts.world
    if not world.is_main:
        return SilentLog(Path(world.broadcast_text(None)))
    resolved = config.model_dump(mode="json") | {"seed": [parts.seed]}
    log = RunLog.create(folder_of(config, parts.seed), config=resolved, overwrite=overwrite)
    world.broadcast_text(str(log.folder))
    return log


def resume(folder: Path, world: World = ALONE) -> list[dict[str, Any]]:
    """Go on with the run in a folder from its last checkpoint, or from its start where there is none.

    Raises:
        UserError: no run folder, a finished run, or a checkpoint that is damaged, foreign or newer.
        Interrupted: stopped by a signal, after saving.
    """
    config = read_config(folder)
    if (folder / "result.json").exists():
        raise UserError(f"{folder} is finished: its result.json is there; read it, or run its config.json again")
    parts = assemble(config, config.seed[0], world)
    checkpoint = latest_checkpoint(folder / CHECKPOINTS)
    tensors, state = load_checkpoint(checkpoint) if checkpoint else ({}, None)
    if state is not None:
        check_identity(checkpoint, state, parts)
    world.barrier()  # everyone has read what the record says before it is cut
    written = state["metrics_bytes"] if state else 0
    with RunLog.reopen(folder, written) if world.is_main else SilentLog(folder) as log:
        logger.info(f"Resuming {folder} from {checkpoint.name if checkpoint else 'its start'}")
        run = Run(parts, log)
        if state is not None:
            run.load_state(state, tensors)
        return [run.to_the_end()]


def read_config(folder: Path) -> RunConfig:
    """The configuration a run folder was made with."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no config.json; give a folder such as logs/sema/.../run_1993_..."
        )
    return config_from_dict(_read_json(path), SCHEMAS, str(path)).config


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished run."""
    return _read_json(folder / "result.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON (line {error.lineno}): restore it, or start a new run") from error


def check_identity(checkpoint: Path, state: dict[str, Any], parts: Parts) -> None:
    """Refuse a checkpoint of another run."""
    for key, ours in parts.identity().items():
        theirs = state.get("run", {}).get(key)
        if theirs != ours:
            raise UserError(
                f"{checkpoint} does not belong to this run: its {key} is {_short(theirs)}, this run's is "
                f"{_short(ours)}; resume with the data, weights and config it was made with"
            )


def assemble(config: RunConfig, seed: int, world: World = ALONE) -> Parts:
    """Data, backbone and device of a run; seeds the global generator that initialises adapters.

    Raises:
        UserError: data or weights cannot be had, or the device is absent.
    """
    device, device_warning = resolve_device(config.device)
    device = local_device(device, world)
    precision, precision_warning = resolve_precision(config.precision, device)
    config = config.model_copy(update={"precision": precision})
    cache = TensorCache(config.cache_root, config.cache_gb)
    decoded = Path(config.cache_root) / IMAGES if cache.enabled else None
    dataset = load_dataset(config.dataset, config.data_root, decode_to=decoded, decode_gb=config.cache_gb)
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
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    warnings = [warning for warning in (device_warning, precision_warning) if warning]
    return Parts(config, seed, data, backbone, device, warnings, cache, world)


@contextmanager
def joined_world(config: RunConfig) -> Iterator[World]:
    """The processes that torchrun started, joined to train together while the context is open; else this one alone.

    Raises:
        UserError: the machine has fewer devices than processes, or torchrun's environment is not whole.
    """
    world = world_from_environment()
    device = local_device(resolve_device(config.device)[0], world)
    world = replace(world, device=device)
    with process_group(world, backend_for(device)):
        yield world


class Run:
    """One seed from its first task to its result."""

    def __init__(self, parts: Parts, log: RunLog) -> None:
        self.parts, self.config, self.data, self.log = parts, parts.config, parts.data, log
        self.stop = StopRequest()
        self.learner = make_learner(parts, log, lambda: self.stop.requested)
        self.evaluate = Evaluator(self.learner, self.data)
        self.matrix = AccuracyMatrix()
        self.seconds_before = 0.0  # of earlier processes, and of finished tasks of this one
        self.started = time.perf_counter()

    def to_the_end(self) -> dict[str, Any]:
        """All tasks that are left, then the result; a stop request saves and raises `Interrupted`."""
        parts = self.parts
        self.log.manifest(manifest(parts))
        logger.info(f"Run folder: {self.log.folder}")
        for warning in parts.warnings:
            logger.warning(warning)
        logger.info(
            f"Backbone {parts.backbone.tag}, {parts.backbone.image_size} px, on {parts.device}; seed {parts.seed}"
        )
        with self.stop:
            try:
                for task in range(len(self.matrix), self.data.nb_tasks):
                    self.run_task(task)
            except Interrupted:
                self.save_interrupted()
                raise
        return self.finish()

    def run_task(self, task: int) -> None:
        """Train, evaluate, record, save."""
        if self.learner.task != task:
            classes = self.data.task_classes(task)
            logger.info(f"Learning on {classes.start}-{classes.stop} (task {task} of {self.data.nb_tasks})")
            self.learner.begin_task(task)
        with out_of_memory_advice(self.config.batch_size, self.config.grad_accumulation, self.config.eval_batch_size):
            self.learner.train_task()
            self.matrix.add(*self.evaluate(task))
        self.parts.world.check_same(f"the model after task {task}", self.learner.fingerprint())
        self.record_task(task)
        self.save(checkpoint_name(task))
        if not self.parts.world.is_main:
            return
        superseded = [f"{checkpoint_name(task)}_step_*"]
        if self.config.checkpoints == "last":
            superseded += [checkpoint_name(earlier) for earlier in range(task)]
        for pattern in superseded:
            for folder in (self.log.folder / CHECKPOINTS).glob(pattern):
                shutil.rmtree(folder)

    def record_task(self, task: int) -> None:
        """What the log and the metrics say of a finished task."""
        summary, matrix = self.learner.summary(), self.matrix
        self.log.metric(
            "task",
            task=task,
            accuracy=matrix.rows[-1],
            total=matrix.curve[-1],
            **summary,
            seconds=self.seconds,
            peak_memory_mb=peak_memory_mb(self.parts.device),
        )
        self.log.accuracy_csv(matrix.rows)
        logger.info(f"CNN top1 curve: {[round(value, 2) for value in matrix.curve]}")
        logger.info(f"Average Accuracy (CNN): {matrix.average:.2f}")
        per_task = ", ".join(f"{value:.2f}" for value in matrix.rows[-1])
        forgetting = "" if matrix.forgetting is None else f", forgetting {matrix.forgetting:.2f}"
        logger.info(f"Task {task}: accuracy per task [{per_task}], total {matrix.curve[-1]:.2f}{forgetting}")
        logger.info(f"Task {task}: adapters per block {_compact(summary['adapters'])}, {self.seconds:.0f} s so far")

    def finish(self) -> dict[str, Any]:
        """result.json, figures and the closing table."""
        summary = self.learner.summary()
        adapters = summary["adapters"]
        expansions = sum(adapters.values()) - len(adapters)
        result = {
            "seed": self.parts.seed,
            "metrics": self.matrix.summary() | {"expansions": expansions},
            "accuracy": self.matrix.rows,
            "curve": self.matrix.curve,
            "adapters": adapters,
            "parameters": summary["parameters"],
            "weights": {"tag": self.parts.backbone.tag, "note": self.parts.backbone.note},
            "cost": {"seconds": self.seconds, "peak_memory_mb": peak_memory_mb(self.parts.device)},
        }
        self.learner.close_run()
        if not self.parts.world.is_main:
            return result
        self.log.result(result)
        draw_figures(self.log.folder)
        logger.info("\n" + accuracy_table(self.matrix))
        logger.info("\n" + summary_table(self.matrix, expansions, summary["parameters"]))
        if self.parts.backbone.note:
            logger.info(f"Weights {self.parts.backbone.tag}: {self.parts.backbone.note}")
        logger.info(f"{self.seconds:.0f} s on {self.parts.device}; everything is in {self.log.folder}")
        return result

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of work on this run, over all processes that worked on it."""
        return self.seconds_before + time.perf_counter() - self.started

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, name: str) -> Path:
        """Write a checkpoint of everything a resumed run needs."""
        folder = self.log.folder / CHECKPOINTS / name
        if not self.parts.world.is_main:
            return folder
        learner, tensors = self.learner.state()
        state = {
            "run": self.parts.identity(),
            "learner": learner,
            "accuracy": self.matrix.to_json(),
            "metrics_bytes": self.log.metrics_bytes,
            "seconds": self.seconds,
        }
        save_checkpoint(folder, tensors, state)
        return folder

    def save_interrupted(self) -> None:
        """Save between two steps and say how to go on."""
        saved = self.save(checkpoint_name(self.learner.task, self.learner.progress.steps))
        logger.warning(f"Stopped and saved {saved}. Continue with: python main.py --resume {self.log.folder}")

    def load_state(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Become the run that a checkpoint was taken of."""
        self.learner.load_state(state["learner"], tensors)
        self.matrix = AccuracyMatrix.from_json(state["accuracy"])
        self.seconds_before = state["seconds"]


def make_learner(parts: Parts, log: RunLog | None, stop_requested: Callable[[], bool] = lambda: False) -> Learner:
    """The method that the configuration names, on the parts."""
    learner = LEARNERS[parts.config.model_name]
    return learner(
        parts.config,
        parts.backbone,
        parts.data,
        seed=parts.seed,
        device=parts.device,
        log=log,
        cache=parts.cache,
        world=parts.world,
        stop_requested=stop_requested,
    )


class Evaluator:
    """Test accuracy of a learner on every task seen: class-incremental, no task label given."""

    def __init__(self, learner: Learner, data: DataManager) -> None:
        self.learner, self.data = learner, data

    @torch.no_grad()
    def __call__(self, task: int) -> tuple[list[int], list[int]]:
        """Images classified right and images in all, for every task up to `task`."""
        correct, total = [], []
        for k in range(task + 1):
            targets = self.data.targets(self.data.indices(self.data.task_classes(k), "test"), "test")
            features = self.learner.features_of(k, "test").to(self.learner.device)
            predictions = self.learner.classify(features).argmax(dim=1).cpu()
            correct.append(int((predictions == targets).sum()))
            total.append(len(targets))
        return correct, total


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request that training honours between two steps; a second one stops at once.

    Signals less than a second apart are one: torchrun passes on to its processes what the terminal sent them already.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self._since > 1:
                raise KeyboardInterrupt
            return
        self.requested, self._since = True, time.monotonic()
        logger.warning("Stopping after this step and saving; once more stops at once without saving")


def manifest(parts: Parts) -> dict[str, Any]:
    """What the run was made with: versions, commit, weights, data, class order, device."""
    backbone, device = parts.backbone, parts.device
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
        },
        "commit": commit(),
        "seed": parts.seed,
        "weights": {"tag": backbone.tag, "sha256": backbone.sha256, "note": backbone.note},
        "image_size": backbone.image_size,
        "data": {"name": parts.config.dataset, "sha256": parts.data.dataset.sha256},
        "class_order": list(parts.data.class_order),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "precision": parts.config.precision,
        "threads": torch.get_num_threads(),
        "processes": parts.world.size,
    }


def commit() -> str | None:
    """Commit of the code, with "+changes" where the working tree differs; None outside a git checkout."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def default_workers(device: torch.device) -> int:
    """Data workers where the config leaves it open: none beside a computing CPU, else up to 8."""
    return 0 if device.type == "cpu" else min(8, torch.multiprocessing.cpu_count())


def _compact(adapters: dict[int, int]) -> str:
    """{0: 1, ..., 9: 2} as "1 x 9, block 9: 2": the blocks that grew stand out."""
    single = sum(count == 1 for count in adapters.values())
    return ", ".join([f"1 in {single} blocks", *(f"{n} in block {b}" for b, n in adapters.items() if n > 1)])


def _short(value: Any) -> str:
    """A value for a sentence, not longer than it needs to be."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
