"""Report of a sweep: tables and figures of its finished runs, with confidence intervals.

    write_report(Path("logs/sweeps/ranks"), "ranks", "does rank matter?", results, commands=...,
    unfinished={})

    report.html      one page with everything, figures included; it needs no other file and no network
    summary.md       the same tables for a README or an issue
    summary.csv      one row per cell and metric, at full precision, with its difference from the baseline
    runs.csv         one row per run
    hypotheses.csv   one row per hypothesis, at full precision, where the sweep states some
    figures/         drawn by `utils/reports/figures.py` and `utils/reports/answers_figure.py`

The same input gives the same bytes. Everything is computed before the first file is replaced.
"""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from utils.errors import UserError, os_error_sentence
from utils.files import replace_file
from utils.plotting import DPI
from utils.reports.answers import answer
from utils.reports.answers_figure import CAPTION, answers_png
from utils.reports.figures import FIGURES, sweep_figures
from utils.reports.hypotheses import Hypothesis
from utils.reports.notes import facts, reading_notes
from utils.reports.results import Results
from utils.reports.tables import difference_tables, hypotheses_table, means_table, runs_table

FIGURES_FOLDER = "figures"
HYPOTHESES, HYPOTHESES_FIGURE = "hypotheses.csv", "hypotheses.png"
CSS_DPI = 96  # pixels an inch on a page
MARKDOWN_SIGNS = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # not inside a word
    r"|<(?=[a-zA-Z/!?])|&(?=#?\w+;)"  # tags and entities
    r"|^[>#]|^[-+](?=\s)"
)


class Picture(NamedTuple):
    """A figure on the page; width and height in CSS pixels."""

    name: str
    caption: str
    base64: str
    width: int
    height: int


def write_report(
    folder: Path,
    title: str,
    description: str,
    results: Results,
    *,
    commands: Mapping[str, str],
    unfinished: Mapping[str, str],
    hypotheses: Mapping[str, Hypothesis] | None = None,
    outdated: Mapping[str, tuple[str, str]] | None = None,
) -> list[Path]:
    """Write the report of a sweep into its folder, over an earlier one; returns the files.

    Args:
        folder: the sweep's; created where it is missing.
        title: the sweep's name.
        description: what it asks, in the words of its file.
        results: those of its finished runs.
        commands: cell -> command that repeats it.
        unfinished: "cell, seed 1993" -> why there is no result.
        hypotheses: name -> hypothesis, about these cells; without any the report does not mention them.
        outdated: "cell, seed 1993" -> (what it differs in from the newest runs, command that runs it again).

    Raises:
        UserError: the folder cannot be written.
    """
    answers = answer(hypotheses, results) if hypotheses else None
    figures = sweep_figures(results, title)
    if hypotheses:
        figures[HYPOTHESES_FIGURE] = answers_png(answers, results, title), CAPTION
    pictures = {name: _picture(name, *figure) for name, figure in figures.items()}
    page = {
        "title": title,
        "description": description,
        "facts": facts(results, unfinished),
        "notes": reading_notes(results, answers),
        "hypotheses": hypotheses_table(answers, results) if hypotheses else None,
        "hypotheses_picture": pictures.pop(HYPOTHESES_FIGURE, None),
        "main": means_table(results),
        "differences": difference_tables(results),
        "runs": runs_table(results),
        "pictures": list(pictures.values()),
        "commands": commands,
        "unfinished": unfinished,
        "outdated": outdated or {},
    }
    files = {
        "summary.csv": _csv(results.summary.reset_index()),
        "runs.csv": _csv(results.runs.reset_index()),
        "summary.md": _render("report_template.md", page),
        "report.html": _render("report_template.html", page),
        **{f"{FIGURES_FOLDER}/{name}": png for name, (png, _) in figures.items()},
    }
    if hypotheses:
        files[HYPOTHESES] = _csv(answers)
    try:
        (folder / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
        for name in (*(f"{FIGURES_FOLDER}/{figure}" for figure in (*FIGURES, HYPOTHESES_FIGURE)), HYPOTHESES):
            (folder / name).unlink(missing_ok=True)  # of an earlier report
        return [replace_file(folder / name, content) for name, content in files.items()]
    except OSError as error:
        go_on = "write it again: add --report to the sweep's command"
        raise UserError(
            f"cannot write the report into {folder}: {os_error_sentence(error, go_on)}"
        ) from error


def _csv(table: pd.DataFrame) -> bytes:
    """A table with a header; a missing value is an empty field."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def _picture(name: str, png: bytes, caption: str) -> Picture:
    """A figure for the page."""
    sides = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))  # of the PNG's header
    size = (round(side * CSS_DPI / DPI) for side in sides)
    return Picture(name, caption, base64.b64encode(png).decode(), *size)


def _render(template: str, page: Mapping[str, Any]) -> bytes:
    """A filled template of this folder; text of users is escaped for HTML, or by `markdown` filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = markdown_text
    return environment.get_template(template).render(page).encode()


def markdown_text(text: str) -> str:
    """Text in one line that Markdown shows as it is, in a table too."""
    return MARKDOWN_SIGNS.sub(r"\\\g<0>", " ".join(text.split()))
