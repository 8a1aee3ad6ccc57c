"""The network for grids: shapes, the sparse autoencoder and its controller, adapters at the bottleneck."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.network import (
    DECODERS,
    FEW_SHOT_ADAPTERS,
    LAYERS,
    AdapterLinear,
    GridModel,
    LoRALinear,
    SparseAutoencoder,
)

SMALL = {"colours": 4, "width": 16, "depth": 1, "heads": 2, "hidden": 24, "sparse_units": 40}
Inputs = tuple[Tensor, Tensor]


def make(**changes: Any) -> GridModel:
    return GridModel(SharedSubspaceConfig(**SMALL | changes), operations=20)


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    grids = torch.randint(0, 4, (5, 8, 8), generator=generator, dtype=torch.uint8)
    return grids, torch.randint(0, 21, (5, 3), generator=generator)


@pytest.mark.parametrize("encoder", LAYERS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_encoders_go_with_decoders(encoder: str, decoder: str, patch: int, inputs: Inputs) -> None:
    model = make(encoder=encoder, decoder=decoder, patch=patch)
    output = model(*inputs)
    assert output.logits.shape == (5, 4, 8, 8)
    assert output.hidden.shape == output.reconstruction.shape == (5, 24)
    assert output.primitive_logits.shape == (5, 14) and output.latents.shape == (5, 40)
    (output.logits.sum() + output.primitive_logits.sum() + output.reconstruction.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(model.parameter_counts().values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("encoder", LAYERS)
def test_the_output_depends_on_grid_and_program_of_its_own_sample_alone(encoder: str, inputs: Inputs) -> None:
    model = make(encoder=encoder)
    grids, program = inputs
    before = model(grids, program).logits
    for changed in ((grids.roll(1, 2), program), (grids, program.roll(1, 1))):
        assert not torch.allclose(model(*changed).logits, before)
    others = model(*(torch.cat([tensor[:1], tensor.flip(0)[:2]]) for tensor in inputs))
    torch.testing.assert_close(others.logits[:1], before[:1])


@pytest.mark.parametrize("encoder", LAYERS)
def test_representations_are_the_layers_that_the_output_is_made_of(encoder: str, inputs: Inputs) -> None:
    model = make(encoder=encoder, patch=4, depth=2)
    output = model(*inputs)
    found = output.representations()
    assert {name: tuple(vectors.shape) for name, vectors in found.items()} == {
        "layer 1": (5, 4 * 16), "layer 2": (5, 4 * 16), "h": (5, 24), "z": (5, 40),
    }  # fmt: skip
    assert found["h"] is output.hidden and found["z"] is output.latents
    patches = model.encoder.norm(found["layer 2"].unflatten(1, (4, 16)))  # without the program's tokens
    hidden = nn.functional.layer_norm(model.bottleneck["down"](patches.flatten(1)), (24,))
    torch.testing.assert_close(hidden, output.hidden)
    torch.testing.assert_close(model.decoder(model.bottleneck["up"](hidden)), output.logits)
    tokens = torch.randn(5, 7, 16)
    _, states = model.encoder(tokens)
    assert torch.equal(states[1], model.encoder.layers[1](states[0])) and not torch.equal(*states)


# --- the sparse autoencoder ---------------------------------------------------------------------------------


def test_the_autoencoder_is_its_formula_and_a_longer_dictionary_changes_nothing() -> None:
    """L1 cannot be lowered by smaller latents and a larger dictionary."""
    torch.manual_seed(0)
    autoencoder, hidden = SparseAutoencoder(width=6, units=10, target=0.1), torch.randn(7, 6)
    for parameter in autoencoder.parameters():
        nn.init.normal_(parameter)
    columns = autoencoder.dictionary / autoencoder.dictionary.norm(dim=0)
    latents = (hidden - autoencoder.bias) @ autoencoder.encoder.weight.T + autoencoder.encoder.bias
    latents = latents.clamp_min(0)
    expected = (latents, latents @ columns.T + autoencoder.bias)
    torch.testing.assert_close(autoencoder(hidden), expected)
    with torch.no_grad():
        autoencoder.dictionary.mul_(3)
    torch.testing.assert_close(autoencoder(hidden), expected)


@pytest.mark.parametrize(("fraction", "direction"), [(0.5, 1), (0.11, 1), (0.1, 0), (0.09, -1), (0.0, -1)])
def test_the_weight_of_l1_follows_the_active_fraction(fraction: float, direction: int) -> None:
    autoencoder = SparseAutoencoder(6, 10, target=0.1)
    before = autoencoder.l1_weight.item()
    autoencoder.update_l1_weight(fraction)
    change = autoencoder.l1_weight.item() - before
    assert change * direction > 0 if direction else change == 0
    assert abs(change) <= 0.052 * before  # a step, not a leap
    for _ in range(1000):
        autoencoder.update_l1_weight(fraction)
    assert autoencoder.BOUNDS[0] * 0.99 <= autoencoder.l1_weight.item() <= autoencoder.BOUNDS[1]


def test_the_controller_reaches_the_target() -> None:
    """Trained on fixed vectors, the active fraction ends near the target from far above it."""
    torch.manual_seed(0)
    autoencoder, hidden = SparseAutoencoder(12, 64, target=0.1), torch.randn(64, 12)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=0.01)
    fractions = []
    for _ in range(250):
        latents, reconstruction = autoencoder(hidden)
        loss = (reconstruction - hidden).square().mean() + autoencoder.l1_weight * latents.sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fractions.append((latents > 0).float().mean().item())
        autoencoder.update_l1_weight(fractions[-1])
    assert fractions[0] > 0.4 and 0.06 < sum(fractions[-50:]) / 50 < 0.14


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW_SHOT_ADAPTERS)
def test_adapters_start_at_zero_output_learn_alone_and_leave_no_trace(kind: str, inputs: Inputs) -> None:
    model, fresh = (make(few_shot_method=kind, few_shot_rank=2) for _ in range(2))
    original, before = copy.deepcopy(model.state_dict()), model(*inputs).logits
    model.insert_adapters()
    assert model.is_adapted and torch.equal(model(*inputs).logits, before)
    for _ in range(2):  # in the first step down-projections have no gradient
        model.zero_grad()
        model(*inputs).logits.square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    assert not torch.allclose(model(*inputs).logits, before)
    fresh.load_state_dict(model.state_dict())  # inserts adapters by their names
    assert fresh.is_adapted and torch.equal(fresh(*inputs).logits, model(*inputs).logits)
    model.remove_adapters()
    assert not model.is_adapted and model.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_are_their_formulas() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 4), torch.randn(3, 6)
    lora = LoRALinear(copy.deepcopy(linear), rank=2)
    down, up = lora.low_rank.down, nn.init.normal_(lora.low_rank.up)
    assert down.shape == (1, 2, 6) and up.shape == (1, 4, 2)
    torch.testing.assert_close(lora(x), x @ (linear.weight + up[0] @ down[0]).T + linear.bias)
    adapted = AdapterLinear(copy.deepcopy(linear), rank=2)
    nn.init.normal_(adapted.adapter.up_proj.weight)
    y = linear(x)
    hidden = torch.relu(y @ adapted.adapter.down_proj.weight.T)
    torch.testing.assert_close(adapted(x), y + hidden @ adapted.adapter.up_proj.weight.T)
