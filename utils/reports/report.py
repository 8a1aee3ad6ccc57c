"""The report of a sweep: what its finished runs say, and how sure that is.

    write_report(Path("logs/sweeps/ranks"), "ranks", "does rank matter?", runs, baseline="matched adapter", ...)

    report.html      one page with everything, figures included; it needs no other file and no network
    summary.md       the same tables for a README or an issue
    summary.csv      a line for each cell and quantity, at full precision, with its difference from the baseline
    runs.csv         a line for each run
    hypotheses.csv   a line for each hypothesis, at full precision, where the sweep states some
    figures/         what `utils/reports/figures.py` and `utils/reports/hypotheses_figure.py` draw

The same input gives the same bytes. Everything is computed before the first file is replaced.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from utils.errors import UserError, os_error_sentence
from utils.files import replace_file
from utils.plotting import DPI
from utils.reports.cells import Cell, quantity_names, tabulate
from utils.reports.figures import FIGURES, sweep_figures
from utils.reports.hypotheses import Answer, Hypothesis, answer
from utils.reports.hypotheses_figure import CAPTION, hypotheses_png
from utils.reports.stats import Paired
from utils.reports.tables import (
    difference_tables,
    facts,
    hypotheses_table,
    main_table,
    reading_notes,
    runs_table,
)
from utils.runs.manifest import Provenance

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
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]],
    *,
    baseline: str | None,
    commands: Mapping[str, str],
    unfinished: Mapping[str, str],
    hypotheses: Mapping[str, Hypothesis] | None = None,
    origins: Mapping[str, Mapping[int, Provenance]] | None = None,
    outdated: Mapping[str, tuple[str, str]] | None = None,
) -> list[Path]:
    """Write the report of a sweep into its folder, over an earlier one; returns the files.

    Args:
        folder: the sweep's; created where it is missing.
        title: the sweep's name.
        description: what it asks, in the words of its file.
        runs: cell name -> seed -> result.json of its finished runs, in the table's order; {} for a cell without one.
        baseline: the cell that the others are compared with, if there is one.
        commands: cell name -> command that repeats it.
        unfinished: "cell, seed 1993" -> why there is no result.
        hypotheses: name -> hypothesis, about these cells; without any the report does not speak of them.
        origins: cell name -> seed -> provenance of the run, in the order in which they ended.
        outdated: "cell, seed 1993" -> (what it differs in from the newest runs, command that runs it again).

    Raises:
        UserError: the baseline is no cell, no run is finished, a result is damaged, or the folder cannot be written.
    """
    cells = tabulate(runs, baseline, origins)
    answers = answer(hypotheses or {}, cells)
    figures = sweep_figures(cells, baseline, title)
    answered = hypotheses_png(answers, title) if answers else b""
    page = {
        "title": title,
        "description": description,
        "facts": facts(cells, baseline, unfinished),
        "notes": reading_notes(cells, baseline, answers),
        "hypotheses": hypotheses_table(answers) if answers else None,
        "hypotheses_picture": _picture(HYPOTHESES_FIGURE, answered, CAPTION) if answers else None,
        "main": main_table(cells),
        "differences": difference_tables(cells, baseline),
        "runs": runs_table(cells),
        "pictures": [_picture(name, png, cells[0].kind.captions[name]) for name, png in figures.items()],
        "commands": commands,
        "unfinished": unfinished,
        "outdated": outdated or {},
    }
    files = {
        "summary.csv": _csv(summary_rows(cells, baseline)),
        "runs.csv": _csv(run_rows(cells)),
        "summary.md": _render("report_template.md", page),
        "report.html": _render("report_template.html", page),
        **{f"{FIGURES_FOLDER}/{name}": png for name, png in figures.items()},
    }
    if answers:
        files |= {
            HYPOTHESES: _csv(hypothesis_rows(answers)),
            f"{FIGURES_FOLDER}/{HYPOTHESES_FIGURE}": answered,
        }
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


def summary_rows(cells: Sequence[Cell], baseline: str | None) -> list[dict[str, Any]]:
    """A row for each cell and quantity; what there is not is None. Differences are the cell's minus the baseline's."""
    rows = []
    for cell in cells:
        for quantity in quantity_names(cells):
            estimate, comparison = cell.estimates.get(quantity), cell.comparisons.get(quantity)
            difference = comparison and comparison.paired
            rows.append(
                {
                    "cell": cell.name,
                    "metric": quantity,
                    "n": estimate.n if estimate else 0,
                    "mean": estimate and estimate.mean,
                    "std": estimate and estimate.std,
                    "low95": estimate and estimate.low,
                    "high95": estimate and estimate.high,
                    "baseline": baseline,
                    "paired_n": difference and difference.n,
                    **_difference_fields(difference),
                    "p_holm": comparison and comparison.p_holm,
                    "p_wilcoxon": difference and difference.p_wilcoxon,
                    "verdict": comparison and comparison.verdict,
                }
            )
    return rows


def hypothesis_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """A row for each hypothesis; what there is not is None. Differences are the cell's side minus the other."""
    rows = []
    for each in answers:
        (cell, metric), (against, against_metric) = each.hypothesis.sides
        (ours, theirs), difference = each.estimates, each.difference
        rows.append(
            {
                "hypothesis": each.name,
                "says": each.hypothesis.says,
                "cell": cell,
                "metric": metric,
                "against": against,
                "against_metric": against_metric,
                "expected": each.hypothesis.expected,
                "n": len(each.pairs),
                "mean": ours and ours.mean,
                "std": ours and ours.std,
                "against_mean": theirs and theirs.mean,
                "against_std": theirs and theirs.std,
                **_difference_fields(difference),
                "p_holm": each.p_holm,
                "verdict": each.verdict,
            }
        )
    return rows


def _difference_fields(difference: Paired | None) -> dict[str, float | None]:
    """The fields of a paired difference in a row; None each without one."""
    return {
        "difference": difference and difference.mean,
        "difference_std": difference and difference.std,
        "difference_low95": difference and difference.low,
        "difference_high95": difference and difference.high,
        "p_t": difference and difference.p_t,
    }


def run_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each finished run: cell, seed, every quantity, tasks, weights tag."""
    names = quantity_names(cells)
    return [
        {
            "cell": cell.name,
            "seed": seed,
            **{name: values.get(name) for name in names},
            "tasks": cell.tasks,
            "weights": cell.results[seed]["weights"].get("tag"),
        }
        for cell in cells
        for seed, values in cell.quantities.items()
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows with the same keys as a table with a header; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _picture(name: str, png: bytes, caption: str) -> Picture:
    width, height = (
        int.from_bytes(png[start : start + 4], "big") for start in (16, 20)
    )  # of the PNG's header
    size = (round(side * CSS_DPI / DPI) for side in (width, height))
    return Picture(name, caption, base64.b64encode(png).decode(), *size)


def _render(template: str, page: Mapping[str, Any]) -> bytes:
    """A template of this folder, filled; what comes from users is escaped for HTML, or by `markdown` filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _markdown
    return environment.get_template(template).render(page).encode()


def _markdown(text: str) -> str:
    """Text in one line that Markdown shows as it is, in a table too."""
    return MARKDOWN_SIGNS.sub(r"\\\g<0>", " ".join(text.split()))
