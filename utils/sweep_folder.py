"""What a sweep has on disk: its runs and how far they are, the table, the summary.

`<logs_root>/sweeps/<the file's name>/` holds

    sweep.json                     the table as it was resolved
    cells/<slug>_<seed>.json       the configuration each run is started from, as good for `python main.py --config`
    logs/<slug>_<seed>.txt         what the run's process printed
    runs/...                       the run folders
    summary.md, report.html, ...   what came out (`utils/report.py`)

    runs = survey(sweep)                        # every cell with every seed; refuses what does not fit the table
    write_table(sweep, runs)
    write_summary(sweep, runs, {"nested, seed 1994": "not started"})
"""

import json
import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.errors import UserError
from utils.files import read_json, write_json
from utils.provenance import Provenance, changes, outdated, read_provenance
from utils.run_folder import CONFIG, RESULT, folder_of
from utils.sweep import Cell, Sweep
from utils.sweep_engines import lock

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
        return (self.folder / RESULT).is_file()

    @property
    def again(self) -> str:
        """The command that runs it once more, in its place."""
        return shlex.join(["python", "main.py", "--config", str(self.config_path), "--overwrite"])

    def result(self) -> dict[str, Any]:
        """The content of its `result.json`."""
        return read_json(self.folder / RESULT)

    def provenance(self) -> Provenance:
        """The code, libraries, data and weights it was made with."""
        return read_provenance(self.folder)

    def remove_leftovers(self) -> None:
        """Remove what a process killed before it wrote its configuration left: a new run would go beside it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_name(f"{self.folder.name}.log").unlink(missing_ok=True)


def all_runs(sweep: Sweep) -> list[Run]:
    """Every run of the table, seed by seed."""
    return [Run(sweep.folder, cell, seed) for seed in sweep.seeds for cell in sweep.cells]


def survey(sweep: Sweep) -> list[Run]:
    """Every run of the table, seed by seed; none of them started with another configuration.

    Raises:
        UserError: a run folder was made with another configuration than its cell now has.
    """
    runs = all_runs(sweep)
    for run in runs:
        if run.started:
            _check_unchanged(run)
    return runs


def refuse_running(sweep: Sweep) -> None:
    """Refuse to touch the folder while any of its runs is at work, also one whose sweep was killed.

    Raises:
        UserError: a process holds the lock on its output.
    """
    for path in sorted((sweep.folder / "logs").glob("*.txt")):
        with open(path, "ab") as file:
            if not lock(file):
                raise UserError(f"{sweep.folder}: the run that writes {path} still goes on; wait for it, or stop it")


def remove(sweep: Sweep) -> None:
    """Remove the sweep's folder.

    Raises:
        UserError: the folder holds other things than a sweep.
    """
    folder = sweep.folder
    if folder.is_dir() and not (folder / TABLE).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} holds no {TABLE}, so it is not a sweep's: move it away, it is not overwritten")
    if folder.exists():
        shutil.rmtree(folder)


def write_table(sweep: Sweep, runs: Sequence[Run]) -> None:
    """Write `sweep.json` and the configuration of every run; cells that left the table are named in the log.

    Raises:
        UserError: the folder cannot be created.
    """
    path = sweep.folder / TABLE
    if path.is_file():
        before = [cell["name"] for cell in read_json(path)["cells"]]
        gone = [name for name in before if name not in {cell.name for cell in sweep.cells}]
        if gone:
            logger.warning(f"No longer in the table, their runs stay in {sweep.folder}: {'; '.join(gone)}")
    try:
        (sweep.folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot create {sweep.folder}: {error.strerror}"
        raise UserError(f"{problem}; logs_root must be a writable folder") from error
    for run in runs:
        write_json(run.config_path, run.cell.resolved(run.seed))
    write_json(path, sweep.table())


def write_summary(sweep: Sweep, runs: Sequence[Run], unfinished: Mapping[str, str]) -> None:
    """Tables, figures and report of the finished runs; nothing where there are none.

    unfinished: label -> why there is no result.
    """
    results: dict[str, dict[int, dict[str, Any]]] = {cell.name: {} for cell in sweep.cells}
    origins: dict[str, dict[int, Provenance]] = {cell.name: {} for cell in sweep.cells}
    finished = sorted((run for run in runs if run.finished), key=lambda run: (run.folder / RESULT).stat().st_mtime_ns)
    if not finished:
        return
    for run in finished:
        results[run.cell.name][run.seed] = run.result()
        origins[run.cell.name][run.seed] = run.provenance()
    by_label = {run.label: origins[run.cell.name][run.seed] for run in finished}
    for sentence in changes(by_label):
        logger.warning(f"{sentence}; runs that differ in it are not paired")
    old = outdated(by_label)
    from utils.report import write_report  # here: only a sweep with results draws

    paths = write_report(
        sweep.folder,
        sweep.path.stem,
        sweep.description,
        results,
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
        raise UserError(f"cell {run.cell.name!r}: {path} is not of this method and version; {ways_out}") from error
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
