"""utils.reports.stats: what has an interval and a p, and what must not have one."""

import math
import warnings
from dataclasses import astuple

import numpy as np
import pandas as pd
import pytest

from utils.reports.stats import Estimate, holm, mean_over_seeds, paired_difference


def pairs_of(ours: list[float], theirs: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"ours": ours, "theirs": theirs})


def test_a_difference_is_paired_and_its_interval_is_students() -> None:
    """A small difference under large variation of seeds; p with 4 degrees of freedom has a closed form."""
    theirs, differences = [30.0, 50.0, 41.0, 62.0, 55.5], [0.3, -0.4, 0.7, 1.1, 1.9]
    std = np.std(differences, ddof=1)
    half = 2.776445105 * std / math.sqrt(5)  # the t quantile 0.975 with 4 degrees of freedom, from a table
    t = 0.72 * math.sqrt(5) / std
    x = t / math.sqrt(4 + t**2)
    expected = [5, 0.72, std, 0.72 - half, 0.72 + half, 1 - 1.5 * x + 0.5 * x**3]
    found = paired_difference(pairs_of([30.3, 49.6, 41.7, 63.1, 57.4], theirs))
    assert astuple(found)[:-1] == pytest.approx(expected)
    assert astuple(mean_over_seeds(differences))[:-1] == pytest.approx(expected)
    assert found.p_wilcoxon == pytest.approx(6 / 32)  # sums of negative ranks 0, 1, 2: three on each side


def test_nothing_and_one_value_have_no_interval_and_no_p() -> None:
    assert mean_over_seeds([]) == paired_difference(pairs_of([], [])) == Estimate()
    assert mean_over_seeds([3.0]) == Estimate(1, 3.0)
    assert paired_difference(pairs_of([2.0], [5.0])) == Estimate(1, -3.0)


@pytest.mark.parametrize("offset", [0.5, 0.0, 0.1])
def test_differences_that_no_seed_changes_have_no_interval_and_no_p(offset: float) -> None:
    """0.1 is no binary fraction: differences of values of different sizes are equal only to rounding."""
    theirs = np.array([10.3 * 3**seed for seed in range(6)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_difference(pairs_of(theirs + offset, theirs))
    assert found == Estimate(6, pytest.approx(offset), 0.0)
    one_number = mean_over_seeds([70.1, 70.1, 70.1 * (1 + 2e-16)])
    assert one_number == Estimate(3, pytest.approx(70.1), 0.0)


def test_small_differences_that_are_not_rounding_are_tested() -> None:
    found = paired_difference(pairs_of([70.0, 70.00001, 70.0], [70.0] * 3))
    assert found.low < 0 < found.high and 0 < found.p_t < 1


def test_the_signed_rank_test_is_exact_with_ties_and_zeros() -> None:
    """0.2, -0.2, 0.4 and 0: the tie is one only to rounding, the zero is left out, 8 signs are counted."""
    found = paired_difference(pairs_of([1000.2, 0.1, 70.4, 80.0], [1000.0, 0.3, 70.0, 80.0]))
    # mean ranks 1.5 1.5 3; the positive sum 4.5 is reached by 3 of the 8 signs; twice that
    assert found.n == 4 and found.p_wilcoxon == pytest.approx(6 / 8)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 0.04 times 1 would fall below 0.03 times 2
        ([0.6, 0.7], [1.0, 1.0]),
        ([math.nan, 0.01, math.nan, 0.02], [math.nan, 0.02, math.nan, 0.02]),
        ([], []),
    ],
)
def test_holm_against_worked_examples(p_values: list[float], adjusted: list[float]) -> None:
    found = holm(pd.Series(p_values, dtype=float))
    assert found.to_list() == pytest.approx(adjusted, nan_ok=True)
