"""The story of a run: tasks one after the other, evaluation at the end of each, record and checkpoints.

    results = train(config)                       # one run a seed; result.json contents
    results = resume(Path("logs/sema/..."))       # goes on from the last checkpoint of a run folder
    parts = assemble(config, seed=1993)           # what a run is made from, nothing written

What kinds of experiments differ in is in `models/experiment.py`; class-incremental learning is one of them. What a run
leaves behind is described in `utils/run_log.py`.
"""

import logging
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
from models.experiment import Parts
from utils.checkpoint import checkpoint_name, latest_checkpoint, load_checkpoint, save_checkpoint
from utils.config import RunConfig
from utils.config_files import config_from_dict
from utils.distributed import World, backend_for, local_device, process_group, world_from_environment
from utils.errors import UserError
from utils.files import read_json
from utils.folders import FolderLock, remove_replaced
from utils.metrics import seeds_table
from utils.plots import draw_figures
from utils.run_log import RunLog, SilentLog, folder_of
from utils.toolkit import out_of_memory_advice, peak_memory_mb, resolve_device, resolve_precision

logger = logging.getLogger("nested_lora")

CHECKPOINTS = "checkpoints"
ALONE = World()


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
    logs: list[RunLog] = []

    def create() -> str:
        resolved = config.model_dump(mode="json") | {"seed": [parts.seed]}
        logs.append(RunLog.create(folder_of(config, parts.seed), config=resolved, overwrite=overwrite))
        return str(logs[0].folder)

    folder = world.on_main(create)
    return logs[0] if logs else SilentLog(Path(folder))


