"""A finished run learns further classes: as a run of all of them bit for bit, from no old training image."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import main
from models.saved.extension import Extension
from tests.conftest import TINY_GRIDS, TINY_SDLORA, folder_of
from tests.crash import outcome
from trainer import extend, resume, train
from utils.config.schema import RunConfig
from utils.errors import Interrupted, UserError
from utils.runs.checkpoint import load_checkpoint
from utils.runs.folder import folder_of as place_of

Config = Callable[..., RunConfig]
METHODS: dict[str, dict[str, Any]] = {
    "sema": {"exp_threshold": 0.5, "max_train_per_class": 8},
    "nested mean": {
        "expansion": "never",
        "nested_lora_freeze": "never",
        "nested_lora_consolidation": "interpolate",
        "nested_lora_consolidation_schedule": "mean",
        "nested_lora_reset": "aligned",
        "head": "cosine",
        "head_drift": "linear",
        "optimizer": "adam",
        "adapter_blocks": "growing",
        "cache_views": 2,
    },
    "finetune": {"model_name": "finetune", "head": "ranpac", "ranpac_dim": 50, "head_drift": "linear"},
    "finetune, aligned": {
        "model_name": "finetune",
        "head": "aligned",
        "head_drift": "linear",
        "merge": "orthogonal",
    },
    "ranpac": {"model_name": "ranpac", "ranpac_dim": 50, "first_session": True},
    "simplecil": {"model_name": "simplecil"},
    "aper": {"model_name": "aper"},
    "ease": {"model_name": "ease"},
    "moal": {"model_name": "moal", "ranpac_dim": 50},
    "coda_prompt": {"model_name": "coda_prompt", "prompt_components": 3},
    "inflora": {"model_name": "inflora", "lora_rank": 4},
    "sdlora": TINY_SDLORA,
    "gate": TINY_SDLORA
    | {"lambda_sparsity": 0.1, "gumbel_gate": "layer", "growth": "top_k", "growth_top_k": 2},
}


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.plotting.png", lambda figure: b"picture")


def run(config: RunConfig) -> Path:
    train(config)
    return place_of(config, config.seed)


def assert_same(one: Path, other: Path) -> None:
    """Numbers, events, files of the gate, and the tensors of every checkpoint."""
    assert outcome(one) == outcome(other)
    for name in ("per_class.csv", "confusion.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    for part in ("checkpoints", "gate"):
        names = [sorted(path.name for path in (folder / part).glob("*")) for folder in (one, other)]
        assert names[0] == names[1]
    for checkpoint in (one / "checkpoints").iterdir():
        (first, state), (second, other_state) = map(
            load_checkpoint, (checkpoint, other / "checkpoints" / checkpoint.name)
        )
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert state["evaluations"] == other_state["evaluations"] and state["run"] == other_state["run"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_extended_from_two_to_four_tasks_is_one_of_four(
    name: str, smoke_config: Config, tmp_path: Path
) -> None:
    def config(**changes: Any) -> RunConfig:
        return smoke_config(**METHODS[name] | {"logs_root": str(tmp_path / "logs")} | changes)

    whole, half = run(config(prefix="whole", max_tasks=4)), run(config(prefix="half", max_tasks=2))
    before = content(half)
    result = extend(Extension.of(half, ["max_tasks=4"]))
    extended = half.with_name(half.name.replace("half", "half_4tasks"))
    assert content(half) == before
    assert_same(extended, whole)
    assert result["cost"]["seconds"] > json.loads((half / "result.json").read_text())["cost"]["seconds"]
    manifest = json.loads((extended / "manifest.json").read_text())
    (origin,) = manifest["extended_from"]
    assert (origin["folder"], origin["tasks"], len(manifest["sessions"])) == (str(half), 2, 2)


def photos(root: Path, classes: dict[str, int], seed: int) -> Path:
    """A folder with images of one colour and noise per class: name -> base colour."""
    generator = np.random.default_rng(seed)
    for split, each in (("train", 4), ("test", 2)):
        for name, colour in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = (colour + generator.integers(0, 40, (12, 10, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def album(tmp_path: Path) -> dict[str, str]:
    """Folders of photos: four old classes, and new ones in two folders."""
    folders = {
        "old": {"ant": 0, "bee": 60, "cat": 120, "dog": 180},
        "fish": {"eel": 30, "cod": 200},
        "birds": {"owl": 90},
    }
    return {
        name: str(photos(tmp_path / name, classes, seed))
        for seed, (name, classes) in enumerate(folders.items())
    }


def test_new_folders_are_new_tasks_and_old_training_images_may_be_gone(
    album: dict[str, str], smoke_config: Config
) -> None:
    """As a run that knew the folders from the start, stopped on the way, then tested and extended again."""
    config = {"model_name": "finetune", "dataset": album["old"], "head": "cosine", "head_drift": "linear"}
    both = [album["fish"], album["birds"]]
    whole = run(smoke_config(**config, prefix="whole", extra_data=both, max_tasks=None))
    half = run(smoke_config(**config, prefix="half", max_tasks=None))

    first = Extension.of(half, [], [album["fish"]])
    extend(first)
    assert_same_classes(half.with_name(first.place.name), ["ant", "bee", "cat", "dog", "cod", "eel"], 4)
    again = Extension.of(first.place, [], [album["birds"]])
    extend(again)
    assert_same(again.place, whole)
    assert len(json.loads((again.place / "manifest.json").read_text())["extended_from"]) == 2

    for name in ("ant", "bee", "cat", "dog"):
        shutil.rmtree(Path(album["old"]) / "train" / name)
    bare = Extension.of(half, ["prefix=bare"], both)
    expected = json.loads((whole / "result.json").read_text())["accuracy"][:2]
    assert extend(bare)["accuracy"][:2] == expected
    assert evaluation.main(["--run", str(bare.place)]) == 0
    with pytest.raises(UserError, match="training image|same class folders"):
        train(smoke_config(**config, prefix="new"))
    shutil.rmtree(Path(album["fish"]) / "train" / "eel")
    with pytest.raises(UserError, match="still to be learned.*eel"):
        extend(Extension.of(half, ["prefix=bare2"], both))


def assert_same_classes(folder: Path, names: list[str], old: int) -> None:
    """The old classes in whatever order, then the new ones."""
    order = json.loads((folder / "manifest.json").read_text())["class_order"]
    assert sorted(names[label] for label in order[:old]) == sorted(names[:old])
    assert [names[label] for label in order[old:]] == names[old:]


def test_classes_that_a_short_run_left_out_stay_out(album: dict[str, str], smoke_config: Config) -> None:
    """New folders follow the tasks that were learned, not all that the data set has."""
    config = smoke_config(model_name="simplecil", dataset=album["old"], max_tasks=1)
    result = extend(Extension.of(run(config), [], [album["birds"]]))
    assert [len(row) for row in result["accuracy"]] == [1, 2]


def test_an_extension_that_is_stopped_is_resumed(
    smoke_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before its first step: the folder holds what was learned from its first moment on."""
    config = {"model_name": "finetune", "logs_root": str(tmp_path / "logs")}
    whole = run(smoke_config(**config, prefix="whole", max_tasks=3))
    half = run(smoke_config(**config, prefix="half", max_tasks=1))
    extension = Extension.of(half, ["max_tasks=3"])
    with monkeypatch.context() as context:
        context.setattr("trainer.Run.to_the_end", stopped)
        with pytest.raises(Interrupted):
            extend(extension)
    resume(extension.place)
    assert_same(extension.place, whole)


