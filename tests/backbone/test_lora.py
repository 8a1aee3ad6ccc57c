"""LoRA on timm's qkv: the dense formula and its gradients, merging, structure, cost of many adapters."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbone.lora import INIT_MAGNITUDE, GumbelGate, LoRAVisionTransformer
from tests.tiny_vits import DEPTH, MODELS, NAME, WIDTH, images, plain_vit


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def learned(
    ranks: Sequence[int] = (2, 3, 4), is_open: bool = True, name: str = NAME
) -> LoRAVisionTransformer:
    """A network whose adapters have learned something, the newest of them still learning."""
    network = LoRAVisionTransformer(plain_vit(name))
    for k, rank in enumerate(ranks):
        network.grow(rank)
        with torch.no_grad():
            for parameter in network.parameter_groups()["lora"]:
                parameter.normal_(std=0.2)
        if k < len(ranks) - 1 or not is_open:
            network.freeze_newest()
    with torch.no_grad():
        network.magnitudes.normal_(mean=0.8, std=0.3)
    return network


def products(network: LoRAVisionTransformer) -> list[list[list[Tensor]]]:
    """B A of every adapter, [block][q or v][adapter]; differentiable in the one that learns."""
    frozen = network.ranks[:-1] if network.is_open else network.ranks
    found = []
    for block in network.projections:
        pairs = [
            zip(block.down[s].split(frozen), block.up[s].split(frozen, dim=1), strict=True) for s in (0, 1)
        ]
        of_block = [[b @ a for a, b in of_projection] for of_projection in pairs]
        if network.is_open:
            for s in (0, 1):
                of_block[s].append(block.new.up[s] @ block.new.down[s])
        found.append(of_block)
    return found


def dense(network: LoRAVisionTransformer, x: Tensor, beta: Tensor | None = None) -> Tensor:
    """timm's own features with W + sum_k beta_k m_k B_k A_k written out."""
    weights = network.magnitudes if beta is None else beta * network.magnitudes
    vit, by_block = plain_vit(), weights.expand(DEPTH, len(network.ranks))
    state = {}
    for i, of_block in enumerate(products(network)):
        q, v = (sum(w * product for w, product in zip(by_block[i], of_s, strict=True)) for of_s in of_block)
        name = f"blocks.{i}.attn.qkv.weight"
        state[name] = vit.get_parameter(name).detach() + torch.cat([q, torch.zeros(WIDTH, WIDTH), v])
    return torch.func.functional_call(vit, state, (x,))


@pytest.mark.parametrize("name", MODELS)
def test_untrained_adapters_give_timms_output_bit_for_bit(name: str) -> None:
    """One and several, with gradients and without, merged, and in bf16."""
    network, x = LoRAVisionTransformer(plain_vit(name)), images(name)
    expected = plain_vit(name)(x)
    assert torch.equal(network(x), expected)
    for _ in range(3):
        network.grow(4)
        down = network.projections[0].new.down
        assert down.abs().max() <= (1 / WIDTH) ** 0.5 + 1e-6  # the bound of Kaiming-uniform(a = sqrt 5)
        assert torch.equal(network(x), expected)
        network.merge()
        assert torch.equal(network(x), expected)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            merged = network(x)
            network.unmerge()
            assert torch.equal(network(x), merged) and torch.equal(merged, plain_vit(name)(x))
        network.freeze_newest()


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("gate", ["none", "global", "layer"])
def test_the_dense_formula(gate: str, is_open: bool) -> None:
    """In training form and merged, with weights of no, one or a gate in every layer, one of them zero.

    What is merged is no state, and the weights come back whole.
    """
    network = learned(is_open=is_open)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    beta = {"none": None, "global": torch.tensor([0.6, 0.0, 0.4]), "layer": torch.rand(DEPTH, 3)}[gate]
    expected = dense(network, images(), beta)
    assert (expected - plain_vit()(images())).abs().max() > 0.01
    unmerged = network(images(), beta=beta)
    close(unmerged, expected)
    assert torch.equal(network(images()), network(images(), beta=torch.ones(DEPTH, 3)))
    network.merge(beta)
    network.merge(torch.zeros(3))  # merged already: nothing
    close(network(images()), expected)
    assert network.is_merged and network.state_dict().keys() == before.keys()
    network.unmerge()
    assert not network.is_merged and torch.equal(network(images(), beta=beta), unmerged)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("ranks", [(2, 3, 4), (20, 10, 4)], ids=["low ranks", "ranks beyond half the width"])
