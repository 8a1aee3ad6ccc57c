"""Losses on grids: values by independent computations, gradients by finite differences."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.losses import (
    TASK_LOSSES,
    SharingLoss,
    group_projector,
    iou,
    soft_iou_loss,
    sparse_terms,
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


# --- prediction ---------------------------------------------------------------------------------------------


def random_grids() -> Tensor:
    return torch.randint(0, 3, (6, 8, 8), generator=generator())


def certain(colours: Tensor) -> Tensor:
    """Logits that say these colours."""
    return 60.0 * F.one_hot(colours, 3).permute(0, 3, 1, 2)


def test_iou_counts_cells() -> None:
    target = torch.zeros(4, 8, 8, dtype=torch.int64)
    guess = target.clone()
    target[0, 0, :4], guess[0, 0, 2:6] = 1, 1  # two of six cells
    target[1, 0, :4], guess[1, 0, :4] = 1, 2  # all of another colour
    guess[2, 3, 3] = 1  # nothing was there
    torch.testing.assert_close(iou(guess, target), torch.tensor([2 / 6, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(iou(target, target), torch.ones(4))


def test_soft_iou_is_iou_where_predictions_are_certain() -> None:
    target = random_grids()
    guess = torch.where(torch.rand(6, 8, 8, generator=generator(1)) < 0.7, target, 0)
    empty = torch.zeros_like(target)
    for colours, truth in ((guess, target), (empty, empty)):
        loss = soft_iou_loss(certain(colours), truth).item()
        assert loss == pytest.approx(1 - iou(colours, truth).mean().item(), abs=1e-5)


@pytest.mark.parametrize("name", TASK_LOSSES)
def test_task_losses_fall_towards_the_target_with_the_gradient_of_finite_differences(name: str) -> None:
    target = random_grids()
    losses = [TASK_LOSSES[name](size * certain(target), target).item() for size in (-0.03, 0, 0.03, 0.3)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01
    target = target[:2]
    target[1] = 0  # an empty one
    x = normal(2, 3, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TASK_LOSSES[name](x, target), x)


# --- projectors ---------------------------------------------------------------------------------------------

EQUAL_EIGENVALUES = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0])).double()


@pytest.mark.parametrize(
    ("x", "fallback"),
    [
        *((normal(*shape) + 3, False) for shape in ((7, 5), (4, 9), (3, 9), (8, 3))),
        (normal(2, 6), True),
        (torch.cat([EQUAL_EIGENVALUES, -EQUAL_EIGENVALUES]), False),  # on one side of the cut
    ],
)
def test_projectors_are_those_of_principal_directions_with_the_gradient_of_finite_differences(
    x: Tensor, fallback: bool
) -> None:
    width = x.shape[1]
    matrix, is_fallback = group_projector(x, 2, probe(width, 2))
    assert is_fallback == fallback
    if not fallback:
        torch.testing.assert_close(matrix, principal(x, 2))
    weights = normal(width, width, seed=3)
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: (group_projector(x, 2, probe(width, 2))[0] * weights).sum(), x)


@pytest.mark.parametrize(
    "x",
    [torch.cat([torch.eye(4), -torch.eye(4)]).double(), normal(2, 4), torch.ones(6, 4).double()],
    ids=["no gap", "too few samples", "no variance"],
)
def test_where_pca_is_unstable_a_random_projection_takes_over(x: Tensor) -> None:
    x = x.clone().requires_grad_()
    matrix, is_fallback = group_projector(x, 2, probe(4, 2))
    assert is_fallback
    torch.testing.assert_close(matrix @ matrix, matrix)
    assert math.isclose(matrix.trace().item(), 2, rel_tol=1e-9)
    (matrix * normal(4, 4)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_the_random_projection_comes_near_the_principal_directions() -> None:
    """It is multiplied by the covariance: with one strong direction it finds nearly that direction."""
    x = normal(40, 6) * torch.tensor([10.0, 10.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    matrix, is_fallback = group_projector(x[:2].repeat(3, 1), 2, probe(6, 2))
    assert is_fallback and float((matrix @ (x[0] - x[1])).norm() / (x[0] - x[1]).norm()) > 0.99


# --- the sharing loss ---------------------------------------------------------------------------------------


def batch(per_group: int = 8, width: int = 6) -> tuple[Tensor, Tensor]:
    """Samples of all labels, not sorted by label."""
    labels = LABELS.repeat(per_group, 1)
    return normal(len(labels), width), labels.double()


def sharing(**changes: float | bool) -> SharingLoss:
    return SharingLoss(LABELS, SharedSubspaceConfig(hidden=6, sharing_rank=2, **changes)).double()


def projectors_of(hidden: Tensor, labels: Tensor) -> list[Tensor]:
    return [principal(hidden[(labels.bool() == label).all(dim=1)], 2) for label in LABELS]


def by_hand(projectors: list[Tensor], targets: list[Tensor]) -> float:
    """Mean over ordered pairs of groups with a primitive in common, one after the other."""
    values = [
        (projectors[i] - targets[j]).square().sum().item() / 4
        for i, j in itertools.permutations(range(4), 2)
        if (LABELS[i] & LABELS[j]).any()
    ]
    assert len(values) == 4
    return sum(values) / len(values)


def test_the_loss_is_the_mean_over_pairs_that_share_a_primitive() -> None:
    hidden, labels = batch()
    terms = sharing()(hidden, labels)
    projectors = projectors_of(hidden, labels)
    assert math.isclose(terms.loss.item(), by_hand(projectors, projectors), rel_tol=1e-9)
    assert terms.fallbacks == 0 and terms.groups.tolist() == [0, 1, 2, 3]
    shuffled = torch.randperm(len(hidden), generator=generator())
    torch.testing.assert_close(sharing()(hidden[shuffled], labels[shuffled]).loss, terms.loss)


@pytest.mark.parametrize("changes", [{}, {"sharing_ema": 0.6}], ids=str)
def test_the_gradient_is_that_of_finite_differences(changes: dict) -> None:
    hidden, labels = batch(per_group=3)
    loss = sharing(**changes)
    loss.update(loss(normal(*hidden.shape, seed=5), labels))
    assert torch.autograd.gradcheck(lambda x: loss(x, labels).loss, hidden.requires_grad_())


def test_a_detached_side_halves_the_gradient_and_keeps_the_value() -> None:
    hidden, labels = batch()
    losses, gradients = [], []
    for detach in (False, True):
        x = hidden.clone().requires_grad_()
        losses.append(sharing(sharing_detach=detach)(x, labels).loss)
        gradients.append(torch.autograd.grad(losses[-1], x)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


@pytest.mark.parametrize("detach", [False, True])
def test_groups_are_pulled_towards_the_running_mean(detach: bool) -> None:
    (first, labels), second = batch(), normal(32, 6, seed=7).requires_grad_()
    loss = sharing(sharing_ema=0.75, sharing_detach=detach)
    terms = loss(first, labels)
    before, now = projectors_of(first, labels), projectors_of(second.detach(), labels)
    assert math.isclose(terms.loss.item(), by_hand(before, before), rel_tol=1e-9)  # at first sight
    loss.update(terms)
    mixed = [0.75 * a + 0.25 * b for a, b in zip(before, now, strict=True)]
    terms = loss(second, labels)
    assert math.isclose(terms.loss.item(), by_hand(now, mixed), rel_tol=1e-9)
    rest = (labels != LABELS[0]).any(dim=1)
    loss.update(loss(second[rest], labels[rest]))
    torch.testing.assert_close(loss.averages[0], before[0])  # absent from the batch
    torch.testing.assert_close(loss.averages[2], mixed[2])


def test_fallbacks_are_counted_and_groups_without_a_common_primitive_have_no_loss() -> None:
    hidden, labels = batch()
    hidden[(labels.bool() == LABELS[0]).all(dim=1)] = 1.0  # no variance
    assert sharing()(hidden, labels).fallbacks == 1
    apart = (labels.bool() != LABELS[3]).any(dim=1)
    terms = sharing()(hidden[apart], labels[apart])
    assert terms.groups.tolist() == [0, 1, 2] and terms.loss.item() == 0


# --- sparse autoencoder -------------------------------------------------------------------------------------


def test_sparse_terms_are_their_definitions() -> None:
    hidden, reconstruction = normal(5, 4), normal(5, 4, seed=1)
    latents = torch.tensor([[0.0, 2, 0], [1, 0, 0], [0, 0, 0], [3, 0, 0], [0, 0, 0]], dtype=torch.float64)
    terms = sparse_terms(hidden, latents, reconstruction)
    error = ((hidden - reconstruction) ** 2).mean()
    explained = 1 - error / ((hidden - hidden.mean(dim=0)) ** 2).mean()
    counted = {"l1": 6 / 5, "active_fraction": 3 / 15, "dead_fraction": 1 / 3}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {"reconstruction": error.item(), **counted, "explained": explained.item()}
    )