def only_config(config: RunConfig, folder: Path) -> Path:
    """A run folder that holds its config alone."""
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    return folder


def stopped(run: object) -> None:
    raise Interrupted


def test_what_cannot_be_extended_is_told_in_one_sentence(
    album: dict[str, str], smoke_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_name": "simplecil", "dataset": album["old"], "max_tasks": 1}
    half = run(smoke_config(**config))
    joint = only_config(smoke_config(model_name="joint", init_cls=8, increment=8), tmp_path / "joint")
    grids = only_config(smoke_config(**TINY_GRIDS), tmp_path / "grids")
    added = Extension.of(half, ["prefix=added"], [album["birds"]])
    extend(added)
    photos(tmp_path / "clash", {"ant": 5}, seed=5)
    (tmp_path / "empty").mkdir()
    runs = sorted(tmp_path.rglob("config.json"))

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        assert main.main(["--extend", *map(str, arguments)]) == 2
        told = capsys.readouterr().err.strip()
        assert "Traceback" not in told
        return told

    def more(value: object) -> tuple[str, str]:
        return "--set", f"max_tasks={value}"

    assert "from 2 to 2" in refused(half, *more(1))
    assert "has 2 tasks" in refused(half, *more(9))
    assert "learned" in refused(half, "--set", "prefix=other")
    assert "init_cls" in refused(half, *more(2), "--set", "init_cls=1")
    assert "seed" in refused(half, *more(2), "--set", "seed=3")
    assert "stay as many" in refused(added.place, *more(2))
    assert "given twice" in refused(half, "--data", album["fish"], album["fish"])
    assert "part of" in refused(added.place, "--data", album["birds"])
    assert "part of" in refused(half, "--data", album["old"])
    assert "such as ant" in refused(half, "--data", tmp_path / "clash")
    assert "was not found" in refused(half, "--data", tmp_path / "nowhere")
    assert "has no train/ and test/" in refused(half, "--data", tmp_path / "empty")
    assert "all of its data at once" in refused(joint, *more(2))
    assert "all of its data at once" in refused(grids, "--set", "prefix=other")
    assert "not a run folder" in refused(tmp_path / "nowhere", *more(2))
    (half / "result.json").unlink()
    assert "unfinished" in refused(half, *more(2))
    assert sorted(tmp_path.rglob("config.json")) == runs


def test_a_data_set_with_other_classes_than_then_is_refused(
    album: dict[str, str], smoke_config: Config, tmp_path: Path
) -> None:
    """A class put into the old folder would change the order of all of them."""
    half = run(smoke_config(model_name="simplecil", dataset=album["old"], max_tasks=1))
    photos(Path(album["old"]), {"aardvark": 220}, seed=9)
    with pytest.raises(UserError, match="folder of their own"):
        extend(Extension.of(half, ["max_tasks=2"]))
    assert folder_of(tmp_path / "logs") == half