def test_gradients_are_those_of_the_formula(ranks: tuple[int, ...]) -> None:
    """Of magnitudes, weights and the newest direction, by both sums of frozen terms; of nothing else."""
    network, beta = learned(ranks).train(), torch.rand(DEPTH, 3).requires_grad_()
    assert not network.vit.training
    groups = network.parameter_groups()
    leaves = [beta, *groups["alpha"], *groups["lora"]]
    ours = torch.autograd.grad(network(images(), beta=beta).square().sum(), leaves)
    theirs = torch.autograd.grad(dense(network, images(), beta).square().sum(), leaves)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-4, rtol=2e-4)
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(leaf) for leaf in leaves[1:]}


def test_bf16_gradients_are_near_those_of_fp32() -> None:
    gradients = []
    for enabled in (False, True):
        network = learned((2, 30, 4))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = network(images()).float().square().sum()
        loss.backward()
        gradients.append(network.magnitudes.grad)
    assert gradients[1].dtype == torch.float32
    torch.testing.assert_close(
        gradients[1], gradients[0], rtol=0.1, atol=0.05 * gradients[0].abs().max().item()
    )


def test_bf16_sees_magnitudes_as_they_are() -> None:
    """0.8013 is no bf16 number: the nearest one gives another output."""
    network, outputs = learned(is_open=False), []
    for value in (0.8013, float(torch.tensor(0.8013).bfloat16())):
        nn.init.constant_(network.magnitudes, value)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(network(images()))
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(
    ("change", "arguments"),
    [("grow", [2]), ("freeze_newest", []), ("keep", [[0, 2]]), ("reset_magnitudes", [])],
)
def test_a_change_of_structure_unmerges(change: str, arguments: list[Any]) -> None:
    network = learned(is_open=change == "freeze_newest")
    network.merge()
    getattr(network, change)(*arguments)
    assert not network.is_merged


def test_freezing_changes_no_function_and_the_next_task_begins_where_this_one_ended() -> None:
    network, x = learned(), images()
    before = network(x)
    network.freeze_newest()
    close(network(x), before)
    network.grow(5)
    close(network(x), before)
    assert network.ranks == [2, 3, 4, 5] and network.magnitudes[-1] == INIT_MAGNITUDE


def test_reset_makes_all_adapters_alike_as_published() -> None:
    """0.8 B A / (|B| |A|); one that never learned stays zero instead of becoming not a number."""
    network = learned(is_open=False)
    network.grow(2)
    network.freeze_newest()  # with B zero
    before = products(network)
    network.reset_magnitudes()
    torch.testing.assert_close(network.magnitudes.data, torch.full((4,), 0.8))
    for old, new, block in zip(before, products(network), network.projections, strict=True):
        for s in (0, 1):
            assert not new[s][-1].any()
            sizes = [part.norm() for part in block.up[s].split(network.ranks, dim=1)[:-1]]
            torch.testing.assert_close(torch.stack(sizes), torch.ones(3))
            for k in range(3):  # rank-one factors keep their direction
                torch.testing.assert_close(new[s][k] / new[s][k].norm(), old[s][k] / old[s][k].norm())


