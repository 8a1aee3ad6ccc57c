"""Blocks with frozen weights: timm's function, names and gradients; less of the last block."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from backbone import frozen_block
from backbone.frozen_block import speed_up
from backbone.sema_block import AdapterSpec
from backbone.vit_sema import SEMAVisionTransformer, token_mean
from tests.tiny_vits import MODELS, NAME, SMALL, images, plain_vit

OPTIONS = {
    "qk_norm": {"qk_norm": True, "qkv_bias": False},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "norms of outputs": {"scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.5},
    "gated units": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 0.5},
    "two inputs": {"mlp_layer": timm.layers.SwiGLU, "act_layer": nn.SiLU, "init_values": 0.5},
    "differences": {"attn_layer": "diff", "init_values": 0.5},
}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def with_options(**options: object) -> nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, **(SMALL | {"img_size": 32} | options))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vit.eval().requires_grad_(False)


def sped_up(vit: nn.Module) -> nn.Module:
    vit = copy.deepcopy(vit).requires_grad_(False)
    speed_up(vit)
    return vit


@pytest.mark.parametrize("vit", [*MODELS, *OPTIONS])
def test_it_is_timms_network(vit: str) -> None:
    """In fp32 and bf16, and copied; with the same tensors under the same names."""
    plain = (plain_vit(vit) if vit in MODELS else with_options(**OPTIONS[vit])).requires_grad_(False)
    x = images(vit if vit in MODELS else "vit_small_patch16_224")
    fast, expected = sped_up(plain), plain(x)
    close(fast(x), expected)
    close(copy.deepcopy(fast)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        lower = fast(x)
        close(lower.float(), plain(x).float(), 0.05)
    assert lower.dtype == plain(x).dtype
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, fast.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_without_the_fused_kernel_and_traced() -> None:
    plain = plain_vit().requires_grad_(False)
    for block in plain.blocks:
        block.attn.fused_attn = False
    fast = sped_up(plain)
    close(fast(images()), plain(images()))
    close(torch.jit.trace(fast, images())(images()), plain(images()))


def test_changed_weights_count() -> None:
    fast, other = sped_up(plain_vit()), plain_vit()
    before = fast(images())
    with torch.no_grad():
        for parameter in other.blocks.parameters():
            parameter.mul_(1.1)
    fast.load_state_dict(other.state_dict())
    close(fast(images()), other(images()))
    assert (fast(images()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize(("name", "fused"), [(NAME, True), (NAME, False), ("vit_small_patch16_224", True)])
def test_adapters_get_the_same_gradients(name: str, fused: bool, adapters: int) -> None:
    """Also in the last block, whose router reads all tokens where it weighs several adapters."""
    spec = AdapterSpec(width=plain_vit(name).embed_dim, kind="nested_lora", bottleneck=4, rd_dim=8)
    slow, fast = (
        SEMAVisionTransformer(vit, spec, growing=(1, 2), adapted=range(3))
        for vit in (plain_vit(name), sped_up(plain_vit(name)))
    )
    for block in fast.vit.blocks:
        block.block.attn.fused_attn = fused
    for _ in range(adapters - 1):
        slow.modules_by_block[2].grow()
    for parameter in slow.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    fast.load_state_dict(slow.state_dict())
    means, gradients = [], []
    for network in (slow, fast):
        network(images(name)).square().sum().backward()
        named = network.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
        means.append(network.token_means(images(name), 0, [1, 2]))
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected, 2e-4)
    for block, expected in means[0].items():
        close(means[1][block], expected)


def test_bf16_gradients_are_near_those_of_fp32() -> None:
    spec = AdapterSpec(width=plain_vit().embed_dim, kind="adaptmlp", bottleneck=4)
    network = SEMAVisionTransformer(sped_up(plain_vit()), spec, adapted=range(3))
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    gradients = []
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            features = network(images())
        found = torch.autograd.grad(features.float().square().sum(), parameters)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    exact, near = gradients
    assert near.dtype == torch.float32
    assert 0 < (near - exact).norm() < 0.03 * exact.norm()


def test_attention_of_many_images_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = sped_up(plain_vit())
    with torch.autocast("cpu", torch.bfloat16):
        expected = vit(images())
        monkeypatch.setattr(frozen_block, "MAX_SCORES", 1)
        assert torch.equal(vit(images()), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_forward_changes_its_input(dtype: torch.dtype) -> None:
    """Blocks compute in place what they made themselves; tokens given to them may be a store's."""
    fast = sped_up(plain_vit())
    x = torch.randn(2, 9, fast.embed_dim)
    for block in fast.blocks:
        given = x.clone()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = block(given)
        assert torch.equal(given, x)
        assert y.data_ptr() != given.data_ptr()


def test_the_last_block_computes_what_the_class_token_needs() -> None:
    """Of attention's output and the MLP one token; a reader of the adapters' inputs is given all."""
    spec = AdapterSpec(width=plain_vit().embed_dim, kind="adaptmlp", bottleneck=4, rd_dim=8)
    network = SEMAVisionTransformer(sped_up(plain_vit()), spec, growing=(2,), adapted=(2,))
    seen: dict[str, list[int]] = {"proj": [], "mlp": []}
    last = network.vit.blocks[2].block
    last.attn.proj.register_forward_pre_hook(lambda module, inputs: seen["proj"].append(inputs[0].shape[1]))
    last.mlp.register_forward_pre_hook(lambda module, inputs: seen["mlp"].append(inputs[0].shape[1]))
    network(images())
    with network.capture_inputs((2,), token_mean):
        network(images())
    network.modules_by_block[2].grow()
    network(images())
    assert seen == {"proj": [1, 9, 9], "mlp": [1, 1, 1]}
