"""Result of an analysis, and its files: numbers, tables, figures and a text for readers.

results = {"cka": AnalysisResult(numbers={...}, tables={"cka": rows}, figures={"cka": draw}, text="...")}
write_results(run / "analysis", results)     # cka.json, cka.csv, cka.png
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from utils.files import replace_file
from utils.plotting import STYLE, pictures

ANALYSIS = "analysis"  # folder of a run
Row = dict[str, Any]


@dataclass(frozen=True)
class AnalysisResult:
    """Numbers, tables, figures and text of one analysis."""

    numbers: Row  # all of it, for the JSON file
    tables: dict[str, list[Row]]  # file stem -> rows, for CSV files
    figures: dict[str, Callable[[], Figure]]  # file stem -> what draws it
    text: str  # the main numbers, for readers


def write_results(folder: Path, results: Mapping[str, AnalysisResult], form: str = "png") -> list[Path]:
    """Write `<name>.json`, tables and figures of every analysis over older ones; returns the files.

    A table without a row is left out. form: of the figures beside PNG, "pdf" or "svg"; "none" draws none.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    for name, result in results.items():
        files = {f"{name}.json": f"{json.dumps(result.numbers, allow_nan=False)}\n".encode()}
        for stem, rows in result.tables.items():
            if rows:
                files[f"{stem}.csv"] = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode()
        with mpl.rc_context(STYLE):
            drawn = {} if form == "none" else {f"{stem}.png": draw() for stem, draw in result.figures.items()}
            files |= pictures(drawn, form)
        paths += [replace_file(folder / file, content) for file, content in files.items()]
    return paths


def number(value: float) -> float | None:
    """A number for JSON: None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def listed(values: np.ndarray) -> list[Any]:
    """Nested lists for JSON: None where a value is not finite."""
    return np.where(np.isfinite(values), values.astype(object), None).tolist()