def test_keeping_some_frees_the_others() -> None:
    """As if they had never been: parameters, memory, function."""
    network = learned((2, 3, 4), is_open=False)
    assert network.parameter_counts() == {"adapters": DEPTH * 4 * WIDTH * 9, "magnitudes": 3}
    expected = network(images(), beta=torch.tensor([1.0, 0.0, 1.0]))
    network.keep([0, 2])
    close(network(images()), expected)
    counts = {"adapters": DEPTH * 4 * WIDTH * 6, "magnitudes": 2}
    assert network.ranks == [2, 4] and network.parameter_counts() == counts
    state, frozen = network.state_dict(), network.frozen_names()
    memory = sum(tensor.untyped_storage().nbytes() for name, tensor in state.items() if name not in frozen)
    assert memory == 4 * sum(counts.values()) + 8 * 6  # and six owners of terms


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("foreign", lambda tensor: torch.zeros(1)),
        ("vit.norm.weight", lambda tensor: None),
        ("vit.blocks.2.attn.qkv.new.up", lambda tensor: None),
        ("owner", lambda tensor: None),
        ("magnitudes", lambda tensor: None),
        ("magnitudes", lambda tensor: tensor[1:]),
        ("vit.blocks.1.attn.qkv.down", lambda tensor: tensor[:, 1:]),
        ("vit.blocks.1.attn.qkv.up", lambda tensor: tensor[..., 1:]),
        ("vit.blocks.1.attn.qkv.new.down", lambda tensor: tensor[:, 1:]),
        ("owner", lambda tensor: tensor[1:]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_of_another_network_are_refused(
    name: str, change: Callable[[Tensor | None], Tensor | None]
) -> None:
    state = learned().state_dict()
    state[name] = change(state.get(name))
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(RuntimeError, match="attn.qkv|magnitudes" if name == "owner" else name):
        LoRAVisionTransformer(plain_vit()).load_state_dict(state)


def test_a_network_may_be_copied_after_a_forward() -> None:
    network = learned()
    network(images()).sum().backward()
    assert torch.equal(copy.deepcopy(network)(images()), network(images()))


@pytest.mark.parametrize("layers", [None, 5])
def test_a_gate_grows_and_loses_logits(layers: int | None) -> None:
    gate, lead = GumbelGate(layers), () if layers is None else (layers,)
    for value in (1.0, 2.0, 3.0):
        gate.grow(torch.full((*lead, 1), value))
    assert gate.logits.shape == (*lead, 3) and gate.logits.requires_grad
    gate.keep([0, 2])
    assert gate.logits.reshape(-1, 2)[0].tolist() == [1.0, 3.0] and gate.logits.is_leaf
    fresh = GumbelGate(layers)
    fresh.load_state_dict(gate.state_dict(), strict=True)
    assert torch.equal(fresh.logits, gate.logits)
    with pytest.raises(RuntimeError, match="size mismatch"):
        GumbelGate(7).load_state_dict(gate.state_dict())


# --- what many adapters cost --------------------------------------------------------------------------------


def flops_of(work: Callable[[], object]) -> int:
    """Floating point operations of the matrix products and attention in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_merged_a_forward_costs_what_timms_does_whatever_was_grown() -> None:
    one, fifty, x = learned((2,)), learned((2,) * 50), images()
    for network in (one, fifty):
        network.merge()
    with torch.no_grad():
        flops = {flops_of(lambda network=network: network(x)) for network in (plain_vit(), one, fifty)}
    assert len(flops) == 1


@pytest.mark.parametrize(("rank", "form"), [(1, "tokens"), (2, "matrix")])
def test_unmerged_a_step_costs_no_more_than_the_magnitudes_derivatives(rank: int, form: str) -> None:
    """20 frozen adapters beside a learning one: dL/dw on tokens, and W put together once per batch."""
    one, many, extra = learned((2,)), learned((rank,) * 20 + (2,)), []
    for x in (images(count=4), images(count=16)):
        step = [flops_of(lambda n=n, x=x: n(x).square().sum().backward()) for n in (one, many)]
        extra.append(step[1] - step[0])
    terms, tokens = 20 * rank, 1 + 4 + 4  # class token, registers, 2 x 2 patches
    on_tokens = {"tokens": 4 * terms * WIDTH, "matrix": 2 * WIDTH * WIDTH}[form]
    assert (2 * terms < WIDTH) == (form == "tokens")
    assert extra[1] - extra[0] == 12 * tokens * DEPTH * 2 * on_tokens  # of twelve more images
    in_all = DEPTH * 2 * (16 * tokens * on_tokens + 3 * 2 * terms * WIDTH * WIDTH)
    assert extra[1] <= in_all


def test_a_training_step_keeps_no_more_activations_with_many_adapters() -> None:
    """Saved for backward: the same bytes an image with one frozen adapter and with forty."""

    def saved_bytes(network: LoRAVisionTransformer, count: int) -> int:
        sizes: list[int] = []
        pack = lambda tensor: sizes.append(tensor.numel() * tensor.itemsize) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(images(count=count))
        return sum(sizes)

    few, many = (learned((1,) * frozen + (2,)) for frozen in (1, 40))
    more = [saved_bytes(network, 10) - saved_bytes(network, 2) for network in (few, many)]
    assert more[0] == more[1] > 0
