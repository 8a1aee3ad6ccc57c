"""Folder of a sweep: its table, its runs with their progress, its report.

`<logs_root>/sweeps/<the file's name>/` holds

    sweep.json                     the table as it was resolved
    cells/<slug>_<seed>.json       config of each run, as good for `python main.py --config`
    logs/<slug>_<seed>.txt         output of the run's process
    runs/...                       the run folders
    summary.md, report.html, ...   the report (`utils/reports/report.py`)

One process at a time runs a sweep. `<name>.replaced` beside it holds what it replaces, until it is finished.

    runs = runs_of(sweep)                       # every cell with every seed
    check_runs(runs)                            # refuses what does not fit the table
    prepare_folder(sweep, runs, overwrite=False)
    write_summary(sweep, runs, failures={})
"""

import json
import logging
import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.files import json_bytes, read_json, write_json
from utils.metric_catalogue import Shown
from utils.reports.about import differing_keys, what_was_run
from utils.reports.renderings import terminal_table
from utils.reports.report import write_report
from utils.reports.results import FinishedRun, Results
from utils.reports.sentences import finding, images_notes, legend
from utils.reports.tables import means_table, measured
from utils.runs.folder import (
    CONFIG,
    RESULT,
    SWEEP,
    FolderLock,
    create_folder,
    folder_of,
    remove_folder,
    restore_replaced,
    set_aside,
)
from utils.runs.manifest import Provenance, changes, outdated
from utils.runs.tables import weights_notes
from utils.sweeps.spec import Cell, Sweep
from utils.wording import as_typed

logger = logging.getLogger("nested_lora")

CONSOLE_WIDTH = 100
FREE = (  # keys that may differ from the config of a begun run
    "description", "trackers", "figure_format", "checkpoints", "cache_root", "cache_gb",
)  # fmt: skip


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: a cell with a seed, its config, its files and its progress."""

    cell: Cell
    seed: int
    config: RunConfig
    config_path: Path
    output_path: Path  # output of its process
    folder: Path  # its run folder

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def started(self) -> bool:
        """Whether there is a run folder to resume."""
        return (self.folder / CONFIG).is_file()

    def recorded_config(self) -> RunConfig:
        """The config in its folder. pydantic's ValidationError: it is not of this method and version."""
        return type(self.config).model_validate(read_json(self.folder / CONFIG))

    @property
    def finished(self) -> bool:
        """Whether there is a result; `is_complete` also requires the figures."""
        return (self.folder / RESULT).exists()

    def read(self) -> FinishedRun:
        """The finished run. UserError: its result or manifest is damaged."""
        return FinishedRun.read(self.folder, self.config, f"run it again with {self.command('--overwrite')}")

    def command(self, *options: str) -> str:
        """Command that runs its config, apart from the sweep."""
        return as_typed("main.py", "--config", self.config_path, *options)


def runs_of(sweep: Sweep) -> list[SweepRun]:
    """Every run of the table, seed by seed."""
    runs = []
    for seed in sweep.file.seeds:
        for cell in sweep.cells:
            config = cell.with_seed(seed)
            config_path = sweep.folder / "cells" / f"{cell.slug}_{seed}.json"
            output_path = sweep.folder / "logs" / f"{cell.slug}_{seed}.txt"
            runs.append(SweepRun(cell, seed, config, config_path, output_path, folder_of(config, seed)))
    return runs


def check_runs(runs: Sequence[SweepRun]) -> None:
    """UserError where a run was started with another config than its cell has now, or is damaged."""
    for run in runs:
        if run.started:
            _check_config(run)
        if run.finished:
            run.read()


def refuse_running(sweep: Sweep) -> None:
    """UserError if a run of the sweep is still being written, even if the sweep itself was killed."""
    for path in sorted((sweep.folder / "runs").rglob(".*.lock")):
        with FolderLock(path.with_name(path.name[1 : -len(".lock")])):
            pass


def prepare_folder(sweep: Sweep, runs: Sequence[SweepRun], overwrite: bool) -> None:
    """Write `sweep.json` and the config of every run; runs that left the table are named in the log.

    With `overwrite` the sweep's earlier folder is set aside first; if this fails, it is restored and the new
    folder removed. A new folder holds `sweep.json` from its first moment on.

    Raises UserError: the folder to be replaced is no sweep's.
    """
    folder = sweep.folder
    if overwrite and os.path.lexists(folder):
        set_aside(folder, SWEEP)
    new = not os.path.lexists(folder)
    configs = set((folder / "cells").glob("*.json")) - {run.config_path for run in runs}
    if configs:
        names = ", ".join(sorted(path.stem for path in configs))
        logger.warning(f"No longer in the table, their runs stay in {folder}: {names}")
    try:
        if new:
            create_folder(folder, {SWEEP: json_bytes(sweep.table())})
        else:
            write_json(folder / SWEEP, sweep.table())
        for part in ("cells", "logs"):
            (folder / part).mkdir(exist_ok=True)
        for run in runs:
            write_json(run.config_path, run.config.model_dump(mode="json"))
    except OSError:
        if new:
            remove_folder(folder)
            restore_replaced(folder)
        raise


