"""Sparse gates: an independent simplex projection, exact derivatives, limits of the temperature."""

import math

import numpy as np
import pytest
import torch

from utils.gumbel_utils import gumbel_sparsemax, newcomer_logits, sparsemax, sparsity_loss


def projected(z: np.ndarray) -> np.ndarray:
    """Rows of z on the simplex by bisection for t in sum max(z - t, 0) = 1: no sorting, float64."""
    low, high = z.min(axis=1, keepdims=True) - 1.0, z.max(axis=1, keepdims=True)
    for _ in range(100):
        middle = (low + high) / 2
        above = np.maximum(z - middle, 0).sum(axis=1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.maximum(z - high, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 50, 200])
def test_it_is_the_projection_onto_the_simplex(size: int) -> None:
    """Two thousand inputs of every size, of scales from 0.01 to 100, some of them with ties or far from 0."""
    draw = np.random.default_rng(size)
    z = draw.normal(size=(2000, size)) * 10.0 ** draw.uniform(-2, 2, size=(2000, 1))
    z[::4] = np.round(z[::4])
    far = z[1::4] + 700.0
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        ours = sparsemax(torch.tensor(z, dtype=dtype))
        torch.testing.assert_close(ours.double(), torch.tensor(projected(z)), atol=tolerance, rtol=0)
        assert ours.dtype == dtype and ours.min() >= 0
        torch.testing.assert_close(ours.sum(dim=1), torch.ones(2000, dtype=dtype), atol=tolerance, rtol=0)
        shifted = sparsemax(torch.tensor(far, dtype=dtype))
        torch.testing.assert_close(shifted, ours[1::4], atol=10 * tolerance, rtol=0)
    assert torch.equal(sparsemax(torch.tensor([5.0, 4.5]) + 1e6), sparsemax(torch.tensor([5.0, 4.5])))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension_of_a_batch(dim: int) -> None:
    z = torch.randn(4, 5, 6, generator=generator())
    rows = z.movedim(dim, -1)
    expected = (
        torch.stack([sparsemax(row) for row in rows.flatten(0, 1)]).reshape(rows.shape).movedim(-1, dim)
    )
    torch.testing.assert_close(sparsemax(z, dim=dim), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_gradient_is_exact(dim: int) -> None:
    """Finite differences, with zeros in the result."""
    z = (3 * torch.randn(6, 5, generator=generator(3), dtype=torch.float64)).requires_grad_()
    assert (sparsemax(z, dim) == 0).any()
    assert torch.autograd.gradcheck(lambda x: sparsemax(x, dim), z)
    assert torch.autograd.gradcheck(lambda x: sparsity_loss(sparsemax(x, 1)), z)
    assert torch.autograd.gradcheck(lambda x: gumbel_sparsemax(x, 2.0, dim, generator(5)), z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = torch.randn(200, 30, generator=generator()).to(dtype).requires_grad_()
    beta = sparsemax(z)
    assert beta.dtype == dtype and torch.equal(beta, sparsemax(z.float()).to(dtype))
    sparsity_loss(beta).backward()
    assert z.grad.dtype == dtype and torch.isfinite(z.grad).all()


def test_one_adapter_has_all_weight_and_no_gradient() -> None:
    z = torch.tensor([-3.0], requires_grad=True)
    beta = gumbel_sparsemax(z, 0.5, generator=generator())
    assert beta.tolist() == [1.0] and sparsity_loss(beta) == 0
    (beta.sum() + sparsity_loss(beta)).backward()
    assert z.grad.tolist() == [0.0]


def test_the_temperature_goes_from_one_winner_to_all_alike() -> None:
    z = torch.randn(6, generator=generator())
    cold, hot = (gumbel_sparsemax(z, tau, generator=generator(100)) for tau in (1e-30, 1e6))
    gumbel = -torch.empty(6, dtype=torch.float64).exponential_(generator=generator(100)).log()
    assert cold.tolist() == [float(i == (z + gumbel).argmax()) for i in range(6)]
    torch.testing.assert_close(hot, torch.full((6,), 1 / 6), atol=1e-4, rtol=0)


def test_the_noise_is_gumbels_and_the_generators_own() -> None:
    """The largest coordinate is i with probability softmax(z)_i; equal generators draw equal noise."""
    z = torch.tensor([1.0, 0.0, -1.0])
    before = torch.get_rng_state()
    draws = gumbel_sparsemax(z.expand(20000, 3), 1e-9, generator=generator())
    torch.testing.assert_close(draws.mean(dim=0), z.softmax(dim=0), atol=0.015, rtol=0)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*(gumbel_sparsemax(z, 1.0, generator=generator(1)) for _ in range(2)))
    assert not torch.equal(*(gumbel_sparsemax(z, 1.0, generator=generator(seed)) for seed in (1, 2)))


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_a_temperature_is_positive(tau: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        gumbel_sparsemax(torch.zeros(2), tau)


def test_entropy_and_its_gradient_by_hand() -> None:
    beta = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = sparsity_loss(beta)
    assert loss.item() == pytest.approx(math.log(2) / 2)
    loss.backward()
    expected = [[-(math.log(0.5) + 1) / 2] * 2 + [0.0], [-0.5, 0.0, 0.0]]
    torch.testing.assert_close(beta.grad, torch.tensor(expected))
    z = torch.tensor([0.3, 0.1, 0.0], requires_grad=True)
    before = sparsity_loss(sparsemax(z))
    before.backward()
    assert sparsity_loss(sparsemax(z - 0.5 * z.grad)) < before  # a step makes weights sparser


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_newcomer_joins_on_equal_terms(size: int) -> None:
    """Its weight beside K equal ones is 1 / (K + 1); its logit is the mean of those with weight."""
    equal = torch.full((size,), 0.3)
    joined = sparsemax(torch.cat([equal, newcomer_logits(equal, 0.5)]) / 0.5)
    torch.testing.assert_close(joined, torch.full((size + 1,), 1 / (size + 1)))
    rows = torch.tensor([[1.0, 0.8, -5.0], [0.0, 0.1, 0.2]])  # in the first row the third has no weight
    torch.testing.assert_close(newcomer_logits(rows, 0.5), torch.tensor([[0.9], [0.1]]))
    assert newcomer_logits(torch.zeros(3, 0), 0.5).tolist() == [[0.0]] * 3


def test_logits_that_are_not_finite_give_no_weights() -> None:
    """A run that diverged fails by its loss, not inside the projection."""
    for logits in ([math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]):
        assert sparsemax(torch.tensor(logits)).isnan().any()
