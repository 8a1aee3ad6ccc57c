"""Runs from start to end: tasks one after the other, each with evaluation, record and checkpoint.

    result = train(config)                        # a run in a new folder; the content of its result.json
    result = resume(Path("logs/sema/..."))        # goes on from the last checkpoint of a run folder
    result = extend(Extension.of(Path("logs/sema/..."), ["max_tasks=4"]))    # further tasks, in a new folder
    learner = make_learner(config)                # data, backbone and modules; nothing is written
    train_seeds(loaded, context)                  # as `main.py --config`: every seed, then the mean

A run's context says where it computes; without one it is made from the config, for this process. A run whose
data, weights or device are missing raises UserError before any folder is made; one that is stopped by a
signal saves, then raises Interrupted. The methods are in `models/`; `utils/runs/run_log.py` describes the
files of a run.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models import LEARNERS
from models.base import Learner, RunContext, continued
from models.saved.extension import Extension
from models.saved.files import read_config, read_result
from models.saved.learner import (
    CHECKPOINTS,
    check_config,
    check_identity,
    check_precision,
    find_run,
    fitting,
    load_run_checkpoint,
    make_learner,
    run_context,
)
from utils.config.loading import LoadedConfig
from utils.config.schema import RunConfig
from utils.errors import Interrupted, UserError
from utils.reports.run_report import write_run_report
from utils.runs.checkpoint import checkpoint_name, latest_checkpoint, save_checkpoint
from utils.runs.disk import DiskWatch, size_of
from utils.runs.figures import draw_figures
from utils.runs.folder import (
    CONFIG,
    METRICS,
    RESULT,
    Fill,
    FolderLock,
    folder_of,
    remove_replaced,
    resume_command,
    waiting_notes,
)
from utils.runs.manifest import (
    Command,
    Manifest,
    Session,
    is_complete,
    read_manifest,
    this_session,
    timestamp,
)
from utils.runs.run_log import RunLog, SilentLog, read_metrics
from utils.runs.seeds import (
    SeedRun,
    check_same_config,
    for_seed_left,
    kept_settings,
    log_mean,
    new_command,
    seed_runs,
)
from utils.runs.trackers import require_trackers
from utils.stop import StopRequest, stop_signals
from utils.training.device import MEMORY_KEYS, out_of_memory_advice, peak_memory_mb
from utils.wording import as_typed, duration

logger = logging.getLogger("nested_lora")


def train(
    config: RunConfig,
    context: RunContext | None = None,
    *,
    notes: Sequence[str] = (),
    command: Command | None = None,
    place: Path | None = None,
) -> dict[str, Any]:
    """Run an experiment in a new folder; returns its result.

    Args:
        notes: lines to log first.
        command: the command that this run is one seed of; by default a new one.
        place: its folder, by default where the config says; a numbered sibling is used where that exists.
    """
    require_trackers(config.trackers)
    command = command or new_command([config.seed], overwrite=False)
    with ExitStack() as held:
        context = context or held.enter_context(run_context(config))
        learner = make_learner(config, replace(context, trains_from=0))
        log = held.enter_context(open_log(learner, command, place or folder_of(config, config.seed)))
        for note in notes:
            logger.warning(note)
        return Run(learner, log).to_the_end()


def extend(
    extension: Extension, context: RunContext | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Learn further tasks after a finished run, in a new folder; returns the result. The run is only read.

    Raises UserError before any folder is made, also if data or weights differ from the run's.
    """
    require_trackers(extension.config.trackers)
    with ExitStack() as held:
        context = context or held.enter_context(run_context(extension.config))
        learner = make_learner(extension.config, replace(context, trains_from=extension.tasks))
        tensors, state = extension.check(learner)
        command, earlier = new_command([learner.seed], overwrite), extension.manifest()
        fill = partial(extension.fill, learner=learner, metrics_bytes=state["metrics_bytes"])
        log = held.enter_context(open_log(learner, command, extension.place, earlier, fill))
        for note in extension.notes:
            logger.warning(note)
        logger.info(f"Extends {extension.folder}: {extension.tasks} of {learner.nb_tasks} tasks are learned")
        run = Run(learner, log)
        with fitting(extension.folder):
            run.load_state(state, tensors)
        return run.to_the_end()


