"""A finished run learns further classes: as a run of all of them bit for bit, from no old training image."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import eval as evaluation
import main
from models.saved import learner as saved_learner
from models.saved.extension import Extension
from tests.conftest import TINY_GRIDS, TINY_SDLORA
from tests.crash import outcome
from tests.image_folders import write_folder
from tests.models.test_baselines import METHODS as BASELINES
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
    "finetune, aligned": BASELINES["finetune, aligned"] | {"head_drift": "linear", "merge": "orthogonal"},
    "sdlora": TINY_SDLORA,
    "gate": TINY_SDLORA
    | {"lambda_sparsity": 0.1, "gumbel_gate": "layer", "growth": "top_k", "growth_top_k": 2},
}
SAME = "simplecil; ranpac, adapted; aper; ease; inflora; moal; coda_prompt; finetune, ranpac; finetune, fecam"
METHODS |= {name: BASELINES[name] for name in SAME.split("; ")}

pytestmark = pytest.mark.usefixtures("quick_pictures")


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


def photos(root: Path, names: list[str], colour: int) -> str:
    """A folder of images, whose classes have colours from this one on."""
    for split, each in (("train", 4), ("test", 2)):
        write_folder(root, split, names, each=each, colour=colour)
    return str(root)


@pytest.fixture
def album(tmp_path: Path) -> dict[str, str]:
    """Folders of photos: four old classes, and new ones in two folders."""
    folders = {"old": ["ant", "bee", "cat", "dog"], "fish": ["eel", "cod"], "birds": ["owl"]}
    return {name: photos(tmp_path / name, folders[name], 10 * i) for i, name in enumerate(folders)}


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
    order = json.loads((first.place / "manifest.json").read_text())["class_order"]
    assert sorted(order[:4]) == [0, 1, 2, 3] and order[4:] == [4, 5]  # the old ones in whatever order
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
    then, now = (json.loads((folder / "manifest.json").read_text()) for folder in (half, bare.place))
    assert now["images_per_class"]["train"] == [*then["images_per_class"]["train"], 4, 4, 4]
    assert now["data_of_tasks"]["train"][:2] == then["data_of_tasks"]["train"]
    with pytest.raises(UserError, match="training image|same class folders"):
        train(smoke_config(**config, prefix="new"))
    shutil.rmtree(Path(album["fish"]) / "train" / "eel")
    with pytest.raises(UserError, match="still to be learned.*eel"):
        extend(Extension.of(half, ["prefix=bare2"], both))
    write_folder(Path(album["old"]), "train", ["ant", "bee", "cat", "dog"], each=4, colour=90)
    with pytest.raises(UserError, match="train images of task 0.*changed"):
        extend(Extension.of(bare.place, [], [photos(Path(album["old"]).with_name("more"), ["emu"], 30)]))


def test_the_temperature_stays_where_images_of_one_class_are_gone(
    album: dict[str, str], smoke_config: Config
) -> None:
    """The ridge's fifth is not drawn again from what is left of a task."""
    config = {"model_name": "ranpac", "ranpac_dim": 20, "dataset": album["old"], "max_tasks": None}
    half = run(smoke_config(**config))
    shutil.rmtree(Path(album["old"]) / "train" / "ant")
    extension = Extension.of(half, [], [album["birds"]])
    extended = extend(extension)
    assert extended["calibration"] == json.loads((half / "result.json").read_text())["calibration"]


