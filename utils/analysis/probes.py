"""Linear probes of representations, and correlations of their units with labels.

    probe = fit_probe(features, labels)              # classes (n,), or labels (n, P) of 0 and 1
    probe_score(probe, other_features, other_labels)     # accuracy, or mean average precision: transfer
    report = unit_report(activities, labels, generator)  # units (n, k) against labels (n, P), with chance

Probes are ridge regressions of the labels, solved in closed form in float64 on the CPU; the ridge is chosen
by leave-one-out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.analysis.ridge import fit_ridge

RIDGES = [10.0**k for k in range(-6, 5)]  # candidates, relative to the number of samples
CONFIDENCE = 0.95  # of the threshold that correlations by chance stay below
PERMUTATIONS = 200  # of labels; no p is below 1 / (1 + PERMUTATIONS)


@dataclass(frozen=True)
class Probe:
    """A linear probe, scores(x) = x W + b."""

    weights: Tensor  # W (d, C), float64
    offset: Tensor  # b (C,), float64

    def scores(self, features: Tensor) -> Tensor:
        """A score for each class or label, (n, d) -> (n, C) float64: the larger, the likelier."""
        return features.detach().cpu().double() @ self.weights + self.offset


def fit_probe(features: Tensor, labels: Tensor) -> Probe:
    """Ridge regression of labels on features (n, d) that were brought to mean 0 and deviation 1.

    With X the standardised features, Y the labels (one-hot classes, or 0 and 1) less their mean, and ridge r:
    W = (X^T X + n r I)^-1 X^T Y, where r is the candidate with the smallest squared leave-one-out error.
    Features that do not vary take no part.

    labels: classes (n,) from 0 on, int64, or (n, P) of 0 and 1.
    """
    x = features.detach().cpu().double()
    targets = (F.one_hot(labels.cpu()) if labels.dim() == 1 else labels.cpu()).double()
    centre, spread, mean = x.mean(dim=0), x.std(dim=0), targets.mean(dim=0)
    varies = spread > torch.finfo(features.dtype).eps * centre.abs()
    scale = torch.where(varies, 1 / spread.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
    fit = fit_ridge((x - centre) * scale, targets - mean, RIDGES, unit=len(x))
    weights = scale[:, None] * (fit.left @ fit.right)
    return Probe(weights, mean - centre @ weights)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each label, sum_i (R_i - R_(i-1)) P_i, (P,).

    P_i and R_i are precision and recall of the samples down to i, from the highest score down, those of one
    score together. NaN for a label that does not occur. scores (n, P), labels (n, P) of 0 and 1.
    """
    scores, truth = scores.detach().cpu(), labels.cpu().double()
    order = scores.argsort(dim=0, descending=True, stable=True)
    ranked, hits = scores.gather(0, order), truth.gather(0, order).cumsum(dim=0)  # (n, P)
    taken = torch.arange(1, len(truth) + 1, dtype=torch.float64)[:, None]
    last_of_score = torch.cat([ranked[1:] != ranked[:-1], torch.ones_like(ranked[:1], dtype=torch.bool)])
    result = []
    for precision, found, ends in zip((hits / taken).T, hits.T, last_of_score.T, strict=True):
        recall = found[ends] / found[-1]
        result.append((precision[ends] * recall.diff(prepend=recall.new_zeros(1))).sum())
    return torch.stack(result)


def probe_score(probe: Probe, features: Tensor, labels: Tensor) -> float:
    """Score from 0 to 1 of a probe on these features, which need not be those it was fitted on.

    Accuracy for classes (n,); for labels (n, P) the mean of `average_precision` over those that occur.
    """
    scores = probe.scores(features)
    if labels.dim() == 1:
        return float((scores.argmax(dim=1) == labels.cpu()).double().mean())
    return float(average_precision(scores, labels).nanmean())


def chance_score(labels: Tensor) -> float:
    """`probe_score` by chance: share of the commonest class, or mean frequency of the labels."""
    if labels.dim() == 1:
        return float(labels.bincount().max() / len(labels))
    frequency = labels.double().mean(dim=0)
    return float(frequency[frequency > 0].mean())


