"""Plain-text tables for log and terminal, wrapped where they would be wider than `TABLE_WIDTH`.

print(accuracy_table(matrix))                     # accuracy on each task after each task
print(summary_table(matrix, 3, parameters))       # the metrics of a run, one per line
print(seeds_table(results, config.metrics))       # mean ± std over runs that differ in their seed
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from utils.metric_catalogue import CLASS_INCREMENTAL, VALIDATION, MetricSpec, by_key, keyed
from utils.runs.metrics import AccuracyMatrix, is_number, mean_std

TABLE_WIDTH = 100  # characters


def value_table(
    title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray, decimals: int
) -> str:
    """Values (rows, columns) with their names under a title; NaN stays empty."""
    numbers = pd.DataFrame(values, index=rows, columns=columns)
    shown = numbers.to_string(float_format=f"{{:.{decimals}f}}".format, na_rep="", line_width=TABLE_WIDTH)
    return f"{title}\n{shown}"


def accuracy_table(matrix: AccuracyMatrix, images: str = "test") -> str:
    """Rows: after task t. Columns: accuracy (%) on each task seen, then over all their images ("total")."""
    tasks = [f"task {k}" for k in range(len(matrix.rows))]
    by_column = itertools.zip_longest(*matrix.rows, fillvalue=math.nan)
    values = np.column_stack([*by_column, matrix.curve])
    title = f"{accuracy_on(images)} (%) after each task (rows) on the {images} images of each task (columns)"
    return value_table(title, tasks, [*tasks, " total"], values, 2)  # as wide as a number


def matrix_frame(matrix: AccuracyMatrix) -> pd.DataFrame:
    """The matrix in percent, without names: line t after task t, missing where a task is not seen yet."""
    return pd.DataFrame(itertools.zip_longest(*matrix.rows)).T


def accuracy_on(images: str) -> str:
    """Name of accuracy on "test" images, or on "validation" images, which were held out of training."""
    return "Accuracy" if images == "test" else f"{images.capitalize()} accuracy"


def summary_table(
    matrix: AccuracyMatrix, adapters_added: int, parameters: Mapping[str, int], images: str = "test"
) -> str:
    """The metrics, with the adapters added after the first task, and the parameters of each part, by line."""
    specs, lines = by_key((*CLASS_INCREMENTAL, *VALIDATION)), {}
    for key, value in (matrix.summary() | {"expansions": adapters_added}).items():
        key = keyed(images, key)
        lines[_label(specs[key])] = "n/a (one task)" if value is None else specs[key].text(value)
    lines |= {f"parameters, {part}": f"{count:,}" for part, count in parameters.items()}
    return f"Result after task {len(matrix.rows) - 1}\n{pd.Series(lines).to_string()}"


def seeds_table(results: Sequence[Mapping[str, Any]], metrics: Sequence[MetricSpec]) -> str:
    """mean ± std (n) of every numeric metric over runs that differ in their seed.

    Args:
        results: the runs' result.json, {"seed": int, "metrics": {key: number or None}, ...}. Values other
            than numbers are left out, so n may be smaller than the number of runs.
        metrics: specs of the runs' method. A metric without one is shown by its key.
    """
    seeds = ", ".join(str(result["seed"]) for result in results)
    title = textwrap.fill(f"Mean ± std (n) over seeds {seeds}", width=TABLE_WIDTH)
    specs, lines = by_key(metrics), {}
    for key in dict.fromkeys(key for result in results for key in result["metrics"]):
        numbers = [number for result in results if is_number(number := result["metrics"].get(key))]
        if numbers:
            spec = specs.get(key) or MetricSpec(key, key.replace("_", " "))
            lines[_label(spec)] = f"{spec.text(*mean_std(numbers))} ({len(numbers)})"
    return f"{title}\n{pd.Series(lines).to_string()}"


def weights_notes(about: Iterable[Mapping[str, Any]]) -> list[str]:
    """Notes on pretrained weights that must stand beside any number, a sentence for each.

    about: a result.json or manifest.json of every run.
    """
    notes = dict.fromkeys(one.get("weights", {}).get("note") for one in about)
    return [f"{note[0].upper()}{note[1:]}." for note in notes if note]


def _label(spec: MetricSpec) -> str:
    """`A_N, accuracy over all classes after the last task (%)`."""
    return f"{spec.name}, {spec.definition}" if spec.meaning else spec.heading
