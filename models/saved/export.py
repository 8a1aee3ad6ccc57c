"""Export of a run as a model that works without this program: timm weights, ONNX or TorchScript.

    python eval.py --run FOLDER --export onnx             # to FOLDER/export/onnx
    python eval.py --run FOLDER --export timm --out cats  # of a ViT with a linear classifier

Every form takes images (B, 3, S, S), float32, prepared as `preprocessing.json` beside it says, and gives
logits (B, C) divided by the run's temperature: their softmax is the calibrated score. Before the folder
appears, the export is read back, and its scores and logits are compared with the run's own, both in fp32 on
the CPU.
"""

import copy
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

from models.compared.ease import EASEHead
from models.ranpac import RanPACHead
from models.saved.model_card import model_card
from models.saved.prediction import Predictor, load_run
from models.vit.closed_form import PrototypeHead
from models.vit.gaussians import AlignedHead, FeCAMHead
from utils.data.transforms import views_of
from utils.errors import UserError
from utils.files import json_bytes, write_synced
from utils.inc_net import IncrementalHead
from utils.training.random import numpy_rng

TOLERANCE = 1e-3  # largest difference between a calibrated score of the export and of the run
LOGITS = 1e-2  # the same of logits, in parts of the largest: scores of about 1 / C hardly tell classes apart
CHECKED, TRACED = 5, 2  # numbers of images: in the comparison, and in the trace
Forward = Callable[[Tensor], Tensor]  # inputs (B, 3, S, S) -> logits (B, C)


class Deployed(nn.Module):
    """A run's network and classifier in one: inputs (B, 3, S, S) -> logits / temperature, (B, C)."""

    def __init__(self, model: Predictor) -> None:
        super().__init__()
        learner = model.learner
        self.network, self.temperature = copy.deepcopy(learner.network), model.temperature
        self.score, tensors = classifier_of(learner.closed_form or learner.head)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.float())

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.network(images), **dict(self.named_buffers(recurse=False))) / self.temperature


# ----------------------------------------------------------------------------------------------------------
# Classifiers: functions of features (B, d) and of named tensors, which give logits (B, C)


