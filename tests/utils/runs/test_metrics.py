"""utils.runs.metrics: every number against a hand-worked example, and tables that fit a terminal."""

import json
import math

import pytest

from utils.errors import UserError
from utils.runs.metrics import AccuracyMatrix, accuracy_table, mean_std, seeds_table, summary_table


def three_tasks() -> AccuracyMatrix:
    """Task sizes 10, 20, 10, so that the mean over images differs from the mean over tasks."""
    matrix = AccuracyMatrix()
    matrix.add([9], [10])  # 90
    matrix.add([10, 16], [10, 20])  # 100 80, all: 26/30
    matrix.add([7, 15, 10], [10, 20, 10])  # 70 75 100, all: 32/40
    return matrix


def many_tasks(tasks: int) -> AccuracyMatrix:
    matrix = AccuracyMatrix()
    for t in range(tasks):
        matrix.add([100 if k == t else 90 - t + k for k in range(t + 1)], [100] * (t + 1))
    return matrix


def test_every_metric_against_hand_worked_values():
    matrix = three_tasks()
    assert matrix.rows == [[90.0], [100.0, 80.0], [70.0, 75.0, 100.0]]
    assert matrix.curve == pytest.approx([90.0, 100 * 26 / 30, 80.0])
    assert matrix.final == 80.0
    assert matrix.average == pytest.approx((90 + 100 * 26 / 30 + 80) / 3)
    assert matrix.forgetting == pytest.approx(
        ((100 - 70) + (80 - 75)) / 2
    )  # from the best, not from the diagonal
    assert matrix.bwt == pytest.approx(((70 - 90) + (75 - 80)) / 2)
    assert matrix.plasticity == pytest.approx((90 + 80 + 100) / 3)
    assert list(matrix.summary()) == ["final", "average", "forgetting", "bwt", "plasticity"]
    assert matrix.summary()["bwt"] == matrix.bwt


def test_forgetting_is_negative_when_the_last_task_helps():
    matrix = AccuracyMatrix()
    matrix.add([5], [10])
    matrix.add([8, 10], [10, 10])
    assert matrix.forgetting == pytest.approx(-30.0)
    assert matrix.bwt == pytest.approx(30.0)


def test_one_task_has_no_forgetting_and_no_bwt():
    matrix = AccuracyMatrix()
    matrix.add([3], [4])
    assert matrix.summary() == {
        "final": 75.0,
        "average": 75.0,
        "forgetting": None,
        "bwt": None,
        "plasticity": 75.0,
    }


def test_no_task_has_no_metrics():
    with pytest.raises(ValueError, match="no task has finished"):
        AccuracyMatrix().summary()


@pytest.mark.parametrize(
    ("correct", "total", "what"),
    [
        ([1], [10], "needs 2 entries"),
        ([1, 2], [10], "needs 2 entries"),
        ([1, 11], [10, 10], "task 1: 11 of 10"),
        ([-1, 1], [10, 10], "task 0: -1 of 10"),
        ([1, 0], [10, 0], "task 1: 0 of 0"),
        ([1, 1], [9, 10], "earlier tasks changed"),
    ],
)
def test_impossible_rows_are_refused_and_leave_the_matrix_as_it_was(correct, total, what):
    matrix = AccuracyMatrix()
    matrix.add([5], [10])
    with pytest.raises(ValueError, match=what):
        matrix.add(correct, total)
    assert matrix.rows == [[50.0]]


def test_json_round_trip_is_exact():
    matrix = three_tasks()
    again = AccuracyMatrix.from_json(json.loads(json.dumps(matrix.to_json())))
    assert again.to_json() == matrix.to_json()
    assert again.summary() == matrix.summary()
    again.add([1, 1, 1, 1], [10, 20, 10, 5])
    assert len(again) == 4 and len(matrix) == 3  # nothing shared


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"correct": [[1]]},
        {"correct": [[1]], "total": []},
        {"correct": [[1], [1]], "total": [[2], [2]]},
        {"correct": 3, "total": 3},
        {"correct": [["many"]], "total": [[2]]},
        {"correct": [[3]], "total": [[2]]},
    ],
)
def test_foreign_json_is_a_sentence(values):
    with pytest.raises(UserError, match="stored accuracies are not readable"):
        AccuracyMatrix.from_json(values)


def test_mean_std():
    assert mean_std([2.0, 4.0, 6.0]) == (4.0, 2.0)
    assert mean_std([5]) == (5.0, None)
    with pytest.raises(ValueError, match="no values"):
        mean_std([])


def test_accuracy_table_shows_every_number_in_its_place():
    assert accuracy_table(three_tasks()).splitlines() == [
        "Accuracy (%) after each task (rows) on the test images of each task (columns)",
        "after     task 0  task 1  task 2   total",
        "task 0     90.00                   90.00",
        "task 1    100.00   80.00           86.67",
        "task 2     70.00   75.00  100.00   80.00",
    ]


@pytest.mark.parametrize("tasks", [1, 4, 10, 11, 20, 21])
def test_accuracy_table_fits_100_columns_and_loses_nothing(tasks):
    matrix = many_tasks(tasks)
    table = accuracy_table(matrix)
    groups = table.split("\n\n")
    assert max(map(len, table.splitlines())) <= 100
    assert len(groups) == math.ceil(tasks / 10)
    for k in range(tasks):
        assert table.count(f"task {k} ") >= 2  # a column and at least one row
    cells = tasks * (tasks + 1) // 2
    totals = sum(1 for line in table.splitlines() if line.startswith("task"))
    assert table.count(".") == cells + totals


def test_summary_table():
    table = summary_table(three_tasks(), 3, {"adapters": 1234567, "head": 770})
    lines = table.splitlines()
    values = [line.split()[-1] for line in lines]
    assert values == ["80.00", "85.56", "17.50", "-12.50", "90.00", "3", "1,234,567", "770"]
    assert len({len(line) for line in lines}) == 1  # aligned
    single = AccuracyMatrix()
    single.add([1], [2])
    assert summary_table(single, 0, {}).count("n/a (one task)") == 2


def test_seeds_table():
    results = [
        {"seed": 1993, "metrics": {"final": 80.0, "bwt": -1.0, "parameters": 120000, "curve": [1.0]}},
        {"seed": 7, "metrics": {"final": 82.0, "bwt": None, "parameters": 120000, "curve": [1.0]}},
        {"seed": 8, "metrics": {"final": 84.0, "bwt": -2.0, "parameters": 120000, "curve": [1.0]}},
    ]
    table = seeds_table(results)
    title, *lines = table.splitlines()
    assert title == "Mean ± std (n) over seeds 1993, 7, 8"
    assert lines[0].endswith("82.00 ± 2.00 (3)")
    assert lines[1].endswith("-1.50 ± 0.71 (2)")
    assert lines[2].endswith("120,000 ± 0 (3)")
    assert len(lines) == 3  # the curve is no number
    one = seeds_table(results[:1])
    assert one.splitlines()[1].endswith(" 80.00 (1)")


def test_seeds_table_with_many_seeds_fits():
    table = seeds_table([{"seed": 1000 + i, "metrics": {"final": 80.0 + i}} for i in range(40)])
    assert max(map(len, table.splitlines())) <= 100
