"""Tests of `utils.config.schema`, `utils.config.loading`, `models.sema_config`: files load, mistakes are told at once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
import models.vit.config
import utils.config.schema
from models import SCHEMAS
from models.sema_config import SEMAConfig
from models.vit.config import ClassIncrementalConfig
from models.vit.pretrained import BackboneShape
from utils.config.loading import ConfigError, LoadedConfig, config_from_dict, load_config
from utils.config.schema import RunConfig
from utils.data.datasets import class_count
from utils.errors import UserError

METHODS = ", ".join(f'"{name}"' for name in SCHEMAS)
ROOT = Path(__file__).parents[3]
EXPS = sorted(path for path in (ROOT / "exps").rglob("*.json") if path.parent.name != "sweeps")
PUBLISHED: dict[str, Any] = {
    "prefix": "reproduce",
    "dataset": "vtab",
    "memory_size": 0,
    "memory_per_class": 0,
    "fixed_memory": False,
    "shuffle": False,
    "init_cls": 10,
    "increment": 10,
    "model_name": "sema",
    "backbone_type": "pretrained_vit_b16_224_adapter",
    "device": ["0"],
    "seed": [1993],
    "batch_size": 32,
    "weight_decay": 0.0005,
    "min_lr": 0,
    "ffn_adapter_type": "adaptmlp",
    "ffn_num": 16,
    "optimizer": "sgd",
    "vpt_type": "shallow",
    "prompt_token_num": 5,
    "func_epoch": 20,
    "rd_epoch": 20,
    "init_lr": 0.005,
    "rd_lr": 0.01,
    "rd_dim": 128,
    "buffer_size": 500,
    "detect_batch_size": 128,
    "exp_threshold": 1,
    "adapt_start_layer": 9,
    "adapt_end_layer": 11,
}


@pytest.fixture
def plain_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of 100 classes, 12-block backbones with patch 16 (or 14), and a machine without CUDA."""
    patches = {"vit": 16, "pretrained_vit_b16_224_adapter": 16, "vit_small_patch14_reg4_dinov2": 14}

    def shape(
        backbone_type: str, image_size: int | None = None, *, weights: str | None = "random"
    ) -> BackboneShape:
        if backbone_type not in patches:
            raise UserError(f"backbone_type {backbone_type!r} is not known; nearest: vit")
        return BackboneShape(depth=12, width=768, patch=patches[backbone_type], image_size=224)

    def device(spec: Any) -> tuple[str, None]:
        if spec == "cuda":
            raise UserError('device = "cuda" was asked for, but there is none; use "auto" or "cpu"')
        return "cpu", None

    monkeypatch.setattr(models.vit.config, "class_count", lambda name, root: 100)
    monkeypatch.setattr(models.vit.config, "backbone_shape", shape)
    monkeypatch.setattr(utils.config.schema, "resolve_device", device)


pytestmark = pytest.mark.usefixtures("plain_checks")


