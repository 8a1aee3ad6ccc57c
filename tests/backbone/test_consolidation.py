"""Nested adapters and their consolidation: what moves into slow, what is left of fast, and the function."""

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone.consolidation import Consolidation, ConsolidationReport, consolidate
from backbone.sema_components import Adapter, LoRAAdapter, NestedLinearLoRAAdapter, NestedLoRAAdapter

WIDTH, RANK = 24, 4


@torch.no_grad()
def trained_adapter(
    kind: type[NestedLoRAAdapter] = NestedLoRAAdapter, aligned: bool = False
) -> NestedLoRAAdapter:
    """Both branches away from their start; or fast aligned with slow."""
    torch.manual_seed(0)
    adapter = kind(WIDTH, RANK)
    for parameter in adapter.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    if aligned:
        adapter.align()
    return adapter


def features() -> Tensor:
    return torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(1))


def consolidated(
    adapter: NestedLoRAAdapter, rule: str, alpha: float, reset: str = "lora", x: Tensor | None = None
) -> ConsolidationReport:
    return consolidate(adapter, features() if x is None else x, Consolidation(rule, alpha, reset))


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def train(adapter: NestedLoRAAdapter) -> None:
    x, target = features(), torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (adapter(x) - target).square().mean().backward()
        optimizer.step()


# --- nested adapters ----------------------------------------------------------------------------------------


def test_branches_are_summed_and_start_at_zero_and_different() -> None:
    adapter, trained = NestedLoRAAdapter(WIDTH, RANK), trained_adapter()
    assert not adapter(features()).any()
    assert not torch.equal(adapter.slow.down_proj.weight, adapter.fast.down_proj.weight)
    torch.testing.assert_close(trained(features()), trained.slow(features()) + trained.fast(features()))
    matched = Adapter(WIDTH, 2 * RANK).parameters()  # of the same size but for one output bias
    assert sum(p.numel() for p in adapter.parameters()) == sum(p.numel() for p in matched) + WIDTH


def test_norms_and_drift_are_those_of_the_formulas() -> None:
    """||W_up W_down||_F, exactly zero at the start, where ||theta|| is not; drift on the tokens."""
    adapter, x = trained_adapter(), features()
    product = adapter.fast.up_proj.weight @ adapter.fast.down_proj.weight
    output, before = adapter(x), adapter.norms()
    assert before["fast_effect"] == pytest.approx(float(product.detach().norm()), rel=1e-5)
    report = consolidated(adapter, "weights", 0.1)
    assert report.before == before and report.after == adapter.norms()
    assert report.after["fast_effect"] == 0.0 and report.after["fast"] > 0
    assert report.drift == pytest.approx(distance(adapter(x), output), rel=1e-4)


# --- rules --------------------------------------------------------------------------------------------------


def test_weights_rule_is_the_formula_tensor_by_tensor() -> None:
    adapter = trained_adapter()
    pairs = zip(adapter.slow.parameters(), adapter.fast.parameters(), strict=True)
    expected = [(slow + 0.1 * fast).detach() for slow, fast in pairs]
    consolidated(adapter, "weights", 0.1)
    for slow, wanted in zip(adapter.slow.parameters(), expected, strict=True):
        torch.testing.assert_close(slow.detach(), wanted)


def test_function_rule_is_exact_when_rank_allows() -> None:
    """With fast at zero output, its units cost nothing to remove: slow comes back exactly."""
    adapter = trained_adapter()
    adapter.fast.reset()
    assert consolidated(adapter, "function", 1.0).drift < 1e-4


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_function_rule_beats_adding_weights_and_refitting_slows_own_units(alpha: float) -> None:
    """As an approximation of slow(x) + alpha fast(x), which it is nearer to than to slow(x)."""
    adapter, added, x = trained_adapter(), trained_adapter(), features()
    slow, target = adapter.slow(x).detach(), (adapter.slow(x) + alpha * adapter.fast(x)).detach()
    hidden = torch.cat([torch.relu(adapter.slow.down_proj(x)).detach(), torch.ones(len(x), 1)], dim=1)
    kept_slow = hidden @ torch.linalg.lstsq(hidden, target).solution
    consolidated(adapter, "function", alpha)
    consolidated(added, "weights", alpha)
    error = distance(adapter(x), target)
    assert error < min(0.6 * distance(added(x), target), distance(adapter(x), slow))
    assert error <= distance(kept_slow, target) + 1e-4


