"""Running a sweep: what is finished is skipped, what broke off is resumed, one failure does not stop the rest.

    code = run_sweep(load_sweep("exps/sweeps/smoke.json", [], schemas))      # 0 done, 1 some failed, 130 stopped
    report_sweep(load_sweep("exps/sweeps/smoke.json", [], schemas))          # the summary again, no run

Every run is a process of its own (`utils/sweeps/executors.py`), started seed by seed, so that all cells can be compared
early. Ctrl-C, SIGTERM and SIGHUP are passed on to the runs, which save; called again, the sweep goes on from there.
What it leaves behind is described in `utils/sweeps/folder.py`.
"""

import errno
import logging
import os
import shlex
import shutil
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from utils.config.schema import RunConfig
from utils.console import progress
from utils.errors import UserError, in_one_line, os_error_sentence
from utils.runs.folder import FolderLock, remove_replaced, restore_replaced
from utils.runs.manifest import changes, present
from utils.sweeps.executors import ENGINES, STOPPED, Engine, Job, Needs, requests
from utils.sweeps.folder import Run, all_runs, begin, refuse_running, survey, tell_replaced, write_summary
from utils.sweeps.spec import Sweep

logger = logging.getLogger("nested_lora")

STOP = "stop"
FULL = 2**20  # bytes left on a disk on which little can be written any more
NOT_STARTED, CUT_SHORT = "not started", "stopped"  # why a run has no result, apart from failures


def run_sweep(
    sweep: Sweep,
    engine: str = "local",
    *,
    jobs: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
) -> int:
    """Run what the sweep has not finished yet, then write its summary.

    Args:
        sweep: the checked table.
        engine: a name in `ENGINES`.
        jobs: runs at once; None for as many as fit.
        address: of a Ray cluster; None starts a Ray of our own.
        overwrite: run everything anew; what there was is set aside until that is finished.

    Returns:
        The exit code: 0 everything is finished, 1 some runs failed, 130 stopped before the end.

    Raises:
        UserError: a cell is not what its run folder was made with, the sweep or a run of it still goes on, or the
            engine cannot be had, and nothing was started; or the disk refused something.
    """
    again = command(sweep, engine, jobs, address)
    try:
        sweep.folder.parent.mkdir(parents=True, exist_ok=True)
        with FolderLock(sweep.folder):
            return _run_locked(
                sweep, engine, Needs(sweep.threads, sweep.memory_gb, jobs, False, address), overwrite, again
            )
    except OSError as error:
        raise UserError(os_error_sentence(error, f"go on with {again}")) from error


def _run_locked(sweep: Sweep, engine: str, needs: Needs, overwrite: bool, again: str) -> int:
    """`run_sweep` by the one process that has the sweep's folder; again: the command that goes on with it."""
    refuse_running(sweep)
    restore_replaced(sweep.folder)
    runs = all_runs(sweep) if overwrite else survey(sweep)
    waiting = [run for run in runs if overwrite or not run.complete]
    troubles: dict[str, str] = {}
    stopped = False
    if waiting:
        needs = replace(needs, gpu=any(wants_gpu(run.cell.config) for run in waiting))
        with ENGINES[engine](needs) as chosen:
            begin(sweep, runs, overwrite)
            tell_replaced(sweep)
            for note, names in sweep.notes().items():
                logger.info(f"{'; '.join(names)}: {note}")
            tell_what_changed(runs)
            logger.info(
                f"{len(waiting)} of {len(runs)} runs to do, {chosen.jobs} at once; all is in {sweep.folder}"
            )
            with StopRequest(sweep.folder / STOP) as stop:
                troubles = run_all(chosen, sweep, waiting, len(runs), stop)
                stopped = stop.requests > 0
    incomplete = [run for run in runs if not run.complete]
    reasons = {run.label: troubles.get(run.label, NOT_STARTED) for run in incomplete if not run.finished}
    try:
        write_summary(sweep, runs, reasons)
        if not incomplete:
            remove_replaced(sweep.folder)
    finally:
        tell_replaced(sweep)
        code = _tell_outcome(sweep, len(runs), len(incomplete), troubles, stopped, again)
    return code


def _tell_outcome(
    sweep: Sweep, total: int, incomplete: int, troubles: Mapping[str, str], stopped: bool, again: str
) -> int:
    """Say how the sweep ended; its exit code."""
    outcome = f"{total - incomplete} of {total} runs are finished"
    listed = "".join(f"\n  {label}: {trouble}" for label, trouble in troubles.items())
    if stopped and incomplete:
        logger.warning(f"Stopped, {outcome}. Continue with: {again}{listed}")
        return STOPPED
    if troubles:
        logger.warning(f"{len(troubles)} failed, {outcome}. To try again: {again}{listed}")
        return 1
    logger.info(f"{outcome}; everything is in {sweep.folder}")
    return 0


def report_sweep(sweep: Sweep) -> None:
    """Write the summary of what is finished again; no run is started.

    Raises:
        UserError: no run is finished, or a cell is not what its run folder was made with.
    """
    runs = survey(sweep)
    if not any(run.finished for run in runs):
        raise UserError(f"{sweep.folder} holds no finished run to report on; first run {sweep.command}")
    reasons = {run.label: "not finished" if run.started else NOT_STARTED for run in runs if not run.finished}
    write_summary(sweep, runs, reasons)


