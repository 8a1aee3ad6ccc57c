"""LoRA on timm's qkv: the dense formula and its gradients, merging, structure, and what many adapters cost."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from utils.costs import flops_of

from backbone.lora import INIT_MAGNITUDE, GumbelGate, LoRAVisionTransformer, LowRank, _FrozenSum
from tests.tiny_vits import DEPTH, MODELS, NAME, WIDTH, images, plain_vit


def learned(
    ranks: Sequence[int] = (2, 3, 4), is_open: bool = True, name: str = NAME
) -> LoRAVisionTransformer:
    """A network whose adapters have learned something, the newest of them still learning."""
    network = LoRAVisionTransformer(plain_vit(name))
    for k, rank in enumerate(ranks):
        network.grow(rank)
        with torch.no_grad():
            for parameter in network.directions():
                parameter.normal_(std=0.2)
        if k < len(ranks) - 1 or not is_open:
            network.freeze_newest()
    with torch.no_grad():
        network.magnitudes.normal_(mean=0.8, std=0.3)
    return network


def factors(network: LoRAVisionTransformer) -> list[list[tuple[Tensor, Tensor]]]:
    """(A, B) of every adapter in the q and v of every block: [block * 2 + projection][adapter]."""
    found = []
    for block in network.projections:
        for s in (0, 1):
            frozen = network.ranks[:-1] if network.is_open else network.ranks
            pairs = list(zip(block.down[s].split(frozen), block.up[s].split(frozen, dim=1), strict=True))
            found.append(pairs + ([(block.new.down[s], block.new.up[s])] if network.is_open else []))
    return found


def dense(network: LoRAVisionTransformer, beta: Tensor | None = None) -> nn.Module:
    """timm's own network with W + sum_k beta_k alpha_k B_k A_k / (|B_k| |A_k|) written out in float64."""
    vit = plain_vit()
    beta = torch.ones(len(network.ranks)) if beta is None else beta
    rows = beta.expand(DEPTH, len(network.ranks))
    for i, block in enumerate(vit.blocks):
        weight = block.attn.qkv.weight.detach().double()
        for s, place in enumerate((slice(0, WIDTH), slice(2 * WIDTH, 3 * WIDTH))):
            for k, (a, b) in enumerate(factors(network)[2 * i + s]):
                a, b = a.double(), b.double()
                alpha = network.magnitudes[k].double() * b.norm() * a.norm()
                weight[place] = weight[place] + rows[i, k] * alpha * (b @ a) / (b.norm() * a.norm())
        block.attn.qkv.weight = nn.Parameter(weight.float())
    return vit


@pytest.mark.parametrize("name", MODELS)
def test_untrained_adapters_give_timms_output_bit_for_bit(name: str) -> None:
    """One and several, with gradients and without, merged, and in bf16."""
    network, x = LoRAVisionTransformer(plain_vit(name)), images(name)
    expected = plain_vit(name)(x)
    assert torch.equal(network(x), expected)
    for _ in range(3):
        network.grow(4)
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
    """In training form and merged, with weights of no, one or a gate in every layer, one of them zero."""
    network = learned(is_open=is_open)
    beta = {"none": None, "global": torch.tensor([0.6, 0.0, 0.4]), "layer": torch.rand(DEPTH, 3)}[gate]
    expected = dense(network, beta)(images())
    assert (expected - plain_vit()(images())).abs().max() > 0.01
    torch.testing.assert_close(network(images(), beta), expected, atol=1e-5, rtol=1e-5)
    network.merge(beta)
    torch.testing.assert_close(network(images()), expected, atol=1e-5, rtol=1e-5)


def test_weights_of_one_change_no_bit() -> None:
    network = learned()
    assert torch.equal(network(images()), network(images(), torch.ones(3)))
    assert torch.equal(network(images()), network(images(), torch.ones(DEPTH, 3)))


