"""Consolidation of Nested LoRA at the end of a task: fast is folded into slow, then reset.

    report = consolidate(adapter, tokens, Consolidation(rule="function", alpha=0.1, reset="lora"))
    report.drift        # relative change of the adapter's output on the tokens

Rules and resets are the entries of `RULES` and `RESETS`. `tokens` (N, d) are inputs of the adapter for images
of the task.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.sema_components import LoRAAdapter, NestedLoRAAdapter

# Relative to the mean diagonal of the Gram matrix; keeps the solve finite with zero or equal units.
RIDGE = 1e-6


@dataclass(frozen=True)
class Consolidation:
    """How to consolidate: rule (key of `RULES`), share alpha of fast folded in, reset (key of `RESETS`).

    With `mean` the share is alpha / (t + 1) for an adapter that has learned in t earlier tasks: with alpha 1,
    if training leaves slow as it is, slow is then the running mean of the tasks' solutions, slow + fast.
    """

    rule: str
    alpha: float
    reset: str
    mean: bool = False

    def share(self, earlier: int) -> float:
        """Share of fast folded into slow, for an adapter that has learned in `earlier` tasks before."""
        return self.alpha / (earlier + 1) if self.mean else self.alpha


@dataclass(frozen=True)
class ConsolidationReport:
    """Norms of both branches before and after (`NestedLoRAAdapter.norms`), drift of the output, and alpha."""

    before: dict[str, float]
    after: dict[str, float]
    drift: float
    alpha: float


@torch.no_grad()
def consolidate(
    adapter: NestedLoRAAdapter, tokens: Tensor, how: Consolidation, earlier: int = 0
) -> ConsolidationReport:
    """Fold fast into slow, then reset fast; `earlier`: tasks that the adapter has learned in before.

    drift = ||Delta_after(X) - Delta_before(X)||_F / ||Delta_before(X)||_F over tokens X (N, d); where
    Delta_before(X) is zero, 1 if the output changed and else 0.
    """
    before, output_before, alpha = adapter.norms(), adapter(tokens), how.share(earlier)
    RULES[how.rule](adapter, tokens, alpha)
    RESETS[how.reset](adapter)
    moved, size = (adapter(tokens) - output_before).norm(), output_before.norm()
    drift = float(moved / size) if size > 0 else float(moved > 0)
    return ConsolidationReport(before, adapter.norms(), drift, alpha)


def add_weights(adapter: NestedLoRAAdapter, tokens: Tensor, alpha: float) -> None:
    """theta_slow <- theta_slow + alpha theta_fast, the rule of the first specification; `tokens` are unused.

    Branches with an activation: tensor by tensor, although their hidden units are unrelated. Linear branches:
    theta is the matrix W = W_up W_down, and W_slow becomes the truncated singular value decomposition of
    W_slow + alpha W_fast, exact where that has rank r at most (Eckart & Young 1936).
    """
    if isinstance(adapter.slow, LoRAAdapter):
        up, down = _linear_target(adapter, alpha)
        return _set_product(adapter.slow, up, down)
    for slow, fast in zip(adapter.slow.parameters(), adapter.fast.parameters(), strict=True):
        slow.add_(fast, alpha=alpha)


def refit_function(adapter: NestedLoRAAdapter, tokens: Tensor, alpha: float) -> None:
    """Least-squares fit slow_new(x) ~ slow(x) + alpha fast(x) on the tokens, at rank r.

    The 2r hidden units of both branches give the target exactly. Units are removed one at a time until r are
    left, each time the one whose removal raises the squared error least after the others are refitted. With G
    = H^T H over units and a constant column and W = G^-1 H^T Y, removing unit j adds ||W_j||^2 / (G^-1)_jj
    (Optimal Brain Surgeon, Hassibi & Stork 1993). The up-projection and its bias are the ridge solution over
    the units left.

    For linear branches the least-squares solution of rank r is W = V V^T (W_slow + alpha W_fast), V (d, r)
    the first principal directions of the outputs on the tokens (reduced-rank regression, Izenman 1975).
    """
    slow, fast = adapter.slow, adapter.fast
    rank = slow.down_proj.out_features
    if isinstance(slow, LoRAAdapter):
        up, down = _linear_target(adapter, alpha)
        basis, mixing = torch.linalg.qr(up)  # outputs are basis (mixing down x)
        outputs = (tokens.double() @ down.T) @ mixing.T  # (N, 2r)
        core = torch.linalg.qr(outputs, mode="r").R  # (2r, 2r), or (N, 2r) of fewer tokens
        directions = torch.linalg.svd(core).Vh[:rank].T  # (2r, r)
        return _set_product(slow, basis @ directions, directions.T @ mixing @ down)
    down = torch.cat([slow.down_proj.weight, fast.down_proj.weight]).double()  # (2r, d)
    bias = torch.cat([slow.down_proj.bias, fast.down_proj.bias]).double()  # (2r,)
    target = (slow(tokens) + alpha * fast(tokens)).double() / slow.scale  # (N, d)
    hidden = F.relu(tokens.double() @ down.T + bias)
    hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)  # (N, 2r + 1), last column constant
    gram, cross = hidden.T @ hidden, hidden.T @ target

    kept = list(range(2 * rank + 1))
    solution, inverse = _ridge(gram, cross, kept)
    while len(kept) > rank + 1:
        cost = solution[:-1].square().sum(dim=1) / inverse.diagonal()[:-1]
        del kept[int(cost.argmin())]
        solution, inverse = _ridge(gram, cross, kept)

    slow.down_proj.weight.copy_(down[kept[:-1]])
    slow.down_proj.bias.copy_(bias[kept[:-1]])
    slow.up_proj.weight.copy_(solution[:-1].T)
    slow.up_proj.bias.copy_(solution[-1])


def interpolate(adapter: NestedLoRAAdapter, tokens: Tensor, alpha: float) -> None:
    """Slow moved by a share alpha towards the task's solution, unit by unit; `tokens` are unused.

        W_down <- W_down + alpha (V_down - W_down),   b likewise,   W_up <- W_up + alpha V_up

    with W of slow and V of fast. Needs aligned branches: fast began the task with V_down = W_down, V_up = 0,
    so unit i is the same unit in both. alpha = 1 gives (W_up + V_up) phi(V_down x), where the task's solution
    is W_up phi(W_down x) + V_up phi(V_down x): the farther V_down has moved, the more the two differ, unless
    W_up is zero. If slow trained too, the change of its W_down shrinks by the factor 1 - alpha. With alpha =
    1 / t in its t-th task, and a slow that does not train, slow has the mean of the weights V_down and W_up +
    V_up over tasks, as in averaging fine-tuned weights (Wortsman et al., *Model soups*, ICML 2022).
    """
    slow, fast = adapter.slow, adapter.fast
    for mine, solution in zip(slow.down_proj.parameters(), fast.down_proj.parameters(), strict=True):
        mine.lerp_(solution, alpha)
    for mine, learned in zip(slow.up_proj.parameters(), fast.up_proj.parameters(), strict=True):
        mine.add_(learned, alpha=alpha)


RULES: dict[str, Callable[[NestedLoRAAdapter, Tensor, float], None]] = {
    "weights": add_weights,
    "function": refit_function,
    "interpolate": interpolate,
}


def _linear_target(adapter: NestedLoRAAdapter, alpha: float) -> tuple[Tensor, Tensor]:
    """W_slow + alpha W_fast of linear branches as a product of (d, 2r) and (2r, d), in double precision."""
    slow, fast = adapter.slow, adapter.fast
    up = torch.cat([slow.up_proj.weight, alpha * fast.up_proj.weight], dim=1)
    return up.double(), torch.cat([slow.down_proj.weight, fast.down_proj.weight]).double()


def _set_product(branch: LoRAAdapter, up: Tensor, down: Tensor) -> None:
    """Set W_up W_down to the best rank-r approximation (Frobenius) of up (d, k) times down (k, d), k >= r.

    W_down gets orthonormal rows and W_up the singular values; a unit with singular value 0 can still learn.
    """
    rank = branch.down_proj.out_features
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    u, sizes, vh = torch.linalg.svd(left_core @ right_core.T)
    branch.up_proj.weight.copy_(left @ u[:, :rank] * sizes[:rank])
    branch.down_proj.weight.copy_(vh[:rank] @ right.T)


def _ridge(gram: Tensor, cross: Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
    """Ridge solution over the kept units, (k, d), and the inverse of their regularised Gram matrix (k, k)."""
    part = gram[kept][:, kept]
    ridge = RIDGE * part.diagonal().mean().clamp_min(torch.finfo(part.dtype).tiny)
    inverse = torch.linalg.inv(part + ridge * torch.eye(len(kept), dtype=part.dtype, device=part.device))
    return inverse @ cross[kept], inverse


def reset_to_zeros(adapter: NestedLoRAAdapter) -> None:
    """All of fast zero, the rule of the first specification; both factors' gradients then stay zero."""
    for parameter in adapter.fast.parameters():
        nn.init.zeros_(parameter)


RESETS: dict[str, Callable[[NestedLoRAAdapter], None]] = {
    "lora": lambda adapter: adapter.fast.reset(),  # down-projection drawn anew, all else zero
    "zeros": reset_to_zeros,
    "aligned": NestedLoRAAdapter.align,  # zero output on the hidden units of slow, for "interpolate"
}