def transfer_scores(representations: Sequence[Tensor], labels: Tensor, train: Tensor, test: Tensor) -> Tensor:
    """Scores (m, m) float64 of probes over m representations (n, d) of the same samples.

    Entry (i, j): fitted on the rows `train` of representation i, scored on the rows `test` of j.
    """
    scores = torch.empty(len(representations), len(representations), dtype=torch.float64)
    for i, fitted in enumerate(representations):
        probe = fit_probe(fitted[train], labels[train])
        for j, features in enumerate(representations):
            scores[i, j] = probe_score(probe, features[test], labels[test])
    return scores


# ------------------------------------------------------------------------------------------------------------
# Units


@dataclass(frozen=True)
class UnitReport:
    """Correlations of the k units of a representation with P labels, compared with permuted labels.

    r is Pearson's, of units and labels that are 0 or 1 (point-biserial); 0 where one of them does not vary.
    Purity is the mean of max_l r_l^2 / sum_l r_l^2 over units that correlate with any label: 1 if each does
    with one label alone, 1 / P if with all equally; NaN without such units.
    """

    correlation: Tensor  # (k, P)
    mean_activity: Tensor  # (k,)
    active_share: Tensor  # (k,), of the samples on which a unit is not zero
    best_unit: Tensor  # (P,) index of the unit with the largest |r|
    best: Tensor  # (P,) its r
    threshold: Tensor  # (P,) `CONFIDENCE` quantile by chance of the largest |r| over all units
    p: Tensor  # (P,) probability by chance of a best unit with at least this |r|
    purity: float
    purity_by_chance: float  # of permuted labels, on average

    @property
    def dead(self) -> int:
        """Number of units that are zero on every sample."""
        return int((self.active_share == 0).sum())

    @property
    def aligned(self) -> float:
        """Share of the labels whose best unit is beyond the threshold of chance."""
        return float((self.best.abs() > self.threshold).double().mean())


def unit_report(activities: Tensor, labels: Tensor, generator: torch.Generator) -> UnitReport:
    """Correlations of units (n, k) with labels (n, P) of 0 and 1, beside those with permuted labels.

    A permutation moves all labels of a sample together, and the largest |r| over units counts, as in `best`.
    A unit that is exactly 0 is not active. generator: draws the permutations, on the CPU.
    """
    units, wanted = _standardised(activities), _standardised(labels)
    correlation = units.T @ wanted
    largest, best_unit = correlation.abs().max(dim=0)
    by_chance, purities = [], []
    for _ in range(PERMUTATIONS):
        order = torch.randperm(len(wanted), generator=generator)
        permuted = units.T @ wanted[order]
        by_chance.append(permuted.abs().amax(dim=0))
        purities.append(_purity(permuted))
    chance = torch.stack(by_chance)  # (permutations, P)
    activities = activities.detach().cpu().double()
    return UnitReport(
        correlation=correlation,
        mean_activity=activities.mean(dim=0),
        active_share=(activities != 0).double().mean(dim=0),
        best_unit=best_unit,
        best=correlation.gather(0, best_unit[None])[0],
        threshold=chance.quantile(CONFIDENCE, dim=0),
        p=(1 + (chance >= largest).sum(dim=0)) / (1 + PERMUTATIONS),
        purity=_purity(correlation),
        purity_by_chance=sum(purities) / len(purities),
    )


def _standardised(values: Tensor) -> Tensor:
    """Columns with mean 0 and length 1, so that products are correlations; 0 where a column does not vary."""
    x = values.detach().cpu().double()
    centred = x - x.mean(dim=0)
    length = centred.norm(dim=0)
    varies = length > 1e-12 * x.norm(dim=0)
    return torch.where(varies, centred / length.where(varies, 1.0), 0.0)


def _purity(correlation: Tensor) -> float:
    """`UnitReport.purity` of correlations (k, P); NaN where all are zero."""
    squares = correlation.square()
    total = squares.sum(dim=1)
    return float((squares.amax(dim=1)[total > 0] / total[total > 0]).mean())