def open_log(
    learner: Learner,
    command: Command,
    place: Path,
    earlier: Manifest | None = None,
    fill: Fill = lambda folder: None,
) -> RunLog:
    """A new run's record, written by the first rank; the other ranks write nothing.

    Args:
        place: its folder; a numbered sibling is used where that exists.
        earlier: the manifest of the run that it extends.
        fill: copies that run's files into the new folder.
    """
    config, context = learner.config, learner.context
    logs: list[RunLog] = []

    def create() -> Path:
        session = this_session(context.device, config.precision, context.distributed.size)
        sessions = [*(earlier.sessions if earlier else []), session]
        manifest = (earlier.model_dump() if earlier else {}) | {
            "command": command.model_dump(),
            "sessions": [each.model_dump() for each in sessions],
            "seed": learner.seed,
        }
        log = RunLog.create(
            place,
            config=config.model_dump(mode="json"),
            manifest=manifest | {"method": learner.method()} | learner.manifest(manifest),
            overwrite=command.overwrite,
            fill=fill,
        )
        if earlier:
            warn_of_differences(session, earlier)
        logs.append(log)
        return log.folder

    folder = context.distributed.on_main(create)
    return logs[0] if logs else SilentLog(folder)


def warn_of_differences(session: Session, earlier: Manifest) -> None:
    """Log differences from the last session of an earlier manifest."""
    if differences := session.differences(earlier.sessions[-1]):
        logger.warning(f"Changed since the session before (manifest.json): {', '.join(differences)}")


def resume(folder: Path, context: RunContext | None = None) -> dict[str, Any]:
    """Continue the run in a folder from its last checkpoint or, without one, its start; returns its result.

    If the result exists already, only what follows it (figures, page) is made.

    Raises UserError also for: no run folder, nothing left to do, another process is writing it, an edited
    config that would mix two experiments, or a checkpoint that is damaged, foreign or newer.
    """
    if is_complete(folder):
        raise UserError(f"{folder} is finished: its {RESULT} is there; read it, or run its config.json again")
    config, lock = read_config(folder), FolderLock(folder)
    require_trackers(config.trackers)
    with ExitStack() as held:
        context = context or held.enter_context(run_context(config))
        distributed = context.distributed
        distributed.on_main(lambda: held.enter_context(lock).folder.name)
        manifest = read_manifest(folder)
        if (folder / RESULT).exists():
            if distributed.is_main:
                log = held.enter_context(RunLog.reopen(folder, (folder / METRICS).stat().st_size, lock))
                logger.info(
                    f"{folder} has its {RESULT}: what should have followed, figures and page, is made"
                )
                complete_run(log)
            return read_result(folder)
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        tensors, state = load_run_checkpoint(checkpoint) if checkpoint else ({}, None)
        learned = len(state["evaluations"]) if state else 0
        learner = make_learner(config, replace(context, trains_from=learned))
        edited, written = [], 0
        if state:
            edited, written = check_config(checkpoint, state, learner), state["metrics_bytes"]
            check_precision(checkpoint, state, learner)
            check_identity(checkpoint, state, learner)
        distributed.barrier()  # all ranks have read the record before it is truncated
        log = held.enter_context(
            RunLog.reopen(folder, written, lock) if distributed.is_main else SilentLog(folder)
        )
        logger.info(f"Resuming from {checkpoint.name if checkpoint else 'the start'}")
        for note in [*edited, *waiting_notes(folder)]:
            logger.warning(note)
        session = this_session(learner.device, learner.config.precision, distributed.size)
        warn_of_differences(session, manifest)
        sessions = [*manifest.sessions, session]
        values = manifest.model_copy(update={"sessions": sessions}).model_dump()
        log.manifest(values | learner.manifest(values))
        run = Run(learner, log)
        if state:
            with fitting(checkpoint):
                run.load_state(state, tensors)
        return run.to_the_end()


def complete_run(log: RunLog) -> None:
    """Complete a run that has its result: draw figures and page, remove the replaced run, note the end."""
    config = read_config(log.folder)
    learner = LEARNERS[config.model_name]
    pictures = draw_figures(log.folder, learner.figures)
    write_run_report(log.folder, config, learner.captions)
    log.show_result(read_result(log.folder)["metrics"], pictures)
    remove_replaced(log.folder)
    log.manifest(read_manifest(log.folder).model_copy(update={"finished": timestamp()}).model_dump())


