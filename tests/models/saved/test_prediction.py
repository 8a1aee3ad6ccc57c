"""models.saved.prediction: class names of images from a run folder alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import eval as evaluation
from models import load_run
from models.saved.learner import load_learner
from tests.conftest import TINY_GRIDS
from tests.models.saved.conftest import Finished
from utils.errors import UserError


def test_a_run_without_its_data_predicts_what_it_was_tested_with(finished: Finished) -> None:
    """As many test images of every class learned are named right as the run recorded, with its ECE."""
    folder, images, labels = finished
    model, result = load_run(folder), json.loads((folder / "result.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert model.classes == manifest["class_names"][: 8 if "linear_probe" in folder.parts else 4]
    seen = np.array([label in model.classes for label in labels])
    table, named = model.predict(images[seen]), np.array(labels)[seen]
    assert list(table.columns) == ["image", "rank", "class", "score"] and len(table) == seen.sum()
    right = table["class"].to_numpy() == named
    assert 100 * right.mean() == pytest.approx(result["curve"][-1])
    bins = np.minimum((table["score"] * 15).astype(int), 14)
    gaps = pd.DataFrame({"gap": right - table["score"]}).groupby(bins)["gap"].sum()
    assert 100 * gaps.abs().sum() / len(right) == pytest.approx(result["metrics"]["ece"], abs=1e-4)
    assert model.temperature == result["calibration"]["temperature"]
    with pytest.raises(UserError, match="things.npz"):
        load_learner(folder / "checkpoints" / "task_00")  # a test needs the data


def test_the_note_on_weights_stands_beside_the_error_of_scores(simplecil: Finished) -> None:
    shown = repr(load_run(simplecil.folder))
    assert "points on test images" in shown and "untrained network" in shown


def test_images_are_predicted_alike_however_they_are_given(simplecil: Finished, tmp_path: Path) -> None:
    random = torch.get_rng_state()
    model, pixels = load_run(simplecil.folder, device="cpu"), simplecil.images[:3]
    assert torch.equal(torch.get_rng_state(), random)
    files = [tmp_path / "photos" / f"{i}.png" for i in range(3)]
    files[0].parent.mkdir()
    for path, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(path)
    expected = model.predict(pixels, top=2)
    assert list(expected["rank"]) == [1, 2] * 3 and expected["score"].between(0, 1).all()
    for given in (
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        list(pixels),
        [Image.fromarray(image) for image in pixels],
        files[0].parent,
        [str(path) for path in files],
    ):
        table = model.predict(given, top=2)
        assert table["class"].equals(expected["class"]) and table["score"].equals(expected["score"])
    assert table["image"].tolist() == [str(path) for path in files for _ in range(2)]
    single = model.predict(pixels[0], top=99)
    assert len(single) == 4 and single["class"][0] == expected["class"][0]
    assert single["score"][0] == pytest.approx(expected["score"][0], abs=1e-5)
    everything = model.predict(pixels, top=4).groupby("image")["score"].sum()
    assert everything.tolist() == pytest.approx([1, 1, 1])


def test_a_model_on_the_cpu_seeds_no_gpu(simplecil: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    load_run(simplecil.folder, device="cpu")
    assert not seeded


def test_a_turned_photo_is_the_same_as_a_path_and_as_an_image(simplecil: Finished, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the orientation
    Image.fromarray(simplecil.images[0]).resize((40, 60)).save(tmp_path / "turned.png", exif=exif)
    model = load_run(simplecil.folder)
    photo = tmp_path / "turned.png"
    path, image = (model.predict(given, top=99) for given in (photo, Image.open(photo)))
    assert path["score"].tolist() == image["score"].tolist()


@pytest.mark.parametrize("given", [np.zeros((2, 8, 8, 3)), np.zeros((1, 8, 8, 4), np.uint8), []])
def test_what_is_no_image_is_refused(given: object, simplecil: Finished) -> None:
    with pytest.raises(UserError, match="uint8|no image"):
        load_run(simplecil.folder).predict(given)


def test_unreadable_images_are_told_and_skipped(
    simplecil: Finished, tmp_path: Path, told: Callable[..., str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "new" / "x.csv"
    (photos / "below").mkdir(parents=True)
    Image.fromarray(simplecil.images[0]).resize((40, 50)).save(photos / "below" / "good.jpg")
    content = (photos / "below" / "good.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(content[: len(content) // 2])
    (photos / "text.png").write_text("no image")
    (photos / "IMG_1.HEIC").write_text("a photo that is not read")
    arguments = evaluation.main, "--run", simplecil.folder, "--predict", photos, "--top", 3
    shown = told(0, *arguments, "--out", out)
    assert "1 image predicted, 2 could not be read" in shown
    assert "cut.jpg cannot be read" in shown and "text.png cannot be read" in shown
    assert "'.heic' to be converted to JPEG (IMG_1.HEIC)" in shown
    table = pd.read_csv(out)
    assert table["image"].unique().tolist() == [str(photos / "below" / "good.jpg")] and len(table) == 3
    assert f"good.jpg: {table['class'][0]} {100 * table['score'][0]:.1f} %" in told(0, *arguments)


def test_a_path_of_nothing_has_one_reason(simplecil: Finished, caplog: pytest.LogCaptureFixture) -> None:
    model = load_run(simplecil.folder)
    caplog.clear()
    table = model.predict(["nowhere.jpg", simplecil.images[0]])
    assert table.attrs["unreadable"].keys() == {"nowhere.jpg"} and len(caplog.records) == 1


@pytest.mark.parametrize("top", [0, -1])
def test_no_class_per_image_is_a_sentence(top: int, simplecil: Finished) -> None:
    with pytest.raises(UserError, match="top.*from 1"):
        load_run(simplecil.folder).predict(simplecil.images, top)


def test_odd_things_in_a_folder_of_images(
    simplecil: Finished, tmp_path: Path, told: Callable[..., str]
) -> None:
    """A link back to the folder, a FIFO, and a name of bytes that are no text."""
    photos, out = tmp_path / "photos", tmp_path / "names.csv"
    (photos / "below").mkdir(parents=True)
    (photos / "below" / "up").symlink_to(photos)
    os.mkfifo(photos / "pipe.png")
    name = os.fsdecode(bytes(photos) + b"/\xff.png")
    Image.fromarray(simplecil.images[0]).save(name)
    arguments = evaluation.main, "--run", simplecil.folder, "--predict", photos
    for more in ([], ["--out", out]):
        shown = told(0, *arguments, *more)
        assert "pipe.png cannot be read: it is a FIFO" in shown
        assert "1 image predicted, 1 could not be read" in shown
    assert pd.read_csv(out)["image"].tolist() == [str(photos / r"\udcff.png")]


def test_mistakes_are_a_sentence(simplecil: Finished, tmp_path: Path, told: Callable[..., str]) -> None:
    for arguments, answer in (
        ([tmp_path / "nowhere.jpg"], "nowhere.jpg: it is not there"),
        ([tmp_path, "--out", "x.txt"], "--out predictions.csv"),
        ([tmp_path], f"no image to predict in {tmp_path}:"),
    ):
        shown = told(2, evaluation.main, "--run", simplecil.folder, "--predict", *arguments)
        assert answer in shown.splitlines()[-1]

    for wrong in ({"device": "tpu"}, {"precision": "fp64"}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} = .*allowed: .*auto"):
            load_run(simplecil.folder, **wrong)


def test_a_key_that_was_edited_wrongly_is_named(simplecil: Finished, tmp_path: Path) -> None:
    """Where a run may be edited it is not of an earlier version."""
    folder = shutil.copytree(simplecil.folder, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eval_batch_size": 0}))
    with pytest.raises(UserError, match="config.json: eval_batch_size = 0: .*allowed"):
        load_run(folder)


def test_any_task_and_only_runs_of_images(
    simplecil: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    """A checkpoint may be named from any folder, and an image twice."""
    first, image = simplecil.folder / "checkpoints" / "task_00", str(tmp_path / "a.png")
    assert load_run(simplecil.folder, checkpoint=first).classes == load_run(simplecil.folder).classes[:2]
    Image.fromarray(simplecil.images[0]).save(image)
    for place, name in ((simplecil.folder, "checkpoints/task_00"), (first.parent, "task_00"), (first, ".")):
        monkeypatch.chdir(place)
        shown = told(0, evaluation.main, "--checkpoint", name, "--predict", image, image)
        assert "2 classes of 1 task" in shown and "2 images predicted" in shown
        assert [line.count("%") for line in shown.splitlines() if line.startswith(image)] == [1, 1]
    (tmp_path / "config.json").write_text(json.dumps(TINY_GRIDS))
    with pytest.raises(UserError, match="runs on images"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text((simplecil.folder / "config.json").read_text())
    with pytest.raises(UserError, match="no checkpoint of a finished task"):
        load_run(tmp_path)
