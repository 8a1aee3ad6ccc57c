"""Consolidation and reset: what moves into slow, what is left of fast, and what it does to the function."""

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone.consolidation import Consolidation, consolidate
from backbone.sema_components import Adapter, LoRAAdapter, NestedLinearLoRAAdapter, NestedLoRAAdapter

WIDTH, RANK = 24, 4


def trained_adapter(seed: int = 0, kind: type[NestedLoRAAdapter] = NestedLoRAAdapter) -> NestedLoRAAdapter:
    """Both branches away from their start."""
    torch.manual_seed(seed)
    adapter = kind(WIDTH, RANK)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


def features(seed: int = 1) -> Tensor:
    return torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(seed))


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_weights_rule_is_the_seeds_formula() -> None:
    """theta_slow + alpha theta_fast, tensor by tensor, exactly."""
    adapter = trained_adapter()
    expected = [
        s + 0.1 * f for s, f in zip(adapter.slow.parameters(), adapter.fast.parameters(), strict=True)
    ]
    consolidate(adapter, features(), Consolidation("weights", alpha=0.1, reset="lora"))
    for slow, wanted in zip(adapter.slow.parameters(), expected, strict=True):
        torch.testing.assert_close(slow.detach(), wanted.detach())


def test_function_rule_keeps_the_output_where_weights_do_not() -> None:
    """At alpha 1 the refit stays far closer to slow(x) + fast(x) on the task's features: 0.37 against 0.79 here."""
    x, drift = features(), {}
    for rule in ("function", "weights"):
        adapter = trained_adapter()
        wanted = adapter(x).detach()
        report = consolidate(adapter, x, Consolidation(rule, alpha=1.0, reset="lora"))
        drift[rule] = distance(adapter(x).detach(), wanted)
        assert report.drift == pytest.approx(drift[rule], rel=1e-4)
    print(f"drift at alpha 1: function {drift['function']:.3f}, weights {drift['weights']:.3f}")
    assert drift["function"] < 0.5 * drift["weights"]


def test_function_rule_is_exact_when_rank_allows() -> None:
    """Units that fast does not use cost nothing to remove: with a silent fast branch slow comes back exactly."""
    adapter, x = trained_adapter(), features()
    adapter.fast.reset()
    wanted = adapter(x).detach()
    consolidate(adapter, x, Consolidation("function", alpha=1.0, reset="lora"))
    assert distance(adapter(x).detach(), wanted) < 1e-4


def test_function_rule_targets_slow_plus_alpha_fast() -> None:
    """The refit is nearer to slow + alpha fast than to either end."""
    adapter, x, alpha = trained_adapter(), features(), 0.5
    slow, fast = adapter.slow(x).detach(), adapter.fast(x).detach()
    consolidate(adapter, x, Consolidation("function", alpha=alpha, reset="lora"))
    after = adapter(x).detach()
    assert distance(after, slow + alpha * fast) < min(distance(after, slow), distance(after, slow + fast))


def test_function_rule_beats_any_fixed_choice_of_units() -> None:
    """Removing units by cost is at least as good as keeping slow's own units and refitting."""
    x = features()
    adapter = trained_adapter()
    target = adapter(x).detach()
    hidden = torch.relu(adapter.slow.down_proj(x)).detach()
    hidden = torch.cat([hidden, torch.ones(len(x), 1)], dim=1)
    kept_slow = hidden @ torch.linalg.lstsq(hidden, target).solution
    consolidate(adapter, x, Consolidation("function", alpha=1.0, reset="lora"))
    assert distance(adapter(x).detach(), target) <= distance(kept_slow, target) + 1e-4


@pytest.mark.parametrize("rule", ["weights", "function"])
def test_reset_leaves_fast_silent_but_able_to_learn(rule: str) -> None:
    """After the LoRA reset fast adds exactly nothing; a few steps of training move it and its output."""
    adapter, x = trained_adapter(), features()
    consolidate(adapter, x, Consolidation(rule, alpha=0.5, reset="lora"))
    assert torch.count_nonzero(adapter.fast(x)) == 0
    start = [parameter.detach().clone() for parameter in adapter.fast.parameters()]
    train(adapter, x)
    moved = [not torch.equal(a, b) for a, b in zip(start, adapter.fast.parameters(), strict=True)]
    assert all(moved)
    assert adapter.fast(x).norm() > 0