def tell_what_changed(runs: Sequence[Run]) -> None:
    """Warn before the first run where code or libraries are not those of the finished ones."""
    finished = {run.label: run.provenance() for run in runs if run.finished}
    for sentence in changes({**finished, "what runs now": present()}):
        logger.warning(f"{sentence}; runs that differ in it will not be compared")


def run_all(
    engine: Engine, sweep: Sweep, waiting: Sequence[Run], total: int, stop: "StopRequest"
) -> dict[str, str]:
    """Run what is waiting, in order; label -> what became of it, for the runs that ended without success."""
    pending, troubles = deque(waiting), {}
    running: dict[Future, Run] = {}
    finished = total - len(waiting)
    with progress(total=total, initial=finished, desc=sweep.path.stem, unit="run", leave=True) as bar:
        try:
            while running or (pending and not stop.requests):
                while pending and len(running) < engine.jobs and not stop.requests:
                    run = pending.popleft()
                    running[engine.submit(job_of(sweep, run))] = run
                bar.set_postfix(running=len(running), failed=failures(troubles))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    trouble = what_went_wrong(run, future)
                    if trouble is None:
                        finished += 1
                        bar.update()
                        logger.info(f"{run.label}: {_brief(run)} ({finished} of {total})")
                    else:
                        troubles[run.label] = trouble
                        logger.warning(f"{run.label}: {trouble}; it printed {run.output_path}")
            bar.set_postfix(running=0, failed=failures(troubles))
        except BaseException:
            stop.request()  # what runs is saved before the error is told
            wait(running)
            raise
    return troubles


def job_of(sweep: Sweep, run: Run) -> Job:
    """The job that starts a run, or resumes it where it broke off."""
    anew = ("--config", str(run.config_path), "--overwrite")  # in its own place: never in a folder beside it
    arguments = ("--resume", str(run.folder)) if run.started else anew
    here = Path.cwd()
    return Job(
        arguments=arguments,
        working_folder=here,
        output=here / run.output_path,
        stop=here / sweep.folder / STOP,
        threads=sweep.threads,
        gpu=wants_gpu(run.cell.config),
    )


def what_went_wrong(run: Run, future: Future) -> str | None:
    """Why a run that has ended is no success; None when it is one."""
    try:
        code, last_line = future.result()
    except OSError as error:
        return os_error_sentence(error, "try again")
    except Exception as error:  # the engine's: a machine was lost, a process could not be started
        return in_one_line(error)
    if code == 0 and run.complete:
        return None
    if code in (STOPPED, -signal.SIGTERM):  # the second: stopped before it could have saved anything
        return CUT_SHORT
    ended = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    full = (
        shutil.disk_usage(run.output_path.parent).free < FULL and os.strerror(errno.ENOSPC) not in last_line
    )
    return f"{ended}: {last_line}" + (
        f"; the disk of {run.output_path} is full, free some space" if full else ""
    )


def failures(troubles: Mapping[str, str]) -> int:
    """How many of the runs without success were not merely stopped."""
    return sum(trouble != CUT_SHORT for trouble in troubles.values())


def wants_gpu(config: RunConfig) -> bool:
    """Whether a run takes whichever GPU it is given; one that names its GPU keeps it."""
    return str(config.device).lower() in ("auto", "cuda")


def command(sweep: Sweep, engine: str, jobs: int | None, address: str | None) -> str:
    """The command that goes on with the sweep in the same way."""
    options = {"--engine": engine if engine != "local" else None, "--jobs": jobs, "--ray-address": address}
    given = [part for option, value in options.items() if value is not None for part in (option, str(value))]
    return shlex.join([*shlex.split(sweep.command), *given])


class StopRequest:
    """Ctrl-C, SIGTERM and a lost terminal (SIGHUP), counted in the length of a file that every machine can see.

    The runs are asked to save and end; asked once more, they end at once. SIGHUP may come from terminal and shell: it
    asks once, and stays ignored where it is ignored, as under nohup.
    """

    HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none

    def __init__(self, path: Path) -> None:
        self.path = path
        self._previous: dict[int, Any] = {}

    @property
    def requests(self) -> int:
        """How often a stop was asked for."""
        return requests(self.path)

    def request(self) -> None:
        """Ask all runs to stop."""
        os.truncate(self.path, self.requests + 1)  # takes no block of the disk: a full one can be left

    def __enter__(self) -> "StopRequest":
        self.path.write_bytes(b"")
        heard = self.HANGUP is not None and signal.getsignal(self.HANGUP) != signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, *([self.HANGUP] if heard else [])):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.path.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self.HANGUP and self.requests:
            return
        self.request()
        logger.warning("Stopping: the runs save and end; once more ends them at once without saving")


def _brief(run: Run) -> str:
    result, main = run.result(), run.cell.config.metrics[0]
    return f"{main.name} {main.text(result['metrics'][main.key])}, {result['cost']['seconds'] / 60:.1f} min"
