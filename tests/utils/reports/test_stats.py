"""utils.reports.stats: closed formulas, worked examples, and a simulation that counts how often the interval is right."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from utils.reports.stats import CONFIDENCE, MOST_TIED, holm, interval, paired


def seeded(values) -> dict[int, float]:
    return dict(enumerate(values))


def test_interval_is_the_closed_formula():
    values = [44.1, 45.3, 43.2, 46.0]
    estimate = interval(values)
    assert (estimate.n, estimate.mean) == (4, pytest.approx(44.65))
    assert estimate.std == pytest.approx(math.sqrt(sum((v - 44.65) ** 2 for v in values) / 3))
    half = 3.182446305 * estimate.std / 2  # the t quantile 0.975 with 3 degrees of freedom, from a table
    assert (estimate.low, estimate.high) == (pytest.approx(44.65 - half), pytest.approx(44.65 + half))
    wider = interval(values, confidence=0.99)
    assert wider.high - wider.mean == pytest.approx(5.840909310 * estimate.std / 2)


def test_one_value_has_a_mean_alone_and_none_is_an_error():
    estimate = interval([3.0])
    assert (estimate.n, estimate.mean, estimate.std, estimate.low, estimate.high) == (
        1,
        3.0,
        None,
        None,
        None,
    )
    with pytest.raises(ValueError, match="no values"):
        interval([])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.5])
def test_a_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval([1.0, 2.0], confidence)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 5))
    held = np.mean([estimate.low <= 3.0 <= estimate.high for estimate in map(interval, draws.tolist())])
    assert abs(held - CONFIDENCE) < 0.015  # three standard errors of the simulation


def test_paired_agrees_with_the_formula_and_with_scipy():
    ours, theirs = [44.1, 45.3, 43.2, 46.0, 44.4], [43.0, 44.9, 43.5, 44.1, 43.7]
    result = paired(seeded(ours), seeded(theirs))
    differences = np.subtract(ours, theirs)
    assert (result.n, result.mean) == (5, pytest.approx(differences.mean()))
    assert result.std == pytest.approx(differences.std(ddof=1))
    reference = stats.ttest_rel(ours, theirs)
    assert result.p_t == pytest.approx(reference.pvalue)
    assert (result.low, result.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    t = result.mean * math.sqrt(5) / result.std
    assert result.p_t == pytest.approx(2 * stats.t.sf(abs(t), 4))
    # |d| = 0.3 0.4 0.7 1.1 1.9 with the smallest negative: W = 1, and 2 of 32 signs on each side give no more
    assert result.p_wilcoxon == pytest.approx(4 / 32)


def test_pairing_is_by_seed_and_over_common_seeds_alone():
    ours, theirs = {1995: 3.0, 1993: 1.0, 7: 100.0}, {1993: 0.5, 1994: -50.0, 1995: 1.5}
    result = paired(ours, theirs)
    assert (result.n, result.mean, result.std) == (2, 1.0, pytest.approx(math.sqrt(0.5)))
    assert paired({1: 1.0}, {2: 1.0}) is None and paired({}, {}) is None


def test_pairing_sees_a_small_difference_under_large_variation_of_seeds():
    seeds = np.random.default_rng(1).normal(0, 10, 5)
    ours = seeds + [1.0, 1.1, 0.9, 1.05, 0.95]
    assert paired(seeded(ours), seeded(seeds)).excludes_zero
    assert stats.ttest_ind(ours, seeds).pvalue > 0.5


def test_one_pair_has_a_mean_alone():
    result = paired({1: 2.0}, {1: 5.0})
    assert (result.n, result.mean) == (1, -3.0)
    assert [result.std, result.low, result.high, result.p_t, result.p_wilcoxon] == [None] * 5
    assert not result.excludes_zero


@pytest.mark.parametrize("offset", [0.5, 0.0, 0.1])
def test_differences_that_no_seed_changes_have_no_interval_and_no_p(offset):
    """0.1 is no binary fraction: over values of different sizes the differences are equal only to rounding."""
    theirs = {seed: 10.3 * 3**seed for seed in range(6)}
    ours = {seed: value + offset for seed, value in theirs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = paired(ours, theirs)
    assert (result.n, result.std, result.same) == (6, 0.0, True)
    assert result.mean == pytest.approx(offset)
    assert [result.low, result.high, result.p_t, result.p_wilcoxon] == [None] * 4
    assert not result.excludes_zero


def test_a_mean_of_values_that_no_seed_changes_has_no_interval():
    estimate = interval([70.1, 70.1, 70.1 * (1 + 2e-16)])
    assert (estimate.mean, estimate.std, estimate.low, estimate.high) == (
        pytest.approx(70.1),
        0.0,
        None,
        None,
    )
    assert estimate.same and not interval([70.1]).same and not interval([70.1, 70.2]).same


def test_small_differences_that_are_not_rounding_are_tested():
    result = paired(seeded([70.0, 70.00001, 70.0]), dict.fromkeys(range(3), 70.0))
    assert not result.same and result.low < 0 < result.high and 0 < result.p_t < 1


def test_the_signed_rank_test_is_exact_with_ties_and_zeros():
    """0.2, -0.2, 0.4 and 0: the tie is one only to rounding, the zero is left out, and 8 signs are counted."""
    result = paired(seeded([1000.2, 0.1, 70.4, 80.0]), seeded([1000.0, 0.3, 70.0, 80.0]))
    # mean ranks 1.5 1.5 3; the positive sum 4.5 is reached by 3 of the 8 signs; twice that
    assert result.n == 4 and result.p_wilcoxon == pytest.approx(6 / 8)


def test_many_tied_differences_have_no_exact_p():
    values = [float(i % 3 + 1) for i in range(MOST_TIED + 1)]
    assert paired(seeded(values), dict.fromkeys(range(len(values)), 0.0)).p_wilcoxon is None
    untied = [float(i + 1) for i in range(MOST_TIED + 1)]
    p = paired(seeded(untied), dict.fromkeys(range(len(untied)), 0.0)).p_wilcoxon
    assert p == pytest.approx(2 / 2 ** len(untied))


def test_holm_against_a_worked_example():
    """Sorted 0.005 0.01 0.03 0.04 times 4 3 2 1 is 0.02 0.03 0.06 0.04, made never to fall: 0.02 0.03 0.06 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_stays_a_probability_and_leaves_out_what_is_missing():
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None, 0.01, None, 0.02]) == [None, pytest.approx(0.02), None, pytest.approx(0.02)]
    assert holm([]) == [] and holm([0.03]) == [0.03]


def test_holm_bounds_the_chance_of_one_false_call():
    """Ten comparisons without any difference, many times over: at most about 5 % of families call one."""
    p_values = np.random.default_rng(2).uniform(size=(2000, 10))
    assert np.mean([min(holm(family)) < 0.05 for family in p_values.tolist()]) < 0.065
    assert np.mean(p_values.min(axis=1) < 0.05) > 0.3  # unadjusted
