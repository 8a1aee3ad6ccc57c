"""Accuracy matrix of a class-incremental run, and the metrics that follow from it.

    matrix = AccuracyMatrix()
    matrix.add(correct=[97], total=[100])             # after task 0
    matrix.add(correct=[90, 95], total=[100, 100])    # after task 1: one entry for each task seen so far
    matrix.summary()   # {"final": 92.5, "average": 94.75, "forgetting": 7.0, "bwt": -7.0, "plasticity": 96.0}

Notation: a[t][k] is the accuracy (percent) on the test images of task k after training on task t; N is the
last task.
Names and units of the metrics stand in `utils/metric_catalogue.py`.
"""

import math
import statistics
from collections.abc import Sequence


class AccuracyMatrix:
    """Lower-triangular matrix a[t][k] of a run, built row by row from counts of correct images."""

    def __init__(self) -> None:
        self._correct: list[list[int]] = []
        self._total: list[list[int]] = []

    def __len__(self) -> int:
        """Number of finished tasks."""
        return len(self._correct)

    def add(self, correct: Sequence[int], total: Sequence[int]) -> None:
        """Add the row of the task that has just finished.

        Args:
            correct: for every task seen so far, its correctly classified test images.
            total: for every task seen so far, all its test images.

        Raises:
            ValueError: the row does not have one entry per task, a count is impossible, or the number of test
                images of a task is not that of the row before.
        """
        row, sizes = [int(count) for count in correct], [int(count) for count in total]
        tasks = len(self) + 1
        if len(row) != tasks or len(sizes) != tasks:
            entries = f"needs {tasks} entries, got {len(row)} correct and {len(sizes)} total"
            raise ValueError(f"the row after task {tasks - 1} {entries}")
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
        """A_t in percent: accuracy over all test images of the classes seen up to task t."""
        return [100.0 * sum(row) / sum(sizes) for row, sizes in zip(self._correct, self._total, strict=True)]

    def summary(self) -> dict[str, float | None]:
        """The metrics by key; forgetting and bwt are None for one task. Raises ValueError without a task.

        final       A_N, accuracy over all classes after the last task (percent)
        average     mean of A_t over tasks (percent)
        forgetting  mean_{k<N} (max_{k<=t<N} a[t][k] - a[N][k]) (points)
        bwt         backward transfer mean_{k<N} (a[N][k] - a[k][k]) (points)
        plasticity  mean_k a[k][k], accuracy on each task just after learning it (percent)
        """
        if not self._correct:
            raise ValueError("no task has finished yet: the matrix has no rows")
        a, last = self.rows, len(self) - 1
        lost = [max(a[t][k] for t in range(k, last)) - a[last][k] for k in range(last)]
        moved = [a[last][k] - a[k][k] for k in range(last)]
        return {
            "final": self.curve[-1],
            "average": statistics.fmean(self.curve),
            "forgetting": statistics.fmean(lost) if lost else None,
            "bwt": statistics.fmean(moved) if moved else None,
            "plasticity": statistics.fmean(row[-1] for row in a),
        }


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof = 1; NaN for one value). Raises ValueError without values."""
    if not values:
        raise ValueError("mean of no values")
    numbers = [float(value) for value in values]
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan
