"""The story of a run: tasks one after the other, evaluation at the end of each, record and checkpoints.

    results = train(config)                       # one run a seed; result.json contents
    results = resume(Path("logs/sema/..."))       # goes on from the last checkpoint of a run folder
    learner = make_learner(config)                # data, backbone and modules; nothing is written

The methods are in `models/`. What a run leaves behind is described in `utils/runs/run_log.py`.
"""

import json
import logging
import re
import shutil
import signal
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from models import LEARNERS
from models.base import Learner
from models.saved_run import (
    ALONE,
    CHECKPOINTS,
    check_config,
    check_identity,
    check_one_experiment,
    check_same_config,
    fitting,
    load_run_checkpoint,
    make_learner,
    read_config,
    read_result,
    short,
)
from utils.config.schema import RunConfig
from utils.errors import Interrupted, UserError
from utils.metric_catalogue import MetricSpec
from utils.runs.checkpoint import checkpoint_name, latest_checkpoint, save_checkpoint
from utils.runs.figures import draw_figures
from utils.runs.folder import (
    CONFIG,
    MANIFEST,
    METRICS,
    RESULT,
    FolderLock,
    folder_of,
    remove_replaced,
    waiting_notes,
)
from utils.runs.manifest import (
    Command,
    is_complete,
    read_manifest,
    this_session,
    timestamp,
)
from utils.runs.run_log import RunLog, SilentLog
from utils.runs.tables import seeds_table
from utils.training.device import out_of_memory_advice, peak_memory_mb
from utils.training.distributed import DistributedContext

logger = logging.getLogger("nested_lora")


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    notes: Sequence[str] = (),
    distributed: DistributedContext = ALONE,
) -> list[dict[str, Any]]:
    """Run every seed of the configuration, each in its own folder; returns their results.

    Raises:
        UserError: data, weights or device cannot be had, before any folder is made.
        Interrupted: stopped by a signal, after saving.
    """
    command = Command(id=uuid.uuid4().hex, seeds=config.seed, overwrite=overwrite)
    results = [start_run(config, seed, command, notes, distributed) for seed in config.seed]
    tell_mean(results, config.metrics)
    return results


def start_run(
    config: RunConfig,
    seed: int,
    command: Command,
    notes: Sequence[str] = (),
    distributed: DistributedContext = ALONE,
    beside: Path | None = None,
) -> dict[str, Any]:
    """Run one seed from its start, where the configuration says or beside a folder; its result."""
    learner = make_learner(config.model_copy(update={"seed": [seed]}), distributed)
    with open_log(learner, command, beside) as log:
        for note in notes:
            logger.info(note)
        return Run(learner, log).to_the_end()


def open_log(learner: Learner, command: Command, beside: Path | None = None) -> RunLog:
    """A new run's record: written by the first rank, the others keep none."""
    config, context = learner.config, learner.context
    place = folder_of(config, learner.seed)
    logs: list[RunLog] = []

    def create() -> str:
        session = this_session(context.device, config.precision, context.distributed.size)
        manifest = {"command": command.model_dump(), "sessions": [session.model_dump()], "seed": learner.seed}
        log = RunLog.create(
            beside.with_name(place.name) if beside else place,
            config=config.model_dump(mode="json"),
            manifest=manifest | learner.manifest(),
            overwrite=command.overwrite,
        )
        logs.append(log)
        return str(log.folder)

    folder = context.distributed.on_main(create)
    return logs[0] if logs else SilentLog(Path(folder))


def resume(folder: Path, distributed: DistributedContext = ALONE) -> list[dict[str, Any]]:
    """Finish the run in a folder, then the other seeds of the command that started it; the results of all of them.

    Raises:
        UserError: no run folder, nothing left to do, another process is at work in it, an edited configuration that
            would mix two experiments in the run or in the mean over seeds, or a checkpoint that is damaged, foreign or
            newer.
        Interrupted: stopped by a signal, after saving.
    """
    config, command = read_config(folder), read_manifest(folder).command
    if config.seed[1:] or config.seed[0] not in command.seeds:
        raise UserError(
            f"{folder / CONFIG} does not belong to this run any more: its seed is {short(config.seed)}, and the run "
            f"was started for one of {short(command.seeds)}; set back what was edited"
        )
    runs = [
        SeedRun(*row)
        for row in json.loads(distributed.on_main(lambda: json.dumps(seed_runs(folder, config, command))))
    ]
    check_same_config([Path(run.folder) for run in runs if run.folder])
    left = [run for run in runs if not run.complete]
    results = {run.seed: read_result(Path(run.folder)) for run in runs if run.complete}
    if len(runs) > 1:
        listed = ", ".join(f"{run.seed} {run.state}" for run in runs)
        logger.info(f"Seeds of the command that started this run: {listed}")
    for run in left:
        if run.folder:
            results[run.seed] = finish_run(Path(run.folder), distributed)
        else:
            others = config.model_copy(update={"seed": [run.seed]})
            results[run.seed] = start_run(others, run.seed, command, distributed=distributed, beside=folder)
    in_order = [results[seed] for seed in command.seeds]
    if distributed.is_main:
        tell_mean(in_order, config.metrics, [Path(run.folder) for run in seed_runs(folder, config, command)])
    if not left:
        raise UserError(f"{folder} is finished: its {RESULT} is there; read it, or run its config.json again")
    return in_order


