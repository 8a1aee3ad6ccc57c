"""Images with labels, from memory and from files that may change meanwhile."""

import collections
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from models.saved.learner import make_learner
from tests.image_folders import folder_images, load, write_folder
from trainer import Run, open_log, resume, train
from utils.cache import file_memo
from utils.cache.file_memo import FileMemo
from utils.data import image_files
from utils.data.image_files import DECODER
from utils.data.image_sets import ArrayImages
from utils.errors import UserError
from utils.runs.checkpoint import load_checkpoint, save_checkpoint
from utils.runs.folder import folder_of
from utils.runs.manifest import Command


def test_batch_is_one_tensor_or_a_list_where_sizes_differ(tmp_path):
    grey = ArrayImages(np.arange(32, dtype=np.uint8).reshape(2, 4, 4), np.zeros(2))
    batch = grey.batch(np.array([1, 0, 1]))
    assert batch.shape == (3, 3, 4, 4) and torch.equal(batch[1], grey[0])
    assert grey.batch(np.arange(0)).shape == (0, 3, 4, 4)
    grey[1].fill_(99)  # a copy
    assert torch.equal(batch[0], grey[1])
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, side in zip(files, (4, 4, 5), strict=True):
        Image.fromarray(np.full((side, 6, 3), side, np.uint8)).save(file)
    images = folder_images(files)
    assert images.batch(np.array([0, 1])).shape == (2, 3, 4, 6) and images.batch(np.arange(0)) == []
    assert [image.shape for image in images.batch(np.arange(3))] == [(3, 4, 6), (3, 4, 6), (3, 5, 6)]


@pytest.fixture
def checks(monkeypatch) -> collections.Counter:
    """How often images were decoded to check them; files count as settled at once."""
    monkeypatch.setattr(file_memo, "SETTLED", -(10**18))
    counts, decode_file = collections.Counter(), image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda content: counts.update(["all"]) or decode_file(content))
    return counts


def test_files_are_checked_once_by_all_runs_with_the_same_decoder(folder, checks, monkeypatch):
    first, again = load(folder), load(folder)
    assert checks["all"] == 8 and first.sha256 == again.sha256
    Image.new("RGB", (9, 9)).save(folder / "train" / "ant" / "2.png")
    load(folder)
    assert checks["all"] == 9
    monkeypatch.setattr("utils.data.folders.DECODER", "Pillow 99")
    load(folder)
    assert checks["all"] == 9 + 9


def test_without_a_place_for_the_memory_every_run_checks(folder, checks):
    (folder.parent / "cache").write_text("a file")
    assert load(folder).sha256 == load(folder).sha256 and checks["all"] == 16


def test_an_image_that_was_replaced_since_its_hash_is_named_and_hashed_anew(folder, checks):
    """Also where the memory says that it is still the same."""
    expected, path = load(folder), folder / "train" / "ant" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(UserError, match=f"{path}.*Run the command again") as caught:
        expected.train[0]
    assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    status = path.stat()
    state = f"{status.st_size} bytes, {status.st_mtime_ns}, {status.st_ctime_ns}, inode {status.st_ino}"
    FileMemo(folder.parent / "cache", folder, DECODER).add({path: (state, "0" * 64)})
    wrong = load(folder)
    with pytest.raises(UserError, match="Run the command again"):
        wrong.train[0]
    assert load(folder).sha256 == expected.sha256 != wrong.sha256


def test_names_and_places_of_files_are_no_part_of_the_content(folder, tmp_path):
    expected = load(folder)
    folder.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").glob("*/*/*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    moved = load(tmp_path / "moved")
    assert moved.sha256 == expected.sha256
    (tmp_path / "moved" / "train" / "bee" / "x1.png").unlink()
    assert load(tmp_path / "moved").sha256 != expected.sha256


def simplecil(folder: Path) -> dict[str, object]:
    network = {"backbone_type": "test_vit", "weights": "random", "image_size": 32, "device": "cpu"}
    split = {"dataset": str(folder), "shuffle": False, "init_cls": 1, "increment": 1}
    return {"model_name": "simplecil"} | network | split


def test_bad_files_are_told_before_a_run_folder_is_made(folder, tmp_path, capsys):
    (folder / "test" / "bee" / "0.png").write_text("")
    (folder / "train" / "ant" / "1.png").write_text("")
    roots = {name: str(tmp_path / name) for name in ("logs_root", "cache_root")}
    (tmp_path / "run.json").write_text(json.dumps(simplecil(folder) | roots))
    assert main.main(["--config", str(tmp_path / "run.json")]) == 2
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1 and "0.png" in told and "1.png" in told
    assert not (tmp_path / "logs_root").exists()


def test_a_run_sees_that_images_were_swapped_in_place(tmp_path, smoke_config, checks):
    """Test images of two classes change places, sizes and times too: nothing stored answers for them."""
    for split in ("train", "test"):
        write_folder(tmp_path / "set", split, ["black", "grey"], ".bmp")
    config = smoke_config(**simplecil(tmp_path / "set"))
    before = train(config)
    time.sleep(0.02)  # the system's clock for files ticks in milliseconds
    for number in range(2):
        black, grey = (tmp_path / "set" / "test" / name / f"{number}.bmp" for name in ("black", "grey"))
        contents = grey.read_bytes(), black.read_bytes()
        for path, content in zip((black, grey), contents, strict=True):
            at = path.stat().st_mtime_ns
            path.write_bytes(content)
            os.utime(path, ns=(at, at))
    after = train(config)
    assert before["curve"] == [100, 100] and after["curve"] == [100, 0]  # task 0 has one class


def test_what_no_finished_task_has_read_may_change(tmp_path, smoke_config):
    """A file of a later class replaced, and one removed, after task 0; then one that task 0 has read."""
    for split in ("train", "test"):
        write_folder(tmp_path / "set", split, ["ant", "bee", "cat"])
    config = smoke_config(**simplecil(tmp_path / "set"))
    learner = make_learner(config)
    command = Command(id="one", seeds=[learner.seed], overwrite=False)
    with open_log(learner, command, folder_of(config, config.seed)) as log:
        Run(learner, log).run_task(0)
    (tmp_path / "set" / "train" / "cat" / "0.png").unlink()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / "test" / "bee" / "1.png")
    read = tmp_path / "set" / "test" / "ant" / "1.png"
    kept = read.read_bytes()
    Image.new("RGB", (8, 8), "red").save(read)
    with pytest.raises(UserError, match="test images of task 0.*have changed"):
        resume(log.folder)
    read.write_bytes(kept)
    newest = log.folder / "checkpoints" / "task_00"
    tensors, state = load_checkpoint(newest)
    inside = state | {"data": state["data"] | {"train": [*state["data"]["train"], "of a file that was bad"]}}
    save_checkpoint(newest.with_name("task_01_step_000001"), tensors, inside)  # as if stopped in task 1
    with pytest.raises(UserError, match="train images of task 1.*remove this checkpoint to go on"):
        resume(log.folder)
    shutil.rmtree(newest.with_name("task_01_step_000001"))
    result = resume(log.folder)
    assert len(result["curve"]) == 3
