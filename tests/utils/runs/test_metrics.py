"""utils.runs.metrics: every number against a hand-worked example."""

import pytest

from utils.runs.metrics import AccuracyMatrix


def matrix_of(*rows: tuple[list[int], list[int]]) -> AccuracyMatrix:
    matrix = AccuracyMatrix()
    for correct, total in rows:
        matrix.add(correct, total)
    return matrix


def three_tasks() -> AccuracyMatrix:
    """Task sizes 10, 20, 10, so that the mean over images differs from the mean over tasks."""
    sizes = [10, 20, 10]
    return matrix_of(([9], sizes[:1]), ([10, 16], sizes[:2]), ([7, 15, 10], sizes))


def test_every_metric_against_hand_worked_values() -> None:
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


def test_forgetting_is_negative_when_the_last_task_helps() -> None:
    found = matrix_of(([5], [10]), ([8, 10], [10, 10])).summary()
    assert (found["forgetting"], found["bwt"]) == pytest.approx((-30.0, 30.0))


def test_one_task_has_no_forgetting_and_no_bwt() -> None:
    same = dict.fromkeys(("final", "average", "plasticity"), 75.0)
    assert matrix_of(([3], [4])).summary() == same | {"forgetting": None, "bwt": None}


@pytest.mark.parametrize(
    ("correct", "total"),
    [
        ([1], [10]),
        ([1, 2], [10]),
        ([1, 11], [10, 10]),
        ([-1, 1], [10, 10]),
        ([1, 0], [10, 0]),
        ([1, 1], [9, 10]),
    ],
)
def test_impossible_rows_are_refused_and_leave_the_matrix_as_it_was(
    correct: list[int], total: list[int]
) -> None:
    matrix = matrix_of(([5], [10]))
    with pytest.raises(ValueError):
        matrix.add(correct, total)
    assert matrix.rows == [[50.0]]