class SeedRun(NamedTuple):
    """One seed of a command: its folder, "" where it has not begun, and whether nothing of it is missing."""

    seed: int
    folder: str
    complete: bool

    @property
    def state(self) -> str:
        """How far it is, for the log."""
        return "finished" if self.complete else "to be resumed" if self.folder else "to be started"


def seed_runs(folder: Path, config: RunConfig, command: Command) -> list[SeedRun]:
    """The runs of a command: that in the folder first, the others, which lie beside it, in the order of the command.

    They are found also where the prefix was edited since they were made.
    """
    own = config.seed[0]
    folders = {own: folder}
    for seed in command.seeds:
        name = folder_of(config, seed).name
        names = re.compile(".*" + re.escape(name.removeprefix(config.prefix)) + r"(_\d+)?")
        for beside in [] if seed == own else sorted(folder.absolute().parent.iterdir()):
            if names.fullmatch(beside.name) and _is_of(beside, command, surely=beside.name.startswith(name)):
                folders[seed] = folder.with_name(beside.name)
    seeds = [own, *(seed for seed in command.seeds if seed != own)]
    return [SeedRun(s, str(folders.get(s, "")), s in folders and is_complete(folders[s])) for s in seeds]


def _is_of(folder: Path, command: Command, surely: bool) -> bool:
    """Whether a folder holds a run of a command; one with a damaged manifest does not, or is refused if `surely`."""
    try:
        return (folder / MANIFEST).exists() and read_manifest(folder).command.id == command.id
    except UserError:
        if surely:
            raise
        return False


def finish_run(folder: Path, distributed: DistributedContext = ALONE) -> dict[str, Any]:
    """Go on with the run in a folder from its last checkpoint, or from its start where there is none; its result.

    Where the result is there, only what was to follow it is made.
    """
    config, lock = read_config(folder), FolderLock(folder)
    with ExitStack() as held:
        distributed.on_main(lambda: held.enter_context(lock).folder.name)
        manifest = read_manifest(folder)
        if (folder / RESULT).exists():
            if distributed.is_main:
                log = held.enter_context(RunLog.reopen(folder, (folder / METRICS).stat().st_size, lock))
                logger.info(f"{folder} has its {RESULT}: what should have followed it is made now")
                complete_run(log)
            return read_result(folder)
        learner = make_learner(config, distributed)
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        tensors, state = load_run_checkpoint(checkpoint) if checkpoint else ({}, None)
        edited = check_config(checkpoint, state, learner) if state else []
        if state is not None:
            check_identity(checkpoint, state, learner)
        distributed.barrier()  # everyone has read what the record says before it is cut
        written = state["metrics_bytes"] if state else 0
        log = held.enter_context(
            RunLog.reopen(folder, written, lock) if distributed.is_main else SilentLog(folder)
        )
        logger.info(f"Resuming {folder} from {checkpoint.name if checkpoint else 'its start'}")
        for note in [*edited, *waiting_notes(folder)]:
            logger.warning(note)
        session = this_session(learner.device, learner.config.precision, distributed.size)
        differences = session.differences(manifest.sessions[-1])
        if differences:
            logger.warning(
                f"Not as in the session before, which manifest.json records: {', '.join(differences)}"
            )
        sessions = [*manifest.sessions, session]
        log.manifest(manifest.model_copy(update={"sessions": sessions}).model_dump() | learner.manifest())
        run = Run(learner, log)
        if state is not None:
            with fitting(checkpoint):
                run.load_state(state, tensors)
        return run.to_the_end()


def complete_run(log: RunLog) -> None:
    """What follows the result: figures, the end of what the run replaces, and the note that nothing is missing."""
    draw_figures(log.folder, LEARNERS[read_config(log.folder).model_name].figures)
    remove_replaced(log.folder)
    log.manifest(read_manifest(log.folder).model_copy(update={"finished": timestamp()}).model_dump())


def tell_mean(
    results: Sequence[dict[str, Any]], metrics: Sequence[MetricSpec], folders: Sequence[Path] = ()
) -> None:
    """The table of means over seeds, where there are several and what is in their folders is one experiment."""
    if len(results) < 2:
        return
    try:
        notes = check_one_experiment(folders)
    except UserError as error:
        logger.warning(f"No mean over the seeds: {error}")
        return
    for note in notes:
        logger.warning(note)
    logger.info(seeds_table(results, metrics))