def write(folder: Path, values: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def check(**values: Any) -> LoadedConfig:
    return config_from_dict(values, SCHEMAS, "test")


def problems(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(**values)
    return caught.value.problems


# ---------------------------------------------------------------------------------------------------------------------
# Shipped and published files


@pytest.mark.parametrize("path", EXPS, ids=lambda path: path.stem)
def test_shipped_config_loads_and_states_its_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real data sets, backbones and devices
    config = load_config(path, [], models.SCHEMAS).config
    assert config.description.startswith(f"python main.py --config {path.relative_to(ROOT)} ")
    assert "expected" in config.description


def test_published_config_loads_unchanged(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, PUBLISHED), [], SCHEMAS)
    for key, value in PUBLISHED.items():
        if key not in SEMAConfig.legacy_keys:
            assert getattr(loaded.config, key) == value, key
    memory = "memory_size, memory_per_class, fixed_memory (no exemplar memory)"
    assert loaded.notes == [f"keys with no effect here: {memory}, vpt_type, prompt_token_num (no prompts)"]


@pytest.mark.parametrize("device", [["0"], ["-1"], [-1], "cpu", "mps", "auto", ["0", "1"]])
def test_published_devices_are_accepted(device: Any) -> None:
    assert check(device=device).config.device == device


def test_values_are_read_generously_where_published_files_vary() -> None:
    config = check(seed=7, min_lr=None, exp_threshold=2, ffn_adapter_scalar="0.1", device=0).config
    assert (config.seed, config.min_lr, config.exp_threshold, config.ffn_adapter_scalar) == (
        [7],
        1e-8,
        2.0,
        0.1,
    )
    assert config.device == [0]


def test_resolved_config_survives_json_and_is_frozen() -> None:
    config = check(**PUBLISHED).config
    again = config_from_dict(json.loads(json.dumps(config.model_dump())), SCHEMAS, "config.json").config
    assert again == config
    with pytest.raises(ValueError, match="frozen"):
        config.init_cls = 5


@pytest.mark.parametrize("schema", [ClassIncrementalConfig, SEMAConfig])
def test_every_key_is_described_and_no_legacy_key_shadows_one(schema: type[RunConfig]) -> None:
    assert all(field.description for field in schema.model_fields.values())
    assert not schema.legacy_keys.keys() & schema.model_fields.keys()
    assert check(**dict.fromkeys(schema.legacy_keys, 1)).notes


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    values = {
        "nested_lora_rnk": 8,
        "rd_lr": "0.01",
        "optimizer": "sdg",
        "init_cls": 120,
        "adapt_start_layer": 12,
        "nested_lora_rank": 0,
        "nested_lora_lr_fast": -0.1,
        "nested_lora_update_interval_slow": -1,
        "seed": [],
        "device": "cuda",
        "increment": True,
        "adapt_end_layer": 10,
        "backbone_type": "vit",
    }
    path = write(tmp_path, values)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["detect_batch_size=1", "nonsense"], SCHEMAS)
    clash = "allowed: adapt_start_layer <= adapt_end_layer"
    depth = 'adapt_start_layer = 12, backbone_type = "vit": the backbone has 12 blocks'
    expected = [
        "--set nonsense: no key and value; allowed: --set key=value",
        "nested_lora_rnk = 8: unknown key; did you mean nested_lora_rank?",
        'rd_lr = "0.01": a wrong type (text); write 0.01 without quotes; allowed: a number > 0 and < 1000',
        'optimizer = "sdg": not a choice; did you mean "sgd"?; allowed: "sgd", "adam"',
        "nested_lora_rank = 0: too small; allowed: an integer >= 1 and <= 4096",
        "nested_lora_lr_fast = -0.1: too small; allowed: a number >= 0 and < 1000",
        "nested_lora_update_interval_slow = -1: too small; allowed: an integer >= 0 and <= 1000000",
        "seed = []: empty; allowed: an integer from 0 to 4294967295, or a list of different ones, at least one",
        "increment = true: a wrong type (a boolean); allowed: an integer >= 1 and <= 1000000",
        "detect_batch_size = 1 (--set): too small; allowed: an integer >= 2 and <= 1000000",
        'init_cls = 120, dataset = "cifar224" (default): the data set has 100 classes; allowed: init_cls from 1 to 100',
        'device = "cuda" was asked for, but there is none; use "auto" or "cpu"',
        f"adapt_start_layer = 12, adapt_end_layer = 10: the first growing block comes after the last; {clash}",
        f"{depth}; allowed: adapt_start_layer from 0 to 11",
    ]
    assert caught.value.problems == expected
    assert str(caught.value) == "\n".join([f"{path}: 14 problems", *(f"  - {line}" for line in expected)])


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"shuffle": 1}, "shuffle = 1: a wrong type (an integer); allowed: true or false"),
        (
            {"func_epoch": 2.5},
            "func_epoch = 2.5: a wrong type (a decimal number); allowed: an integer >= 0 and <= 1000000",
        ),
        ({"init_lr": True}, "init_lr = true: a wrong type (a boolean); allowed: a number > 0 and < 1000"),
        ({"init_lr": None}, "init_lr = null: a wrong type (null); allowed: a number > 0 and < 1000"),
        ({"prefix": 3}, "prefix = 3: a wrong type (an integer); allowed: a name without / and \\"),
        (
            {"prefix": "a/b"},
            'prefix = "a/b": cannot be part of a folder\'s name; allowed: a name without / and \\',
        ),
        ({"dataset": ""}, 'dataset = "": empty; allowed: non-empty text in double quotes'),
        ({"max_tasks": 0}, "max_tasks = 0: too small; allowed: an integer >= 1 and <= 1000000 or null"),
        (
            {"ffn_adapter_scalar": "big"},
            'ffn_adapter_scalar = "big": a wrong type (text); allowed: a number >= -1000 and <= 1000',
        ),
        (
            {"nested_lora_consolidation_alpha": 2},
            "nested_lora_consolidation_alpha = 2: too large; allowed: a number >= 0 and <= 1",
        ),
        ({"min_lr": -1}, "min_lr = -1: too small; allowed: a number >= 0 and < 1000, or null for 1e-8"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(values: dict[str, Any], line: str) -> None:
    assert problems(**values) == [line]


@pytest.mark.parametrize(
    ("seed", "fault"),
    [
        ([1, -2], "item 2 (-2) is too small"),
        ([3, 3], "holds 3 more than once"),
        ([True], "item 1 (true) is a wrong"),
    ],
)
def test_bad_seeds(seed: list[int], fault: str) -> None:
    (line,) = problems(seed=seed)
    assert line.startswith(f"seed = {json.dumps(seed)}: ") and fault in line


@pytest.mark.parametrize("device", [[], [1.5], True, None, [True]])
def test_bad_devices(device: Any) -> None:
    (line,) = problems(device=device)
    assert "names no device; allowed: " in line and '["-1"]' in line


def test_infinite_numbers_are_refused() -> None:
    assert problems(rd_lr=float("inf")) == [
        "rd_lr = Infinity: not a finite number; allowed: a number > 0 and < 1000"
    ]


def test_backbone_mistakes() -> None:
    (line,) = problems(backbone_type="vti", adapt_end_layer=30)
    assert line == "backbone_type 'vti' is not known; nearest: vit"
    (line,) = problems(backbone_type="vit", image_size=230)
    assert line.endswith("allowed: a multiple of 16, such as 224 or 240")
    (line,) = problems(backbone_type="vit", weights="nowhere.safetensors")
    assert line.startswith('weights = "nowhere.safetensors": it is not there; allowed: null, "random"')


def test_unknown_key_without_a_near_one_lists_the_valid_keys() -> None:
    with pytest.raises(ConfigError, match="did you mean batch_size") as caught:
        check(**{"Batch-Size": 8})
    assert "Valid keys" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        check(qqqq=8)
    assert caught.value.problems == ["qqqq = 8: unknown key; allowed: the keys listed below"]
    listed = str(caught.value).split("Valid keys: ")[1].replace("\n", " ").replace(",", "").split()
    assert set(listed) == set(SEMAConfig.model_fields)


def test_unknown_method_lists_the_choices_and_the_rest_is_still_checked() -> None:
    near = problems(model_name="semma", rd_dim=0, nested_lora_rnk=8)
    assert near[0] == f'model_name = "semma": no such method; did you mean "sema"?; allowed: {METHODS}'
    assert [line.split(" = ")[0] for line in near] == ["model_name", "rd_dim", "nested_lora_rnk"]
    far = problems(model_name="qqqq", rd_dim=8, increment=0, init_cls=300)
    assert far[0] == f'model_name = "qqqq": no such method; allowed: {METHODS}'
    assert [line.split(" = ")[0] for line in far] == ["model_name", "increment", "init_cls"]


class OtherConfig(RunConfig):
    """A second method with a key of its own that has no default."""

    own_key: int


def test_each_method_has_its_own_keys() -> None:
    schemas = {"sema": SEMAConfig, "other": OtherConfig}
    assert config_from_dict({"model_name": "other", "own_key": 3}, schemas, "test").config.own_key == 3
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"model_name": "other", "rd_dim": 3}, schemas, "test")
    assert caught.value.problems == [
        'rd_dim = 3: not a key of model_name "other"; it belongs to "sema"',
        "own_key: missing; allowed: an integer",
    ]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, {}, "sema_cifar.json")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "sema_cifr.json", [], SCHEMAS)
    assert caught.value.problems == [
        f"{tmp_path / 'sema_cifr.json'} does not exist; did you mean {tmp_path / 'sema_cifar.json'}?"
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{\n  "rd_dim": 8,\n  "rd_lr" 0.1\n}', "line 3, column 11: "),
        ('{\n  "rd_dim": 8,\n  "rd_lr" 0.1\n}', 'the line reads: "rd_lr" 0.1'),
        ('{"rd_dim": 8,\n', "line 2, column 1: "),
        ("", "line 1, column 1: "),
        ("[1]", "holds a list; allowed: one JSON object"),
        ('{"rd_lr": NaN}', "NaN is not a JSON number"),
    ],
)
def test_invalid_json_is_located(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), ["rd_dim=0"], SCHEMAS)
    assert told in caught.value.problems[0]
    assert caught.value.problems[1] == "rd_dim = 0 (--set): too small; allowed: an integer >= 1 and <= 16384"