def warn_of_changes(origins: Mapping[str, Provenance]) -> None:
    """Warn where runs differ in code, libraries, data or weights; origins: by their labels."""
    for sentence in changes(origins):
        logger.warning(f"{sentence}; runs that differ in it are not compared")


def write_summary(sweep: Sweep, runs: Sequence[SweepRun], failures: Mapping[str, str]) -> None:
    """Write the report of the finished runs and log what it says; nothing where there are none.

    failures: label -> reason.
    """
    finished = [run for run in runs if run.finished]
    if not finished:
        return
    finished.sort(key=lambda run: (run.folder / RESULT).stat().st_mtime_ns)
    read = {run.label: run.read() for run in finished}
    cells = {
        cell.name: {run.seed: read[run.label] for run in finished if run.cell is cell} for cell in sweep.cells
    }
    origins = {label: run.origin for label, run in read.items()}
    warn_of_changes(origins)
    unfinished = {
        run.label: failures.get(run.label, "not finished" if run.started else "not started")
        for run in runs
        if not run.finished
    }
    seeds = json.dumps(sweep.file.seeds, separators=(",", ":"))
    all_seeds = ("--set", f"seed={seeds}") if len(sweep.file.seeds) > 1 else ()
    again = {run.label: run.command("--overwrite") for run in runs}
    results = Results(cells, sweep.cells[0].config.metrics, sweep.file.baseline)
    paths = write_report(
        sweep.folder,
        sweep.path.stem,
        sweep.file.description,
        results,
        about=what_was_run(results.cells),
        keys=differing_keys({cell.name: cell.config for cell in sweep.cells}),
        form=sweep.cells[0].config.figure_format,
        hypotheses=sweep.hypotheses,
        commands={run.cell.name: run.command(*all_seeds) for run in runs[: len(sweep.cells)]},
        unfinished=unfinished,
        outdated={label: (", ".join(kinds), again[label]) for label, kinds in outdated(origins).items()},
    )
    lines = closing_lines(sweep, results, paths, complete=not unfinished)
    logger.info("\n".join([f"Results of {sweep.path.stem}; * best", "", *lines]))


def closing_lines(sweep: Sweep, results: Results, paths: Sequence[Path], complete: bool) -> list[str]:
    """Table, finding, paths of curves and report and, when all runs are finished, commands to go on with."""
    names = [spec.name for spec in measured(results, Shown.CONSOLE)]  # the legend tells the units
    table = means_table(results, Shown.CONSOLE)._replace(headings=["cell", "n", *names])
    lines = [terminal_table(table), "", *legend(results), ""]
    notes = [*weights_notes(results.every_result), *images_notes(results)]
    for text in (*notes, f"Finding: {finding(results, sweep.file.finding)}"):
        lines += [*textwrap.wrap(text, CONSOLE_WIDTH, break_on_hyphens=False), ""]
    for what in ("curves", "report"):
        lines += [f"{what.capitalize():<8}{path}" for path in paths if path.stem == what]
    if complete and sweep.file.next:
        lines += ["", "Next"]
        for what, command in sweep.file.next.items():
            lines += [f"  {what}:", f"    {command.replace('{folder}', shlex.quote(str(sweep.folder)))}"]
    return lines


def _check_config(run: SweepRun) -> None:
    """UserError where a run folder was made with another config than the cell's.

    `FREE` keys may differ, and those without effect in both configs.
    """
    path = run.folder / CONFIG
    ways_out = (
        "keep both with --set logs_root=FOLDER, replace all with --overwrite, or rename the cell, or remove "
        f"the folder {run.folder}"
    )
    try:
        before = run.recorded_config()
    except ValidationError as error:
        fault = f"{path} is not of this method and version"
        raise UserError(f"cell {run.cell.name!r}: {fault}; {ways_out}") from error
    ours, theirs = run.config.model_dump(mode="json"), before.model_dump(mode="json")
    free = {*FREE, *(run.config.without_effect().keys() & before.without_effect().keys())}
    asked = ours["precision"]
    with suppress(UserError):  # absent or damaged
        asked = read_json(run.config_path).get("precision", asked)  # by the config that started the run
    if asked == ours["precision"] and (asked == "auto" or theirs["precision"] == "fp32"):
        ours["precision"] = theirs["precision"]  # recorded is what the device has
    changed = [key for key in ours if ours[key] != theirs[key] and key not in free]
    if changed:
        each = (f"{key} = {json.dumps(ours[key])} instead of {json.dumps(theirs[key])}" for key in changed)
        raise UserError(
            f"cell {run.cell.name!r}, seed {run.seed}, was run with another config, now it has "
            f"{', '.join(each)}; {ways_out}"
        )