class Run:
    """A learner from its first task, or from a checkpoint, to its result."""

    def __init__(self, learner: Learner, log: RunLog) -> None:
        self.learner, self.log, self.stop = learner, log, StopRequest()
        context = learner.context
        context.log, context.save, context.stop = log, self.save_progress, lambda: self.stop.requested
        self.evaluations: list[dict[str, Any]] = []  # one per finished task
        self.seconds_before = self.peak_before = 0.0  # of earlier processes
        self.started = time.perf_counter()

    def to_the_end(self) -> dict[str, Any]:
        """All tasks that are left, then the result; a stop request saves and raises `Interrupted`."""
        learner = self.learner
        logger.info(f"Run folder: {self.log.folder}")
        for warning in learner.context.warnings:
            logger.warning(warning)
        logger.info(f"{learner.describe_run()}, on {learner.device}; seed {learner.seed}")
        with self.stop:
            try:
                for task in range(len(self.evaluations), learner.nb_tasks):
                    self.run_task(task)
            except Interrupted:
                self.save_interrupted()
                raise
        return self.finish()

    def run_task(self, task: int) -> None:
        """Train, evaluate, record, save."""
        learner, config = self.learner, self.learner.config
        if learner.task != task:
            logger.info(learner.describe_task(task))
            learner.begin_task(task)
        with out_of_memory_advice(config.batch_size, config.grad_accumulation, config.eval_batch_size):
            learner.train_task()
            self.evaluations.append(learner.evaluate())
        learner.distributed.check_same(f"the model after task {task}", learner.fingerprint())
        self.record_task(task)
        self.save(checkpoint_name(task))
        superseded = [f"{checkpoint_name(task)}_step_*"]
        if not learner.keeps_every_task:
            superseded += [checkpoint_name(earlier) for earlier in range(task)]
        for pattern in superseded:
            self.remove_checkpoints(pattern)

    def record_task(self, task: int) -> None:
        """Write a finished task to the log, the metrics and the accuracy matrix."""
        report = self.learner.report(self.evaluations)
        cost = {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb}
        self.log.metric("task", task=task, **report.event, **self.learner.summary(), **cost)
        if report.accuracy is not None:
            self.log.accuracy_csv(report.accuracy)
        for line in report.lines:
            logger.info(line)
        logger.info(f"Task {task}: {self.seconds:.0f} s so far")

    def finish(self) -> dict[str, Any]:
        """Write result.json and figures, and log the closing tables."""
        learner = self.learner
        report, weights = learner.report(self.evaluations), learner.weights()
        result = {
            "seed": learner.seed,
            **report.result,
            "parameters": learner.parameter_counts(),
            "weights": weights,
            "cost": {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb, **report.cost},
        }
        learner.close_run()
        if not learner.distributed.is_main:
            return result
        self.log.result(result)
        complete_run(self.log)
        for table in report.tables:
            logger.info("\n" + table)
        if weights["note"]:
            logger.info(f"Weights {weights['tag']}: {weights['note']}")
        logger.info(f"{self.seconds:.0f} s on {learner.device}; everything is in {self.log.folder}")
        return result

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of work on this run, over all processes that worked on it."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def peak_memory_mb(self) -> float:
        """Peak memory in MiB over the processes that worked on this run."""
        return max(self.peak_before, peak_memory_mb(self.learner.device))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, name: str) -> Path:
        """Write a checkpoint of everything a resumed run needs."""
        folder = self.log.folder / CHECKPOINTS / name
        self.learner.distributed.on_main(lambda: self._write_checkpoint(folder))
        return folder

    def _write_checkpoint(self, folder: Path) -> str:
        learner, tensors = self.learner.state()
        state = {
            "run": self.learner.identity(),
            "data": self.learner.data_read(self.learner.task + 1, len(self.evaluations)),
            "config": self.learner.config.model_dump(mode="json"),
            "learner": learner,
            "evaluations": self.evaluations,
            "metrics_bytes": self.log.metrics_bytes,
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
        }
        save_checkpoint(folder, tensors, state)
        return folder.name

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
        self.evaluations = list(state["evaluations"])
        self.seconds_before, self.peak_before = state["seconds"], state["peak_memory_mb"]

    def remove_checkpoints(self, pattern: str, but: Path | None = None) -> None:
        """Remove the checkpoints whose names match, apart from one."""
        if self.learner.distributed.is_main:
            for folder in (self.log.folder / CHECKPOINTS).glob(pattern):
                if folder != but:
                    shutil.rmtree(folder)


class StopRequest:
    """Turns Ctrl-C, SIGTERM and a lost terminal (SIGHUP) into a request that training honours between two steps.

    A second one stops at once. Signals less than a second apart are one: torchrun passes on to its processes what the
    terminal sent them already. SIGHUP that is ignored, as under nohup, stays ignored.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
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
