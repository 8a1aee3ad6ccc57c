"""One block's adapters: mixing, consolidation, records and novelty, and the checkpoints it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backbone.consolidation import Consolidation
from backbone.frozen_block import is_learning
from backbone.sema_block import AdapterSpec, SEMAModules
from backbone.sema_components import ADAPTERS, Records

SPEC = AdapterSpec(width=12, kind="nested_lora", bottleneck=2, rd_dim=4, buffer_size=10)


def modules(growable: bool = True) -> SEMAModules:
    torch.manual_seed(0)
    return SEMAModules(SPEC, growable=growable)


def disturb(block: SEMAModules) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("adapters", [1, 2, 5])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_stacked_adapters_are_the_sum_one_by_one(kind: str, adapters: int) -> None:
    """Output and every gradient, with frozen and learning adapters, biases and a scale that is not 1."""
    torch.manual_seed(3)
    block = SEMAModules(AdapterSpec(width=12, kind=kind, bottleneck=3, scale=0.7), growable=True)
    for _ in range(adapters - 1):
        block.freeze_functional()
        block.grow()
    disturb(block)
    learning = [p for group in block.parameter_groups().values() for p in group if p.requires_grad]
    results = []
    for mix in (block.mix_stacked, block.mix_one_by_one):
        x = tokens().requires_grad_(True)
        out = mix(x, block.mixing_weights(x.mean(dim=1)))
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *learning], allow_unused=True)))
    for stacked, single in zip(*results, strict=True):
        if adapters > 1 or stacked is not None:  # the router of a single adapter decides nothing
            torch.testing.assert_close(stacked, single)


@pytest.mark.parametrize(("freeze_adapters", "expected"), [(True, [1]), (False, [0, 1])])
def test_consolidation_reaches_what_learned_in_the_task(freeze_adapters: bool, expected: list[int]) -> None:
    """Under "task" only the adapter added in it, if any; under "never" all of them."""
    how = Consolidation("weights", alpha=0.1, reset="lora")
    block = modules()
    disturb(block)
    assert set(block.end_of_task_training(freeze_adapters, how, tokens().flatten(0, 1))) == {0}
    block.grow()
    assert sorted(block.end_of_task_training(freeze_adapters, how, tokens().flatten(0, 1))) == expected
    assert [is_learning(adapter.functional) for adapter in block.adapters] == 2 * [not freeze_adapters]
    assert not any(is_learning(adapter.rd) for adapter in block.adapters) and not is_learning(block.router)
    again = block.end_of_task_training(freeze_adapters, how, tokens().flatten(0, 1))
    assert sorted(again) == ([] if freeze_adapters else [0, 1])


def test_outside_the_growing_range_there_is_one_adapter_and_nothing_else() -> None:
    block = modules(growable=False)
    assert block.router is None and block.adapters[0].rd is None
    with pytest.raises(RuntimeError, match="adapters.1"):
        block.load_state_dict(grown().state_dict())


def grown() -> SEMAModules:
    """Three adapters with two merged router rows and one of its own."""
    block = modules()
    for _ in range(2):
        block.observe(tokens().mean(dim=1))
        block.end_of_task_training()
        block.grow()
    disturb(block)
    return block


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adapters.1.functional.slow.up_proj.weight", lambda tensor: None),
        ("adapters.2.functional.fast.down_proj.weight", lambda tensor: tensor[:, 1:]),
        ("adapters.4.rd.encoder.weight", lambda tensor: torch.zeros(4, 12)),
        ("adapters.0.rd_loss_record.errors", lambda tensor: torch.zeros(11)),
        ("router.weight", lambda tensor: tensor[1:]),
        ("new_router.weight", lambda tensor: None),
        ("foreign", lambda tensor: torch.zeros(1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_of_another_module_are_refused(name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    saved = grown().state_dict()
    saved[name] = change(saved.get(name))
    with pytest.raises(RuntimeError, match=name.split(".")[0]):
        modules().load_state_dict({key: t for key, t in saved.items() if t is not None}, strict=True)


def test_records_keep_the_last_errors_as_published() -> None:
    """The batch that fills the buffer is cut to the room left; after that the oldest go."""
    record = Records(4)
    record.push(torch.tensor([1.0, 2.0, 3.0]))
    record.push(torch.tensor([4.0, 5.0, 6.0]))
    assert record.errors.tolist() == [1, 2, 3, 4] and len(record) == 4
    record.push(torch.tensor([7.0, 8.0]))
    assert record.errors.tolist() == [3, 4, 7, 8]
    record.push(torch.arange(10.0))
    assert record.errors.tolist() == [6, 7, 8, 9]


def test_z_scores() -> None:
    """Zero until more than two errors are stored; among equal ones an equal error has zero, too."""
    record, errors = Records(10), torch.tensor([5.0, -1.0])
    record.push(torch.tensor([1.0, 3.0]))
    assert record.z_scores(errors).tolist() == [0, 0]
    record.push(torch.tensor([2.0]))
    torch.testing.assert_close(record.z_scores(errors), torch.tensor([3.0, 3.0]))  # mean 2, unbiased std 1
    equal = Records(10)
    equal.push(torch.full((4,), 2.0))
    assert equal.z_scores(torch.tensor([2.0, 2.5])).tolist() == [0, torch.inf]


def test_novelty_is_the_smallest_mean_z_and_records_stop_with_their_descriptor() -> None:
    block, mean = modules(), tokens().mean(dim=1)
    block.grow()
    disturb(block)
    block.observe(mean)
    for k, adapter in enumerate(block.adapters):
        assert len(adapter.rd_loss_record) == 6
        adapter.rd_loss_record.push(torch.arange(1.0, 5.0) * (k + 1))
    scores = [a.rd_loss_record.z_scores(a.rd(mean)).mean().item() for a in block.adapters]
    assert block.novelty(mean) == pytest.approx(min(scores))
    block.freeze_rd()
    block.observe(mean)
    assert [len(adapter.rd_loss_record) for adapter in block.adapters] == [10, 10]


@pytest.mark.parametrize("kind", ["adaptmlp", "nested_lora"])
def test_frozen_adapters_are_stacked_once_until_one_changes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten forwards read the factors of four frozen adapters once, those of the learning one ten times."""
    torch.manual_seed(3)
    block = SEMAModules(AdapterSpec(width=12, kind=kind, bottleneck=3), growable=True)
    for _ in range(4):
        block.freeze_functional()
        block.grow()
    disturb(block)
    counts, factors = [0], ADAPTERS[kind].factors
    monkeypatch.setattr(
        ADAPTERS[kind], "factors", lambda self: counts.__setitem__(0, counts[0] + 1) or factors(self)
    )
    x = tokens()
    weights = block.mixing_weights(x.mean(dim=1))
    for _ in range(10):
        block.mix_stacked(x, weights)
    assert counts == [4 + 10]
    for change in (lambda: disturb(block), block.freeze_functional, lambda: block.double() and None):
        change()
        x, weights = x.to(next(block.parameters())), weights.to(next(block.parameters()))
        torch.testing.assert_close(block.mix_stacked(x, weights), block.mix_one_by_one(x, weights))