def test_interpolation_of_aligned_branches_is_exact_while_hidden_units_stay() -> None:
    """Fast moved only its up-projection: slow_new(x) = slow(x) + alpha fast(x) to rounding."""
    adapter, x = trained_adapter(aligned=True), features()
    torch.nn.init.normal_(adapter.fast.up_proj.weight)
    wanted = (adapter.slow(x) + 0.3 * adapter.fast(x)).detach()
    consolidated(adapter, "interpolate", 0.3, "aligned")
    torch.testing.assert_close(adapter(x).detach(), wanted)
    assert not adapter.fast(x).any()
    assert torch.equal(adapter.fast.down_proj.weight, adapter.slow.down_proj.weight)


def test_interpolation_by_one_over_t_is_the_mean_of_the_tasks_solutions() -> None:
    adapter, ups, downs = trained_adapter(aligned=True), [], []
    slow, fast = adapter.slow, adapter.fast
    for task in range(4):
        with torch.no_grad():
            fast.up_proj.weight.normal_(generator=torch.Generator().manual_seed(task))
            fast.down_proj.weight.add_(0.1 * fast.up_proj.weight.T)
        ups.append((slow.up_proj.weight + fast.up_proj.weight).detach())
        downs.append(fast.down_proj.weight.detach().clone())
        consolidated(adapter, "interpolate", 1 / (task + 1), "aligned")
    torch.testing.assert_close(slow.up_proj.weight.detach(), torch.stack(ups).mean(dim=0))
    torch.testing.assert_close(slow.down_proj.weight.detach(), torch.stack(downs).mean(dim=0))


# --- resets and report --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reset", "learning"), [("lora", 4), ("aligned", 4), ("zeros", 1)])
def test_after_a_reset_fast_is_zero_and_able_to_learn_but_for_zeros(reset: str, learning: int) -> None:
    """Of all zeros the output bias alone learns."""
    adapter = trained_adapter()
    consolidated(adapter, "weights", 0.5, reset)
    assert not adapter.fast(features()).any()
    start = [parameter.detach().clone() for parameter in adapter.fast.parameters()]
    train(adapter)
    moved = [not torch.equal(a, b) for a, b in zip(start, adapter.fast.parameters(), strict=True)]
    assert sum(moved) == learning


@pytest.mark.parametrize("rule", ["weights", "function"])
def test_drift_of_an_untrained_adapter_is_zero(rule: str) -> None:
    """No division by zero, also with units that are never active."""
    assert consolidated(NestedLoRAAdapter(WIDTH, RANK), rule, 0.1).drift == 0.0


# --- linear branches: an adapter is its matrix --------------------------------------------------------------


def matrix(branch: LoRAAdapter) -> np.ndarray:
    """W_up W_down, (d, d), in double precision."""
    return (branch.up_proj.weight.double() @ branch.down_proj.weight.double()).detach().numpy()


def truncated(of: np.ndarray, rank: int = RANK) -> np.ndarray:
    u, sizes, vh = np.linalg.svd(of)
    return u[:, :rank] * sizes[:rank] @ vh[:rank]


def test_linear_rules_are_truncated_singular_value_decompositions() -> None:
    """By "weights" of W_slow + alpha W_fast; by "function" of its outputs, on far from isotropic tokens."""
    adapter, x = trained_adapter(NestedLinearLoRAAdapter), features() * torch.logspace(-1, 1, WIDTH)
    target = matrix(adapter.slow) + 0.5 * matrix(adapter.fast)
    consolidated(adapter, "weights", 0.5)
    np.testing.assert_allclose(matrix(adapter.slow), truncated(target), atol=1e-5)

    adapter, inputs = trained_adapter(NestedLinearLoRAAdapter), x.double().numpy()
    consolidated(adapter, "function", 0.5, x=x)
    wanted = truncated(inputs @ target.T)
    np.testing.assert_allclose(inputs @ matrix(adapter.slow).T, wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_function_rule_of_linear_branches_needs_no_more_tokens_than_there_are() -> None:
    """Fewer tokens than the rank: the outputs on them are matched exactly."""
    adapter, x = trained_adapter(NestedLinearLoRAAdapter), features()[: RANK - 1]
    expected = adapter.slow(x) + adapter.fast(x)
    consolidated(adapter, "function", alpha=1.0, x=x)
    assert distance(adapter.slow(x), expected) < 1e-5


def test_a_linear_branch_can_learn_after_nothing_was_consolidated() -> None:
    """W = 0 leaves W_up zero and W_down not: its gradient is not zero."""
    adapter, x = NestedLinearLoRAAdapter(WIDTH, RANK), features()
    consolidated(adapter, "weights", 1.0)
    assert not adapter(x).any()
    (adapter(x) - x).square().mean().backward()
    assert adapter.slow.up_proj.weight.grad.norm() > 0
