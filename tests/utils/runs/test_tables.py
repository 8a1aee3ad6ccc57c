"""utils.runs.tables: tables that show every number in its place and fit a terminal."""

import math

import numpy as np
import pytest

from tests.utils.runs.test_metrics import matrix_of, three_tasks
from utils.metric_catalogue import CLASS_INCREMENTAL
from utils.runs.tables import accuracy_table, seeds_table, summary_table, value_table


def test_accuracy_table_shows_every_number_in_its_place() -> None:
    table = accuracy_table(three_tasks())
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["task", "0", "task", "1", "task", "2", "total"],
        ["task", "0", "90.00", "90.00"],
        ["task", "1", "100.00", "80.00", "86.67"],
        ["task", "2", "70.00", "75.00", "100.00", "80.00"],
    ]
    assert all(line[-8:-6] == "  " for line in table.splitlines()[2:])  # columns are equally far apart


@pytest.mark.parametrize("tasks", [1, 10, 21])
def test_accuracy_table_fits_100_columns_and_loses_nothing(tasks: int) -> None:
    rows = [([100 if k == t else 90 - t + k for k in range(t + 1)], [100] * (t + 1)) for t in range(tasks)]
    table = accuracy_table(matrix_of(*rows))
    assert max(map(len, table.splitlines())) <= 100
    assert table.count(".") == tasks * (tasks + 1) // 2 + tasks


def test_values_are_folded_and_what_is_missing_stays_empty() -> None:
    values = np.array([[0.5] * 20, [math.nan] * 19 + [0.25]])
    tasks = [f"task {t}" for t in range(20)]
    lines = value_table("title", ["block 0", "block 10"], tasks, values, 2).splitlines()
    assert max(map(len, lines)) <= 100 and lines[-1].split() == ["block", "10", "0.25"]
    assert sum(line.count("task") for line in lines) == 20


def test_summary_table() -> None:
    title, *lines = summary_table(three_tasks(), 3, {"adapters": 1234567, "head": 770}).splitlines()
    values = [line.split()[-1] for line in lines]
    assert title == "Result after task 2"
    assert values == ["80.00", "85.56", "17.50", "-12.50", "90.00", "3", "1,234,567", "770"]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert summary_table(matrix_of(([1], [2])), 0, {}).count("n/a (one task)") == 2


def test_seeds_table_counts_numbers_alone_and_names_them_as_the_catalogue() -> None:
    shared = {"parameters": 120000, "curve": [1.0]}
    results = [
        {"seed": 1993, "metrics": {"final": 80.0, "bwt": -1.0, **shared}},
        {"seed": 7, "metrics": {"final": 82.0, "bwt": None, **shared}},
        {"seed": 8, "metrics": {"final": 84.0, "bwt": -2.0, **shared}},
    ]
    title, *lines = seeds_table(results, CLASS_INCREMENTAL).splitlines()
    assert title == "Mean ± std (n) over seeds 1993, 7, 8"
    assert lines[0].startswith("A_N, ") and lines[0].endswith("82.00 ± 2.00 (3)")
    assert lines[1].endswith("-1.50 ± 0.71 (2)") and lines[2].endswith("120,000.00 ± 0.00 (3)")
    assert len(lines) == 3  # the curve is no number
    assert seeds_table(results[:1], CLASS_INCREMENTAL).splitlines()[1].endswith(" 80.00 (1)")


def test_seeds_table_with_many_seeds_fits() -> None:
    results = [{"seed": 1000 + i, "metrics": {"final": 80.0 + i}} for i in range(40)]
    assert max(map(len, seeds_table(results, CLASS_INCREMENTAL).splitlines())) <= 100