class Run:
    """The run of a learner from its first task, or from a checkpoint, to its result."""

    def __init__(self, learner: Learner, log: RunLog) -> None:
        self.learner, self.log, self.stop = learner, log, StopRequest()
        context = learner.context
        context.log, context.save, context.stop = log, self.save_progress, lambda: self.stop.requested
        self.evaluations: list[dict[str, Any]] = []  # one per finished task
        self.data_before: dict[str, list[str]] = {}  # `Learner.data_read` of earlier processes
        self.seconds_before = self.peak_before = 0.0  # of earlier processes
        self.disk = DiskWatch(log.folder, learner.config)
        self.started = time.perf_counter()
        self.before_task = 0.0  # seconds of the tasks that are finished

    def to_the_end(self) -> dict[str, Any]:
        """Run the remaining tasks, then write the result; a stop request saves and raises `Interrupted`."""
        learner = self.learner
        logger.info(f"Run folder: {self.log.folder}")
        for warning in learner.context.warnings:
            logger.warning(warning)
        for line in learner.describe_run():
            logger.info(line)
        logger.info(f"On {learner.device} in {learner.config.precision}, seed {learner.seed}")
        with stop_signals(self.stop.receive):
            try:
                for task in range(len(self.evaluations), learner.nb_tasks):
                    self.run_task(task)
            except Interrupted:
                saved, go_on = self.save_progress(), resume_command(self.log.folder)
                logger.warning(f"Stopped and saved {saved.name}. Continue with: {go_on}")
                raise
        return self.finish()

    def run_task(self, task: int) -> None:
        """Train, evaluate, record, save."""
        learner, config = self.learner, self.learner.config
        begun = "continued: " if learner.task == task else ""
        place = f"Task {task} ({task + 1} of {learner.nb_tasks})"
        logger.info(f"--- {place}: {begun}{learner.describe_task(task)}")
        if not begun:
            learner.begin_task(task)
        values, unused = dict(config), config.without_effect()
        sizes = {key: values[key] for key in MEMORY_KEYS if key in values and key not in unused}
        with out_of_memory_advice(sizes, config.editable_keys):
            learner.train_task()
            self.evaluations.append(learner.evaluate())
        if learner.distributed.size > 1:
            learner.distributed.check_same(f"the model after task {task}", learner.fingerprint())
        self.record_task(task)
        saved = self.save(checkpoint_name(task))
        superseded, every = ["task_*_step_*"], learner.keeps_every_task
        if not every:
            superseded += [checkpoint_name(earlier) for earlier in range(task)]
        for pattern in superseded:
            self.remove_checkpoints(pattern)
        if learner.distributed.is_main:
            later = learner.nb_tasks - task - 1
            self.disk.compare("checkpoint", size_of(saved), later if every else min(later, 1))

    def record_task(self, task: int) -> None:
        """Write a finished task to the log, the metrics and the tables."""
        report = self.learner.report(self.evaluations)
        cost = {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb}
        self.log.metric("task", task=task, **report.event, **self.learner.summary(), **cost)
        for name, table in report.csv.items():
            self.log.table(name, table)
        for line in report.lines:
            logger.info(line)
        seconds, self.before_task = self.seconds - self.before_task, self.seconds
        logger.info(f"Task {task} took {duration(seconds)}, {duration(self.before_task)} so far")

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
        for table in report.tables():
            logger.info(table)
        if weights["note"]:
            logger.info(f"Weights {weights['tag']}: {weights['note']}")
        seconds = duration(result["cost"]["seconds"])
        logger.info(f"{seconds} on {learner.device}; everything is in {self.log.folder}")
        if getattr(learner.config, "validation_share", 0):
            test = as_typed("eval.py", "--run", self.log.folder, "--test")
            logger.info(f"No test image was read; once the settings are chosen, run {test}")
        return result

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run, summed over the processes that worked on it one after the other."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def peak_memory_mb(self) -> float:
        """Peak memory in MiB over the processes that worked on this run."""
        return max(self.peak_before, peak_memory_mb(self.learner.device))

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, name: str) -> Path:
        """Write a checkpoint of everything a resumed run needs."""
        folder = self.log.folder / CHECKPOINTS / name
        self.learner.distributed.on_main(lambda: self._write_checkpoint(folder))
        return folder

    def _write_checkpoint(self, folder: Path) -> None:
        learner, tensors = self.learner.state()
        read = self.learner.data_read(self.learner.task + 1, len(self.evaluations))
        state = {
            "run": self.learner.identity(),
            "data": continued(self.data_before, read),
            "config": self.learner.config.model_dump(mode="json"),
            "learner": learner,
            "evaluations": self.evaluations,
            "metrics_bytes": self.log.metrics_bytes,
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
        }
        save_checkpoint(folder, tensors, state)

    def save_progress(self) -> Path:
        """Write a checkpoint inside a task, which replaces earlier ones inside this task."""
        task = self.learner.task
        saved = self.save(checkpoint_name(task, self.learner.progress.steps))
        self.remove_checkpoints(f"{checkpoint_name(task)}_step_*", but=saved)
        return saved

    def load_state(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Restore the run from a checkpoint."""
        self.learner.load_state(state["learner"], tensors)
        self.evaluations, self.data_before = list(state["evaluations"]), state["data"]
        self.seconds_before, self.peak_before = state["seconds"], state["peak_memory_mb"]
        if self.learner.distributed.is_main:
            ends = [event["seconds"] for event in read_metrics(self.log.folder) if event["event"] == "task"]
            self.before_task = ends[-1] if ends else 0.0

    def remove_checkpoints(self, pattern: str, but: Path | None = None) -> None:
        """Remove the checkpoints whose names match, apart from one."""
        if self.learner.distributed.is_main:
            for folder in (self.log.folder / CHECKPOINTS).glob(pattern):
                if folder != but:
                    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------------
# The runs of a command, one per seed


def train_seeds(
    loaded: LoadedConfig, context: RunContext, overwrite: bool = False, go_on: bool = False
) -> None:
    """Run the experiment of a config file with each of its seeds, then log their mean.

    go_on: finish runs that were stopped, skip those that are finished, and start the others.

    Raises UserError: as `train`.
    """

    def found(seed: int) -> SeedRun:
        config = configs[seed].model_copy(update={"precision": context.precision})
        return SeedRun.of(seed, find_run(config) if go_on else None)

    def tell_edits() -> None:
        for folder, config in ((found(seed).folder, config) for seed, config in configs.items()):
            if folder and (kept := kept_settings(folder, folder / CONFIG, read_config(folder), config)):
                logger.warning(kept)

    configs = {config.seed: config for config in loaded.configs}
    command = new_command(list(configs), overwrite)
    context.distributed.on_main(tell_edits)
    start = partial(train, context=context, notes=loaded.notes, command=command)
    done = results_of(list(configs), found, context, lambda seed: start(configs[seed]))
    if context.distributed.is_main:
        folders = filter(None, (run.folder or found(seed).folder for seed, (run, _) in done.items()))
        log_mean(
            [result for _, result in done.values()],
            loaded.config.metrics,
            [(folder, read_config(folder)) for folder in folders],
        )


def resume_seeds(folder: Path, context: RunContext) -> None:
    """Finish the run in a folder, then the other seeds of the command that started it; log the mean of all.

    Raises UserError: nothing is left to do, or the folders hold different experiments.
    """
    folder = folder.resolve() if folder.is_symlink() else folder  # the other seeds lie beside the run itself
    config, command = read_config(folder), read_manifest(folder).command
    runs = context.distributed.on_main(lambda: seed_runs(folder, config, command))
    check_same_config([(run.folder, read_config(run.folder)) for run in runs if run.folder])
    if len(runs) > 1:
        states = ", ".join(f"{run.seed} {run.state}" for run in runs)
        logger.info(f"Seeds of the command that started this run: {states}")

    def start(seed: int) -> dict[str, Any]:
        place = folder.with_name(folder_of(config, seed).name)
        own = context.distributed.on_main(partial(for_seed_left, command, folder, place))
        return train(config.model_copy(update={"seed": seed}), context, command=own, place=place)

    done = results_of(
        [run.seed for run in runs],
        lambda seed: next(run for run in seed_runs(folder, config, command) if run.seed == seed),
        context,
        start,
    )
    if context.distributed.is_main:
        configs = [(run.folder, read_config(run.folder)) for run in seed_runs(folder, config, command)]
        log_mean([done[seed][1] for seed in command.seeds], config.metrics, configs)
    if all(run.complete for run in runs):
        raise UserError(f"{folder} is finished: read its {RESULT}, or run its config.json again")


def results_of(
    seeds: Sequence[int],
    found: Callable[[int], SeedRun],
    context: RunContext,
    start: Callable[[int], dict[str, Any]],
) -> dict[int, tuple[SeedRun, dict[str, Any]]]:
    """Seed -> its run as it was found, and its result: that in its folder, or of the run resumed or started.

    found: the run of a seed as it stands; asked when its turn comes, as others may have run it meanwhile.
    """
    done = {}
    for seed in seeds:
        run = context.distributed.on_main(partial(found, seed))
        if run.complete:
            logger.info(f"{run.folder} is finished: read its {RESULT}")
            result = read_result(run.folder)
        else:
            result = resume(run.folder, context) if run.folder else start(seed)
        done[seed] = run, result
    return done