def test_unreadable_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, [], SCHEMAS)
    path = tmp_path / "latin.json"
    path.write_bytes(b'{"prefix": "\xe9"}')
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(path, [], SCHEMAS)


def test_key_written_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, '{"rd_dim": 8, "rd_dim": 9}'), [], SCHEMAS)
    assert caught.value.problems == ["rd_dim: written twice, as 8 and 9; allowed: once"]


# ---------------------------------------------------------------------------------------------------------------------
# Inheritance and overrides


def test_base_chain_is_relative_and_nearest_wins(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, {"rd_dim": 8, "rd_lr": 0.5, "func_epoch": 9, "description": "of the root"}, "root.json")
    write(tmp_path / "deep", {"base": "../root.json", "rd_dim": 16, "rd_lr": 0.25}, "middle.json")
    path = write(tmp_path, {"base": "deep/middle.json", "rd_dim": 32}, "leaf.json")
    config = load_config(path, [], SCHEMAS).config
    assert (config.rd_dim, config.rd_lr, config.func_epoch, config.description) == (32, 0.25, 9, "")


def test_a_fault_in_a_base_names_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, {"rd_dim": 0, "rd_lr": 0}, "root.json")
    path = write(tmp_path, {"base": "root.json", "rd_lr": -1})
    with pytest.raises(ConfigError) as caught:
        load_config(path, [], SCHEMAS)
    assert caught.value.problems == [
        "rd_lr = -1: too small; allowed: a number > 0 and < 1000",
        f"rd_dim = 0 (from {base}): too small; allowed: an integer >= 1 and <= 16384",
    ]


