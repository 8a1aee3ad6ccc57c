"""InfLoRA's directions, its basis of old inputs, and what they leave alone, against numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backbone.inflora import InfLoRALinear, InfLoRAViT
from tests.tiny_vits import DEPTH, MODELS, WIDTH, images, plain_vit

D, RANK = 8, 3


def inputs(dimensions: int, seed: int, count: int = 60) -> Tensor:
    """Vectors (count, D) in a random subspace."""
    generator = torch.Generator().manual_seed(seed)
    factors = (torch.randn(shape, generator=generator) for shape in ((count, dimensions), (dimensions, D)))
    return (next(factors) @ next(factors)).float()


def moments_of(x: Tensor) -> Tensor:
    return (x.T @ x).double()


def projection() -> InfLoRALinear:
    torch.manual_seed(0)
    return InfLoRALinear(nn.Linear(D, 3 * D).requires_grad_(False), RANK)


def learned(module: InfLoRALinear, moments: Tensor) -> None:
    """A task that writes something into k and v."""
    module.grow(moments)
    module.new_up.data = torch.randn(module.new_up.shape, generator=torch.Generator().manual_seed(9))
    module.freeze()


def test_directions_are_orthogonal_to_old_inputs_and_of_the_new_ones() -> None:
    """Orthogonal to 1e-5, in the span of what the new inputs have beside the old; scaled by sqrt(3)."""
    old, new, module = inputs(3, seed=0), inputs(4, seed=1), projection()
    learned(module, moments_of(old))
    module.remember(moments_of(old), threshold=1.0, power=1)
    assert module.basis.shape == (D, 3)
    assert module.grow(moments_of(new)) == RANK
    directions = module.new_down
    assert (directions @ old.T).abs().max() < 1e-5 * old.norm(dim=1).max()
    torch.testing.assert_close(3 * directions @ directions.T, torch.eye(RANK), atol=1e-5, rtol=1e-5)
    basis, _ = np.linalg.qr(old.T.double().numpy()[:, :3])
    moments = moments_of(new).numpy()
    left, _, _ = np.linalg.svd(moments - basis @ basis.T @ moments)
    overlap = np.linalg.svd(3**0.5 * directions.double().numpy() @ left[:, :RANK])[1]
    np.testing.assert_allclose(overlap, 1, atol=1e-5)


def test_outputs_for_old_inputs_change_by_what_the_basis_lacks_of_them() -> None:
    """Delta y = B A x = B A (x - M M^T x): nothing for inputs inside the basis, at any threshold."""
    old, new, module = inputs(6, seed=0), inputs(8, seed=1), projection()
    learned(module, moments_of(old))
    module.remember(moments_of(old), threshold=0.8, power=1)
    before = module(old)
    learned(module, moments_of(new))
    change = module(old) - before
    rest = old.double() - old.double() @ module.basis @ module.basis.T
    up, down = module.up[-1].double(), module.down[-1].double()
    expected = torch.cat([torch.zeros(len(old), D), rest @ down.T @ up[0].T, rest @ down.T @ up[1].T], dim=1)
    torch.testing.assert_close(change.double(), expected, atol=1e-5, rtol=1e-4)
    inside = old @ (module.basis @ module.basis.T).float()
    same = InfLoRALinear(module.qkv, RANK)
    same.down, same.up = module.down[:1], module.up[:1]
    torch.testing.assert_close(module(inside), same(inside), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("power", [1, 2])
def test_the_basis_holds_the_share_asked_for_and_no_more(power: int) -> None:
    x, module, threshold = inputs(8, seed=3), projection(), 0.9
    module.remember(moments_of(x), threshold, power)
    energies = np.sort(np.linalg.eigvalsh(moments_of(x).numpy()))[::-1] ** power
    shares = np.cumsum(energies) / energies.sum()
    assert module.basis.shape[1] == int(np.argmax(shares >= threshold)) + 1
    torch.testing.assert_close(module.basis.T @ module.basis, torch.eye(module.basis.shape[1]).double())
    held = module.basis.shape[1]
    module.remember(moments_of(x), threshold, power)  # the same inputs need nothing more
    assert module.basis.shape[1] == held


def test_where_no_direction_is_left_rows_are_zero_and_nothing_changes() -> None:
    module, x = projection(), inputs(8, seed=3)
    module.remember(moments_of(x), 1.0, 1)
    before = module(x)
    assert module.grow(moments_of(x)) == 0 and not module.new_down.any()
    module.new_up.data.fill_(1.0)
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("name", MODELS)
def test_untrained_terms_leave_the_network_as_it_is(name: str) -> None:
    network = InfLoRAViT(plain_vit(name), RANK, range(1, DEPTH))
    x = images(name)
    with network.second_moments() as moments:
        features = network(x)
    torch.testing.assert_close(features, plain_vit(name)(x), atol=1e-5, rtol=1e-4)
    assert moments.keys() == {1, 2} and moments[1].shape == (WIDTH, WIDTH)
    with network.second_moments() as of_nothing:  # as on a rank that has no image
        pass
    assert {block: (sums.shape, float(sums.norm())) for block, sums in of_nothing.items()} == {
        block: ((WIDTH, WIDTH), 0.0) for block in (1, 2)
    }
    network.grow(moments)
    torch.testing.assert_close(network(x), features)
    assert [n for n, p in network.named_parameters() if p.requires_grad] == [
        f"vit.blocks.{i}.attn.qkv.new_up" for i in (1, 2)
    ]


def test_in_bf16_moments_and_merged_terms_keep_their_precision() -> None:
    """Directions are told apart down to 1e-6 of the largest."""
    network, seen, bf16 = InfLoRAViT(plain_vit(), RANK, [1]), [], torch.autocast("cpu", torch.bfloat16)
    projection = network.modules_by_block[1]
    projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().flatten(0, 1)))
    with torch.no_grad(), bf16, network.second_moments() as moments:
        network(images())
    torch.testing.assert_close(moments[1], moments_of(seen[0]), rtol=1e-5, atol=1e-4)
    network.grow(moments)
    torch.nn.init.normal_(projection.new_up)
    network.freeze()
    with bf16:
        merged = projection.merged_weight()
    assert torch.equal(merged, projection.merged_weight())


def test_merged_terms_are_the_terms_beside_the_weights_and_one_timm_network() -> None:
    """Also those of an earlier state that is loaded."""
    network, x, states = InfLoRAViT(plain_vit(), RANK, range(1, DEPTH)), images(), []
    with network.second_moments() as moments:
        before = network(x)
    for _ in range(2):
        network.grow(moments)
        for projection in network.modules_by_block.values():
            torch.nn.init.normal_(projection.new_up, std=0.1)
        beside = network(x)
        network.freeze()
        torch.testing.assert_close(network(x), beside, atol=1e-5, rtol=1e-4)
        network.remember(moments, 0.5)
        states.append((copy.deepcopy(network.state_dict()), network(x)))
    plain = plain_vit()
    plain.load_state_dict(network.plain_state())
    torch.testing.assert_close(plain(x), beside, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(beside, before, atol=1e-3)
    for state, features in states:
        network.load_state_dict(state)
        assert torch.equal(network(x), features)
