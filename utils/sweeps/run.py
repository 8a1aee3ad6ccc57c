"""Runner of a sweep: it skips finished runs, resumes interrupted ones, and goes on after a failure.

    sweep = load_sweep("exps/sweeps/smoke.json", [], schemas)
    code = run_sweep(sweep, "local", jobs=None, address=None, overwrite=False, imports=[])
    report_sweep(sweep)          # the report again, no run

Every run is a process of its own (`utils/sweeps/executors.py`), started seed by seed, so that all cells can
be compared early. Ctrl-C, SIGTERM and SIGHUP are passed on to the runs, which save; called again, the sweep
goes on.
"""

import errno
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from utils.config.messages import grouped
from utils.console import progress
from utils.errors import STOPPED, UserError, in_one_line, os_error_sentence
from utils.runs.disk import DiskWatch, size_of
from utils.runs.folder import CONFIG, FolderLock, remove_replaced, restore_replaced, waiting_notes
from utils.runs.manifest import is_complete, present, read_provenance
from utils.runs.seeds import kept_settings
from utils.runs.trackers import require_trackers
from utils.stop import stop_signals
from utils.sweeps.executors import (
    EXECUTORS,
    POLL,
    Job,
    LocalExecutor,
    RayExecutor,
    Resources,
    request_stop,
    stop_requests,
)
from utils.sweeps.folder import (
    SweepRun,
    check_runs,
    prepare_folder,
    refuse_running,
    runs_of,
    warn_of_changes,
    write_summary,
)
from utils.sweeps.spec import Sweep
from utils.wording import duration

logger = logging.getLogger("nested_lora")

MAIN = Path(__file__).resolve().parents[2] / "main.py"
FULL_DISK = 2**20  # a disk with fewer free bytes counts as full
CUT_SHORT = "stopped"  # reason of a run that was interrupted
STOP = "stop"  # name of the file that counts requests to stop


def run_sweep(
    sweep: Sweep, engine: str, jobs: int | None, address: str | None, overwrite: bool, imports: Sequence[str]
) -> int:
    """Run what the sweep has not finished yet, then write its report; 0 done, 1 some failed, 130 stopped.

    Args:
        engine: a key of `EXECUTORS`, which gets jobs, address and imports.
        overwrite: run everything anew; earlier results are set aside until that is finished.

    Raises UserError before anything is started: a run folder was made with another config than its cell has,
    the sweep or a run of it is still running, or the executor is not available; and later for disk errors.
    """
    options = {"--engine": engine if engine != "local" else None, "--jobs": jobs, "--ray-address": address}
    given = [part for option, value in options.items() if value is not None for part in (option, str(value))]
    again = " ".join([sweep.command, *map(shlex.quote, given)])
    try:
        with opened(sweep, overwrite) as (runs, waiting):
            failures, stopped = {}, False
            if waiting:
                resources = resources_of(sweep, waiting)
                on_cpu = all(str(run.config.device).lower() in ("auto", "cpu") for run in waiting)
                once = imports if on_cpu else ()
                with EXECUTORS[engine](resources, jobs, address, once) as executor:
                    require_assets(waiting)
                    prepare_folder(sweep, runs, overwrite)
                    log_beginning(sweep, waiting, runs)
                    counts = f"{len(waiting)} of {len(runs)} runs to do, {executor.jobs} at once"
                    logger.info(f"{counts}; all is in {sweep.folder}")
                    failures, stopped = run_all(executor, sweep, waiting, runs)
            else:
                prepare_folder(sweep, runs, overwrite)
            return finish(sweep, runs, failures, stopped, again)
    except OSError as error:
        raise UserError(os_error_sentence(error, f"go on with {again}")) from error


@contextmanager
def opened(sweep: Sweep, overwrite: bool = False) -> Iterator[tuple[list[SweepRun], list[SweepRun]]]:
    """Context with all runs of a sweep and those still to do, in which no other process writes its folder.

    Raises UserError: a run does not fit the table, or the sweep or a run of it is being written.
    """
    require_trackers([name for cell in sweep.cells for name in cell.config.trackers])
    sweep.folder.parent.mkdir(parents=True, exist_ok=True)
    with FolderLock(sweep.folder):
        refuse_running(sweep)
        restore_replaced(sweep.folder)
        runs = runs_of(sweep)
        if not overwrite:
            check_runs(runs)
        chosen = [run for run in runs if sweep.chooses(run.cell, run.seed)]
        yield runs, [run for run in chosen if overwrite or not is_complete(run.folder)]


