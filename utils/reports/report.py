"""Report of a sweep: tables and figures of its finished runs, with confidence intervals.

    write_report(Path("logs/sweeps/ranks"), "ranks", "does rank matter?", results, commands=...,
    unfinished={})

    report.html      one page: what was run, figures, tables; it needs no other file and no network
    summary.md       the same tables for a README or an issue
    summary.csv      one row per cell and metric, at full precision, with its difference from the baseline
    runs.csv         one row per run
    hypotheses.csv   one row per hypothesis, at full precision, where the sweep states some
    figures/         drawn by `utils/reports/figures.py`

The same input gives the same bytes. Everything is computed before the first file is replaced.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from utils.errors import UserError, os_error_sentence
from utils.files import replace_file
from utils.reports.answers import answer
from utils.reports.figures import FIGURES, HYPOTHESES_FIGURE, sweep_figures
from utils.reports.hypotheses import Hypothesis
from utils.reports.pages import Picture, render
from utils.reports.results import Results
from utils.reports.sentences import facts, reading_notes
from utils.reports.tables import (
    Table,
    difference_tables,
    hypotheses_table,
    means_table,
    plain_table,
    runs_table,
)

FIGURES_FOLDER = "figures"
HYPOTHESES = "hypotheses.csv"


def write_report(
    folder: Path,
    title: str,
    description: str,
    results: Results,
    *,
    commands: Mapping[str, str],
    unfinished: Mapping[str, str],
    about: Sequence[tuple[str, str]] = (),
    keys: Table | None = None,
    form: str = "png",
    hypotheses: Mapping[str, Hypothesis] | None = None,
    outdated: Mapping[str, tuple[str, str]] | None = None,
) -> list[Path]:
    """Write the report of a sweep into its folder, over an earlier one; returns the files.

    Args:
        commands: cell -> command that repeats it.
        unfinished: "cell, seed 1993" -> why there is no result.
        about: what was run, as (heading, text).
        keys: table of the keys in which cells differ.
        form: format of figures in addition to PNG, "pdf" or "svg".
        hypotheses: by name; without any the report does not mention them.
        outdated: "cell, seed 1993" -> (what it differs in from the newest runs, command that runs it again).

    Raises:
        UserError: the folder cannot be written.
    """
    answers = answer(hypotheses, results) if hypotheses else None
    figures = sweep_figures(results, title, answers, form)
    page = {
        "title": title,
        "description": description,
        "facts": [*about, *facts(results, unfinished)],
        "keys": keys,
        "notes": reading_notes(results, answers),
        "hypotheses": hypotheses_table(answers, results) if hypotheses else None,
        "main": means_table(results),
        "differences": difference_tables(results),
        "runs": runs_table(results),
        "pictures": [Picture.of(name, *figure) for name, figure in figures.items() if name.endswith(".png")],
        "commands": commands,
        "unfinished": plain_table(["run", "why"], unfinished.items()),
        "outdated": outdated or {},
    }
    files = {
        "summary.csv": _csv(results.summary.reset_index()),
        "runs.csv": _csv(results.runs.reset_index()),
        "summary.md": render("sweep.md", page),
        "report.html": render("sweep.html", page),
        **{f"{FIGURES_FOLDER}/{name}": content for name, (content, _) in figures.items()},
    }
    if hypotheses:
        files[HYPOTHESES] = _csv(answers)
    try:
        (folder / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
        names = [f"{FIGURES_FOLDER}/{Path(name).stem}.*" for name in (*FIGURES, HYPOTHESES_FIGURE)]
        for path in (path for name in (*names, HYPOTHESES) for path in folder.glob(name)):
            path.unlink()  # of an earlier report
        return [replace_file(folder / name, content) for name, content in files.items()]
    except OSError as error:
        go_on = "write it again: add --report to the sweep's command"
        raise UserError(
            f"cannot write the report into {folder}: {os_error_sentence(error, go_on)}"
        ) from error


def _csv(table: pd.DataFrame) -> bytes:
    """A table with a header; a missing value is an empty field."""
    return table.to_csv(index=False, lineterminator="\n").encode()
