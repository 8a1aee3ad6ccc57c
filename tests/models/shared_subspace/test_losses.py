"""Losses of the shared-subspace experiment: values by independent computations, gradients by finite differences."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from models.shared_subspace.losses import (
    TASK_LOSSES,
    SharingLoss,
    group_projector,
    iou,
    projector_distances,
    soft_iou_loss,
    sparse_terms,
    weight_at,
)

LABELS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def probe(width: int, rank: int) -> Tensor:
    return torch.linalg.qr(normal(width, rank, seed=9))[0]


def principal(x: Tensor, rank: int) -> Tensor:
    """The projector by an eigendecomposition of the covariance."""
    centred = x - x.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors[:, -rank:] @ vectors[:, -rank:].T


# ---------------------------------------------------------------------------------------------------------------------
# The task


def test_iou_counts_cells() -> None:
    target = torch.zeros(4, 8, 8, dtype=torch.int64)
    guess = target.clone()
    target[0, 0, :4], guess[0, 0, 2:6] = 1, 1  # two of six cells
    target[1, 0, :4], guess[1, 0, :4] = 1, 2  # all of another colour
    guess[2, 3, 3] = 1  # nothing was there
    torch.testing.assert_close(iou(guess, target), torch.tensor([2 / 6, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(iou(target, target), torch.ones(4))


def test_soft_iou_is_iou_where_predictions_are_certain() -> None:
    target = torch.randint(0, 3, (6, 8, 8), generator=generator())
    guess = torch.where(torch.rand(6, 8, 8, generator=generator(1)) < 0.7, target, 0)
    certain = 60.0 * torch.nn.functional.one_hot(guess, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        soft_iou_loss(certain, target), 1 - iou(guess, target).mean(), atol=1e-5, rtol=0
    )
    empty = torch.zeros_like(target)
    certain = 60.0 * torch.nn.functional.one_hot(empty, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(soft_iou_loss(certain, empty), torch.tensor(0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TASK_LOSSES)
def test_task_losses_have_the_gradient_of_finite_differences(name: str) -> None:
    logits = normal(2, 3, 8, 8).requires_grad_()
    target = torch.randint(0, 3, (2, 8, 8), generator=generator())
    target[1] = 0  # an empty one
    assert torch.autograd.gradcheck(lambda x: TASK_LOSSES[name](x, target), logits)


@pytest.mark.parametrize("name", TASK_LOSSES)
def test_task_losses_fall_towards_the_target(name: str) -> None:
    target = torch.randint(0, 3, (4, 8, 8), generator=generator())
    right = torch.nn.functional.one_hot(target, 3).permute(0, 3, 1, 2).float()
    losses = [TASK_LOSSES[name](size * right, target).item() for size in (-2, 0, 2, 20)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Projectors


@pytest.mark.parametrize(("samples", "width", "rank"), [(12, 5, 2), (4, 9, 2), (6, 5, 4)])
def test_the_projector_is_that_of_the_principal_directions(samples: int, width: int, rank: int) -> None:
    x = normal(samples, width) + 3
    found = group_projector(x, rank, probe(width, rank))
    assert not found.is_fallback
    torch.testing.assert_close(found.matrix, principal(x, rank))
    torch.testing.assert_close(found.matrix @ found.matrix, found.matrix)
    assert math.isclose(found.matrix.trace().item(), rank, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("samples", "width", "rank"), [(7, 5, 2), (4, 9, 2), (3, 9, 2), (2, 6, 2), (8, 3, 2)]
)
def test_the_gradient_of_a_projector_is_that_of_finite_differences(
    samples: int, width: int, rank: int
) -> None:
    """With more samples than dimensions and fewer, and (two samples) by random projection."""
    x, weights = normal(samples, width).requires_grad_(), normal(width, width, seed=3)
    assert group_projector(x, rank, probe(width, rank)).is_fallback == (samples == 2)
    assert torch.autograd.gradcheck(
        lambda x: (group_projector(x, rank, probe(width, rank)).matrix * weights).sum(), x
    )


def test_equal_eigenvalues_on_one_side_of_the_cut_do_no_harm() -> None:
    """Where an eigendecomposition has no derivative, the projector has one."""
    x = torch.cat(
        [torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0])), -torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0]))]
    )
    x = x.double().requires_grad_()
    weights = normal(4, 4)
    assert not group_projector(x, 2, probe(4, 2)).is_fallback
    assert torch.autograd.gradcheck(lambda x: (group_projector(x, 2, probe(4, 2)).matrix * weights).sum(), x)


@pytest.mark.parametrize("case", ["no gap", "too few samples", "no variance"])
def test_where_pca_is_unstable_a_random_projection_takes_over(case: str) -> None:
    x = {
        "no gap": torch.cat([torch.eye(4), -torch.eye(4)]).double(),
        "too few samples": normal(2, 4),
        "no variance": torch.ones(6, 4, dtype=torch.float64),
    }[case].requires_grad_()
    found = group_projector(x, 2, probe(4, 2))
    assert found.is_fallback
    torch.testing.assert_close(found.matrix @ found.matrix, found.matrix)
    assert math.isclose(found.matrix.trace().item(), 2, rel_tol=1e-9)
    (found.matrix * normal(4, 4)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_the_random_projection_comes_near_the_principal_directions() -> None:
    """It looks through the covariance: with one strong plane it finds nearly that plane."""
    x = normal(40, 6) * torch.tensor([10.0, 10.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    near = group_projector(x[:2].repeat(3, 1), 2, probe(6, 2)).matrix  # one direction only: unstable
    assert float((near @ (x[0] - x[1])).norm() / (x[0] - x[1]).norm()) > 0.99


def test_distances_are_those_of_principal_angles() -> None:
    ours, theirs = principal(normal(9, 6), 2), principal(normal(9, 6, seed=1), 2)
    distance = projector_distances(ours[None], theirs[None], 2)[0, 0]
    bases = [torch.linalg.eigh(p).eigenvectors[:, -2:] for p in (ours, theirs)]
    cosines = torch.linalg.svdvals(bases[0].T @ bases[1])
    torch.testing.assert_close(distance, 1 - cosines.square().mean())
    assert abs(projector_distances(ours[None], ours[None], 2).item()) < 1e-12
    orthogonal = torch.eye(6, dtype=torch.float64) - principal(normal(9, 6), 4)
    assert math.isclose(
        projector_distances(principal(normal(9, 6), 2)[None], orthogonal[None], 2).item(), 1, rel_tol=1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# The sharing loss


def batch(per_group: int = 8, width: int = 6) -> tuple[Tensor, Tensor]:
    """Samples of all labels, not sorted by label."""
    labels = LABELS.repeat(per_group, 1)
    return normal(len(labels), width), labels.double()


def sharing(**changes: float | bool) -> SharingLoss:
    return SharingLoss(LABELS, width=6, rank=2, generator=generator(), **changes).double()


def by_hand(hidden: Tensor, labels: Tensor) -> float:
    """Mean over pairs of groups with a primitive in common, one after the other."""
    groups = [hidden[(labels.bool() == label).all(dim=1)] for label in LABELS]
    values = [
        (principal(groups[i], 2) - principal(groups[j], 2)).square().sum().item() / 4
        for i, j in itertools.combinations(range(4), 2)
        if (LABELS[i] & LABELS[j]).any()
    ]
    assert len(values) == 2
    return sum(values) / len(values)


def test_the_loss_is_the_mean_over_pairs_that_share_a_primitive() -> None:
    hidden, labels = batch()
    terms = sharing()(hidden, labels)
    assert math.isclose(terms.loss.item(), by_hand(hidden, labels), rel_tol=1e-9)
    assert terms.pairs == 4 and terms.fallbacks == 0 and terms.groups.tolist() == [0, 1, 2, 3]
    shuffled = torch.randperm(len(hidden), generator=generator())
    torch.testing.assert_close(sharing()(hidden[shuffled], labels[shuffled]).loss, terms.loss)


@pytest.mark.parametrize("changes", [{}, {"ema": 0.6}, {"ema": 0.6, "detach": True}], ids=str)
def test_the_gradient_is_that_of_finite_differences(changes: dict) -> None:
    hidden, labels = batch(per_group=3)
    loss = sharing(**changes)
    loss.update(loss(normal(*hidden.shape, seed=5), labels))
    frozen = loss._targets(loss(hidden, labels).projectors, torch.arange(4)).detach()
    if loss.detach:  # what does not move is given to the finite differences as a constant
        loss._targets = lambda projectors, groups: frozen
    assert torch.autograd.gradcheck(lambda x: loss(x, labels).loss, hidden.requires_grad_())


def test_a_detached_side_halves_the_gradient_and_keeps_the_value() -> None:
    hidden, labels = batch()
    gradients = []
    for detach in (False, True):
        x = hidden.clone().requires_grad_()
        loss = sharing(detach=detach)(x, labels).loss
        assert math.isclose(loss.item(), by_hand(hidden, labels), rel_tol=1e-9)
        gradients.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


def test_descent_brings_sharing_groups_together() -> None:
    hidden, labels = batch()
    x = hidden.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    losses = []
    for _ in range(25):
        loss = sharing()(x, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_running_mean_is_what_groups_are_pulled_towards() -> None:
    (first, labels), second = batch(), normal(32, 6, seed=7)
    loss = sharing(ema=0.75)
    terms = loss(first, labels)
    assert math.isclose(terms.loss.item(), by_hand(first, labels), rel_tol=1e-9)  # at first sight
    loss.update(terms)
    groups = [[x[(labels.bool() == label).all(dim=1)] for label in LABELS] for x in (first, second)]
    mixed = [0.75 * principal(a, 2) + 0.25 * principal(b, 2) for a, b in zip(*groups, strict=True)]
    expected = [
        (principal(groups[1][i], 2) - mixed[j]).square().sum().item() / 4
        for i, j in itertools.permutations(range(4), 2)
        if (LABELS[i] & LABELS[j]).any()
    ]
    terms = loss(second, labels)
    assert math.isclose(terms.loss.item(), sum(expected) / 4, rel_tol=1e-9)
    loss.update(terms)
    torch.testing.assert_close(loss.averages[2], mixed[2])
    assert set(loss.state_dict()) >= {"averages", "seen", "probe"}


def test_a_group_that_is_absent_keeps_its_running_mean() -> None:
    hidden, labels = batch()
    loss = sharing(ema=0.5)
    loss.update(loss(hidden, labels))
    before = loss.averages.clone()
    rest = (labels != LABELS[0]).any(dim=1)
    loss.update(loss(normal(32, 6, seed=4)[rest], labels[rest]))
    assert torch.equal(loss.averages[0], before[0]) and not torch.equal(loss.averages[1], before[1])


def test_fallbacks_are_counted_and_lonely_samples_left_out() -> None:
    hidden, labels = batch()
    hidden[(labels.bool() == LABELS[0]).all(dim=1)] = 1.0  # no variance
    assert sharing()(hidden, labels).fallbacks == 1
    few = torch.cat([LABELS, LABELS[:2]]).double()
    terms = sharing()(normal(6, 6), few)
    assert terms.groups.tolist() == [0, 1] and terms.pairs == 0 and terms.loss.item() == 0
    assert sharing()(normal(2, 6), LABELS[:2].double()).loss.item() == 0


def test_a_label_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="not made for"):
        sharing()(normal(4, 6), torch.ones(4, 3))


# ---------------------------------------------------------------------------------------------------------------------
# The sparse code, and weights


def test_sparse_terms_are_their_definitions() -> None:
    hidden, rebuilt = normal(5, 4), normal(5, 4, seed=1)
    sparse = torch.tensor([[0.0, 2, 0], [1, 0, 0], [0, 0, 0], [3, 0, 0], [0, 0, 0]], dtype=torch.float64)
    terms = sparse_terms(hidden, sparse, rebuilt)
    error = ((hidden - rebuilt) ** 2).mean()
    torch.testing.assert_close(terms.reconstruction, error)
    torch.testing.assert_close(terms.l1.item(), 6 / 5)
    torch.testing.assert_close(terms.activity.item(), 3 / 15)
    torch.testing.assert_close(terms.silent.item(), 1 / 3)
    torch.testing.assert_close(terms.explained, 1 - error / ((hidden - hidden.mean(dim=0)) ** 2).mean())


def test_sparse_terms_have_the_gradient_of_finite_differences() -> None:
    inputs = [
        normal(3, 4).requires_grad_(),
        normal(3, 5, seed=1).requires_grad_(),
        normal(3, 4, seed=2).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(lambda h, z, r: sparse_terms(h, z, r).reconstruction, inputs)
    assert torch.autograd.gradcheck(lambda h, z, r: sparse_terms(h, z, r).l1, inputs)


@pytest.mark.parametrize(
    ("points", "progress", "expected"),
    [
        ([[0, 0.3]], 0.7, 0.3),
        ([[0, 0], [0.2, 1]], 0.1, 0.5),
        ([[0, 0], [0.2, 1]], 0.9, 1.0),
        ([[0.5, 2], [1, 0]], 0.0, 2.0),
        ([[0.5, 2], [1, 0]], 0.75, 1.0),
    ],
)
def test_weights_are_straight_lines_between_points(points: list, progress: float, expected: float) -> None:
    assert weight_at(points, progress) == pytest.approx(expected)
