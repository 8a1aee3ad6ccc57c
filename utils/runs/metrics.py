"""Accuracy of a class-incremental run: every number defined once, and the plain-text tables that show them.

    matrix = AccuracyMatrix()
    matrix.add(correct=[97], total=[100])             # after task 0
    matrix.add(correct=[90, 95], total=[100, 100])    # after task 1: one entry for each task seen so far
    print(accuracy_table(matrix))
    matrix.summary()   # {"final": 92.5, "average": 94.75, "forgetting": 7.0, "bwt": -7.0, "plasticity": 96.0}

Notation: a[t][k] is the accuracy (percent) on the test images of task k after training on task t; N is the last task.
Counts are kept, not percentages, so that a matrix read back from a file is exactly the one that was written.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.errors import UserError

TABLE_WIDTH = 100  # characters; wider tables are folded
CELL = 8  # characters a column: "task 19" or "100.00" and a space

# metric -> what a table calls it; the unit of all of them is percent (of images, or points of it)
PERCENT_METRICS: dict[str, str] = {
    "final": "A_N, final accuracy over all classes (%)",
    "average": "average of A_t over tasks (%)",
    "forgetting": "forgetting (points)",
    "bwt": "BWT, backward transfer (points)",
    "plasticity": "plasticity, each task just learned (%)",
}


class AccuracyMatrix:
    """Lower-triangular matrix a[t][k] of a run, built row by row from counts of correctly classified test images."""

    def __init__(self) -> None:
        self._correct: list[list[int]] = []
        self._total: list[list[int]] = []

    def __len__(self) -> int:
        """Number of finished tasks."""
        return len(self._correct)

    def add(self, correct: Sequence[int], total: Sequence[int]) -> None:
        """Add the row of the task that has just finished.

        correct, total: for every task seen so far, its correctly classified test images and all its test images.
        Raises ValueError when the row does not have one entry a task, a count is impossible, or a task's number of
        test images is not what it was in the row before.
        """
        row, sizes = [int(count) for count in correct], [int(count) for count in total]
        tasks = len(self) + 1
        if len(row) != tasks or len(sizes) != tasks:
            raise ValueError(
                f"the row after task {tasks - 1} needs {tasks} entries, got {len(row)} correct and {len(sizes)} total"
            )
        for k, (right, size) in enumerate(zip(row, sizes, strict=True)):
            if size < 1 or not 0 <= right <= size:
                raise ValueError(f"task {k}: {right} of {size} test images correct is impossible")
        if self._total and sizes[:-1] != self._total[-1]:
            raise ValueError(
                f"test images of the earlier tasks changed from {self._total[-1]} to {sizes[:-1]}"
            )
        self._correct.append(row)
        self._total.append(sizes)

    @property
    def rows(self) -> list[list[float]]:
        """a[t][k] in percent; row t has t + 1 entries."""
        return [
            [100.0 * right / size for right, size in zip(row, sizes, strict=True)]
            for row, sizes in zip(self._correct, self._total, strict=True)
        ]

    @property
    def curve(self) -> list[float]:
        """A_t in percent: accuracy over the test images of all classes seen up to task t, each image counting once."""
        return [100.0 * sum(row) / sum(sizes) for row, sizes in zip(self._correct, self._total, strict=True)]

    @property
    def final(self) -> float:
        """A_N: accuracy over all classes after the last task, percent."""
        self._require_a_task()
        return self.curve[-1]

    @property
    def average(self) -> float:
        """Mean of A_t over tasks (average incremental accuracy), percent."""
        self._require_a_task()
        return statistics.fmean(self.curve)

    @property
    def forgetting(self) -> float | None:
        """mean_{k<N} (max_{k<=t<N} a[t][k] - a[N][k]), points; None for a single task."""
        self._require_a_task()
        a, last = self.rows, len(self) - 1
        if last == 0:
            return None
        return statistics.fmean(max(a[t][k] for t in range(k, last)) - a[last][k] for k in range(last))

    @property
    def bwt(self) -> float | None:
        """Backward transfer mean_{k<N} (a[N][k] - a[k][k]), points; None for a single task."""
        self._require_a_task()
        a, last = self.rows, len(self) - 1
        if last == 0:
            return None
        return statistics.fmean(a[last][k] - a[k][k] for k in range(last))

    @property
    def plasticity(self) -> float:
        """mean_k a[k][k]: accuracy on a task just after learning it, percent."""
        self._require_a_task()
        return statistics.fmean(row[-1] for row in self.rows)

    def summary(self) -> dict[str, float | None]:
        """The scalar metrics by name, in the order of `PERCENT_METRICS`."""
        return {name: getattr(self, name) for name in PERCENT_METRICS}

    def to_json(self) -> dict[str, list[list[int]]]:
        """The counts, ready for JSON; `from_json` gives the same matrix back."""
        return {"correct": [list(row) for row in self._correct], "total": [list(row) for row in self._total]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AccuracyMatrix:
        """Rebuild a matrix from `to_json`. Raises UserError when `values` cannot be one."""
        matrix = cls()
        try:
            for correct, total in zip(values["correct"], values["total"], strict=True):
                matrix.add(correct, total)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"stored accuracies are not readable: {error}; the file is damaged or foreign"
            ) from error
        return matrix

    def _require_a_task(self) -> None:
        if not self._correct:
            raise ValueError("no task has finished yet: the matrix has no rows")


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof = 1; None for one value). Raises ValueError without values."""
    if not values:
        raise ValueError("mean of no values")
    numbers = [float(value) for value in values]
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


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
    return "Accuracy (%) after each task (rows) on the test images of each task (columns)\n" + "\n\n".join(
        groups
    )


