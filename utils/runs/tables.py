"""Plain-text tables of a run for log and terminal, at most `TABLE_WIDTH` characters wide.

print(accuracy_table(matrix))                     # accuracy on each task after each task
print(summary_table(matrix, 3, parameters))       # the metrics of a run, a line each
print(seeds_table(results, config.metrics))       # mean ± std over runs that differ in their seed
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.metric_catalogue import CLASS_INCREMENTAL, MetricSpec, by_key
from utils.runs.metrics import AccuracyMatrix, mean_std
from utils.runs.result import is_number

TABLE_WIDTH = 100  # characters; wider tables are folded
CELL = 8  # characters per column: "task 19" or "100.00" and a space


def accuracy_table(matrix: AccuracyMatrix) -> str:
    """Rows: after task t. Columns: accuracy (%) on each task seen, then over all their images ("total").

    Folded into groups of columns where it would be wider than `TABLE_WIDTH`; each group repeats the total.
    """
    rows, curve = matrix.rows, matrix.curve
    groups = []
    for columns in _column_groups(len(rows)):
        lines = [_line("after", [f"task {k}" for k in columns] + ["total"])]
        for t in range(columns.start, len(rows)):
            cells = [f"{rows[t][k]:.2f}" if k <= t else "" for k in columns]
            lines.append(_line(f"task {t}", [*cells, f"{curve[t]:.2f}"]))
        groups.append("\n".join(lines))
    title = "Accuracy (%) after each task (rows) on the test images of each task (columns)"
    return f"{title}\n" + "\n\n".join(groups)


def summary_table(matrix: AccuracyMatrix, adapters_added: int, parameters: Mapping[str, int]) -> str:
    """A line per metric, the adapters added by growth, and the number of parameters of each part."""
    specs, lines = by_key(CLASS_INCREMENTAL), []
    for key, value in (matrix.summary() | {"expansions": adapters_added}).items():
        lines.append((_label(specs[key]), "n/a (one task)" if value is None else specs[key].text(value)))
    lines += [(f"parameters, {part}", f"{count:,}") for part, count in parameters.items()]
    return _two_columns(lines)


def seeds_table(results: Sequence[Mapping[str, Any]], metrics: Sequence[MetricSpec]) -> str:
    """mean ± std (n) of every numeric metric over runs that differ in their seed.

    Args:
        results: the runs' result.json, {"seed": int, "metrics": {key: number or None}, ...}. Values other
            than numbers are left out, so n may be smaller than the number of runs.
        metrics: specs of the runs' method. A metric without one is shown by its key.
    """
    seeds = ", ".join(str(result["seed"]) for result in results)
    title = textwrap.fill(f"Mean ± std (n) over seeds {seeds}", width=TABLE_WIDTH)
    specs, lines = by_key(metrics), []
    for key in dict.fromkeys(key for result in results for key in result["metrics"]):
        numbers = [result["metrics"].get(key) for result in results]
        numbers = [number for number in numbers if is_number(number)]
        if numbers:
            spec = specs.get(key) or MetricSpec(key, key.replace("_", " "))
            lines.append((_label(spec), f"{spec.text(*mean_std(numbers))} ({len(numbers)})"))
    return f"{title}\n{_two_columns(lines)}"


def _label(spec: MetricSpec) -> str:
    """`A_N, accuracy over all classes after the last task (%)`."""
    return f"{spec.name}, {spec.definition}" if spec.meaning else spec.heading


def _column_groups(tasks: int) -> Iterator[range]:
    """Split columns 0..tasks-1 into the fewest groups that fit, as equal in size as can be."""
    fitting = (TABLE_WIDTH - 2 * CELL) // CELL  # beside the row's name and the total
    size = math.ceil(tasks / math.ceil(tasks / fitting)) if tasks else 1
    for start in range(0, tasks, size):
        yield range(start, min(start + size, tasks))


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{CELL}}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def _two_columns(lines: Sequence[tuple[str, str]]) -> str:
    left = max((len(name) for name, _ in lines), default=0)
    right = max((len(value) for _, value in lines), default=0)
    return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in lines)
