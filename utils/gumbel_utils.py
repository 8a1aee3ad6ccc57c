"""Sparse gates: sparsemax, its noisy form for training, and the entropy that is minimised for sparsity.

    beta = gumbel_sparsemax(logits, tau=2.0, generator=generator)    # training: with noise
    beta = sparsemax(logits / 0.5)                                   # evaluation: exact zeros, no noise
    loss = task_loss + 0.01 * sparsity_loss(beta)

Sources: sparsemax (Martins and Astudillo, ICML 2016); Gumbel noise over a temperature (Jang et al., ICLR
2017).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sparsemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Euclidean projection onto the probability simplex along `dim`; shape and dtype of `logits`.

    sparsemax(z)_i = max(z_i - t(z), 0) with the one t(z) for which the results sum to 1, so that results are
    exact zeros where z_i <= t(z). The gradient is exact: v -> v - mean of v over the support on the support,
    0 elsewhere. Half precision is computed in float32.
    """
    return _Sparsemax.apply(logits, dim)


def gumbel_sparsemax(
    logits: Tensor, tau: float, dim: int = -1, generator: torch.Generator | None = None
) -> Tensor:
    """sparsemax((logits + G) / tau) with independent standard Gumbel noise G = -log E, E exponential.

    Args:
        logits: any shape.
        tau: temperature; towards 0 the largest noisy logit takes all weight, towards infinity weights are
            equal.
        dim: the dimension of the adapters.
        generator: source of the noise, on its own device; None for torch's global one.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau = {tau}: a temperature is positive")
    device = logits.device if generator is None else generator.device
    exponential = torch.empty(logits.shape, dtype=torch.float64, device=device).exponential_(
        generator=generator
    )
    noise = -exponential.clamp_min(torch.finfo(torch.float64).tiny).log()
    noisy = logits + noise.to(logits.dtype).to(logits.device)
    return sparsemax((noisy - noisy.detach().amax(dim=dim, keepdim=True)) / tau, dim)


def sparsity_loss(beta: Tensor) -> Tensor:
    """Entropy H = -sum_i beta_i log(beta_i) of weights (..., K), in nats: the mean over leading dimensions.

    0 log 0 = 0, and an exact zero gets no gradient.
    """
    positive = _at_least_float32(torch.where(beta > 0, beta, torch.ones_like(beta)))
    return -(positive * positive.log()).sum(dim=-1).mean()


def newcomer_logits(logits: Tensor, tau: float) -> Tensor:
    """Logits of a new adapter in sparsemax(logits / tau), (..., K) -> (..., 1).

    The mean of the logits with non-zero weight, so that next to K equal weights it gets 1 / (K + 1); 0 for
    K = 0.
    """
    if logits.shape[-1] == 0:
        return logits.new_zeros((*logits.shape[:-1], 1))
    active = sparsemax(logits / tau) > 0
    return (logits * active).sum(dim=-1, keepdim=True) / active.sum(dim=-1, keepdim=True)


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, dim: int) -> Tensor:
        z = _at_least_float32(logits).movedim(dim, -1)
        z = z - z.amax(dim=-1, keepdim=True)  # a constant shift changes nothing and keeps numbers small
        ordered = z.sort(dim=-1, descending=True).values
        ranks = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        sums = ordered.cumsum(dim=-1)
        size = (1 + ranks * ordered > sums).sum(dim=-1, keepdim=True)  # of the support; >= 1 for finite z
        threshold = (sums.gather(-1, size.clamp_min(1) - 1) - 1) / size  # sum_i max(z_i - threshold, 0) = 1
        result = (z - threshold).clamp_min(0).movedim(-1, dim)
        ctx.save_for_backward(result > 0)
        ctx.dim = dim
        return result.to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (support,) = ctx.saved_tensors
        inside = _at_least_float32(gradient) * support
        mean = inside.sum(dim=ctx.dim, keepdim=True) / support.sum(dim=ctx.dim, keepdim=True)
        return (inside - mean * support).to(gradient.dtype), None


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x