def test_reset_to_zeros_is_dead_for_ever() -> None:
    """The seeds' literal rule: up-projection, down-projection and hidden bias have no gradient ever again."""
    adapter, x = trained_adapter(), features()
    consolidate(adapter, x, Consolidation("weights", alpha=0.5, reset="zeros"))
    train(adapter, x)
    fast = adapter.fast
    for dead in (fast.down_proj.weight, fast.down_proj.bias, fast.up_proj.weight):
        assert torch.count_nonzero(dead) == 0


def train(adapter: NestedLoRAAdapter, x: Tensor) -> None:
    target = torch.randn(len(x), WIDTH, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (adapter(x) - target).square().mean().backward()
        optimizer.step()


def test_effect_is_the_norm_of_the_product() -> None:
    """||W_up W_down||_F written out; exactly zero for a branch at its start, while ||theta|| is not."""
    adapter = trained_adapter()
    product = adapter.fast.up_proj.weight @ adapter.fast.down_proj.weight
    assert adapter.norms()["fast_effect"] == pytest.approx(float(product.detach().norm()), rel=1e-5)
    adapter.fast.reset()
    assert adapter.norms()["fast_effect"] == 0.0 and adapter.norms()["fast"] > 0


def test_norms_are_reported_before_and_after() -> None:
    adapter = trained_adapter()
    before = adapter.norms()
    report = consolidate(adapter, features(), Consolidation("weights", alpha=0.1, reset="zeros"))
    assert report.before == before
    assert report.after == adapter.norms() and report.after["fast"] == 0.0


def test_drift_of_a_silent_adapter_is_zero() -> None:
    """Nothing to move, nothing moved, no division by zero; also with units that never fire."""
    for rule in ("weights", "function"):
        adapter = NestedLoRAAdapter(WIDTH, RANK)
        report = consolidate(adapter, features(), Consolidation(rule, alpha=0.1, reset="lora"))
        assert report.drift == 0.0


def test_nested_rank_r_has_the_parameters_of_bottleneck_2r_and_one_bias() -> None:
    count = {
        "nested": sum(p.numel() for p in NestedLoRAAdapter(WIDTH, RANK).parameters()),
        "matched": sum(p.numel() for p in Adapter(WIDTH, 2 * RANK).parameters()),
    }
    assert count["nested"] == count["matched"] + WIDTH


def test_branches_are_summed_and_start_silent_and_different() -> None:
    adapter, x = NestedLoRAAdapter(WIDTH, RANK), features()
    assert torch.count_nonzero(adapter(x)) == 0
    assert not torch.equal(adapter.slow.down_proj.weight, adapter.fast.down_proj.weight)
    adapter = trained_adapter()
    torch.testing.assert_close(adapter(x), adapter.slow(x) + adapter.fast(x))


def test_aligned_branches_share_their_hidden_units_and_can_learn() -> None:
    adapter = trained_adapter()
    before = adapter.slow(features())
    adapter.align()
    assert torch.equal(adapter.fast.down_proj.weight, adapter.slow.down_proj.weight)
    assert torch.equal(adapter.fast.down_proj.bias, adapter.slow.down_proj.bias)
    assert torch.equal(adapter(features()), before) or distance(adapter(features()), before) < 1e-6
    adapter(features()).square().mean().backward()
    assert adapter.fast.up_proj.weight.grad.norm() > 0


def test_interpolation_of_aligned_branches_is_exact_while_hidden_units_stay() -> None:
    """Fast moved only its up-projection: slow_new(x) = slow(x) + alpha fast(x) to rounding, and fast is silent."""
    adapter = trained_adapter()
    adapter.align()
    torch.nn.init.normal_(adapter.fast.up_proj.weight)
    x = features()
    wanted = (adapter.slow(x) + 0.3 * adapter.fast(x)).detach()
    consolidate(adapter, x, Consolidation("interpolate", alpha=0.3, reset="aligned"))
    torch.testing.assert_close(adapter(x).detach(), wanted)
    assert not adapter.fast(x).any()
    assert torch.equal(adapter.fast.down_proj.weight, adapter.slow.down_proj.weight)


def test_aligned_units_make_every_rule_but_the_sum_of_weights_keep_the_output() -> None:
    """A task moves the aligned units a little: at alpha 1 the output hardly moves, but for doubled down-projections."""
    drift = {}
    for rule, reset in (("interpolate", "aligned"), ("function", "aligned"), ("weights", "aligned")):
        adapter = trained_adapter()
        adapter.align()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in adapter.fast.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        drift[rule] = consolidate(adapter, features(), Consolidation(rule, alpha=1.0, reset=reset)).drift
    assert drift["function"] < drift["interpolate"] < 0.2 < drift["weights"]


def test_mean_of_the_tasks_solutions() -> None:
    """With alpha 1 / t the up-projection of slow ends as the mean of what each task ended with."""
    adapter = trained_adapter()
    adapter.align()
    solutions = []
    for task in range(4):
        with torch.no_grad():
            adapter.fast.up_proj.weight.normal_(generator=torch.Generator().manual_seed(task))
        solutions.append((adapter.slow.up_proj.weight + adapter.fast.up_proj.weight).detach().clone())
        consolidate(adapter, features(), Consolidation("interpolate", alpha=1 / (task + 1), reset="aligned"))
    torch.testing.assert_close(adapter.slow.up_proj.weight.detach(), torch.stack(solutions).mean(dim=0))


# --- linear branches: an adapter is its matrix ------------------------------------------------------------------------


def matrix(branch: LoRAAdapter) -> np.ndarray:
    """W_up W_down, (d, d), in double precision."""
    return (branch.up_proj.weight.double() @ branch.down_proj.weight.double()).detach().numpy()


def truncated(of: np.ndarray, rank: int) -> np.ndarray:
    u, sizes, vh = np.linalg.svd(of)
    return u[:, :rank] * sizes[:rank] @ vh[:rank]


def test_a_linear_adapter_is_its_matrix_without_biases() -> None:
    adapter, x = trained_adapter(kind=NestedLinearLoRAAdapter).slow, features()
    assert [name for name, _ in adapter.named_parameters()] == ["down_proj.weight", "up_proj.weight"]
    torch.testing.assert_close(adapter(x), x @ torch.from_numpy(matrix(adapter)).T.float())


@pytest.mark.parametrize("rule", ["weights", "function"])
def test_linear_consolidation_is_exact_where_the_rank_allows(rule: str) -> None:
    """With a silent slow branch, slow becomes alpha fast: to rounding, by both rules."""
    adapter, x = trained_adapter(kind=NestedLinearLoRAAdapter), features()
    adapter.slow.reset()
    wanted = (0.3 * adapter.fast(x)).detach()
    consolidate(adapter, x, Consolidation(rule, alpha=0.3, reset="lora"))
    assert distance(adapter(x).detach(), wanted) < 1e-5


def test_the_weights_rule_of_linear_branches_adds_their_matrices() -> None:
    """The nearest matrix of rank r to W_slow + alpha W_fast, by a singular value decomposition of the whole."""
    adapter = trained_adapter(kind=NestedLinearLoRAAdapter)
    wanted = truncated(matrix(adapter.slow) + 0.5 * matrix(adapter.fast), RANK)
    consolidate(adapter, features(), Consolidation("weights", alpha=0.5, reset="lora"))
    np.testing.assert_allclose(matrix(adapter.slow), wanted, atol=1e-5)


def test_the_function_rule_of_linear_branches_is_the_best_of_its_rank_on_the_tokens() -> None:
    """Its outputs are the truncated decomposition of the target's outputs, on tokens that are far from isotropic."""
    adapter = trained_adapter(kind=NestedLinearLoRAAdapter)
    x = features() * torch.logspace(-1, 1, WIDTH)
    target = matrix(adapter.slow) + 0.5 * matrix(adapter.fast)
    wanted = truncated(x.double().numpy() @ target.T, RANK)
    consolidate(adapter, x, Consolidation("function", alpha=0.5, reset="lora"))
    outputs = x.double().numpy() @ matrix(adapter.slow).T
    np.testing.assert_allclose(outputs, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_linear_branch_can_learn_after_nothing_was_consolidated() -> None:
    """W = 0 leaves W_up zero and W_down not: its gradient is not zero."""
    adapter, x = NestedLinearLoRAAdapter(WIDTH, RANK), features()
    consolidate(adapter, x, Consolidation("weights", alpha=1.0, reset="lora"))
    assert not adapter(x).any()
    (adapter(x) - x).square().mean().backward()
    assert adapter.slow.up_proj.weight.grad.norm() > 0