def test_a_run_keeps_its_precision_and_can_be_looked_at_in_another(
    smoke_config: Config, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    """As where a run in bf16 comes to a machine that has none."""
    config = smoke_config(model_name="simplecil", max_tasks=2, precision="fp32")
    folder = run(config)
    with monkeypatch.context() as context:
        context.setattr(saved_learner, "resolve_precision", lambda precision, device: ("bf16", None))
        assert "made in fp32" in told(0, evaluation.main, "--run", folder)
        with pytest.raises(UserError, match="made in fp32.*go on in bf16"):
            extend(Extension.of(folder, ["max_tasks=3"]))
        (folder / "result.json").unlink()
        assert "made in fp32" in told(2, main.main, "--resume", folder)
    assert list((folder / "checkpoints").iterdir()) != []


def test_looking_at_a_run_leaves_nothing_in_the_cache(smoke_config: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    config = smoke_config(model_name="finetune", max_tasks=1, validation_share=0.25, cache_root=str(cache))
    folder = run(config)
    before = content(cache)
    assert evaluation.main(["--checkpoint", str(folder / "checkpoints/task_00")]) == 0
    assert evaluation.main(["--run", str(folder), "--test"]) == 0
    assert content(cache).keys() == before.keys()


def test_classes_that_a_short_run_left_out_stay_out(album: dict[str, str], smoke_config: Config) -> None:
    """New folders follow the tasks that were learned, not all that the data set has."""
    config = smoke_config(model_name="simplecil", dataset=album["old"], max_tasks=1)
    result = extend(Extension.of(run(config), [], [album["birds"]]))
    assert [len(row) for row in result["accuracy"]] == [1, 2]


def test_changed_keys_without_effect_are_named(smoke_config: Config, told: Callable[..., str]) -> None:
    """Also keys of published files that mean nothing here."""
    half = run(smoke_config(model_name="simplecil", max_tasks=1))
    words = [part for change in ("max_tasks=2", "drop=0.5", "weights_root=x") for part in ("--set", change)]
    shown = told(0, main.main, "--extend", half, *words)
    notes = " ".join(line for line in shown.splitlines() if "no effect" in line)
    assert "drop" in notes and "weights_root (weights says which)" in notes


def test_an_extension_that_is_stopped_is_resumed(
    smoke_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before its first step: the folder holds what was learned from its first moment on."""
    config = {"model_name": "finetune", "logs_root": str(tmp_path / "logs")}
    whole = run(smoke_config(**config, prefix="whole", max_tasks=3))
    half = run(smoke_config(**config, prefix="half", max_tasks=1))
    extension = Extension.of(half, ["max_tasks=3"])
    with monkeypatch.context() as context, pytest.raises(Interrupted):
        context.setattr("trainer.Run.to_the_end", Mock(side_effect=Interrupted))
        extend(extension)
    resume(extension.place)
    assert_same(extension.place, whole)


def test_what_cannot_be_extended_is_told_in_one_sentence(
    album: dict[str, str], smoke_config: Config, tmp_path: Path, told: Callable[..., str]
) -> None:
    half = run(smoke_config(model_name="simplecil", dataset=album["old"], max_tasks=1))
    added = Extension.of(half, ["prefix=added"], [album["birds"]])
    extend(added)
    joint, grids, nowhere = (tmp_path / name for name in ("joint", "grids", "nowhere"))
    for folder, changes in ((joint, {"model_name": "joint", "init_cls": 8}), (grids, TINY_GRIDS)):
        folder.mkdir()
        (folder / "config.json").write_text(smoke_config(**changes).model_dump_json())
    clash = photos(tmp_path / "clash", ["ant"], colour=5)
    (tmp_path / "empty").mkdir()
    runs = sorted(tmp_path.rglob("config.json"))
    more = "--set", "max_tasks=2"
    for words, folder, *arguments in (
        ("from 2 to 2", half, "--set", "max_tasks=1"),
        ("has 2 tasks", half, "--set", "max_tasks=9"),
        ("learned", half, "--set", "prefix=other"),
        ("init_cls", half, *more, "--set", "init_cls=1"),
        ("seed", half, *more, "--set", "seed=3"),
        ("stay as many", added.place, *more),
        ("given twice", half, "--data", album["fish"], album["fish"]),
        ("part of", added.place, "--data", album["birds"]),
        ("part of", half, "--data", album["old"]),
        ("such as ant", half, "--data", clash),
        ("was not found", half, "--data", nowhere),
        ("has no train/ and test/", half, "--data", tmp_path / "empty"),
        ("all of its data at once", joint, *more),
        ("all of its data at once", grids, "--set", "prefix=other"),
        ("not a run folder", nowhere, *more),
    ):
        assert words in told(2, main.main, "--extend", folder, *arguments)
    photos(Path(album["old"]), ["aardvark"], colour=220)  # would change the order of all old classes
    assert "folder of their own" in told(2, main.main, "--extend", half, *more)
    (half / "result.json").unlink()
    assert "unfinished" in told(2, main.main, "--extend", half, *more)
    assert sorted(tmp_path.rglob("config.json")) == runs
