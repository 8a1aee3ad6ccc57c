"""utils.analysis.probes: probes against explicit solutions and chance; units that stand for labels."""

from collections.abc import Callable

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
    transfer_scores,
    unit_report,
)
from utils.training.random import rng


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng("test", seed), dtype=torch.float64)


def clusters(n: int = 120, spread: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four classes around corners, in 10 numbers of very different size."""
    labels = torch.arange(n) % 4
    corners = 3 * F.one_hot(labels, 10)
    return (corners + spread * normal(n, 10, seed=seed)) * torch.logspace(-3, 3, 10) + 5, labels


def several(n: int = 150, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three labels a sample, each of them linear in 8 numbers."""
    x = normal(n, 8, seed=seed)
    return x, (x[:, :3] > torch.tensor([0.0, 0.5, 1.0])).long()


def test_what_is_separable_is_read_on_samples_that_were_not_fitted() -> None:
    x, labels = clusters()
    assert probe_score(fit_probe(x[:80], labels[:80]), x[80:], labels[80:]) == 1.0
    x, labels = several(800)
    score = probe_score(fit_probe(x[:600], labels[:600]), x[600:], labels[600:])
    assert score > 0.95 > 1.5 * chance_score(labels)


@pytest.mark.parametrize(("make", "tolerance"), [(clusters, 0.04), (several, 0.06)])
def test_shuffled_labels_are_read_no_better_than_chance(make: Callable, tolerance: float) -> None:
    """Ten shufflings of 200 test images: the mean accuracy has a standard error of 1 percent."""
    x, labels = make(400)
    orders = [labels[torch.randperm(400, generator=rng("test", seed))] for seed in range(10)]
    found = [probe_score(fit_probe(x[:200], order[:200]), x[200:], order[200:]) for order in orders]
    assert np.mean(found) == pytest.approx(chance_score(labels), abs=tolerance)


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

    probe = fit_probe(x, labels)
    assert probe.ridge == min(RIDGES, key=left_out_error)
    torch.testing.assert_close(probe.scores(x), z @ solved(z, y - y.mean(0), probe.ridge) + y.mean(0))


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


def test_transfer_needs_the_same_coordinates() -> None:
    """Read by a probe of its own, a rotated copy is as good; by the other's probe it is not."""
    x, labels = clusters(200)
    x = (x - x.mean(0)) / x.std(0)
    turned = x @ torch.linalg.qr(normal(10, 10))[0]
    train, test = torch.arange(0, 200)[:100], torch.arange(100, 200)
    scores = transfer_scores([x, turned, x], labels, train, test)
    assert (
        scores[0, 0] == scores[0, 2] == scores[2, 0] == 1.0 == scores[1, 1]
        and scores[0, 1] < 0.8 > scores[1, 0]
    )
    probe = fit_probe(x[train], labels[train])
    assert scores[0, 1] == probe_score(probe, turned[test], labels[test])


@pytest.mark.parametrize("shapes", [((1, 4), (1,)), ((6, 4), (5,)), ((6,), (6,))])
def test_what_cannot_be_fitted_is_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, labels = normal(*shapes[0]), torch.zeros(shapes[1], dtype=torch.int64)
    for fit in (fit_probe, lambda x, labels: unit_report(x, labels, rng("test", 0))):
        with pytest.raises(ValueError):
            fit(x, labels)


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
    always = unit_report(units, torch.ones_like(labels), rng("test", 1), 3)
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
    assert unit_report(units, labels, rng("test", 0), 3).purity == pytest.approx(purity)
