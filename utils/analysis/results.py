"""What an analysis finds, and how it is kept: numbers, tables, figures and a text to read.

found = {"cka": AnalysisResult(numbers={...}, tables={"cka": rows}, figures={"cka": draw}, text="...")}
write_results(run / "analysis", found)      # cka.json, cka.csv, cka.png
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from utils.files import replace_file
from utils.plotting import STYLE, png
from utils.runs.metrics import CELL, TABLE_WIDTH

ANALYSIS = "analysis"  # folder of a run
Row = dict[str, Any]


@dataclass(frozen=True)
class AnalysisResult:
    """What an analysis found.

    Attributes:
        numbers: all of it, for the JSON file.
        tables: file stem -> rows, for CSV files.
        figures: file stem -> what draws the figure.
        text: the main numbers, to be read.
    """

    numbers: Row
    tables: dict[str, list[Row]]
    figures: dict[str, Callable[[], Figure]]
    text: str


def write_results(folder: Path, found: Mapping[str, AnalysisResult]) -> list[Path]:
    """Write `<name>.json`, tables and figures of every analysis into the folder, replacing older ones; the files.

    A table without a row is left out.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    for name, findings in found.items():
        texts = {f"{name}.json": json.dumps(findings.numbers, allow_nan=False) + "\n"}
        texts |= {f"{stem}.csv": _csv(rows) for stem, rows in findings.tables.items() if rows}
        for file, text in texts.items():
            paths.append(replace_file(folder / file, text.encode()))
        with mpl.rc_context(STYLE):
            for stem, draw in findings.figures.items():
                paths.append(replace_file(folder / f"{stem}.png", png(draw())))
    return paths


def value_table(
    title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray, decimals: int
) -> str:
    """Values (rows, columns) with their names under a title, folded where they would be too wide; NaN stays empty."""
    first, cell = (max(CELL, *(len(name) + 1 for name in names)) for names in (rows, columns))
    fitting = max(1, (TABLE_WIDTH - first) // cell)
    lines = [title]
    for start in range(0, len(columns), fitting):
        shown = range(start, min(start + fitting, len(columns)))
        lines.append(f"{'':<{first}}" + "".join(f"{columns[c]:>{cell}}" for c in shown))
        for name, row in zip(rows, values, strict=True):
            cells = ["" if math.isnan(row[c]) else f"{row[c]:.{decimals}f}" for c in shown]
            lines.append(f"{name:<{first}}" + "".join(f"{text:>{cell}}" for text in cells))
    return "\n".join(lines)


def number(value: float) -> float | None:
    """A number for JSON: None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def listed(values: np.ndarray) -> list[Any]:
    """Nested lists, None for NaN."""
    return np.where(np.isfinite(values), values.astype(object), None).tolist()


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
