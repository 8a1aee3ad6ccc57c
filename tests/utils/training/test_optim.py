"""Groups step at their own rhythm: skipped steps change no bit, accumulated gradients are means."""

import json

import pytest
import torch
from torch import Tensor, nn

from utils.training.device import pack_tensors, unpack_tensors
from utils.training.optim import GroupedOptimizer, ParameterGroup, StepDecay

KINDS = ["sgd", "adam", "fused_adam"]


def two_branches(
    kind: str, every: int, between: str = "discard", step_decay: StepDecay | None = None
) -> tuple[nn.Linear, nn.Linear, GroupedOptimizer]:
    torch.manual_seed(0)
    slow, fast = nn.Linear(4, 3), nn.Linear(4, 3)
    groups = [
        ParameterGroup("slow", list(slow.parameters()), lr=0.1, update_interval=every, between=between),
        ParameterGroup("fast", list(fast.parameters()), lr=0.2),
    ]
    optimizer = GroupedOptimizer(kind, groups, weight_decay=0.1, epochs=3, min_lr=0.0, step_decay=step_decay)
    return slow, fast, optimizer


def take_step(slow: nn.Linear, fast: nn.Linear, optimizer: GroupedOptimizer, seed: int) -> dict[str, bool]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (slow(x) + fast(x)).square().sum().backward()
    return optimizer.step()


def snapshot(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(before: list[Tensor], module: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("between", ["discard", "accumulate"])
@pytest.mark.parametrize(("every", "k"), [(5, 5), (1, 1), (0, 1)])
def test_slow_moves_on_every_kth_step_only(kind: str, between: str, every: int, k: int) -> None:
    """With momentum, weight decay and a history of updates, the steps between are bit-identical."""
    slow, fast, optimizer = two_branches(kind, every, between)
    for step in range(1, 16):
        slow_before, fast_before = snapshot(slow), snapshot(fast)
        moved = take_step(slow, fast, optimizer, seed=step)
        assert moved == {"slow": step % k == 0, "fast": True}
        assert same(slow_before, slow) == (step % k != 0)
        assert not same(fast_before, fast)


def test_discard_uses_the_last_gradient_and_accumulate_the_mean() -> None:
    """SGD with momentum 0.9 written out by hand for k = 3; nothing is left over for the next interval."""
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]), torch.tensor([5.0, 5.0])]
    for between, expected in (("discard", gradients[2]), ("accumulate", sum(gradients) / 3)):
        parameter = nn.Parameter(torch.zeros(2))
        group = ParameterGroup("slow", [parameter], lr=1.0, update_interval=3, between=between)
        optimizer = GroupedOptimizer("sgd", [group], weight_decay=0.0, epochs=1, min_lr=0.0)
        for gradient in gradients * 2:
            parameter.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(parameter.detach(), -(1 + 1.9) * expected)


@pytest.mark.parametrize(
    ("step_decay", "factors"),
    [
        (None, [1, 0.75, 0.25, 0]),  # a cosine over three epochs
        (StepDecay(), [1, 1, 1, 1, 1]),
        (StepDecay([2, 4], 0.1), [1, 1, 0.1, 0.1, 0.01]),
        (StepDecay([1, 1, 10000], 0.5), [1, 0.25, 0.25, 0.25, 0.25]),
        (StepDecay([3], 0.0), [1, 1, 1, 0, 0]),
    ],
    ids=["cosine", "constant", "two steps", "twice at once, and never", "to zero"],
)
def test_the_schedule_multiplies_the_rate_of_every_group(
    step_decay: StepDecay | None, factors: list[float]
) -> None:
    """Also when the state went through JSON in the middle."""
    slow, fast, optimizer = two_branches("sgd", every=1, step_decay=step_decay)
    for epoch, factor in enumerate(factors):
        assert optimizer.lrs == pytest.approx({"slow": 0.1 * factor, "fast": 0.2 * factor}, abs=1e-12)
        take_step(slow, fast, optimizer, seed=epoch)
        optimizer.end_epoch()
        tree, tensors = pack_tensors(optimizer.state(), "phase")
        slow, fast, optimizer = two_branches("sgd", every=1, step_decay=step_decay)
        optimizer.load_state(unpack_tensors(json.loads(json.dumps(tree)), tensors))


