"""What a sweep has on disk: its runs and how far they are, the table, the summary.

`<logs_root>/sweeps/<the file's name>/` holds

    sweep.json                     the table as it was resolved
    cells/<slug>_<seed>.json       the configuration each run is started from, as good for `python main.py --config`
    logs/<slug>_<seed>.txt         what the run's process printed
    runs/...                       the run folders
    summary.md, report.html, ...   what came out (`utils/reports/report.py`)

One process at a time runs a sweep. `<name>.replaced` beside it holds what it replaces, until it is finished.

    runs = survey(sweep)                        # every cell with every seed; refuses what does not fit the table
    begin(sweep, runs, overwrite=False)         # the table and the configurations
    write_summary(sweep, runs, {"nested, seed 1994": "not started"})
"""

import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.errors import UserError
from utils.files import json_bytes, read_json, write_json
from utils.runs.folder import (
    CONFIG,
    RESULT,
    FolderLock,
    create_folder,
    folder_of,
    remove_folder,
    replaced_folders,
    restore_replaced,
    set_aside,
)
from utils.runs.manifest import Provenance, changes, is_complete, outdated, read_provenance
from utils.runs.result import fault_of
from utils.sweeps.spec import Cell, Sweep

logger = logging.getLogger("nested_lora")

TABLE = "sweep.json"


