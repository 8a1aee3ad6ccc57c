"""The wrapped transformer: untrained adapters change nothing, and only adapters learn."""

import pytest
import torch

from backbone.sema_block import AdapterSpec
from backbone.sema_components import ADAPTERS
from backbone.vit_sema import SEMAVisionTransformer, token_mean
from tests.tiny_vits import MODELS, images, plain_vit


def wrapped(name: str, kind: str = "nested_lora") -> SEMAVisionTransformer:
    vit = plain_vit(name)
    spec = AdapterSpec(width=vit.embed_dim, kind=kind, bottleneck=4, rd_dim=8, buffer_size=16)
    return SEMAVisionTransformer(vit, spec, growing=(1, 2), adapted=range(3))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_untrained_adapters_give_timms_output_bit_for_bit(name: str, kind: str) -> None:
    """Also with several adapters in a block, and in bf16."""
    network = wrapped(name, kind)
    x = images(name)
    network.modules_by_block[1].grow()
    with torch.no_grad():
        assert torch.equal(network(x), plain_vit(name)(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(x), plain_vit(name)(x))


@pytest.mark.parametrize("name", MODELS)
def test_running_in_stretches_is_running_at_once(name: str) -> None:
    """Images to block k to block j to features, bit for bit; an empty stretch returns its input."""
    network, x = wrapped(name), images(name)
    with torch.no_grad():
        for parameter in network.modules_by_block[1].adapters[0].parameters():
            parameter.add_(0.1)
        whole = network(x)
        for middle in (1, 2):
            tokens = network(x, 0, middle)
            assert torch.equal(network(network(tokens, middle, 2), 2), whole)
        assert network(whole, network.depth) is whole
    with pytest.raises(ValueError, match="between 0 and 3"):
        network(x, 2, 1)


def test_the_attention_before_the_first_adapters_is_below_their_depth() -> None:
    """No adapter changes it, so it runs once per image."""
    network, runs = wrapped("vit_small_patch16_224"), []
    for i, block in enumerate(network.vit.blocks):
        block.block.attn.register_forward_hook(lambda *_, i=i: runs.append(i))
    with torch.no_grad():
        tokens = network(images("vit_small_patch16_224"), 0, 1)
        assert runs == [0, 1]
        network(tokens, 1)
    assert runs == [0, 1, 2]


def test_depths_follow_what_may_change_and_what_learns() -> None:
    network = wrapped("vit_small_patch16_224")  # adapters in blocks 0 to 2, of which 1 and 2 may grow
    assert (network.fixed_depth(), network.learning_depth()) == (0, 0)
    for modules in network.modules_by_block.values():
        modules.end_of_task_training()
    assert (network.fixed_depth(), network.learning_depth()) == (1, 3)
    network.modules_by_block[2].grow()
    assert (network.fixed_depth(), network.learning_depth()) == (1, 2)
    assert {name.split(".")[0] for name in network.tensors_below(2)} == {"0", "1"}
    assert network.tensors_below(0) == {}


def test_token_means_stop_at_the_deepest_block_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network = wrapped("vit_small_patch16_224")
    x = images("vit_small_patch16_224")
    with torch.no_grad(), network.capture_inputs((1,), token_mean) as expected:
        network(x)
    monkeypatch.setattr(network.vit.blocks[2], "forward", None)
    torch.testing.assert_close(network.token_means(x, 0, [1]), expected)


def test_a_checkpoint_is_the_state_without_the_pretrained_transformer() -> None:
    """A fresh network takes it by names and shapes; names say which tensors it leaves out."""
    network, fresh = wrapped("vit_small_patch16_224"), wrapped("vit_small_patch16_224")
    network.train().modules_by_block[2].grow()
    assert not network.vit.training and not network.vit.blocks[0].block.training
    frozen = network.frozen_names()
    timms = {id(p) for block in network.vit.blocks for p in block.block.parameters()}
    named = dict(network.named_parameters())
    assert {id(named[name]) for name in frozen if ".blocks." in name} == timms
    assert {name for name in named if name not in frozen} == {n for n, p in named.items() if p.requires_grad}
    saved = {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}
    outcome = fresh.load_state_dict(saved, strict=False)
    assert set(outcome.missing_keys) == frozen == fresh.frozen_names() and not outcome.unexpected_keys
    assert all(torch.equal(tensor, saved.get(name, tensor)) for name, tensor in fresh.state_dict().items())
    assert fresh.adapters_per_block() == {0: 1, 1: 1, 2: 2}


def test_capture_inputs_sees_what_the_adapters_see_and_cleans_up() -> None:
    network, x, seen = wrapped("vit_small_patch16_224"), images("vit_small_patch16_224"), []
    with torch.no_grad(), network.capture_inputs((1, 2), token_mean) as means:
        network.modules_by_block[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        network(x)
    assert set(means) == {1, 2}
    torch.testing.assert_close(means[2], seen[0].mean(dim=1))
    means.clear()
    network(x)
    assert means == {} and len(seen) == 2
