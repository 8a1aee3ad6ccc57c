"""Model card of an exported run: its data, weights and accuracy, and code that loads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.saved.prediction import Predictor
from models.vit.pretrained import weights_origin
from utils.analysis.calibration import FITTED_ON, VALIDATION
from utils.runs.manifest import read_manifest
from utils.wording import counted, named_data

LOADING = """\
import {library}
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

{load}
prepare = v2.Compose([v2.PILToTensor(), v2.Resize({resize_shorter_side}, interpolation=3, antialias=True),
    v2.CenterCrop({centre_crop}), v2.ToDtype(torch.float32, scale=True), v2.Normalize({mean}, {std})])
upright = ImageOps.exif_transpose(Image.open("image.png"))  # of 8 bits, without transparency
images = prepare(upright.convert("RGB"))[None]
scores = model(images).softmax(dim=1)"""
LOAD = {  # form -> library, and how it loads the model
    "timm": ("timm", 'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'),
    "torchscript": ("torchvision", 'model = torch.jit.load("FOLDER/model.pt")'),
    "onnx": (
        "onnxruntime",
        'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        'model = lambda images: torch.tensor(session.run(None, {"images": images.numpy()})[0])',
    ),
}


def model_card(
    model: Predictor, folder: Path, form: str, preprocessing: Mapping[str, Any], difference: float
) -> str:
    """The card of an export as Markdown."""
    learner, tested = model.learner, model.evaluation
    config, backbone, calibration = learner.config, learner.backbone, learner.calibration
    source, licence = weights_origin(config.backbone_type, config.weights)
    images, data = tested.get("images", "test"), data_learned(model, folder)
    accuracy = 100 * sum(tested["correct"]) / sum(tested["total"])
    calibrated = "not calibrated"
    if calibration is not None:
        kind = "validation" if calibration.fitted_on == VALIDATION else "training"
        calibrated = (
            f"temperature {calibration.temperature:.4g}, fitted on "
            f"{counted(calibration.images, f'{kind} image')}, {FITTED_ON[calibration.fitted_on]}; expected "
            f"calibration error {tested['ece']:.2f} points on {images} images"
        )
    rows = {
        "run": folder.name,
        "method": config.model_name,
        "data": data,
        "classes": f"{len(model.classes)}, learned in {counted(learner.task + 1, 'task')}",
        "accuracy": f"{accuracy:.2f} % of {sum(tested['total']):,} {images} images of these classes",
        "scores": calibrated,
        "backbone": f"{backbone.tag}, {backbone.image_size} px",
        "its weights": f"{source}, by name; SHA-256 of the tensors {backbone.sha256[:16]}",
        "their licence": licence,
        "export": f"{form}; scores within {difference:.1e} of the run's, in fp32",
    }
    library, load = LOAD[form]
    loading = LOADING.format(library=library, load=load, **preprocessing)
    return "\n".join(
        [
            f"# {counted(len(model.classes), 'class', 'classes')} of {data} by {config.model_name}\n",
            "| | |\n| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            *([f"{backbone.note[0].upper()}{backbone.note[1:]}.\n"] if backbone.note else []),
            f"Loading it:\n\n```python\n{loading}\n```\n",
            "`preprocessing.json` says the same for other languages, and names the classes in order.\n",
            f"Classes: {', '.join(model.classes)}\n",
        ]
    )


def data_learned(model: Predictor, folder: Path) -> str:
    """The data sets whose classes the model knows: each of `extra_data` is one task after the others."""
    config, more = model.learner.config, read_manifest(folder).model_extra or {}
    tasks = len(more["data_of_tasks"]["train"]) if "data_of_tasks" in more else 0
    later = max(0, tasks - model.learner.task - 1)  # not learned yet
    added = config.added[: max(0, len(config.added) - later)]
    return named_data({"dataset": config.dataset, "extra_data": added})
