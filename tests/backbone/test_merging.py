"""Merging of task weights, against formulas by numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backbone.merging import STARTS, Merging, orthogonal_part

SHAPES = [(3, 5), (5,), (6, 3)]


def trained(rule: str, tasks: int = 4, **options: object) -> tuple[Merging, list[nn.Parameter], list[Tensor]]:
    """Tasks that each move the parameters at random; the weights (P,) that training reached."""
    generator = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    merging, reached = Merging(parameters, rule, **options), []
    for _ in range(tasks):
        merging.begin()
        with torch.no_grad():
            for parameter in parameters:
                parameter += torch.randn(parameter.shape, generator=generator)
        reached.append(merging.weights())
        merging.end()
    return merging, parameters, reached


def test_mean_is_the_mean_over_tasks() -> None:
    merging, _, reached = trained("mean")
    torch.testing.assert_close(merging.weights(), torch.stack(reached).mean(dim=0))


def test_ema_is_its_closed_form() -> None:
    """m_t = (1 - a)^t w_0 + sum_i a (1 - a)^(t - i) w_i."""
    merging, _, reached = trained("ema", alpha=0.3)
    shares = [0.7**3, *(0.3 * 0.7 ** (3 - i) for i in (1, 2, 3))]
    expected = sum(share * weights for share, weights in zip(shares, reached, strict=True))
    torch.testing.assert_close(merging.weights(), expected)


def test_max_magnitude_takes_each_number_where_it_moved_most() -> None:
    merging, _, reached = trained("max_magnitude")
    moved = (torch.stack(reached) - merging.initial).numpy()
    expected = [column[np.abs(column).argmax()] for column in moved.T]
    np.testing.assert_allclose((merging.weights() - merging.initial).numpy(), expected, atol=1e-6)


def test_of_equal_magnitudes_the_later_one_stays() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    merging = Merging([parameter], "max_magnitude", start="initial")
    for moved in ([1.0, -2.0], [-1.0, 1.0]):
        merging.begin()
        parameter.data += torch.tensor(moved)
        merging.end()
    assert parameter.tolist() == [-1.0, -2.0]


def by_hand(new: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """`orthogonal_part` as a sum over pairs of singular directions."""
    left, values, right = np.linalg.svd(merged, full_matrices=True)
    rank = next(k for k in range(1, len(values) + 1) if values[:k].sum() > values.sum() / 2)
    total = np.zeros_like(new)
    for i in range(left.shape[1]):
        for j in range(right.shape[0]):
            if i != j and not (i < rank and j < rank):
                u, v = left[:, i], right[j]
                total += (u @ new @ v) * np.outer(u, v)
    return total


def test_tasks_that_move_nothing_are_merged_to_nothing() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    merging = Merging([parameter], "orthogonal")
    for step in (0, 0, 1):
        merging.begin()
        with torch.no_grad():
            parameter += step
        merging.end()
        assert torch.isfinite(parameter).all() and (parameter[0, 0] > 1) == bool(step)


def test_orthogonal_is_the_projection_of_each_matrix_and_one_scale() -> None:
    merging, _, reached = trained("orthogonal")
    initial = merging.initial.double()
    changes = [[p.numpy() for p in merging.split(weights.double() - initial)] for weights in reached]
    merged, scale, norms = changes[0], 1.0, []
    for t, change in enumerate(changes):
        norms.append(np.sqrt(sum((part**2).sum() for part in change)))
        if t:
            total = [
                scale * old + (by_hand(new, old) if new.ndim == 2 else new)
                for old, new in zip(merged, change, strict=True)
            ]
            scale = np.sqrt(sum((part**2).sum() for part in total)) / np.mean(norms)
            merged = [part / scale for part in total]
    for part, expected in zip(merging.split(merging.weights() - merging.initial), merged, strict=True):
        np.testing.assert_allclose(part.numpy(), expected, atol=1e-5)
    assert torch.equal(orthogonal_part(initial[None], torch.zeros(1, len(initial))), initial[None])


@pytest.mark.parametrize("start", ["carried", "merged", "first", "initial", None])
def test_a_task_trains_on_from_where_it_is_told_to(start: str | None) -> None:
    merging, _, reached = trained("ema", alpha=0.3, start=start)
    deployed = merging.weights()
    merging.begin()
    expected = {
        "carried": reached[-1],
        "merged": deployed,
        "first": reached[0],
        "initial": merging.initial,
    }[start or STARTS["ema"]]
    torch.testing.assert_close(merging.weights(), expected)


@pytest.mark.parametrize("rule", STARTS)
def test_a_state_loaded_in_the_middle_of_a_task_goes_on_the_same(rule: str) -> None:
    one, parameters, _ = trained(rule)
    other, copies, _ = trained(rule, tasks=1)
    one.begin()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        for parameter, copied in zip(parameters, copies, strict=True):
            parameter += 0.5
            copied.copy_(parameter)
    for merging in (one, other):
        merging.end()
        merging.begin()
    assert torch.equal(one.weights(), other.weights()) and torch.equal(one.merged, other.merged)
