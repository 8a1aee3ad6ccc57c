"""utils.reports.stats: what has an interval and a p, and what must not have one."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest

from utils.reports.stats import Estimate, holm, mean_over_seeds, paired_difference


def pairs_of(ours: list[float], theirs: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"ours": ours, "theirs": theirs})


def test_the_interval_of_a_mean_is_students() -> None:
    found = mean_over_seeds([44.1, 45.3, 43.2, 46.0])
    assert (found.n, found.mean) == (4, pytest.approx(44.65))
    assert found.std == pytest.approx(math.sqrt((0.55**2 + 0.65**2 + 1.45**2 + 1.35**2) / 3))
    half = 3.182446305 * found.std / 2  # the t quantile 0.975 with 3 degrees of freedom, from a table
    assert (found.low, found.high) == (pytest.approx(44.65 - half), pytest.approx(44.65 + half))


def test_a_difference_is_paired() -> None:
    """A small difference under large variation of seeds; p with 4 degrees of freedom has a closed form."""
    theirs = [30.0, 50.0, 41.0, 62.0, 55.5]
    found = paired_difference(pairs_of([30.3, 49.6, 41.7, 63.1, 57.4], theirs))
    differences = np.array([0.3, -0.4, 0.7, 1.1, 1.9])
    assert (found.n, found.mean, found.std) == (
        5,
        pytest.approx(0.72),
        pytest.approx(differences.std(ddof=1)),
    )
    half = 2.776445105 * found.std / math.sqrt(5)
    assert (found.low, found.high) == (pytest.approx(0.72 - half), pytest.approx(0.72 + half))
    x = found.mean * math.sqrt(5) / found.std / math.sqrt(4 + (found.mean * math.sqrt(5) / found.std) ** 2)
    assert found.p_t == pytest.approx(1 - 1.5 * x + 0.5 * x**3)
    assert found.p_wilcoxon == pytest.approx(
        6 / 32
    )  # sums of negative ranks 0, 1, 2: three signs on each side


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
    assert found.same and found == Estimate(6, pytest.approx(offset), 0.0)
    one_number = mean_over_seeds([70.1, 70.1, 70.1 * (1 + 2e-16)])
    assert one_number.same and one_number == Estimate(3, pytest.approx(70.1), 0.0)


def test_small_differences_that_are_not_rounding_are_tested() -> None:
    found = paired_difference(pairs_of([70.0, 70.00001, 70.0], [70.0] * 3))
    assert not found.same and found.low < 0 < found.high and 0 < found.p_t < 1


def test_the_signed_rank_test_is_exact_with_ties_and_zeros() -> None:
    """0.2, -0.2, 0.4 and 0: the tie is one only to rounding, the zero is left out, 8 signs are counted."""
    found = paired_difference(pairs_of([1000.2, 0.1, 70.4, 80.0], [1000.0, 0.3, 70.0, 80.0]))
    # mean ranks 1.5 1.5 3; the positive sum 4.5 is reached by 3 of the 8 signs; twice that
    assert found.n == 4 and found.p_wilcoxon == pytest.approx(6 / 8)


@pytest.mark.parametrize(
    ("estimate", "verdict"),
    [
        (Estimate(), "no number"),
        (Estimate(1, 2.0), "one seed"),
        (Estimate(3, 2.0, 0.0), "same in every seed"),
        (Estimate(3, 2.0, 1.0, -0.5, 4.5), "undecided"),
        (Estimate(3, 2.0, 0.5, 0.5, 3.5), "above"),
        (Estimate(3, -2.0, 0.5, -3.5, -0.5), "below"),
    ],
)
def test_a_verdict_follows_from_the_interval(estimate: Estimate, verdict: str) -> None:
    assert estimate.verdict("above", "below") == verdict


def test_holm_against_a_worked_example() -> None:
    """Sorted 0.005 0.01 0.03 0.04 times 4 3 2 1 is 0.02 0.03 0.06 0.04, and never falls: the last is 0.06."""
    assert holm(pd.Series([0.01, 0.04, 0.03, 0.005])).to_list() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_stays_a_probability_and_leaves_out_what_is_missing() -> None:
    assert holm(pd.Series([0.6, 0.7])).to_list() == [1.0, 1.0]
    found = holm(pd.Series([math.nan, 0.01, math.nan, 0.02]))
    assert list(found.isna()) == [True, False, True, False] and found.dropna().to_list() == [0.02, 0.02]
    assert holm(pd.Series(dtype=float)).empty