def summary_table(matrix: AccuracyMatrix, adapters_added: int, parameters: Mapping[str, int]) -> str:
    """One line a quantity: the metrics, the adapters added by growth, and the number of parameters of each part."""
    values = [
        (label, "n/a (one task)" if value is None else f"{value:.2f}")
        for label, value in zip(PERCENT_METRICS.values(), matrix.summary().values(), strict=True)
    ]
    values.append(("adapters added", f"{adapters_added:,}"))
    values += [(f"parameters, {part}", f"{count:,}") for part, count in parameters.items()]
    return _two_columns(values)


def seeds_table(results: Sequence[Mapping[str, Any]]) -> str:
    """mean ± std (n) of every numeric metric over runs that differ in their seed.

    results: the runs' result.json, {"seed": int, "metrics": {name: number or None}, ...}. Standard deviation with
    ddof = 1, not shown for one value. None counts as absent, so n may be smaller than the number of runs.
    Metrics that are not numbers are left out.
    """
    seeds = ", ".join(str(result["seed"]) for result in results)
    title = textwrap.fill(f"Mean ± std (n) over seeds {seeds}", width=TABLE_WIDTH)
    names = dict.fromkeys(name for result in results for name in result["metrics"])
    lines = []
    for name in names:
        numbers = [result["metrics"].get(name) for result in results]
        numbers = [number for number in numbers if is_number(number)]
        if numbers:
            lines.append((PERCENT_METRICS.get(name, name.replace("_", " ")), _mean_std_text(numbers)))
    return f"{title}\n{_two_columns(lines)}"


def active_adapters_table(masks: Mapping[int, Sequence[bool]]) -> str:
    """A line for every task from 1 on: adapters kept when it ended, adapters pruned up to then, share that is kept.

    masks: task -> for each task up to it, whether that task's adapter is kept.
    """
    lines = ["Task | Active Adapters | Pruned | Percentage", "-" * 50]
    for task, mask in sorted(masks.items()):
        if task:
            active = sum(mask)
            lines.append(
                f"{task:4d} | {active:15d} | {len(mask) - active:6d} | {100 * active / len(mask):5.1f}%"
            )
    return "\n".join(lines)


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


def _mean_std_text(values: Sequence[float]) -> str:
    mean, std = mean_std(values)
    digits = 0 if abs(mean) >= 1000 else 2
    spread = f" ± {std:,.{digits}f}" if std is not None else ""
    return f"{mean:,.{digits}f}{spread} ({len(values)})"


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
