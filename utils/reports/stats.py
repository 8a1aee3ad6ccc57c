"""Means over seeds and paired differences, each with its confidence interval; Holm's adjustment.

    mean_over_seeds([45.1, 44.2, 46.0])         # mean, std and 95 % interval
    paired_difference(pairs)                    # pairs: a row per seed, columns "ours" and "theirs"
    holm(pd.Series([0.01, 0.04, 0.03]))         # p values of several comparisons, adjusted

Two methods with the same seed see the same class order and the same images, so their difference varies less
than either of them: comparisons are paired by seed. Intervals and the t-test suppose values that are about
normal over seeds. Values that are the same in every seed have no interval and no p: their spread is unknown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from utils.runs.metrics import mean_std

CONFIDENCE = 0.95
ROUNDING = 1e-12  # of the largest value: smaller differences come from floating-point rounding
SAME, UNDECIDED, ONE_SEED, NO_NUMBER = "same in every seed", "undecided", "one seed", "no number"


@dataclass(frozen=True)
class Estimate:
    """A mean over n values, its standard deviation (ddof = 1), its confidence interval, and p of a mean of 0.

    Undefined numbers are NaN: all but the mean for a single value; interval and p for values that are all the
    same (std is 0). p_t is of the two-sided t-test, p_wilcoxon of the two-sided signed-rank test.
    """

    n: int = 0
    mean: float = math.nan
    std: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_t: float = math.nan
    p_wilcoxon: float = math.nan

    def verdict(self, above: str, below: str) -> str:
        """`above` or `below`: the side of zero on which the interval lies; else why neither."""
        if self.n < 2:
            return ONE_SEED if self.n else NO_NUMBER
        if self.std == 0:
            return SAME
        return above if self.low > 0 else below if self.high < 0 else UNDECIDED


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation s, t interval mean ± t_0.975 s / sqrt(n) with n - 1 degrees of freedom."""
    return _estimate(np.asarray(values, float), ROUNDING * max(map(abs, values), default=0.0))


def paired_difference(pairs: pd.DataFrame) -> Estimate:
    """Mean difference ours - theirs over seeds with interval, paired t-test and Wilcoxon's signed-rank test.

    pairs: columns "ours" and "theirs", a row per seed. Differences that differ by `ROUNDING` times the
    largest value, or less, count as the same. The signed-rank test leaves out zeros and is exact for up to 13
    differences, and for up to 50 without ties; its p cannot be below 2 / 2^n.
    """
    rounding = ROUNDING * float(pairs.abs().to_numpy().max(initial=0.0))
    differences = (pairs["ours"] - pairs["theirs"]).to_numpy()
    estimate = _estimate(differences, rounding)
    if math.isnan(estimate.p_t):
        return estimate
    from scipy import stats  # here: the report of a run, which has one seed, does without

    differences = np.round(differences / rounding) * rounding
    return replace(estimate, p_wilcoxon=float(stats.wilcoxon(differences[differences != 0]).pvalue))


def holm(p_values: pd.Series) -> pd.Series:
    """Holm's step-down adjustment of the p values of one family of comparisons; missing ones are ignored.

    With p_(1) <= ... <= p_(m): adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)). Calling those below
    0.05 different calls one wrongly so with a probability of at most 0.05 in the whole family. Source: S.
    Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    family = p_values.dropna().sort_values()
    steps = family * np.arange(len(family), 0, -1)
    return steps.cummax().clip(upper=1.0).reindex(p_values.index)


def _estimate(values: np.ndarray, rounding: float) -> Estimate:
    """Mean and interval of the mean; values that differ by `rounding` at most are the same."""
    if not len(values):
        return Estimate()
    mean, std = mean_std(values.tolist())
    if len(values) == 1:
        return Estimate(1, mean)
    if np.ptp(values) <= rounding:
        return Estimate(len(values), mean, 0.0)
    from scipy import stats  # here, as above

    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return Estimate(len(values), mean, std, float(low), float(high), float(test.pvalue))