def require_assets(runs: Sequence[SweepRun]) -> None:
    """UserError where data or weights of runs are missing; what can be downloaded is."""
    configs = [run.config for run in runs]
    needs = {tuple(str(getattr(config, name)) for name in config.asset_keys): config for config in configs}
    missing = dict.fromkeys(sentence for config in needs.values() for sentence in config.missing_assets())
    if missing:
        raise UserError("\n  - ".join(["nothing was started, the runs need what is not there:", *missing]))


def commands_of(sweep: Sweep) -> list[str]:
    """A complete shell command for each run still to do, in order; nothing is started.

    Each starts its run or continues it, and can be repeated. The configs that they name are written. Errors
    are those of `run_sweep`.
    """
    with opened(sweep) as (runs, waiting):
        require_assets(waiting)
        prepare_folder(sweep, runs, overwrite=False)
        logger.info(f"{len(waiting)} of {len(runs)} runs to do; their configs are in {sweep.folder}")
        threads = " ".join(f"{name}={n}" for name, n in resources_of(sweep, waiting).environment.items())
        start = f"cd {shlex.quote(str(Path.cwd()))} && {threads}"
        again = (sys.executable, str(MAIN), "--resume", "auto", "--config")
        return [f"{start} {shlex.join([*again, str(run.config_path)])}" for run in waiting]


def report_sweep(sweep: Sweep) -> None:
    """Write the report of finished runs again. UserError: there is none, or a run does not fit the table."""
    runs = runs_of(sweep)
    check_runs(runs)
    if not any(run.finished for run in runs):
        raise UserError(f"{sweep.folder} holds no finished run to report on; first run {sweep.command}")
    write_summary(sweep, runs, failures={})


def resources_of(sweep: Sweep, runs: Sequence[SweepRun]) -> Resources:
    """Resources of each of the runs; one whose config names a GPU gets none assigned."""
    gpu = any(str(run.cell.config.device).lower() in ("auto", "cuda") for run in runs)
    return Resources(sweep.file.threads, sweep.file.memory_gb, gpu)


def log_beginning(sweep: Sweep, waiting: Sequence[SweepRun], runs: Sequence[SweepRun]) -> None:
    """Warn of replaced folders, keys without effect or that begun runs keep, and changes since finished ones.

    waiting: those of `runs` that are started or resumed now; changes are those of code and libraries.
    """
    notes = grouped((cell.name, note) for cell in sweep.cells for note in cell.notes)
    cell_notes = [f"{'; '.join(names)}: {note}" for note, names in notes.items()]
    kept = (
        kept_settings(run.label, run.folder / CONFIG, run.recorded_config(), run.config)
        for run in waiting
        if run.started
    )
    for text in [*waiting_notes(sweep.folder), *cell_notes, *filter(None, kept)]:
        logger.warning(text)
    origins = {run.label: read_provenance(run.folder) for run in runs if run.finished}
    warn_of_changes({**origins, "what runs now": present()})


def run_all(
    executor: LocalExecutor | RayExecutor, sweep: Sweep, waiting: Sequence[SweepRun], runs: Sequence[SweepRun]
) -> tuple[dict[str, str], bool]:
    """Run `waiting`, part of `runs`, in order: failures (label -> reason), and whether to stop was asked."""
    failures: dict[str, str] = {}
    finished, total = sum(is_complete(run.folder) for run in runs), len(runs)
    disk, written = DiskWatch(sweep.folder, waiting[0].config), []
    bar = progress(total=total, initial=finished, desc=sweep.path.stem, unit="run", leave=True)
    stop = sweep.folder / STOP
    with stop_file(stop), ThreadPoolExecutor(executor.jobs) as pool, bar:
        try:
            futures = {pool.submit(executor.run, job_of(sweep, run)): run for run in waiting}
            for future in as_they_end(list(futures), bar.refresh):
                run = futures[future]
                if future.exception() is None and future.result() is None:
                    continue  # a stop was requested before it started
                reason = failure_reason(run, future)
                if reason is None:
                    finished += 1
                    bar.update()
                    logger.info(f"{run.label}: {result_line(run)} ({finished} of {total})")
                    written.append(size_of(run.folder))
                    disk.compare("run", mean(written), len(waiting) - len(written) - len(failures))
                else:
                    failures[run.label] = reason
                    logger.warning(f"{run.label}: {reason}; its output is in {run.output_path}")
                bar.set_postfix(failed=sum(reason != CUT_SHORT for reason in failures.values()))
        except BaseException:
            request_stop(stop)  # running processes save before the error is reported
            raise
        return failures, stop_requests(stop) > 0


