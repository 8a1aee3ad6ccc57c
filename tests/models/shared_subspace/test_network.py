"""The network for grids: shapes, the sparse autoencoder and its controller, adapters at the bottleneck."""

import copy

import pytest
import torch
from torch import Tensor, nn

from models.shared_subspace.adapters import ADAPTATIONS, AdaptedLinear, LowRankLinear
from models.shared_subspace.network import DECODERS, ENCODERS, GridModel, GridShape, SparseAutoencoder

SHAPE = GridShape(colours=4, steps=20, slots=3, primitives=6)
SMALL = {"width": 16, "depth": 1, "heads": 2, "hidden": 24, "units": 40, "activity": 0.1}


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    grids = torch.randint(0, 4, (5, 8, 8), generator=generator)
    return grids, torch.randint(0, 21, (5, 3), generator=generator)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_every_encoder_goes_with_every_decoder(
    encoder: str, decoder: str, patch: int, inputs: tuple[Tensor, Tensor]
) -> None:
    model = GridModel(SHAPE, encoder=encoder, decoder=decoder, patch=patch, **SMALL)
    output = model(*inputs)
    assert output.logits.shape == (5, 4, 8, 8) and output.hidden.shape == output.rebuilt.shape == (5, 24)
    assert output.named.shape == (5, 6) and output.sparse.shape == (5, 40)
    assert torch.equal(model.decode(output.hidden), output.logits)
    (output.logits.sum() + output.named.sum() + output.rebuilt.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(model.parameter_counts().values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_output_depends_on_grid_and_program_of_its_own_sample_alone(
    encoder: str, inputs: tuple[Tensor, Tensor]
) -> None:
    model = GridModel(SHAPE, encoder=encoder, **SMALL).eval()
    grids, program = inputs
    before = model(grids, program).logits
    for changed in ((grids.roll(1, 2), program), (grids, program.roll(1, 1))):
        assert not torch.allclose(model(*changed).logits, before)
    other_samples = model(
        torch.cat([grids[:1], grids.flip(0)[:2]]), torch.cat([program[:1], program.flip(0)[:2]])
    )
    torch.testing.assert_close(other_samples.logits[:1], before[:1])


def test_h_has_no_size_to_play_with(inputs: tuple[Tensor, Tensor]) -> None:
    """Mean 0 and variance 1 whatever the layer before it does."""
    model = GridModel(SHAPE, **SMALL)
    before = model.encode(*inputs)
    torch.testing.assert_close(before.mean(dim=1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(before.var(dim=1, unbiased=False), torch.ones(5), atol=1e-3, rtol=0)
    with torch.no_grad():
        for tensor in model.near["to_hidden"].parameters():
            tensor.mul_(100)
    torch.testing.assert_close(model.encode(*inputs), before, atol=1e-3, rtol=0)


def test_without_units_there_is_no_autoencoder(inputs: tuple[Tensor, Tensor]) -> None:
    model = GridModel(SHAPE, **{**SMALL, "units": 0})
    output = model(*inputs)
    assert output.sparse is None and output.rebuilt is None and model.parameter_counts()["autoencoder"] == 0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_states_are_what_each_layer_makes_of_the_one_before(encoder: str) -> None:
    reader = ENCODERS[encoder](16, 3, 2)
    tokens = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    states = reader.states(tokens)
    assert len(states) == 3
    for layer, before, after in zip(reader.layers, [tokens, *states], states, strict=False):
        assert torch.equal(after, layer(before)) and not torch.equal(after, before)
    assert torch.equal(reader(tokens), reader.norm(states[-1]))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_layers_are_those_that_the_output_is_made_of(encoder: str, inputs: tuple[Tensor, Tensor]) -> None:
    model = GridModel(SHAPE, encoder=encoder, patch=4, **{**SMALL, "depth": 2})
    found, output = model.layers(*inputs), model(*inputs)
    assert {name: tuple(vectors.shape) for name, vectors in found.items()} == {
        "layer 1": (5, 4 * 16), "layer 2": (5, 4 * 16), "h": (5, 24), "z": (5, 40),
    }  # fmt: skip
    assert torch.equal(found["h"], output.hidden) and torch.equal(found["z"], output.sparse)
    patches = model.encoder.norm(found["layer 2"].unflatten(1, (4, 16)))  # without the program's tokens
    hidden = nn.functional.layer_norm(model.near["to_hidden"](patches.flatten(1)), (24,))
    torch.testing.assert_close(hidden, output.hidden)
    assert list(GridModel(SHAPE, **{**SMALL, "units": 0}).layers(*inputs)) == ["layer 1", "h"]


# ---------------------------------------------------------------------------------------------------------------------
# The sparse autoencoder


def test_the_autoencoder_is_its_formula() -> None:
    torch.manual_seed(0)
    autoencoder = SparseAutoencoder(width=6, units=10, target=0.1)
    for parameter in autoencoder.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(7, 6)
    sparse, rebuilt = autoencoder(hidden)
    columns = autoencoder.dictionary / autoencoder.dictionary.norm(dim=0)
    expected = (hidden - autoencoder.bias) @ autoencoder.encoder.weight.T + autoencoder.encoder.bias
    torch.testing.assert_close(sparse, expected.clamp_min(0))
    torch.testing.assert_close(rebuilt, sparse @ columns.T + autoencoder.bias)


def test_a_longer_dictionary_changes_nothing() -> None:
    """L1 cannot be lowered by a smaller code and a larger dictionary."""
    autoencoder = SparseAutoencoder(6, 10, 0.1)
    hidden = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    before = autoencoder(hidden)
    with torch.no_grad():
        autoencoder.dictionary.mul_(3)
    for ours, theirs in zip(autoencoder(hidden), before, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("activity", "direction"), [(0.5, 1), (0.11, 1), (0.1, 0), (0.09, -1), (0.0, -1)])
def test_the_weight_of_l1_follows_the_activity(activity: float, direction: int) -> None:
    autoencoder = SparseAutoencoder(6, 10, target=0.1)
    before = autoencoder.l1_weight.item()
    autoencoder.steer(activity)
    change = autoencoder.l1_weight.item() - before
    assert change * direction > 0 if direction else change == 0
    assert abs(change) <= 0.052 * before  # a step, not a leap
    for _ in range(1000):
        autoencoder.steer(activity)
    assert autoencoder.BOUNDS[0] * 0.99 <= autoencoder.l1_weight.item() <= autoencoder.BOUNDS[1]
    assert "l1_weight" in autoencoder.state_dict()


def test_the_controller_reaches_the_activity_that_is_wanted() -> None:
    """Trained on fixed vectors, the share of active units ends near the target from far above it."""
    torch.manual_seed(0)
    autoencoder = SparseAutoencoder(12, 64, target=0.1)
    hidden = torch.randn(64, 12)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=0.01)
    activities = []
    for _ in range(250):
        sparse, rebuilt = autoencoder(hidden)
        loss = (rebuilt - hidden).square().mean() + autoencoder.l1_weight * sparse.sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        activities.append((sparse > 0).float().mean().item())
        autoencoder.steer(activities[-1])
    assert activities[0] > 0.4
    assert 0.06 < sum(activities[-50:]) / 50 < 0.14


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


@pytest.mark.parametrize("kind", ADAPTATIONS)
def test_adapters_are_silent_learn_alone_and_leave_no_trace(kind: str, inputs: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = GridModel(SHAPE, **SMALL)
    original, before = copy.deepcopy(model.state_dict()), model(*inputs).logits
    model.insert(kind, rank=2)
    assert model.is_adapted and torch.equal(model(*inputs).logits, before)
    own = model.adapters()
    assert {id(p) for p in own} == {id(p) for p in model.parameters() if p.requires_grad} and own
    optimizer = torch.optim.SGD(own, lr=0.5)
    for _ in range(2):  # one step moves up-projections only: down-projections have no gradient at the start
        optimizer.zero_grad()
        model(*inputs).logits.square().mean().backward()
        optimizer.step()
    assert not torch.allclose(model(*inputs).logits, before)
    model.remove_adapters()
    assert not model.is_adapted and model.adapters() == []
    assert model.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_are_not_put_on_twice() -> None:
    model = GridModel(SHAPE, **SMALL)
    model.insert("lora", 2)
    with pytest.raises(RuntimeError, match="remove them first"):
        model.insert("adapter", 2)


def test_adapters_are_their_formulas() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 4), torch.randn(3, 6)
    lora = LowRankLinear(copy.deepcopy(linear), rank=2)
    low_rank = lora.low_rank
    nn.init.normal_(low_rank.up)
    assert low_rank.down.shape == (1, 2, 6) and low_rank.up.shape == (1, 4, 2)
    torch.testing.assert_close(
        lora(x), x @ (linear.weight + low_rank.up[0] @ low_rank.down[0]).T + linear.bias
    )
    adapted = AdaptedLinear(copy.deepcopy(linear), rank=2)
    nn.init.normal_(adapted.adapter.up_proj.weight)
    y = linear(x)
    hidden = torch.relu(y @ adapted.adapter.down_proj.weight.T)
    torch.testing.assert_close(adapted(x), y + hidden @ adapted.adapter.up_proj.weight.T)