def resume(folder: Path, world: World = ALONE) -> list[dict[str, Any]]:
    """Go on with the run in a folder from its last checkpoint, or from its start where there is none.

    Raises:
        UserError: no run folder, a finished run, or a checkpoint that is damaged, foreign or newer.
        Interrupted: stopped by a signal, after saving.
    """
    config = read_config(folder)
    lock = FolderLock(folder)
    with ExitStack() as held:
        world.on_main(lambda: str(held.enter_context(lock)))
        if (folder / "result.json").exists():
            raise UserError(f"{folder} is finished: its result.json is there; read it, or run its config.json again")
        parts = assemble(config, config.seed[0], world)
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        tensors, state = load_checkpoint(checkpoint) if checkpoint else ({}, None)
        if state is not None:
            check_identity(checkpoint, state, parts)
        world.barrier()  # everyone has read what the record says before it is cut
        written = state["metrics_bytes"] if state else 0
        log = held.enter_context(RunLog.reopen(folder, written, lock) if world.is_main else SilentLog(folder))
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
    return config_from_dict(read_json(path), SCHEMAS, str(path)).config


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished run."""
    return read_json(folder / "result.json")


def check_identity(checkpoint: Path, state: dict[str, Any], parts: Parts) -> None:
    """Refuse a checkpoint of another run."""
    for key, ours in parts.identity().items():
        theirs = state.get("run", {}).get(key)
        if theirs != ours:
            raise UserError(
                f"{checkpoint} does not belong to this run: its {key} is {_short(theirs)}, this run's is "
                f"{_short(ours)}; resume with the data, weights and config it was made with"
            )
    _check_data(checkpoint, state.get("data") or {}, parts)


def _check_data(checkpoint: Path, read: dict[str, list[str]], parts: Parts) -> None:
    """Refuse a checkpoint whose tasks have read other images than are there now."""
    ours = parts.data_read(*(len(read.get(source, [])) for source in ("train", "test")))
    for source, hashes in ours.items():
        theirs = read.get(source, [])
        if source not in read or len(theirs) != len(hashes):
            raise UserError(f"{checkpoint} does not belong to this run: its {source} images are of other tasks")
        changed = [task for task in range(len(hashes)) if theirs[task] != hashes[task]]
        if changed:
            raise UserError(
                f"{checkpoint} does not belong to this run: the {source} images of task {changed[0]}, which it has "
                f"read, have changed since; put the files back that were there"
            )


def assemble(config: RunConfig, seed: int, world: World = ALONE) -> Parts:
    """Everything a run is made from; seeds the global generator that initialises modules.

    Raises:
        UserError: data or weights cannot be had, or the device is absent.
    """
    device, device_warning = resolve_device(config.device)
    device = local_device(device, world)
    precision, precision_warning = resolve_precision(config.precision, device)
    config = config.model_copy(update={"precision": precision})
    warnings = [warning for warning in (device_warning, precision_warning) if warning]
    kind = LEARNERS[config.model_name].Parts
    parts = kind.prepare(config, seed=seed, device=device, world=world, warnings=warnings)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    return parts


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
        self.parts, self.config, self.log = parts, parts.config, log
        self.stop = StopRequest()
        self.learner = make_learner(parts, log, lambda: self.stop.requested, self.save_progress)
        self.scores = self.learner.Scores()
        self.seconds_before = 0.0  # of earlier processes, and of finished tasks of this one
        self.started = time.perf_counter()

    def to_the_end(self) -> dict[str, Any]:
        """All tasks that are left, then the result; a stop request saves and raises `Interrupted`."""
        parts = self.parts
        self.log.manifest(manifest(parts))
        logger.info(f"Run folder: {self.log.folder}")
        for warning in parts.warnings:
            logger.warning(warning)
        logger.info(f"{parts.introduction()}, on {parts.device}; seed {parts.seed}")
        with self.stop:
            try:
                for task in range(len(self.scores), parts.nb_tasks):
                    self.run_task(task)
            except Interrupted:
                self.save_interrupted()
                raise
        return self.finish()

    def run_task(self, task: int) -> None:
        """Train, evaluate, record, save."""
        if self.learner.task != task:
            logger.info(self.parts.opening(task))
            self.learner.begin_task(task)
        with out_of_memory_advice(self.config.batch_size, self.config.grad_accumulation, self.config.eval_batch_size):
            self.learner.train_task()
            self.scores.add(self.scores.measure(self.learner))
        self.parts.world.check_same(f"the model after task {task}", self.learner.fingerprint())
        self.record_task(task)
        self.save(checkpoint_name(task))
        superseded = [f"{checkpoint_name(task)}_step_*"]
        if not self.parts.keeps_every_task:
            superseded += [checkpoint_name(earlier) for earlier in range(task)]
        for pattern in superseded:
            self.remove_checkpoints(pattern)

    def record_task(self, task: int) -> None:
        """What the log and the metrics say of a finished task."""
        summary = self.learner.summary()
        self.log.metric(
            "task",
            task=task,
            **self.scores.event(),
            **summary,
            seconds=self.seconds,
            peak_memory_mb=peak_memory_mb(self.parts.device),
        )
        self.scores.record(self.log)
        for line in self.scores.lines(summary):
            logger.info(line)
        logger.info(f"Task {task}: {self.seconds:.0f} s so far")

    def finish(self) -> dict[str, Any]:
        """result.json, figures and the closing tables."""
        summary, weights = self.learner.summary(), self.parts.weights()
        cost = {"seconds": self.seconds, "peak_memory_mb": peak_memory_mb(self.parts.device)}
        result = {
            "seed": self.parts.seed,
            **self.scores.result(summary),
            "parameters": summary["parameters"],
            "weights": weights,
            "cost": cost | self.scores.cost(),
        }
        self.learner.close_run()
        if not self.parts.world.is_main:
            return result
        self.log.result(result)
        draw_figures(self.log.folder)
        remove_replaced(self.log.folder)
        for table in self.scores.tables(summary):
            logger.info("\n" + table)
        if weights["note"]:
            logger.info(f"Weights {weights['tag']}: {weights['note']}")
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
            "data": self.parts.data_read(self.learner.task + 1, len(self.scores)),
            "learner": learner,
            "accuracy": self.scores.to_json(),
            "metrics_bytes": self.log.metrics_bytes,
            "seconds": self.seconds,
        }
        save_checkpoint(folder, tensors, state)
        return folder

    def save_progress(self) -> Path:
        """Save inside a task, in place of what was saved in it before."""
        task = self.learner.task
        saved = self.save(checkpoint_name(task, self.learner.progress.steps))
        self.remove_checkpoints(f"{checkpoint_name(task)}_step_*", but=saved)
        return saved

    def save_interrupted(self) -> None:
        """Save between two steps and say how to go on."""
        saved = self.save_progress()
        logger.warning(f"Stopped and saved {saved}. Continue with: python main.py --resume {self.log.folder}")

    def load_state(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Become the run that a checkpoint was taken of."""
        self.learner.load_state(state["learner"], tensors)
        self.scores.load_json(state["accuracy"])
        self.seconds_before = state["seconds"]

    def remove_checkpoints(self, pattern: str, but: Path | None = None) -> None:
        """Remove the checkpoints whose names match, apart from one."""
        if self.parts.world.is_main:
            for folder in (self.log.folder / CHECKPOINTS).glob(pattern):
                if folder != but:
                    shutil.rmtree(folder)


def make_learner(
    parts: Parts,
    log: RunLog | None,
    stop_requested: Callable[[], bool] = lambda: False,
    save: Callable[[], object] = lambda: None,
) -> Learner:
    """The method that the configuration names, on the parts."""
    return LEARNERS[parts.config.model_name](parts, log=log, stop_requested=stop_requested, save=save)


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
    """What the run was made with: versions, commit, device, and what its kind of experiment names."""
    device = parts.device
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
        **parts.manifest(),
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


def _short(value: Any) -> str:
    """A value for a sentence, not longer than it needs to be."""
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