def as_they_end(futures: Sequence[Future], tick: Callable[[], object]) -> Iterator[Future]:
    """Futures in the order in which they end; waits time out, so that signals are handled in between.

    tick: called between waits.
    """
    pending = set(futures)
    while pending:
        done, pending = wait(pending, POLL, FIRST_COMPLETED)
        tick()
        yield from (future for future in futures if future in done)


def job_of(sweep: Sweep, run: SweepRun) -> Job:
    """Job that starts a run, or resumes it from its last checkpoint."""
    anew = ("--config", str(run.config_path), "--overwrite")
    arguments = ("--resume", str(run.folder)) if run.started else anew
    details = ("--verbose",) if logger.isEnabledFor(logging.DEBUG) else ()
    here = Path.cwd()
    return Job(
        command=(sys.executable, str(MAIN), *arguments, *details),
        working_folder=here,
        output=here / run.output_path,
        stop=here / sweep.folder / STOP,
        resources=resources_of(sweep, [run]),
    )


def failure_reason(run: SweepRun, future: Future) -> str | None:
    """Why a run whose process has ended is not complete, as part of a sentence; None for a success."""
    try:
        code, last_line = future.result()
    except OSError as error:
        return os_error_sentence(error, "try again")
    except Exception as error:  # the executor's: a machine was lost, a process could not be started
        return in_one_line(error)
    if code == 0 and is_complete(run.folder):
        return None
    if code in (STOPPED, -signal.SIGTERM):  # the second: stopped before it could have saved anything
        return CUT_SHORT
    ended = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    reason = f"{ended}: {last_line}"
    free = shutil.disk_usage(run.output_path.parent).free
    if free < FULL_DISK and os.strerror(errno.ENOSPC) not in last_line:
        reason += f"; the disk of {run.output_path} is full, free some space"
    return reason


def result_line(run: SweepRun) -> str:
    """Main number and time of a finished run."""
    result, main = run.read().result, run.config.metrics[0]
    return f"{main.name} {main.text(result['metrics'][main.key])}, {duration(result['cost']['seconds'])}"


def finish(
    sweep: Sweep, runs: Sequence[SweepRun], failures: Mapping[str, str], stopped: bool, again: str
) -> int:
    """Write the report, log the outcome, return the exit code; again: command that continues the sweep."""
    complete = sum(is_complete(run.folder) for run in runs)
    outcome, code = f"{complete} of {len(runs)} runs are finished", 0
    if begun := sum(run.finished for run in runs) - complete:
        outcome += f" ({begun} more with a result, but not all that follows it)"
    if complete == len(runs):
        logger.info(f"{outcome}; everything is in {sweep.folder}")
    try:
        write_summary(sweep, runs, failures)
        if complete == len(runs):
            remove_replaced(sweep.folder)
    finally:
        for note in waiting_notes(sweep.folder):
            logger.warning(note)
        listed = "".join(f"\n  {label}: {reason}" for label, reason in failures.items())
        if stopped and complete < len(runs):
            logger.warning(f"Stopped, {outcome}. Continue with: {again}{listed}")
            code = STOPPED
        elif failures:
            logger.warning(f"{len(failures)} failed, {outcome}. To try again: {again}{listed}")
            code = 1
        elif complete < len(runs):  # others were not chosen
            logger.info(f"{outcome}; everything is in {sweep.folder}")
    return code


@contextmanager
def stop_file(path: Path) -> Iterator[None]:
    """File whose length counts the requests to stop, for every machine to see.

    The first request lets the runs save and end, the second ends them at once. SIGHUP may come from terminal
    and shell: it asks once.
    """

    def receive(number: int) -> None:
        if number == getattr(signal, "SIGHUP", None) and stop_requests(path):
            return
        request_stop(path)
        logger.warning("Stopping: the runs save and end; once more ends them at once without saving")

    path.write_bytes(b"")
    try:
        with stop_signals(receive):
            yield
    finally:
        path.unlink(missing_ok=True)
