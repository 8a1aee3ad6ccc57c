"""MoAL: the average of adapters in closed form, rumination, and the regression it feeds."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backbone.merging import MovingAverage
from models.base import Learner
from models.compared.moal import RuminatingHead
from models.ranpac import FIT, HELD, IMAGES
from tests.conftest import run_tasks

WIDTH = 5
Make = Callable[..., Learner]


def clusters(classes: range, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(20, WIDTH))
    labels = rng.permutation(np.repeat(list(classes), 12))
    return torch.tensor(centres[labels] + spread * rng.normal(size=(len(labels), WIDTH))), torch.tensor(
        labels
    )


def test_the_average_is_its_closed_form() -> None:
    """a_n = d^n a_0 + (1 - d) sum_s d^(n - s) w_s."""
    parameter, decay = nn.Parameter(torch.tensor([1.0, -2.0])), 0.7
    average, seen = MovingAverage([parameter]), []
    parameter.data += 1
    average.end(first=True)
    start = parameter.detach().clone()
    average.begin()
    for step in range(5):
        parameter.data += 0.3 * (step + 1)
        seen.append(parameter.detach().clone())
        average.update(decay)
    average.end(first=False)
    expected = decay**5 * start + (1 - decay) * sum(decay ** (4 - s) * w for s, w in enumerate(seen))
    torch.testing.assert_close(parameter.detach(), expected)
    average.begin()
    assert torch.equal(parameter.detach(), seen[-1])


def head(rumination: bool = True) -> RuminatingHead:
    return RuminatingHead(WIDTH, seed=3, dim=30, rumination=rumination)


def test_pseudo_features_are_those_of_the_nearest_new_class_moved_to_the_old_mean() -> None:
    ours = head(rumination=False)
    ours.add(*clusters(range(3), 0))
    new, labels = clusters(range(3, 6), 1)
    ours.add(new, labels)
    pseudo, of = ours.pseudo_features(new, labels, 3)
    means = {c: clusters(range(3), 0)[0][clusters(range(3), 0)[1] == c].mean(dim=0).numpy() for c in range(3)}
    means |= {c: new[labels == c].mean(dim=0).numpy() for c in range(3, 6)}
    expected = []
    for i in range(3):
        cosines = {
            j: means[i] @ means[j] / np.linalg.norm(means[i]) / np.linalg.norm(means[j]) for j in range(3, 6)
        }
        j = max(cosines, key=cosines.get)
        expected += [x.numpy() + means[i] - means[j] for x in new[labels == j]]
    np.testing.assert_allclose(pseudo.numpy(), np.array(expected))
    assert of.tolist() == [0] * 12 + [1] * 12 + [2] * 12


def test_the_random_features_in_memory_do_not_grow_with_the_old_classes() -> None:
    """Every old class has as many pseudo-features as there are images of the new class nearest to it."""
    ours, held_at_once, project = head(), [], head().random_features
    ours.add(*clusters(range(19), 0))
    new, count = clusters(range(1), 1)[0].repeat(20, 1), 240
    ours.random_features = lambda features: (held_at_once.append(len(features)), project(features))[1]
    ours.add(new, torch.full((count,), 19))
    assert sum(held_at_once) > 19 * count > 2 * IMAGES >= 2 * max(held_at_once)


def test_rumination_is_ridge_regression_with_the_misclassified_ones_at_once() -> None:
    """Those made from features that are held out of the choice of lambda are held out, too."""
    with_them, without = head(), head(rumination=False)
    for each in (with_them, without):
        each.add(*clusters(range(3), 0, spread=2.0))
    new, labels = clusters(range(3, 6), 1, spread=2.0)
    for each in (with_them, without):
        each.add(new, labels)
    held = torch.isin(torch.arange(len(new)), without.unseen_rows(len(new), 6))
    for part, rows in ((FIT, ~held), (HELD, held)):
        pseudo, of = without.pseudo_features(new[rows], labels[rows], 3)
        wrong = without(pseudo).argmax(dim=1) != of
        assert 0 < wrong.sum() < len(wrong)
        hidden = without.random_features(pseudo[wrong])
        torch.testing.assert_close(with_them.gram[part], without.gram[part] + hidden.T @ hidden)
        assert (with_them(pseudo[wrong]).argmax(dim=1) == of[wrong]).any()
    gram = with_them.gram.sum(dim=0) + with_them.ridge * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(with_them.weights, torch.linalg.solve(gram, with_them.cross.sum(dim=0)))


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_the_average_moves_when_it_is_told_to(every: str, make_sema: Make) -> None:
    """In epochs with decay d and n of them, a share d^n of the first task's weights stays."""
    learner = make_sema(model_name="moal", ranpac_dim=40, ema_every=every, ema_decay=0.5, func_epoch=2)
    run_tasks(learner, 1)
    updates, update = [], learner.average.update
    learner.average.update = lambda decay: (updates.append(decay), update(decay))
    run_tasks(learner, 2)
    steps = learner.inputs.batch_count(1, learner.config.batch_size)
    assert len(updates) == (2 * steps if every == "step" else 2)
    assert torch.equal(learner.average.weights(), learner.average.average)
    assert not torch.equal(learner.average.trained, learner.average.average)
