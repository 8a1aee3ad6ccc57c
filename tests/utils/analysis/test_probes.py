"""utils.analysis.probes: probes against explicit solutions and chance; units that stand for labels."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from utils.analysis.probes import (
    RIDGES,
    average_precision,
    chance_score,
    fit_probe,
    probe_score,
    unit_report,
)
from utils.training.random import rng


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng("test", seed), dtype=torch.float64)


def clusters(n: int, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Four classes around corners, in 10 numbers of very different size."""
    labels = torch.arange(n) % 4
    corners = 3 * F.one_hot(labels, 10)
    return (corners + spread * normal(n, 10)) * torch.logspace(-3, 3, 10) + 5, labels


@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_the_probe_is_the_ridge_regression_that_leaving_out_each_sample_prefers(spread: float) -> None:
    """Every candidate refitted without every sample, and the best on all of them."""
    x, labels = clusters(16, spread)
    z, y = (x - x.mean(0)) / x.std(0), F.one_hot(labels).double()

    def solved(z: Tensor, y: Tensor, ridge: float) -> Tensor:
        return torch.linalg.solve(z.T @ z + 16 * ridge * torch.eye(10), z.T @ y)

    def left_out_error(ridge: float) -> float:
        error = 0.0
        for i in range(16):
            keep = torch.arange(16) != i
            centre, mean = z[keep].mean(0), y[keep].mean(0)
            predicted = mean + (z[i] - centre) @ solved(z[keep] - centre, y[keep] - mean, ridge)
            error += float((y[i] - predicted).square().sum())
        return error

    expected = z @ solved(z, y - y.mean(0), min(RIDGES, key=left_out_error)) + y.mean(0)
    for given in (labels, y):  # classes, or a label each
        torch.testing.assert_close(fit_probe(x, given).scores(x), expected)


def test_a_probe_does_not_depend_on_units_and_ignores_what_does_not_vary() -> None:
    x, labels = clusters(40)
    scores = fit_probe(x, labels).scores(x)
    changed = torch.cat([x * torch.logspace(3, -3, 10) - 8, torch.full((40, 2), 0.1)], 1)
    torch.testing.assert_close(fit_probe(changed, labels).scores(changed), scores)
    wide = torch.cat([x, normal(40, 100)], 1)  # more numbers than samples
    assert torch.isfinite(fit_probe(wide, labels).weights).all()


def test_average_precision_by_its_definition() -> None:
    scores, labels = normal(40, 3), (normal(40, 3, seed=1) > 0.4).long()
    for column in range(3):
        order = sorted(range(40), key=lambda i: -float(scores[i, column]))
        hits, total = 0, 0.0
        for rank, i in enumerate(order, start=1):
            if labels[i, column]:
                hits += 1
                total += hits / rank
        expected = total / int(labels[:, column].sum())
        assert float(average_precision(scores, labels)[column]) == pytest.approx(expected)


def test_average_precision_of_perfect_reversed_tied_and_absent_labels() -> None:
    labels = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = torch.tensor([[4.0, 1, 5, 1], [3, 2, 5, 2], [2, 3, 5, 3], [1, 4, 5, 4]])
    found = average_precision(scores, labels)
    assert found[:3].tolist() == pytest.approx([1.0, (1 / 3 + 2 / 4) / 2, 0.5]) and found[3].isnan()
    probe = fit_probe(scores, labels)
    assert probe_score(probe, scores, labels) == pytest.approx(
        float(average_precision(probe.scores(scores), labels)[:3].mean())
    )
    assert chance_score(labels) == 0.5 and chance_score(torch.tensor([0, 0, 0, 1])) == 0.75


# --- units --------------------------------------------------------------------------------------------------


def sparse_units(n: int = 400) -> tuple[Tensor, Tensor]:
    """Units 0 to 2 follow one label each, 3 is noise, 4 is dead, 5 follows two labels."""
    labels = (normal(n, 3) > 0.5).long()
    noise = normal(n, 6, seed=1).abs()
    units = torch.cat([labels, torch.zeros(n, 2), labels[:, :1] + labels[:, 1:2]], 1) + 0.2 * noise
    units[:, 3] = noise[:, 3]
    units[:, 4] = 0
    return units, labels


def test_units_that_stand_for_labels_are_found_and_told_from_chance() -> None:
    units, labels = sparse_units()
    report = unit_report(units, labels, rng("test", 1))
    for unit, label in ((0, 0), (3, 1), (5, 1)):
        expected = stats.pointbiserialr(labels[:, label].numpy(), units[:, unit].numpy()).statistic
        assert float(report.correlation[unit, label]) == pytest.approx(expected)
    assert report.correlation.shape == (6, 3) and report.correlation[4].tolist() == [0, 0, 0]
    assert report.best_unit.tolist() == [0, 1, 2] and (report.best > 0.8).all()
    assert report.dead == 1 and report.active_share.tolist() == [1, 1, 1, 1, 0, 1]
    torch.testing.assert_close(report.mean_activity, units.double().mean(0))
    assert report.aligned == 1.0 and report.p.tolist() == pytest.approx([1 / 201] * 3)
    assert report.purity > report.purity_by_chance
    always = unit_report(units, torch.ones_like(labels), rng("test", 1))
    assert always.correlation.abs().max() == 0 and np.isnan(always.purity)


def test_noise_is_not_told_from_chance_however_many_units_there_are() -> None:
    """The threshold is that of the best of 300 units: of five labels of noise hardly one is beyond it."""
    labels = (normal(100, 5, seed=3) > 0).long()
    report = unit_report(normal(100, 300, seed=4), labels, rng("test", 2))
    assert report.best.abs().min() > 2 / 100**0.5  # a single unit would seem significant
    assert report.aligned <= 0.2 and report.p.min() > 0.01
    assert report.purity == pytest.approx(report.purity_by_chance, abs=0.05)


@pytest.mark.parametrize(("together", "purity"), [(False, 1.0), (True, 0.5)])
def test_purity_from_one_label_to_all_alike(together: bool, purity: float) -> None:
    labels = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(20, 1)
    units = (labels.sum(1, keepdim=True) if together else labels).double()
    assert unit_report(units, labels, rng("test", 0)).purity == pytest.approx(purity)