@dataclass(frozen=True)
class Run:
    """One cell with one seed: where its files are, and how far it is."""

    sweep_folder: Path
    cell: Cell
    seed: int

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def config_path(self) -> Path:
        """The configuration it is started from."""
        return self.sweep_folder / "cells" / f"{self.cell.slug}_{self.seed}.json"

    @property
    def output_path(self) -> Path:
        """What its process prints."""
        return self.sweep_folder / "logs" / f"{self.cell.slug}_{self.seed}.txt"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return folder_of(self.cell.config, self.seed)

    @property
    def started(self) -> bool:
        """Whether there is a run folder to resume."""
        return (self.folder / CONFIG).is_file()

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return (self.folder / RESULT).exists()

    @property
    def again(self) -> str:
        """The command that runs it once more, in its place."""
        return shlex.join(["python", "main.py", "--config", str(self.config_path), "--overwrite"])

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, the figures included. Raises UserError when its manifest is damaged."""
        return is_complete(self.folder)

    def result(self) -> dict[str, Any]:
        """The content of its `result.json`. Raises UserError when it is damaged."""
        path = self.folder / RESULT
        result = read_json(path)
        if fault := fault_of(result, self.cell.config.metrics):
            raise UserError(f"{path} is damaged, {fault}: run it again with {self.again}")
        return result

    def provenance(self) -> Provenance:
        """The code, libraries, data and weights it was made with."""
        return read_provenance(self.folder)


def all_runs(sweep: Sweep) -> list[Run]:
    """Every run of the table, seed by seed."""
    return [Run(sweep.folder, cell, seed) for seed in sweep.seeds for cell in sweep.cells]


def survey(sweep: Sweep) -> list[Run]:
    """Every run of the table, seed by seed; none of them started with another configuration.

    Raises:
        UserError: a run folder was made with another configuration than its cell now has, or one of its files is
            damaged.
    """
    runs = all_runs(sweep)
    for run in runs:
        if run.started:
            _check_unchanged(run)
        if run.finished:
            run.result(), run.provenance()
    _names_before(sweep)
    return runs


def refuse_running(sweep: Sweep) -> None:
    """Refuse to touch the folder while any of its runs is at work, also one whose sweep was killed.

    Raises:
        UserError: a process holds the lock of a run's folder.
    """
    for path in sorted((sweep.folder / "runs").rglob(".*.lock")):
        with FolderLock(path.with_name(path.name[1 : -len(".lock")])):
            pass


def begin(sweep: Sweep, runs: Sequence[Run], overwrite: bool) -> None:
    """Write `sweep.json` and the configuration of every run; cells that left the table are named in the log.

    With `overwrite` the sweep's earlier folder is set aside first (`utils/runs/folder.py`), and is back where this fails. A
    new folder holds `sweep.json` from its first moment on, and is gone where this fails.

    Raises:
        UserError: the folder to be replaced holds other things than a sweep.
        OSError: the folder cannot be written.
    """
    folder = sweep.folder
    if overwrite and os.path.lexists(folder):
        if not (folder / TABLE).is_file():
            raise UserError(
                f"{folder} holds no {TABLE}, so it is no sweep's: move it away, it is not overwritten"
            )
        set_aside(folder)
    gone = [name for name in _names_before(sweep) if name not in {cell.name for cell in sweep.cells}]
    if gone:
        logger.warning(f"No longer in the table, their runs stay in {folder}: {'; '.join(gone)}")
    new = not os.path.lexists(folder)
    try:
        if new:
            create_folder(folder, {TABLE: json_bytes(sweep.table())})
        else:
            write_json(folder / TABLE, sweep.table())
        for part in ("cells", "logs"):
            (folder / part).mkdir(exist_ok=True)
        for run in runs:
            write_json(run.config_path, run.cell.resolved(run.seed))
    except OSError:
        if new:
            remove_folder(folder)
            restore_replaced(folder)
        raise


def tell_replaced(sweep: Sweep) -> None:
    """Say where the results lie that the sweep replaces, until all its runs are finished."""
    for path in replaced_folders(sweep.folder):
        logger.warning(
            f"{path}: the results that this sweep replaces, removed when all its runs are finished"
        )


def _names_before(sweep: Sweep) -> list[str]:
    """The cells that the table had when it was last run. Raises UserError when its `sweep.json` is damaged."""
    path = sweep.folder / TABLE
    if not path.exists():
        return []
    try:
        return [str(cell["name"]) for cell in read_json(path)["cells"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, it lists no cells: remove it, it is written anew") from error


def write_summary(sweep: Sweep, runs: Sequence[Run], unfinished: Mapping[str, str]) -> None:
    """Tables, figures and report of the finished runs; nothing where there are none.

    unfinished: label -> why there is no result.
    """
    results: dict[str, dict[int, dict[str, Any]]] = {cell.name: {} for cell in sweep.cells}
    origins: dict[str, dict[int, Provenance]] = {cell.name: {} for cell in sweep.cells}
    finished = sorted(
        (run for run in runs if run.finished), key=lambda run: (run.folder / RESULT).stat().st_mtime_ns
    )
    if not finished:
        return
    for run in finished:
        results[run.cell.name][run.seed] = run.result()
        origins[run.cell.name][run.seed] = run.provenance()
    by_label = {run.label: origins[run.cell.name][run.seed] for run in finished}
    for sentence in changes(by_label):
        logger.warning(f"{sentence}; runs that differ in it are not compared")
    old = outdated(by_label)
    from utils.reports.report import write_report  # here: only a sweep with results draws

    paths = write_report(
        sweep.folder,
        sweep.path.stem,
        sweep.description,
        results,
        metrics=sweep.cells[0].config.metrics,
        baseline=sweep.baseline,
        hypotheses=sweep.hypotheses,
        commands={run.cell.name: _command(sweep, run) for run in runs[: len(sweep.cells)]},
        unfinished=unfinished,
        origins=origins,
        outdated={run.label: (", ".join(old[run.label]), run.again) for run in runs if run.label in old},
    )
    logger.info(f"Summary: {', '.join(map(str, paths))}")


def _command(sweep: Sweep, run: Run) -> str:
    """The command that repeats the run's cell with all seeds, apart from the sweep."""
    command = ["python", "main.py", "--config", str(run.config_path)]
    if len(sweep.seeds) > 1:
        command += ["--set", f"seed={json.dumps(sweep.seeds, separators=(',', ':'))}"]
    return shlex.join(command)


def _check_unchanged(run: Run) -> None:
    """Refuse a run folder that was made with another configuration than the cell's. Descriptions may differ."""
    path = run.folder / CONFIG
    ways_out = f"rename the cell, or remove the folder {run.folder}"
    try:
        theirs = type(run.cell.config).model_validate(read_json(path)).model_dump(mode="json")
    except ValidationError as error:
        raise UserError(
            f"cell {run.cell.name!r}: {path} is not of this method and version; {ways_out}"
        ) from error
    ours = run.cell.resolved(run.seed)
    if theirs["precision"] == "fp32":  # recorded also where bf16 was asked for and the device has none
        ours["precision"] = "fp32"
    changed = [key for key in ours if ours[key] != theirs[key] and key != "description"]
    if changed:
        changes = (f"{key} = {json.dumps(ours[key])} instead of {json.dumps(theirs[key])}" for key in changed)
        raise UserError(
            f"cell {run.cell.name!r}, seed {run.seed}, was run with another configuration, now it has "
            f"{', '.join(changes)}; {ways_out}"
        )
