"""Moving what the fast branch learned into the slow one at a task's end (Nested LoRA v1).

    report = consolidate(adapter, tokens, rule="function", alpha=0.1, reset="lora")
    report.drift        # how far the adapter's output moved on the tokens, relative

Rules and resets are entries of visible dicts. `tokens` are the adapter's own inputs on the task's data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.sema_components import LoRAAdapter, NestedLoRAAdapter

RIDGE = 1e-6  # relative to the mean diagonal of the Gram matrix: keeps the solve finite when units are silent or equal


@dataclass(frozen=True)
class Consolidation:
    """What a task end does to nested adapters: the rule, its strength and how fast starts again.

    Attributes:
        rule: "weights" (theta_slow += alpha theta_fast), "function" (slow refitted to slow(x) + alpha fast(x)) or
            "interpolate" (slow goes a share alpha of the way to slow and fast merged, unit by unit).
        alpha: how much of fast goes into slow.
        reset: "lora" (fast silent, able to learn), "zeros" (all of fast zero: its gradient is zero for ever) or
            "aligned" (fast silent on slow's hidden units; what "interpolate" starts from).
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
    RESETS[how.reset](adapter)
    moved, size = (adapter(tokens) - output_before).norm(), output_before.norm()
    drift = float(moved / size) if size > 0 else float(moved > 0)
    return ConsolidationReport(before, adapter.norms(), drift)


def add_weights(adapter: NestedLoRAAdapter, tokens: Tensor, alpha: float) -> None:
    """theta_slow <- theta_slow + alpha theta_fast (the seeds' rule; `tokens` are not needed).

    Tensor by tensor for branches with an activation: their hidden units are unrelated, so this adds weights that do not
    belong together. Linear branches are their matrices W = W_up W_down, so theta is W there: W_slow + alpha W_fast at
    rank r is its truncated singular value decomposition, exact where its rank is at most r (Eckart & Young 1936).
    """
    if isinstance(adapter.slow, LoRAAdapter):
        up, down = _linear_target(adapter, alpha)
        return _set_product(adapter.slow, up, down)
    for slow, fast in zip(adapter.slow.parameters(), adapter.fast.parameters(), strict=True):
        slow.add_(fast, alpha=alpha)


def refit_function(adapter: NestedLoRAAdapter, tokens: Tensor, alpha: float) -> None:
    """Refit slow so that slow_new(x) ~ slow(x) + alpha fast(x) on the tokens, at unchanged rank r.

    The 2r hidden units of both branches stacked give the target exactly. Units are removed one at a time, each time
    the one whose removal costs least after the others are refitted, until r are left; the up-projection and bias are
    the ridge least-squares solution. With G = H^T H over units and a constant column and W = G^-1 H^T Y, removing
    unit j raises the squared error by ||W_j||^2 / (G^-1)_jj (Optimal Brain Surgeon, Hassibi & Stork 1993).

    For linear branches the least-squares solution of rank r is W = V V^T (W_slow + alpha W_fast), V (d, r) the first
    principal directions of the outputs on the tokens (reduced-rank regression, Izenman 1975).
    """
    slow, fast = adapter.slow, adapter.fast
    if isinstance(slow, LoRAAdapter):
        up, down = _linear_target(adapter, alpha)
        basis, mixing = torch.linalg.qr(up)  # outputs are basis (mixing down x)
        outputs = (tokens.double() @ down.T) @ mixing.T  # (N, 2r)
        directions = (
            torch.linalg.svd(outputs, full_matrices=False).Vh[: slow.down_proj.out_features].T
        )  # (2r, r)
        return _set_product(slow, basis @ directions, directions.T @ mixing @ down)
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


def _linear_target(adapter: NestedLoRAAdapter, alpha: float) -> tuple[Tensor, Tensor]:
    """W_slow + alpha W_fast of linear branches as a product of (d, 2r) and (2r, d), in double precision."""
    slow, fast = adapter.slow, adapter.fast
    up = torch.cat([slow.up_proj.weight, alpha * fast.up_proj.weight], dim=1)
    return up.double(), torch.cat([slow.down_proj.weight, fast.down_proj.weight]).double()


def _set_product(branch: LoRAAdapter, up: Tensor, down: Tensor) -> None:
    """Make W_up W_down the best approximation of rank r of up (d, k) times down (k, d), k >= r, in Frobenius norm.

    W_down gets orthonormal rows and W_up the sizes: a unit of no size has a zero W_up, as at the LoRA start, and can
    learn.
    """
    rank = branch.down_proj.out_features
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    u, sizes, vh = torch.linalg.svd(left_core @ right_core.T)
    branch.up_proj.weight.copy_(left @ u[:, :rank] * sizes[:rank])
    branch.down_proj.weight.copy_(vh[:rank] @ right.T)


def _ridge(gram: Tensor, cross: Tensor, kept: list[int]) -> tuple[Tensor, Tensor]:
    """Ridge solution over the kept units, (k, d), and the inverse of their regularised Gram matrix, (k, k)."""
    part = gram[kept][:, kept]
    ridge = RIDGE * part.diagonal().mean().clamp_min(torch.finfo(part.dtype).tiny)
    inverse = torch.linalg.inv(part + ridge * torch.eye(len(kept), dtype=part.dtype, device=part.device))
    return inverse @ cross[kept], inverse


def interpolate(adapter: NestedLoRAAdapter, tokens: Tensor, alpha: float) -> None:
    """Slow goes a share alpha of the way to the task's solution, unit by unit (`tokens` are not needed):

        W_down <- W_down + alpha (V_down - W_down),   b likewise,   W_up <- W_up + alpha V_up

    with W of slow and V of fast. It needs aligned branches: fast began the task on slow's hidden units (V_down =
    W_down, V_up = 0), so unit i of both is one unit that the task has moved, and alpha 1 is the task's solution to
    first order in what fast learned. With alpha_t = 1 / t slow is the running mean of the tasks' solutions, as in
    averaging fine-tuned weights (Wortsman et al., *Model soups*, ICML 2022) along the sequence of tasks.
    """
    slow, fast = adapter.slow, adapter.fast
    for mine, solution in zip(slow.down_proj.parameters(), fast.down_proj.parameters(), strict=True):
        mine.lerp_(solution, alpha)
    for mine, learned in zip(slow.up_proj.parameters(), fast.up_proj.parameters(), strict=True):
        mine.add_(learned, alpha=alpha)


def reset_to_lora_start(adapter: NestedLoRAAdapter) -> None:
    """Up and biases zero, down drawn anew: silent, and its up-projection has a gradient."""
    adapter.fast.reset()


def reset_to_zeros(adapter: NestedLoRAAdapter) -> None:
    """All of fast zero, the seeds' literal rule. Both factors' gradients are then exactly zero: fast is dead."""
    for parameter in adapter.fast.parameters():
        nn.init.zeros_(parameter)


def reset_aligned(adapter: NestedLoRAAdapter) -> None:
    """Silent on the hidden units of slow."""
    adapter.align()


RULES: dict[str, Callable[[NestedLoRAAdapter, Tensor, float], None]] = {
    "weights": add_weights,
    "function": refit_function,
    "interpolate": interpolate,
}
RESETS: dict[str, Callable[[NestedLoRAAdapter], None]] = {
    "lora": reset_to_lora_start,
    "zeros": reset_to_zeros,
    "aligned": reset_aligned,
}