@pytest.mark.parametrize(
    ("base", "told"),
    [("config.json", "this file or one that inherits"), ("gone.json", "does not exist"), (3, "a wrong type")],
)
def test_bad_base_is_told_with_the_file_s_own_faults(tmp_path: Path, base: Any, told: str) -> None:
    path = write(tmp_path, {"base": base, "rd_dim": 0, "init_cls": 300})
    with pytest.raises(ConfigError) as caught:
        load_config(path, [], SCHEMAS)
    first, second = caught.value.problems  # no conflicts: what the base would have said is unknown
    assert first.startswith(f"base = {json.dumps(base)}: ") and told in first
    assert second.startswith("rd_dim = 0: ")


def test_longer_cycle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"base": "b.json"}, "a.json")
    write(tmp_path, {"base": "a.json"}, "b.json")
    with pytest.raises(ConfigError, match="a chain that ends"):
        load_config(tmp_path / "a.json", [], SCHEMAS)


def test_overrides_are_json_or_text_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, {"nested_lora_rank": 16, "max_tasks": 3})
    given = ["nested_lora_rank=4", "nested_lora_rank=8", "max_tasks=null", "dataset=a=b", "seed=[1,2]"]
    config = load_config(path, [*given, "optimizer=adam"], SCHEMAS).config
    assert (config.nested_lora_rank, config.max_tasks, config.dataset) == (8, None, "a=b")
    assert (config.seed, config.optimizer) == ([1, 2], "adam")


def test_override_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path, {})
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["base=x.json", "=3", "shuffle=True", "rd_dimm=3"], SCHEMAS)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "--set base=x.json",
        "--set =3",
        'shuffle = "True" (--set)',
        "rd_dimm = 3 (--set)",
    ]
    assert "write true without quotes" in caught.value.problems[2]


