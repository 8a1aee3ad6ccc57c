"""How sure a mean over seeds is, and how sure a difference between two methods is.

    interval([45.1, 44.2, 46.0])                           # mean, std and 95 % interval of one method
    paired({1993: 45.1, 1994: 44.2}, {1993: 44.0, 1994: 43.9})   # ours - theirs, seed by seed
    holm([0.01, 0.04, 0.03])                               # p values of several comparisons at once

Two methods with the same seed see the same class order and the same images, so their difference varies less than either
of them: comparisons are paired by seed. All intervals and the t-test suppose that values are about normal over seeds.
Values that are the same in every seed have no interval and no p: a seed that changes nothing draws no sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from utils.runs.metrics import mean_std

CONFIDENCE = 0.95
ROUNDING = 1e-12  # of the largest value: smaller differences come from floating-point rounding
MOST_TIED = 12  # differences whose 2^n signs are gone through one by one
SAME = "same in every seed"  # the verdict on a difference that no seed changes


@dataclass(frozen=True)
class Estimate:
    """A mean over n values, their standard deviation (ddof = 1), and the mean's confidence interval [low, high].

    std, low and high are None for a single value; low and high also for values that are all the same (std is 0).
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None

    @property
    def same(self) -> bool:
        """Whether there are several values, all the same to rounding."""
        return self.std == 0


@dataclass(frozen=True)
class Paired(Estimate):
    """An `Estimate` of the differences ours - theirs over seeds, and how likely such ones are by chance.

    Attributes:
        p_t: p of the two-sided paired t-test of mean difference 0; None for a single difference, and where all
            differences are the same.
        p_wilcoxon: p of the two-sided exact signed-rank test; None as `p_t`, and where it is not computed (see
            `paired`).
    """

    p_t: float | None
    p_wilcoxon: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether there is a confidence interval and it leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean, standard deviation s (ddof = 1) and Student's t interval of a mean over n values.

    mean ± q s / sqrt(n), q the (1 + confidence) / 2 quantile of the t distribution with n - 1 degrees of freedom.
    Raises ValueError without values, or for a confidence outside (0, 1).
    """
    return _estimate(values, confidence, rounding=ROUNDING * max(map(abs, values), default=0.0))


def paired(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = CONFIDENCE
) -> Paired | None:
    """Difference ours - theirs over the seeds that both have; None where they have none in common.

    d_i = ours_i - theirs_i, with the interval of `interval`. The t-test takes t = mean(d) sqrt(n) / std(d) with n - 1
    degrees of freedom. The signed-rank test ranks |d_i|, leaves out zeros, gives ties their mean rank, and compares
    with all 2^n signs; ties among more than `MOST_TIED` differences are not gone through. Its p cannot be below
    2 / 2^n: with five seeds it never reaches 0.05. Where all d_i are the same there is no interval and no p.

    Differences that differ by `ROUNDING` times the largest value, or less, count as the same.
    Raises ValueError for a confidence outside (0, 1).
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    pairs = np.array([[ours[seed], theirs[seed]] for seed in seeds])  # (n, 2)
    differences, rounding = pairs[:, 0] - pairs[:, 1], ROUNDING * float(np.abs(pairs).max())
    estimate = _estimate(differences.tolist(), confidence, rounding)
    tested = estimate.low is not None
    return Paired(
        **vars(estimate),
        p_t=float(stats.ttest_1samp(differences, 0.0).pvalue) if tested else None,
        p_wilcoxon=_signed_rank_test(differences, rounding) if tested else None,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of the p values of one family of comparisons, in the order given.

    With p_(1) <= ... <= p_(m): adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)). Calling those below 0.05
    different calls one wrongly so with a probability of at most 0.05 in the whole family. None stays None and is no
    member. Source: S. Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    family = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, index) in enumerate(family):
        largest = max(largest, min(1.0, (len(family) - rank) * p))
        adjusted[index] = largest
    return adjusted


def _estimate(values: Sequence[float], confidence: float, rounding: float) -> Estimate:
    """The estimate of `interval`; values that differ by `rounding` at most are the same."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie between 0 and 1")
    mean, std = mean_std(values)
    if std is None:
        return Estimate(1, mean, None, None, None)
    if max(values) - min(values) <= rounding:
        return Estimate(len(values), mean, 0.0, None, None)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    return Estimate(len(values), mean, std, float(low), float(high))


def _signed_rank_test(differences: np.ndarray, rounding: float) -> float | None:
    """p of the exact two-sided Wilcoxon signed-rank test; differences: (n,), not all the same.

    Sizes that differ by `rounding` at most are tied, and sizes up to it are 0.
    """
    if rounding:
        differences = np.round(differences / rounding) * rounding
    differences = differences[differences != 0]
    n = len(differences)
    if len(np.unique(np.abs(differences))) == n:
        return float(stats.wilcoxon(differences, method="exact").pvalue)
    if n > MOST_TIED:
        return None
    return float(stats.wilcoxon(differences, method=stats.PermutationMethod(n_resamples=2**n)).pvalue)
