"""Sparse gates: sparsemax, its noisy form for training, and the entropy that rewards sparse weights.

    beta = gumbel_sparsemax(logits, tau=2.0, generator=generator)    # training: noise explores
    beta = sparsemax(logits / 0.5)                                   # evaluation: exact zeros, no noise
    loss = task_loss + 0.01 * sparsity_loss(beta)

Sources: sparsemax (Martins and Astudillo, ICML 2016); Gumbel noise over a temperature (Jang et al., ICLR 2017).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sparsemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Euclidean projection onto the probability simplex along `dim`; the shape and dtype of `logits`.

    sparsemax(z)_i = max(z_i - t(z), 0), with the one t(z) for which the results sum to 1. Results below t(z) are exact
    zeros. The gradient is exact: v -> v - mean of v over the support on the support, 0 elsewhere. Half precision is
    computed in float32.
    """
    return _Sparsemax.apply(logits, dim)


def gumbel_sparsemax(
    logits: Tensor, tau: float, dim: int = -1, generator: torch.Generator | None = None
) -> Tensor:
    """sparsemax((logits + G) / tau) with independent standard Gumbel noise G.

    Args:
        tau: temperature; towards 0 the largest noisy logit takes everything, towards infinity all share alike.
        generator: draws the noise, on its own device; None for torch's global one.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau = {tau}: a temperature is positive")
    device = logits.device if generator is None else generator.device
    waiting = torch.empty(logits.shape, dtype=torch.float64, device=device).exponential_(generator=generator)
    noise = -waiting.clamp_min(torch.finfo(torch.float64).tiny).log()
    noisy = logits + noise.to(logits.dtype).to(logits.device)
    return sparsemax((noisy - noisy.detach().amax(dim=dim, keepdim=True)) / tau, dim)


def sparsity_loss(beta: Tensor) -> Tensor:
    """Entropy H = -sum_i beta_i log(beta_i) of weights (..., K) in nats, the mean over leading dimensions; a scalar.

    0 log 0 = 0, and an exact zero gets no gradient.
    """
    positive = _wide(torch.where(beta > 0, beta, torch.ones_like(beta)))
    return -(positive * positive.log()).sum(dim=-1).mean()


def newcomer_logits(logits: Tensor, tau: float) -> Tensor:
    """Logits with which a newcomer joins sparsemax(logits / tau) on equal terms: (..., K) -> (..., 1).

    They are the mean of those logits that have weight, so that a newcomer to K equal weights gets 1 / (K + 1). Zero
    where there are none yet.
    """
    if logits.shape[-1] == 0:
        return logits.new_zeros((*logits.shape[:-1], 1))
    taking_part = sparsemax(logits / tau) > 0
    return (logits * taking_part).sum(dim=-1, keepdim=True) / taking_part.sum(dim=-1, keepdim=True)


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, dim: int) -> Tensor:
        moved = _wide(logits).movedim(dim, -1)
        moved = moved - moved.amax(
            dim=-1, keepdim=True
        )  # a constant shift changes nothing and keeps numbers small
        result = (moved - _threshold(moved)).clamp_min(0).movedim(-1, dim)
        ctx.save_for_backward(result > 0)
        ctx.dim = dim
        return result.to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (support,) = ctx.saved_tensors
        inside = _wide(gradient) * support
        mean = inside.sum(dim=ctx.dim, keepdim=True) / support.sum(dim=ctx.dim, keepdim=True)
        return (inside - mean * support).to(gradient.dtype), None


def _threshold(z: Tensor) -> Tensor:
    """The t with sum_i max(z_i - t, 0) = 1 along the last dimension, (..., K) -> (..., 1)."""
    ordered = z.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    sums = ordered.cumsum(dim=-1)
    size = (1 + ranks * ordered > sums).sum(dim=-1, keepdim=True)  # of the support: at least 1 of numbers
    return (sums.gather(-1, size.clamp_min(1) - 1) - 1) / size


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype.itemsize < 4 else x
