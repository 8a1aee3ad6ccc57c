"""models.saved.export: exported models give the run's scores without this program."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import eval as evaluation
from models import SCHEMAS, load_run
from models.saved import export as saved_export
from models.saved.extension import Extension
from models.saved.prediction import Predictor
from tests.conftest import folder_of
from tests.models.saved.conftest import COMMON, Finished
from tests.models.saved.test_extension import photos
from trainer import extend, train
from utils.config.loading import config_from_dict

AS_TIMM = ("linear_probe", "sdlora", "inflora")  # one ViT with a linear classifier
EXPORTS = {
    "timm": (*AS_TIMM, "sema"),
    "onnx": ("sema", "simplecil", "ranpac", "sdlora"),
    "torchscript": ("sema", "fecam", "aligned", "ease", "moal", "coda_prompt"),
}


def export(finished: Finished, form: str, out: Path) -> tuple[object, ...]:
    """The command that exports a run."""
    return evaluation.main, "--run", finished.folder, "--export", form, "--out", out


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in EXPORTS for name in EXPORTS[form]])
def test_an_export_gives_the_run_s_scores_as_its_card_says(
    name: str,
    form: str,
    runs: Callable[[str], Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[..., str],
) -> None:
    """The card's own lines, run on an image file of another size, and on more images at once."""
    if form == "onnx":
        for library in ("onnx", "onnxruntime"):
            pytest.importorskip(library, reason=f"{library} is not installed: requirements-export.txt")
    finished, out = runs(name), tmp_path / "made" / "model"
    if form == "timm" and name not in AS_TIMM:
        assert "possible: onnx, torchscript" in told(2, *export(finished, form, out))
        assert list(tmp_path.iterdir()) == []
        return
    shown = told(0, *export(finished, form, out))
    assert "differ from the run's by" in shown and "(0.0 " not in shown
    monkeypatch.chdir(tmp_path)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # as phones store photos that were taken upright
    Image.fromarray(finished.images[0]).resize((48, 40)).save("image.png", exif=turned)
    (code,) = re.findall("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    found: dict[str, object] = {}
    exec(code.replace("FOLDER", str(out)), found)
    model = load_run(finished.folder, device="cpu")
    about = json.loads((out / "preprocessing.json").read_text())
    table = model.predict("image.png", top=len(model.classes)).set_index("class")["score"]
    with torch.no_grad():
        scores = found["model"](found["images"]).softmax(dim=1)
        many = found["model"](torch.cat([found["images"]] * 7)).softmax(dim=1)
    assert about["classes"] == model.classes and scores.shape == (1, len(model.classes))
    assert scores[0].detach().numpy() == pytest.approx(table[model.classes].to_numpy(), abs=1e-5)
    assert many.detach().numpy() == pytest.approx(np.repeat(scores.detach().numpy(), 7, axis=0), abs=1e-6)


def test_a_card_says_what_the_model_is_and_nothing_is_replaced(
    runs: Callable[[str], Finished], tmp_path: Path, told: Callable[..., str]
) -> None:
    finished = runs("sdlora")
    command = export(finished, "timm", tmp_path / "x")
    told(0, *command)
    card, model = (tmp_path / "x" / "README.md").read_text(), load_run(finished.folder)
    result = json.loads((finished.folder / "result.json").read_text())
    for fact in (
        "sdlora", "things.npz", "learned in 2 tasks", f"{result['curve'][-1]:.2f} %", "test_vit.random",
        "untrained", f"temperature {model.temperature:.4g}", ", ".join(model.classes),
    ):  # fmt: skip
        assert fact in card, fact
    before = sorted((tmp_path / "x").iterdir())
    assert "is there already" in told(2, *command) and sorted((tmp_path / "x").iterdir()) == before


@pytest.mark.parametrize("form", EXPORTS)
def test_a_disk_that_takes_no_more_is_a_sentence(
    form: str, runs: Callable[[str], Finished], tmp_path: Path, told: Callable[..., str]
) -> None:
    resource = pytest.importorskip("resource", reason="limits of file sizes")
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="requirements-export.txt")
    command, size = export(runs("linear_probe"), form, tmp_path / "x"), resource.RLIMIT_FSIZE
    limits = resource.getrlimit(size)
    resource.setrlimit(size, (50_000, limits[1]))
    try:
        assert "File too large" in told(2, *command) and list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(size, limits)


def test_scores_that_hardly_differ_must_still_name_the_same_classes(
    runs: Callable[[str], Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[..., str],
) -> None:
    """With a high temperature, as many classes have, every score is about 1 / C."""

    def soft(*arguments: object) -> Predictor:
        model = load_run(*arguments)
        model.temperature = 1e6
        return model

    def broken(model: Predictor, views: torch.Tensor, folder: Path) -> Callable[..., torch.Tensor]:
        return lambda images: torch.zeros(len(images), len(model.classes))

    monkeypatch.setattr(saved_export, "load_run", soft)
    command = export(runs("simplecil"), "torchscript", tmp_path / "x")
    told(0, *command)
    shutil.rmtree(tmp_path / "x")
    monkeypatch.setitem(saved_export.FORMS, "torchscript", broken)
    assert "differs from the run" in told(2, *command) and list(tmp_path.iterdir()) == []


def test_a_card_names_the_data_and_images_that_its_model_knows(
    tmp_path: Path, told: Callable[..., str]
) -> None:
    """Of an extended run measured on validation images: all data sets, or those of an earlier task."""
    old, new = (photos(tmp_path / name, [name], colour) for name, colour in (("ant", 0), ("bee", 90)))
    config = {"model_name": "simplecil", "dataset": old, "init_cls": 1, "increment": 1, "max_tasks": 1}
    config |= {"validation_share": 0.25, "logs_root": str(tmp_path / "logs"), "cache_gb": 0}
    tiny = {key: COMMON[key] for key in ("backbone_type", "weights", "image_size", "device", "precision")}
    config = config_from_dict(tiny | config, SCHEMAS, "test").config
    train(config)
    extension = Extension.of(folder_of(tmp_path / "logs"), [], [new])
    extend(extension)
    task = extension.place / "checkpoints" / "task_00"
    for number, (given, named) in enumerate((("--run", f"{old} + {new}"), ("--checkpoint", old))):
        place, out = task if number else extension.place, tmp_path / str(number)
        told(0, evaluation.main, given, place, "--export", "torchscript", "--out", out)
        card = (out / "README.md").read_text()
        assert f" of {named} by simplecil" in card and f"| data | {named} |" in card
        images = ("2 validation images", "1 validation image")[number]
        assert f"fitted on {images}, held out of training" in card
