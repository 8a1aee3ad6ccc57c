"""Moving what the fast branch learned into the slow one at a task's end (Nested LoRA v1).

    report = consolidate(adapter, tokens, rule="function", alpha=0.1, reset="lora")
    report.drift        # how far the adapter's output moved on the tokens, relative

Two rules and two resets, each one entry of a visible dict. `tokens` are the adapter's own inputs on the task's data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.sema_components import Adapter, NestedLoRAAdapter

RIDGE = 1e-6  # relative to the mean diagonal of the Gram matrix: keeps the solve finite when units are silent or equal


@dataclass(frozen=True)
class Consolidation:
    """What a task end does to nested adapters: the rule, its strength and how fast starts again.

    Attributes:
        rule: "weights" (theta_slow += alpha theta_fast) or "function" (slow refitted to slow(x) + alpha fast(x)).
        alpha: how much of fast goes into slow.
        reset: "lora" (fast silent, able to learn) or "zeros" (all of fast zero: its gradient is zero for ever).
    """

    rule: str
    alpha: float
    reset: str


@dataclass(frozen=True)
class ConsolidationReport:
    """Norms of the two branches before and after, and the relative change of the adapter's output on the tokens."""

    before: dict[str, float]
    after: dict[str, float]
    drift: float


@torch.no_grad()
def consolidate(adapter: NestedLoRAAdapter, tokens: Tensor, how: Consolidation) -> ConsolidationReport:
    """Fold fast into slow, then reset fast.

    drift = ||Delta_after(X) - Delta_before(X)||_F / ||Delta_before(X)||_F over tokens X (N, d); 0 when both are silent.
    """
    before, output_before = adapter.norms(), adapter(tokens)
    RULES[how.rule](adapter, tokens, how.alpha)
    RESETS[how.reset](adapter.fast)
    moved, size = (adapter(tokens) - output_before).norm(), output_before.norm()
    drift = float(moved / size) if size > 0 else float(moved > 0)
    return ConsolidationReport(before, adapter.norms(), drift)


def add_weights(adapter: NestedLoRAAdapter, tokens: Tensor, alpha: float) -> None:
    """theta_slow <- theta_slow + alpha theta_fast, tensor by tensor (the seeds' rule; `tokens` are not needed).

    The hidden units of the two branches are unrelated, so this adds weights that do not belong together.
    """
    for slow, fast in zip(adapter.slow.parameters(), adapter.fast.parameters(), strict=True):
        slow.add_(fast, alpha=alpha)


def refit_function(adapter: NestedLoRAAdapter, tokens: Tensor, alpha: float) -> None:
    """Refit slow so that slow_new(x) ~ slow(x) + alpha fast(x) on the tokens, at unchanged rank r.

    The 2r hidden units of both branches stacked give the target exactly. Units are removed one at a time, each time
    the one whose removal costs least after the others are refitted, until r are left; the up-projection and bias are
    the ridge least-squares solution. With G = H^T H over units and a constant column and W = G^-1 H^T Y, removing
    unit j raises the squared error by ||W_j||^2 / (G^-1)_jj (Optimal Brain Surgeon, Hassibi & Stork 1993).
    """
    slow, fast = adapter.slow, adapter.fast
    rank = slow.down_proj.out_features
    down = torch.cat([slow.down_proj.weight, fast.down_proj.weight]).double()  # (2r, d)
    bias = torch.cat([slow.down_proj.bias, fast.down_proj.bias]).double()  # (2r,)
    x = tokens.double()
    target = (slow(tokens) + alpha * fast(tokens)).double() / slow.scale  # (N, d)
    hidden = F.relu(x @ down.T + bias)
    hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)  # (N, 2r + 1), last column constant
    gram, cross = hidden.T @ hidden, hidden.T @ target

    kept = list(range(2 * rank + 1))
    solution, inverse = _ridge(gram, cross, kept)
    while len(kept) > rank + 1:
        cost = solution[:-1].square().sum(dim=1) / inverse.diagonal()[:-1]
        del kept[int(cost.argmin())]
        solution, inverse = _ridge(gram, cross, kept)

    units = kept[:-1]
    slow.down_proj.weight.copy_(down[units])
    slow.down_proj.bias.copy_(bias[units])
    slow.up_proj.weight.copy_(solution[:-1].T)
    slow.up_proj.bias.copy_(solution[-1])


def _ridge(gram: Tensor, cross: Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
    """Ridge solution over the kept units, (k, d), and the inverse of their regularised Gram matrix, (k, k)."""
    part = gram[kept][:, kept]
    ridge = RIDGE * part.diagonal().mean().clamp_min(torch.finfo(part.dtype).tiny)
    inverse = torch.linalg.inv(part + ridge * torch.eye(len(kept), dtype=part.dtype, device=part.device))
    return inverse @ cross[kept], inverse


def reset_to_lora_start(fast: Adapter) -> None:
    """Up and biases zero, down drawn anew: silent, and its up-projection has a gradient."""
    fast.reset()


def reset_to_zeros(fast: Adapter) -> None:
    """All of fast zero, the seeds' literal rule. Both factors' gradients are then exactly zero: fast is dead."""
    for parameter in fast.parameters():
        nn.init.zeros_(parameter)


RULES: dict[str, Callable[[NestedLoRAAdapter, Tensor, float], None]] = {
    "weights": add_weights,
    "function": refit_function,
}
RESETS: dict[str, Callable[[Adapter], None]] = {"lora": reset_to_lora_start, "zeros": reset_to_zeros}