def test_a_group_with_rate_0_keeps_it_and_its_bits_where_the_schedule_ends_above_0() -> None:
    still, moving = [nn.Parameter(torch.ones(3))], nn.Linear(4, 3)
    groups = [ParameterGroup("slow", still, 0.0), ParameterGroup("fast", list(moving.parameters()), 0.2)]
    optimizer = GroupedOptimizer("sgd", groups, weight_decay=0.1, epochs=3, min_lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (still[0].sum() + moving(torch.ones(1, 4)).sum()).backward()
        optimizer.step()
        optimizer.end_epoch()
    assert optimizer.lrs == pytest.approx({"slow": 0, "fast": 0.1}) and torch.equal(still[0], torch.ones(3))


def test_table_names_groups_rates_and_sizes() -> None:
    _, _, optimizer = two_branches("sgd", every=5)
    lines = [line.split() for line in optimizer.table().splitlines()]
    assert lines == [
        ["group", "lr", "every", "tensors", "parameters"],
        ["slow", "0.1", "5", "2", "15"],
        ["fast", "0.2", "1", "2", "15"],
    ]


def test_fused_adam_is_adam() -> None:
    """The same steps up to rounding."""
    ends = []
    for kind in ("adam", "fused_adam"):
        weight = nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = GroupedOptimizer(
            kind, [ParameterGroup("w", [weight], lr=0.1)], weight_decay=0.1, epochs=3, min_lr=0.0
        )
        for step in range(6):
            optimizer.zero_grad()
            (weight.square() * (step + 1)).sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)
    assert not torch.allclose(ends[0], torch.linspace(-1, 1, 7), atol=0.05)


def test_a_tensor_in_two_groups_or_frozen_is_refused() -> None:
    parameter, frozen = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)
    twice = [ParameterGroup("a", [parameter], lr=1.0), ParameterGroup("b", [parameter], lr=1.0)]
    for groups, message in ((twice, "two optimizer"), ([ParameterGroup("a", [frozen], lr=1.0)], "frozen")):
        with pytest.raises(ValueError, match=message):
            GroupedOptimizer("sgd", groups, weight_decay=0.0, epochs=1, min_lr=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_state_through_json_continues_bit_for_bit(kind: str) -> None:
    """Stopped between two slow updates, with held gradients, and rebuilt from JSON and tensors."""
    slow, fast, optimizer = two_branches(kind, every=3, between="accumulate")
    for step in range(4):
        take_step(slow, fast, optimizer, seed=step)
    optimizer.end_epoch()
    tree, tensors = pack_tensors(optimizer.state(), "phase")
    tree = json.loads(json.dumps(tree))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    slow2, fast2, optimizer2 = two_branches(kind, every=3, between="accumulate")
    slow2.load_state_dict(slow.state_dict())
    fast2.load_state_dict(fast.state_dict())
    optimizer2.load_state(unpack_tensors(tree, tensors))
    for step in range(4, 9):
        assert take_step(slow, fast, optimizer, step) == take_step(slow2, fast2, optimizer2, step)
    assert same(snapshot(slow), slow2) and same(snapshot(fast), fast2)
    assert optimizer.lrs == optimizer2.lrs


def test_weight_decay_reaches_what_the_loss_does_not() -> None:
    """As where several processes add up their gradients, which have to be there."""
    reached, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [ParameterGroup("all", [reached, other], lr=0.5)]
    optimizer = GroupedOptimizer("sgd", groups, weight_decay=0.1, epochs=1, min_lr=0.0)
    optimizer.zero_grad()
    reached.sum().backward()
    optimizer.divide_gradients(2)
    optimizer.step()
    assert reached.tolist() == pytest.approx([0.7, 0.7]) and other.tolist() == pytest.approx([0.95, 0.95])


def test_gradients_kept_for_a_later_step_come_back_to_the_device_of_their_parameters() -> None:
    """A checkpoint is read on the CPU; "meta" stands for any other device."""
    slow, fast, optimizer = two_branches("sgd", every=2, between="accumulate")
    take_step(slow, fast, optimizer, seed=1)
    saved = optimizer.state()
    parameters = [nn.Parameter(torch.zeros(3, 4, device="meta")), nn.Parameter(torch.zeros(3, device="meta"))]
    groups = [ParameterGroup("slow", parameters, lr=0.1, update_interval=2, between="accumulate")]
    other = GroupedOptimizer("sgd", groups, weight_decay=0.1, epochs=3, min_lr=0.0)
    other.load_state(other.state() | {"accumulated_grads": saved["accumulated_grads"][:1]})
    assert [gradient.device.type for gradient in other.state()["accumulated_grads"][0]] == ["meta", "meta"]
