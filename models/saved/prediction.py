"""Predictor: a saved run that classifies any images, with calibrated scores.

    from models import load_run

    model = load_run("logs/sema/...")
    model.predict("photos/", top=3)          # a DataFrame: image, rank, class, score

It needs only the run folder and the backbone's weights; no data set is read.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from models.methods import LEARNERS
from models.saved.learner import (
    CHECKPOINTS,
    check_same,
    fitting,
    load_run_checkpoint,
    make_learner,
    run_context,
)
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.sources import view_spec
from utils.config.loading import check_object
from utils.console import progress
from utils.data.folders import FolderScan
from utils.data.image_files import THREADS, decode_whole, to_rgb, upright, why_bad
from utils.data.transforms import views_of
from utils.errors import UserError
from utils.files import read_json, replace_file, why_no_file
from utils.runs.checkpoint import latest_checkpoint
from utils.runs.folder import CONFIG, resume_command
from utils.training.random import kept_generators
from utils.wording import counted, escaped

logger = logging.getLogger("nested_lora")

ImageInput = Any  # as `Predictor.predict` takes them


class Predictor:
    """A saved run as a classifier of images.

    Attributes:
        learner: the model, without data.
        classes: names of the classes learned, in the order of the scores.
        evaluation: result of `ClassIncrementalLearner.evaluate` after its newest task.
        temperature: scores are softmax(raw scores / temperature); 1 where it was never fitted.
    """

    def __init__(
        self, learner: ClassIncrementalLearner, classes: list[str], evaluation: dict[str, Any]
    ) -> None:
        self.learner, self.classes, self.evaluation = learner, classes, evaluation
        self.temperature = learner.calibration.temperature if learner.calibration else 1.0
        self.view = view_spec(learner.config, learner.backbone, "none")

    def __repr__(self) -> str:
        error, images = self.evaluation.get("ece"), self.evaluation.get("images", "test")
        scores = (
            "not calibrated" if error is None else f"calibrated, error {error:.1f} points on {images} images"
        )
        tasks, note = counted(self.learner.task + 1, "task"), self.learner.backbone.note
        about = f"{len(self.classes)} classes of {tasks}, scores {scores}"
        return f"{self.learner.config.model_name}: {about}{f' ({note})' if note else ''}"

    def predict(self, images: ImageInput, top: int = 1) -> pd.DataFrame:
        """The most likely classes of every image, one row each: image (path or number), rank, class, score.

        Images that cannot be read have no row but a warning; `.attrs["unreadable"]`: image -> reason.

        Args:
            images: paths, folders (all image files in and below them), PIL images, or uint8 arrays or
                tensors: (h, w, 3), (3, h, w), (h, w), or a batch of those; or a sequence of any of these but
                batches. (3, h, w) is always one image: three grey ones are given in a list.
            top: classes per image.

        Raises UserError: there is no image, an array does not have the form of one, or `top` is below 1.
        """
        if top < 1:
            raise UserError(f"top = {top}: each image has one class at least; allowed: from 1")
        given, size = list(named_images(images)), self.learner.config.eval_batch_size
        if not given:
            paths = [images] if isinstance(images, str | Path) else list(images)
            places = ", ".join(map(str, paths)) or "what was given"
            raise UserError(f"no image to predict in {places}: give paths of image files or their folders")
        rows, unreadable = [], {}
        with ThreadPoolExecutor(THREADS) as threads, progress(total=len(given), unit="image") as bar:
            for batch in (given[first : first + size] for first in range(0, len(given), size)):
                names, contents = zip(*batch, strict=True)
                read = list(zip(names, threads.map(read_image, contents), strict=True))
                unreadable |= {name: found for name, found in read if isinstance(found, str)}
                readable = [(name, found) for name, found in read if isinstance(found, Tensor)]
                best = self.scores([pixels for _, pixels in readable]).topk(min(top, len(self.classes)))
                for (name, _), values, labels in zip(readable, *map(Tensor.tolist, best), strict=True):
                    ranked = enumerate(zip(labels, values, strict=True), start=1)
                    rows += [(name, rank, self.classes[label], value) for rank, (label, value) in ranked]
                bar.update(len(batch))
        for name, reason in unreadable.items():
            logger.warning(f"{name} cannot be read: {reason}")
        table = pd.DataFrame(rows, columns=["image", "rank", "class", "score"])
        table.attrs["unreadable"] = unreadable
        return table

    def scores(self, pixels: list[Tensor]) -> Tensor:
        """Calibrated scores (n, C) of images (3, h, w) uint8, on the CPU; each row sums to 1."""
        return self.logits(pixels).softmax(dim=1)

    @torch.no_grad()
    def logits(self, pixels: list[Tensor]) -> Tensor:
        """Raw scores divided by the temperature, (n, C) float64, of images as `scores` takes them."""
        if not pixels:
            return torch.empty(0, len(self.classes), dtype=torch.float64)
        views = torch.cat([views_of(image[None], self.view, None, np.zeros(1, int)) for image in pixels])
        learner = self.learner
        return learner.classify(learner.features(views.to(learner.device))).cpu().double() / self.temperature


def load_run(
    folder: str | Path,
    device: str = "auto",
    checkpoint: str | Path | None = None,
    precision: str | None = None,
) -> Predictor:
    """The model of a run folder, as its last finished task left it.

    Args:
        device: "auto" takes a GPU where there is one; else "cpu", "cuda", "cuda:1", "mps".
        checkpoint: another checkpoint of the run, such as `FOLDER/checkpoints/task_02`.
        precision: "auto", "fp32" or "bf16"; by default the run's.

    PyTorch's global random states are left as they were.

    Raises UserError: no run of images, no finished task, a damaged checkpoint or config, no weights, or a
    device or precision that does not exist.
    """
    folder = Path(folder).expanduser()
    values = read_json(folder / CONFIG)
    method = LEARNERS.get(values.get("model_name"))
    if method is None or not issubclass(method, ClassIncrementalLearner):
        raise UserError(
            f"{folder} is a run of {values.get('model_name')!r}, which classifies no images: predictions and "
            "exports are made of runs on images"
        )
    checkpoint = Path(checkpoint) if checkpoint else latest_checkpoint(folder / CHECKPOINTS, whole_tasks=True)
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint of a finished task yet: let the run finish one")
    own = {key: values[key] for key in method.Config.editable_keys & values.keys()}
    asked = {"device": device} | ({} if precision is None else {"precision": precision})
    for given, origin in ((own, f"{folder / CONFIG}: "), (asked, "")):
        if problems := check_object(given, method.Config).problems:
            raise UserError(origin + "; ".join(problems))
    tensors, state = load_run_checkpoint(checkpoint)
    with fitting(checkpoint):
        config = method.Config.model_validate(state["config"] | own | asked)
    with run_context(config) as context, kept_generators(context.device):
        learner = make_learner(config, replace(context, reads_data=False))
        check_same(checkpoint, state, learner.backbone.identity())
        with fitting(checkpoint):
            learner.load_state(state["learner"], tensors)
            learner.modules.eval()
            classes = state["learner"]["class_names"]
    if len(state["evaluations"]) <= learner.task:
        raise UserError(
            f"{checkpoint} lies inside task {learner.task}: predictions and exports are of finished tasks; "
            f"give another checkpoint, or go on with {resume_command(folder)}"
        )
    for warning in context.warnings:
        logger.warning(warning)
    return Predictor(learner, classes, state["evaluations"][-1])


def show_predictions(
    folder: Path, checkpoint: Path | None, images: list[Path], top: int, out: Path | None
) -> Iterator[str]:
    """A run's predictions as lines, one per image, or the path of the .csv file they are written to; a count.

    Raises UserError: from `load_run`, or a path is absent.
    """
    for path in images:
        if not path.is_dir() and (reason := why_no_file(path)):
            raise UserError(f"--predict {path}: {reason}; give image files or folders of them")
    if out is not None and out.suffix.lower() != ".csv":
        raise UserError(f"--out {out}: predictions are written as .csv, such as --out predictions.csv")
    model = load_run(folder, checkpoint=checkpoint)
    yield repr(model)
    table = model.predict(images, top)
    unreadable = table.attrs["unreadable"]
    number = (table["rank"] == 1).cumsum()  # of the image: it may be given twice
    if out is None:
        for _, rows in table.groupby(number):
            named = (f"{row['class']} {100 * row['score']:.1f} %" for _, row in rows.iterrows())
            yield f"{rows['image'].iloc[0]}: {', '.join(named)}"
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield f"wrote {replace_file(out, escaped(table.to_csv(index=False)).encode())}"
    left_out = f", {len(unreadable):,} could not be read" if unreadable else ""
    yield f"{counted(number.nunique(), 'image')} predicted{left_out}"


# ----------------------------------------------------------------------------------------------------------
# What users give as images


def named_images(images: ImageInput) -> Iterator[tuple[str | int, Any]]:
    """(name, image) of everything that `Predictor.predict` is given; images without a path are numbered."""
    if isinstance(images, str | Path):
        path, scan = Path(images).expanduser(), FolderScan()
        is_folder = path.is_dir() and scan.is_new(path)  # met, so that no link in it leads back
        for found in scan.images(path) if is_folder else [path]:
            yield str(found), found
        if left_out := str(scan):
            logger.warning(f"Left out of {path}: {left_out}")
    elif isinstance(images, Image.Image):
        yield 0, images
    elif isinstance(images, np.ndarray | Tensor):
        array = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
        single = array.ndim == 2 or (array.ndim == 3 and 3 in (array.shape[0], array.shape[-1]))
        yield from enumerate(array[None] if single else array)
    else:
        for number, image in enumerate(images):
            if isinstance(image, str | Path):
                yield from named_images(image)
            else:
                yield number, image


def read_image(image: Path | Image.Image | np.ndarray | Tensor) -> Tensor | str:
    """Pixels of an image, uint8 (3, h, w), or why it cannot be read. UserError: an array is no image."""
    if isinstance(image, np.ndarray | Tensor):
        pixels = np.asarray(image.cpu() if isinstance(image, Tensor) else image)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        elif pixels.ndim == 3 and pixels.shape[-1] != 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise UserError(
                f"an image of type {image.dtype} and shape {tuple(image.shape)}: allowed are uint8 arrays "
                "(h, w, 3), (3, h, w) or (h, w), with values from 0 to 255"
            )
    else:
        try:
            if isinstance(image, Path) and (reason := why_no_file(image)):
                return reason
            pixels = decode_whole(image.read_bytes()) if isinstance(image, Path) else to_rgb(upright(image))
        except Exception as error:  # decoders raise errors of many kinds on bad bytes
            return why_bad(error)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
