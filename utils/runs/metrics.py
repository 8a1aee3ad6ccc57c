"""Metrics of a run: computed from its accuracy matrix, and read from its result.json.

    matrix = AccuracyMatrix()
    matrix.add(correct=[97], total=[100])             # after task 0
    matrix.add(correct=[90, 95], total=[100, 100])    # after task 1: one entry for each task seen so far
    matrix.summary()   # {"final": 92.5, "average": 94.75, "forgetting": 7.0, "bwt": -7.0, "plasticity": 96.0}

    result = checked_result(run_folder, config.metrics)     # UserError: damaged
    numbers_of(result)["seconds"]

Notation: a[t][k] is the accuracy (percent) on the test images of task k after training on task t; N is the
last task. Names and units of the metrics stand in `utils/metric_catalogue.py`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json
from utils.metric_catalogue import COSTS, MetricSpec
from utils.runs.folder import RESULT


class AccuracyMatrix:
    """Lower-triangular matrix a[t][k] of a run, built row by row from counts of correct images."""

    def __init__(self) -> None:
        self._counts: list[list[tuple[int, int]]] = []  # (correct, all) of each task seen, after each task

    def add(self, correct: Sequence[int], total: Sequence[int]) -> None:
        """Add the row of the task that has just finished.

        Args:
            correct: for every task seen so far, the number of its images that are classified correctly.
            total: for every task seen so far, the number of its images.

        Raises:
            ValueError: the row does not have one entry per task, a count is impossible, or the number of
                images of a task is not that of the row before.
        """
        row = list(zip(correct, total, strict=True))
        before = [size for _, size in self._counts[-1]] if self._counts else []
        possible = all(0 <= right <= size and size for right, size in row)
        if not possible or len(row) != len(before) + 1 or list(total[:-1]) != before:
            raise ValueError(
                f"{correct} of {total} test images correct cannot follow a row with {before} test images"
            )
        self._counts.append(row)

    @property
    def rows(self) -> list[list[float]]:
        """a[t][k] in percent; row t has t + 1 entries."""
        return [[100.0 * right / size for right, size in row] for row in self._counts]

    @property
    def curve(self) -> list[float]:
        """A_t in percent: accuracy over all images of the classes seen up to task t."""
        return [100.0 * sum(right for right, _ in row) / sum(size for _, size in row) for row in self._counts]

    def summary(self) -> dict[str, float | None]:
        """The metrics by key after at least one task; forgetting and bwt are None for one task.

        final       A_N, accuracy over all classes after the last task (percent)
        average     mean of A_t over tasks (percent)
        forgetting  mean_{k<N} (max_{k<=t<N} a[t][k] - a[N][k]) (points)
        bwt         backward transfer mean_{k<N} (a[N][k] - a[k][k]) (points)
        plasticity  mean_k a[k][k], accuracy on each task just after learning it (percent)
        """
        a, last = self.rows, len(self._counts) - 1
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
    """Mean and sample standard deviation (ddof = 1; NaN for one value) of at least one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Key -> value of every metric and cost of a run that is a finite number."""
    parameters = {f"parameters_{part}": count for part, count in result["parameters"].items()}
    values = result["metrics"] | parameters | result["cost"]
    keys = [*result["metrics"], *(spec.key for spec in COSTS)]
    return {key: values[key] for key in keys if is_number(values.get(key))}


def number_of_tasks(result: Mapping[str, Any], metrics: Sequence[MetricSpec]) -> int:
    """Tasks of a run, as many as a metric per task has values; 1 where there is none."""
    return next((len(result[spec.key]) for spec in metrics if spec.per_task), 1)


def checked_result(
    folder: Path, metrics: Sequence[MetricSpec], way_out: str = "restore it"
) -> dict[str, Any]:
    """The `result.json` of a run. UserError: it is absent or damaged; way_out: what to do then."""
    result = read_json(folder / RESULT, way_out)
    if fault := fault_of(result, metrics):
        raise UserError(f"{folder / RESULT} is damaged ({fault}): {way_out}")
    return result


def fault_of(result: Mapping[str, Any], metrics: Sequence[MetricSpec]) -> str | None:
    """Why a result cannot be in a report, or None; metrics: of its run's method, the main one first."""
    if not isinstance(result.get("seed"), int):
        return 'it has no "seed"'
    for part in ("metrics", "parameters", "weights", "cost"):
        if not isinstance(result.get(part), dict):
            return f'it has no "{part}"'
    if not is_number(result["metrics"].get(metrics[0].key)):
        return f"it has no {metrics[0].name}"
    for spec in metrics:
        values = result.get(spec.key)
        if spec.per_task and not (isinstance(values, list) and values and all(map(is_number, values))):
            return f'its "{spec.key}" is no list of numbers'
    return None


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