# ---------------------------------------------------------------------------------------------------------------------
# Notes


def test_keys_of_the_other_adapter_are_noted() -> None:
    (note,) = check(nested_lora_rank=8, nested_lora_lr_fast=0.1).notes
    keys = "nested_lora_rank, nested_lora_lr_fast"
    assert note == f'keys with no effect here: {keys} (ffn_adapter_type is "adaptmlp")'


def test_idle_keys_of_nested_lora_are_noted() -> None:
    config = {"ffn_adapter_type": "nested_lora", "ffn_num": 8, "nested_lora_consolidation_alpha": 0.2}
    off = "nested_lora_consolidation_alpha (nested_lora_use_consolidation is false)"
    assert check(**config).notes == [
        f"keys with no effect here: ffn_num (nested_lora_rank is the width), {off}"
    ]
    assert check(ffn_adapter_type="nested_lora").notes == []
    nested = {"ffn_adapter_type": "nested_lora", "nested_lora_use_consolidation": True}
    assert check(**nested, nested_lora_reset="lora").notes == []
    (note,) = check(ffn_adapter_type="nested_lora", nested_lora_slow_grad="accumulate").notes
    assert note == "keys with no effect here: nested_lora_slow_grad (slow steps every step)"


ONE_CLASS = {"init_cls": 1, "increment": 1}  # of 100
ALL_OF_THEM, THE_FIRST, THE_LAST = "task 0, 1, 2, ... of 0 to 99", "task 0 of 0 to 33", "task 33 of 0 to 33"


@pytest.mark.parametrize(
    ("changes", "which", "words"),
    [
        ({"model_name": "sema"}, ALL_OF_THEM, ["cosine", "ranpac"]),
        ({"model_name": "finetune"}, ALL_OF_THEM, ["cosine", "ranpac"]),
        ({"model_name": "finetune", "head": "cosine"}, ALL_OF_THEM, ["cosine"]),
        ({"model_name": "sdlora"}, ALL_OF_THEM, ["cosine", "ranpac"]),
        ({"model_name": "ranpac", "first_session": True}, "task 0 of 0 to 99", ["ranpac"]),
        ({"model_name": "sema", "increment": 3}, THE_FIRST, ["cosine", "ranpac"]),
        ({"model_name": "sdlora", "init_cls": 3, "increment": 3}, THE_LAST, ["cosine", "ranpac"]),
        ({"model_name": "ranpac"}, None, []),
        ({"model_name": "simplecil"}, None, []),
        ({"model_name": "sema", "init_cls": 3, "increment": 3, "max_tasks": 3}, None, []),
        ({"model_name": "sema", "init_cls": 4, "increment": 3}, None, []),
    ],
    ids=str,
)
def test_tasks_of_one_class_are_told_once_with_the_heads_that_work(
    changes: dict[str, Any], which: str | None, words: list[str]
) -> None:
    notes = [note for note in check(**ONE_CLASS | changes).notes if "one class" in note]
    assert len(notes) == (which is not None)
    assert all(
        which in note and "teaches nothing" in note and all(word in note for word in words) for note in notes
    )


def test_tasks_of_one_class_are_counted_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.vit.config, "class_count", class_count)
    arrays = {f"{name}_{source}": np.zeros(3, np.uint8) for name in "xy" for source in ("train", "test")}
    np.savez(tmp_path / "mine.npz", **arrays, class_names=np.array(["a", "b", "c"]))
    (note,) = check(dataset="mine.npz", data_root=str(tmp_path), init_cls=2, increment=2).notes
    assert "task 1 of 0 to 1 brings one class" in note


def test_departures_are_remarked() -> None:
    (note,) = check(ffn_adapter_scalar="0.1").notes
    assert note.startswith("ffn_adapter_scalar = 0.1 is applied here")
    nested = {
        "ffn_adapter_type": "nested_lora",
        "nested_lora_use_consolidation": True,
        "nested_lora_reset": "zeros",
    }
    (note,) = check(**nested).notes
    assert note.startswith('nested_lora_reset = "zeros"')
