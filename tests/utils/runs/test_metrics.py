"""utils.runs.metrics: every number against a hand-worked example."""

import math

import pytest

from utils.runs.metrics import AccuracyMatrix, mean_std


def three_tasks() -> AccuracyMatrix:
    """Task sizes 10, 20, 10, so that the mean over images differs from the mean over tasks."""
    matrix = AccuracyMatrix()
    matrix.add([9], [10])  # 90
    matrix.add([10, 16], [10, 20])  # 100 80, all: 26/30
    matrix.add([7, 15, 10], [10, 20, 10])  # 70 75 100, all: 32/40
    return matrix


def test_every_metric_against_hand_worked_values():
    matrix = three_tasks()
    assert matrix.rows == [[90.0], [100.0, 80.0], [70.0, 75.0, 100.0]]
    assert matrix.curve == pytest.approx([90.0, 100 * 26 / 30, 80.0])
    assert matrix.summary() == {
        "final": 80.0,
        "average": pytest.approx((90 + 100 * 26 / 30 + 80) / 3),
        "forgetting": pytest.approx(((100 - 70) + (80 - 75)) / 2),  # from the best, not from the diagonal
        "bwt": pytest.approx(((70 - 90) + (75 - 80)) / 2),
        "plasticity": pytest.approx((90 + 80 + 100) / 3),
    }


def test_forgetting_is_negative_when_the_last_task_helps():
    matrix = AccuracyMatrix()
    matrix.add([5], [10])
    matrix.add([8, 10], [10, 10])
    assert matrix.summary()["forgetting"] == pytest.approx(-30.0)
    assert matrix.summary()["bwt"] == pytest.approx(30.0)


def test_one_task_has_no_forgetting_and_no_bwt():
    matrix = AccuracyMatrix()
    matrix.add([3], [4])
    same = dict.fromkeys(("final", "average", "plasticity"), 75.0)
    assert matrix.summary() == same | {"forgetting": None, "bwt": None}


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


def test_mean_std():
    assert mean_std([2.0, 4.0, 6.0]) == (4.0, 2.0)
    mean, std = mean_std([5])
    assert mean == 5.0 and math.isnan(std)
    with pytest.raises(ValueError, match="no values"):
        mean_std([])