@pytest.mark.parametrize("ranks", [(2, 3, 4), (20, 10, 4)], ids=["low ranks", "ranks beyond half the width"])
def test_gradients_are_those_of_the_formula(ranks: tuple[int, ...]) -> None:
    """Of magnitudes, weights and the newest direction; both ways of summing the frozen terms. Nothing else has one."""
    network, beta = learned(ranks), torch.rand(DEPTH, 3).requires_grad_()
    network(images(), beta).square().sum().backward()
    ours = {"beta": beta.grad, "magnitudes": network.magnitudes.grad}
    ours |= {str(i): p.grad for i, p in enumerate(network.directions())}
    leaves = {id(p) for p in (network.magnitudes, *network.directions())}
    assert all(p.grad is None for p in network.parameters() if id(p) not in leaves)

    free = torch.ones(DEPTH, 3).mul(beta.detach()).requires_grad_()
    vit, theirs = plain_vit(), {}
    weights = free * network.magnitudes
    by_block: list[Tensor] = []
    for i, block in enumerate(vit.blocks):
        extra = [
            sum(weights[i, k] * (b @ a) for k, (a, b) in enumerate(factors(network)[2 * i + s]))
            for s in (0, 1)
        ]
        by_block.append(
            block.attn.qkv.weight.detach() + torch.cat([extra[0], torch.zeros(WIDTH, WIDTH), extra[1]])
        )
    network.magnitudes.grad = None
    for parameter in network.directions():
        parameter.grad = None
    named = {f"blocks.{i}.attn.qkv.weight": weight for i, weight in enumerate(by_block)}
    torch.func.functional_call(vit, named, (images(),)).square().sum().backward()
    theirs = {"beta": free.grad, "magnitudes": network.magnitudes.grad}
    theirs |= {str(i): p.grad for i, p in enumerate(network.directions())}
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], atol=2e-4, rtol=2e-4, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("rank", [2, 7])
def test_the_frozen_sum_by_finite_differences(rank: int) -> None:
    """Width 6: rank 2 sums over tokens first, rank 7 over the matrix."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(rank, dtype=torch.float64, requires_grad=True)
    fixed = [
        torch.randn(shape, dtype=torch.float64) for shape in ((18, 6), (18,), (2, rank, 6), (2, 6, rank))
    ]
    assert torch.autograd.gradcheck(lambda x, w: _FrozenSum.apply(x, *fixed, w), (x, weights))


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


def test_merging_is_apart_from_forward_and_comes_back_whole() -> None:
    network = learned()
    beta = torch.tensor([0.5, 0.2, 0.3])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = network(images(), beta)
    network.merge(beta)
    assert network.is_merged
    network.merge(torch.zeros(3))  # it is done: nothing
    torch.testing.assert_close(network(images()), expected, atol=1e-5, rtol=1e-5)
    assert {name for name in network.state_dict()} == before.keys()  # what is merged is no state
    network.unmerge()
    assert not network.is_merged
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(network(images(), beta), expected)


@pytest.mark.parametrize(
    "change", ["grow", "freeze_newest", "keep", "reset_magnitudes"], ids=lambda name: name.replace("_", " ")
)
def test_a_change_of_structure_unmerges(change: str) -> None:
    network = learned(is_open=change == "freeze_newest")
    network.merge()
    arguments = {"grow": (2,), "keep": ([0, 2],)}.get(change, ())
    getattr(network, change)(*arguments)
    assert not network.is_merged


def test_freezing_changes_no_function_and_normalises_directions() -> None:
    """|A| becomes 1, and the next task begins where this one ended."""
    network, x = learned(), images()
    before = network(x)
    network.freeze_newest()
    torch.testing.assert_close(network(x), before, atol=1e-5, rtol=1e-5)
    for pairs in factors(network):
        for a, _ in pairs:
            torch.testing.assert_close(a.norm(), torch.tensor(1.0))
    network.grow(5)
    torch.testing.assert_close(network(x), before, atol=1e-5, rtol=1e-5)
    assert network.ranks == [2, 3, 4, 5] and network.magnitudes[-1] == INIT_MAGNITUDE


def test_reset_makes_all_adapters_alike_as_published() -> None:
    """0.8 B A / (|B| |A|); one that never learned stays silent instead of becoming not a number."""
    network = learned(is_open=False)
    network.grow(2)
    network.freeze_newest()  # with B zero
    directions = [[b @ a / (b.norm() * a.norm()) for a, b in pairs[:-1]] for pairs in factors(network)]
    network.reset_magnitudes()
    torch.testing.assert_close(network.magnitudes.data, torch.full((4,), 0.8))
    for pairs, expected in zip(factors(network), directions, strict=True):
        for (a, b), direction in zip(pairs, expected, strict=False):
            torch.testing.assert_close(b @ a, direction)
        assert torch.count_nonzero(pairs[-1][1]) == 0


def test_keeping_some_frees_the_others() -> None:
    """As if they had never been: parameters, tensors, function."""
    network = learned((2, 3, 4), is_open=False)
    counts = network.parameter_counts()
    assert counts == {"adapters": DEPTH * 4 * WIDTH * 9, "magnitudes": 3}
    expected = network(images(), torch.tensor([1.0, 0.0, 1.0]))
    network.keep([0, 2])
    assert network.ranks == [2, 4] and network.parameter_counts() == {
        "adapters": DEPTH * 4 * WIDTH * 6,
        "magnitudes": 2,
    }
    assert sum(t.untyped_storage().nbytes() for t in network.tensors().values()) == 4 * (
        DEPTH * 4 * WIDTH * 6 + 2
    )
    torch.testing.assert_close(network(images()), expected, atol=1e-5, rtol=1e-5)


def saved_state(network: LoRAVisionTransformer) -> dict[str, Tensor]:
    """A checkpoint: the state without the pretrained transformer."""
    frozen = network.frozen_names()
    return {name: tensor.clone() for name, tensor in network.state_dict().items() if name not in frozen}


@pytest.mark.parametrize("ranks", [(2, 3, 4), ()])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_fresh_network_takes_the_saved_shape_from_names_and_shapes(
    ranks: tuple[int, ...], is_open: bool
) -> None:
    network, fresh = learned(ranks, is_open), LoRAVisionTransformer(plain_vit())
    network.merge()  # what is merged is no state
    saved = saved_state(network)
    assert sum(tensor.numel() for tensor in saved.values()) == sum(
        (*network.parameter_counts().values(), len(network.owner))
    )
    outcome = fresh.load_state_dict(saved, strict=False)
    assert set(outcome.missing_keys) == fresh.frozen_names() and not outcome.unexpected_keys
    assert all(torch.equal(tensor, saved[name]) for name, tensor in saved_state(fresh).items())
    network.unmerge()
    assert (fresh.ranks, fresh.is_open) == (network.ranks, network.is_open) and fresh.ranks == list(ranks)
    assert torch.equal(fresh(images()), network(images()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("magnitudes", lambda tensor: tensor[1:]),
        ("vit.blocks.1.attn.qkv.down", lambda tensor: tensor[:, 1:]),
        ("vit.blocks.1.attn.qkv.up", lambda tensor: tensor[..., 1:]),
        ("vit.blocks.1.attn.qkv.new.down", lambda tensor: tensor[:, 1:]),
        ("owner", lambda tensor: tensor[1:]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_of_another_network_are_refused(name: str, change: Callable[[Tensor], Tensor]) -> None:
    state = learned().state_dict()
    state[name] = change(state[name])
    with pytest.raises(RuntimeError, match="size mismatch"):
        LoRAVisionTransformer(plain_vit()).load_state_dict(state)


def test_a_network_refuses_missing_and_foreign_tensors() -> None:
    state, fresh = learned().state_dict(), LoRAVisionTransformer(plain_vit())
    with pytest.raises(RuntimeError, match="foreign"):
        fresh.load_state_dict(state | {"foreign": torch.zeros(1)})
    for name in ("vit.blocks.2.attn.qkv.new.up", "magnitudes", "owner", "vit.norm.weight"):
        with pytest.raises(RuntimeError, match=name):
            fresh.load_state_dict({key: tensor for key, tensor in state.items() if key != name})


def test_only_magnitudes_and_the_newest_direction_learn() -> None:
    network = learned().train()
    assert not network.vit.training
    learning = {id(p) for p in network.parameters() if p.requires_grad}
    assert learning == {id(p) for p in (network.magnitudes, *network.directions())}
    assert network.adapters_per_block() == dict.fromkeys(range(DEPTH), 3)


def test_one_direction_at_a_time() -> None:
    with pytest.raises(RuntimeError, match="still learns: freeze it first"):
        learned().grow(2)
    with pytest.raises(RuntimeError, match="still learns"):
        learned().keep([0])
    with pytest.raises(RuntimeError, match="is frozen"):
        learned(is_open=False).freeze_newest()


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


# ---------------------------------------------------------------------------------------------------------------------
# What many adapters cost


class Allocated(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.bytes += sum(t.numel() * t.itemsize for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


def training_step(network: LoRAVisionTransformer, x: Tensor) -> None:
    network(x).square().sum().backward()


def test_merged_a_forward_costs_what_timms_does_whatever_was_grown() -> None:
    flops, allocated, x = [], [], images()
    one, fifty = learned((2,)), learned((2,) * 50)
    for network in (one, fifty):
        network.merge()
    with torch.no_grad():
        for network in (plain_vit(), one, fifty):
            flops.append(flops_of(lambda network=network: network(x)))
            with Allocated() as counter:
                network(x)
            allocated.append(counter.bytes)
    assert flops == [flops[0]] * 3 and allocated == [allocated[0]] * 3


@pytest.mark.parametrize(("rank", "form"), [(1, "tokens"), (2, "matrix")])
def test_unmerged_a_step_costs_no_more_than_the_magnitudes_derivatives(rank: int, form: str) -> None:
    """49 frozen adapters beside the learning one: dL/dw on tokens, and W put together once, whatever the batch."""
    extra = []
    for count in (4, 16):
        x = images(count=count)
        one, many = learned((2,)), learned((rank,) * 20 + (2,))
        step = [flops_of(lambda n=n, x=x: training_step(n, x)) for n in (one, many)]
        extra.append(step[1] - step[0])
    terms, tokens = 20 * rank, 1 + 4 + 4  # class token, registers, 2 x 2 patches
    on_tokens = {"tokens": 4 * terms * WIDTH, "matrix": 2 * WIDTH * WIDTH}[form]
    assert (2 * terms < WIDTH) == (form == "tokens")
    assert extra[1] - extra[0] == 12 * tokens * DEPTH * 2 * on_tokens  # of twelve more images
    in_all = DEPTH * 2 * (16 * tokens * on_tokens + 3 * 2 * terms * WIDTH * WIDTH)
    assert extra[1] <= in_all


def test_a_training_step_keeps_no_more_activations_with_many_adapters() -> None:
    """Saved for backward: the same bytes an image with one frozen adapter and with forty."""
    saved = []
    for frozen in (1, 40):
        of_size = []
        for count in (2, 10):
            network, total = learned((1,) * frozen + (2,)), [0]

            def pack(tensor: Tensor, total: list[int] = total) -> Tensor:
                total[0] += tensor.numel() * tensor.itemsize
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                network(images(count=count))
            of_size.append(total[0])
        saved.append(of_size[1] - of_size[0])
    assert saved[0] == saved[1] > 0


# ---------------------------------------------------------------------------------------------------------------------
# The matrices by themselves


def test_low_rank_products_stand_one_after_the_other() -> None:
    low_rank, x = LowRank(torch.empty(0), copies=2, rank=3, inputs=5, outputs=4), torch.randn(7, 5)
    assert torch.equal(low_rank(x), torch.zeros(7, 8))
    nn.init.normal_(low_rank.up)
    expected = torch.cat([x @ (low_rank.up[s] @ low_rank.down[s]).T for s in (0, 1)], dim=1)
    torch.testing.assert_close(low_rank(x), expected)
    assert low_rank.down.abs().max() <= (1 / 5) ** 0.5 + 1e-6  # the bound of Kaiming-uniform(a = sqrt 5)