def classifier_of(head: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """A head as a function of features and tensors that works on any device, with its tensors by name."""
    match head:
        case IncrementalHead():
            names = ("weight", "bias")
            return F.linear, {name: torch.cat([getattr(task, name) for task in head.tasks]) for name in names}
        case AlignedHead():
            return F.linear, {"weight": head.weight, "bias": head.bias}
        case PrototypeHead():
            return cosine, {"means": F.normalize(head.means.float(), dim=1)}
        case RanPACHead():
            return ridge, {"projection": head.projection, "weights": head.weights}
        case FeCAMHead():
            whitening = torch.stack([factor.inverse() for factor in head.factors()])  # (C, d, d)
            return distance, {
                "whitening": whitening,
                "means": torch.einsum("cij,cj->ci", whitening, head.means.float()),
            }
        case EASEHead():
            weighted = F.normalize(head.prototypes.float(), dim=2) * head.shares()[:, :, None]
            return subspaces, {"prototypes": weighted.transpose(0, 1)}  # (C, subspaces, d)
    raise NotImplementedError(f"no export of {type(head).__name__}")


def cosine(features: Tensor, means: Tensor) -> Tensor:
    return F.linear(F.normalize(features, dim=1), means)


def ridge(features: Tensor, projection: Tensor, weights: Tensor) -> Tensor:
    return F.relu(features @ projection) @ weights


def distance(features: Tensor, whitening: Tensor, means: Tensor) -> Tensor:
    """Minus the squared Mahalanobis distance, |L^-1 (f / |f| - m)|^2, to every class."""
    whitened = torch.einsum("cij,bj->bci", whitening, F.normalize(features, dim=1))
    return -(whitened - means).square().sum(dim=2)


def subspaces(features: Tensor, prototypes: Tensor) -> Tensor:
    """Sum over subspaces of cosines with prototypes (C, subspaces, d) that contain their weights."""
    parts = F.normalize(features.unflatten(1, prototypes.shape[1:]), dim=2)
    return F.linear(parts.flatten(1), prototypes.flatten(1))


# ----------------------------------------------------------------------------------------------------------
# Forms: each writes its files into a folder and returns a function that runs them; views are for tracing


def to_timm(model: Predictor, views: Tensor, folder: Path) -> Forward:
    """A plain timm ViT: model.safetensors and the config.json that `timm.create_model` reads."""
    learner, size = model.learner, model.view.image_size
    vit = timm.create_model(learner.backbone.architecture, num_classes=len(model.classes), img_size=size)
    _, head = classifier_of(learner.head)
    state = {f"head.{name}": tensor / model.temperature for name, tensor in head.items()}
    vit.load_state_dict(learner.network.plain_state() | state)
    about = preprocessing(model)
    try:
        save_for_hf(
            vit,
            folder,
            model_config={"label_names": model.classes},
            model_args={"img_size": size},
            safe_serialization=True,
            data_config={
                "input_size": (3, size, size),
                "mean": tuple(about["mean"]),
                "std": tuple(about["std"]),
                "interpolation": about["interpolation"],
                "crop_pct": size / about["resize_shorter_side"],
            },
        )
    except SafetensorError as error:
        raise UserError(
            f"{folder} cannot be written ({error}): free some space, or give --out on another disk"
        ) from error
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def to_torchscript(model: Predictor, views: Tensor, folder: Path) -> Forward:
    """A traced module, model.pt."""
    path, content = folder / "model.pt", io.BytesIO()  # torch has no OSError for a disk that is full
    torch.jit.save(torch.jit.trace(Deployed(model).eval(), views), content)
    write_synced(path, content.getvalue())
    return torch.jit.load(path)


def to_onnx(model: Predictor, views: Tensor, folder: Path) -> Forward:
    """A graph with any number of images, model.onnx; run with onnxruntime."""
    import onnxruntime

    path, axis = folder / "model.onnx", {0: "batch"}
    torch.onnx.export(
        Deployed(model).eval(),
        (views,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": axis, "logits": axis},
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


FORMS: dict[str, Callable[[Predictor, Tensor, Path], Forward]] = {
    "timm": to_timm,
    "onnx": to_onnx,
    "torchscript": to_torchscript,
}


# ----------------------------------------------------------------------------------------------------------
# The export


@torch.no_grad()
def export_run(folder: Path, checkpoint: Path | None, form: str, out: Path | None) -> Iterator[str]:
    """Write an export, if it gives the run's scores; yields lines for the console.

    Raises UserError: from `load_run`; the form is impossible for this run, its libraries are absent, its
    scores differ, or its folder exists already.
    """
    out = out or folder / "export" / form
    if out.exists():
        raise UserError(
            f"--export {form}: {out} is there already: remove it, or give another folder to --out"
        )
    lacking = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if form == "onnx" and lacking:
        raise UserError(
            f"--export onnx needs {' and '.join(lacking)}: python -m pip install -r requirements-export.txt"
        )
    model = load_run(folder, "cpu", checkpoint, "fp32")
    yield repr(model)
    shape = (CHECKED, 3, model.view.image_size, model.view.image_size)
    images = torch.from_numpy(numpy_rng("export check").integers(0, 256, shape, dtype="uint8"))
    views = views_of(images, model.view, None, np.arange(CHECKED))
    wanted = model.logits(list(images))  # also merges adapters into weights, where a method does so
    if form == "timm" and (
        model.learner.closed_form is not None or model.learner.network.plain_state() is None
    ):
        others = ", ".join(name for name in FORMS if name != form)
        raise UserError(
            f"--export timm: this {model.learner.config.model_name} is more than a ViT with a linear "
            f"classifier; possible: {others}"
        )
    near = next(parent for parent in out.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=".export-", dir=near) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracers, about shapes that are fixed here
        made = Path(place) / out.name
        made.mkdir()
        exported = FORMS[form](model, views[:TRACED], made)(views).double()
        difference, of_logits = differences(exported, wanted)
        if not (difference <= TOLERANCE and of_logits <= LOGITS):
            raise UserError(
                f"--export {form}: it differs from the run, in scores by up to {difference:.2g} (allowed: "
                f"{TOLERANCE:g}), in logits by up to {100 * of_logits:.2g} % of the largest (allowed: "
                f"{100 * LOGITS:g} %): nothing was written; try another form"
            )
        about = preprocessing(model)
        (made / "preprocessing.json").write_bytes(json_bytes(about))
        card = model_card(model, folder, form, about, difference)
        (made / "README.md").write_text(card, encoding="utf-8")
        out.parent.mkdir(parents=True, exist_ok=True)
        made.rename(out)
    yield f"scores of {CHECKED} images differ from the run's by {difference:.1e} at most"
    for path in sorted(out.iterdir()):
        size = path.stat().st_size
        yield f"wrote {path} ({f'{size / 1e6:,.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB'})"


def differences(exported: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Largest differences between logits (B, C) of an export and of the run: in scores, and in logits.

    Logits are taken less their mean over classes, which changes no score, and relative to the largest.
    """
    scores = (exported.softmax(dim=1) - wanted.softmax(dim=1)).abs().max()
    ours, theirs = (logits - logits.mean(dim=1, keepdim=True) for logits in (exported, wanted))
    largest = theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)  # zero for a single class
    return float(scores), float((ours - theirs).abs().max() / largest)


def preprocessing(model: Predictor) -> dict[str, object]:
    """Preprocessing steps of an image, in order, and the meaning of the outputs; JSON."""
    size, view = model.view.image_size, model.view
    return {
        "colours": "RGB",
        "resize_shorter_side": 256 * size // 224,
        "interpolation": "bicubic",
        "antialias": True,
        "centre_crop": size,
        "scale": "from 0..255 to 0..1",
        "mean": list(view.mean or (0.0, 0.0, 0.0)),
        "std": list(view.std or (1.0, 1.0, 1.0)),
        "output": "logits, divided by the temperature already: their softmax is the calibrated score",
        "temperature": model.temperature,
        "classes": model.classes,
    }
