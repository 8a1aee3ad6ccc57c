"""Tests of `utils.config.loading`: files, bases and overrides become configs, or all mistakes are told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import SCHEMAS
from tests.image_folders import write_folder
from utils.config.loading import ConfigError, LoadedConfig, config_from_dict, load_config
from utils.config.schema import RunConfig

PUBLISHED: dict[str, Any] = {
    "prefix": "reproduce", "dataset": "vtab", "memory_size": 0, "memory_per_class": 0, "fixed_memory": False,
    "shuffle": False, "init_cls": 10, "increment": 10, "model_name": "sema", "device": ["0"], "seed": [1993],
    "backbone_type": "pretrained_vit_b16_224_adapter", "batch_size": 32, "weight_decay": 0.0005, "min_lr": 0,
    "ffn_adapter_type": "adaptmlp", "ffn_num": 16, "optimizer": "sgd", "vpt_type": "shallow",
    "prompt_token_num": 5, "func_epoch": 20, "rd_epoch": 20, "init_lr": 0.005, "rd_lr": 0.01, "rd_dim": 128,
    "buffer_size": 500, "detect_batch_size": 128, "exp_threshold": 1, "adapt_start_layer": 9,
    "adapt_end_layer": 11,
}  # fmt: skip
NESTED = {"ffn_adapter_type": "nested_lora"}


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


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, SCHEMAS)
    str(caught.value).encode()
    return caught.value.problems


# ----------------------------------------------------------------------------------------------------------
# Files and values


def test_published_config_loads_unchanged(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, PUBLISHED), [], SCHEMAS)
    own = {key: value for key, value in PUBLISHED.items() if key not in SCHEMAS["sema"].legacy_keys}
    assert {key: getattr(loaded.config, key) for key in own} == own | {"seed": 1993}
    memory = "memory_size, memory_per_class, fixed_memory (no exemplar memory)"
    assert loaded.notes == [f"keys with no effect here: {memory}, vpt_type, prompt_token_num (no prompts)"]


def test_values_are_read_generously_where_published_files_vary() -> None:
    config = check(min_lr=None, exp_threshold=2, ffn_adapter_scalar="0.1").config
    assert (config.min_lr, config.exp_threshold, config.ffn_adapter_scalar) == (1e-8, 2.0, 0.1)
    for device in (["0"], ["-1"], [-1], "cpu", "auto", ["0", "1"]):
        assert check(device=device).config.device == device
    assert check(device=0).config.device == [0]


@pytest.mark.parametrize(
    "values",
    [PUBLISHED, {"model_name": "sdlora", "lora_rank_schedule": [[4, 8], [8, 6]]}],
    ids=("sema", "sdlora"),
)
def test_resolved_config_survives_json_is_frozen_and_needs_no_notes(values: dict[str, Any]) -> None:
    config = check(**values).config
    again = config_from_dict(json.loads(json.dumps(config.model_dump())), SCHEMAS, "config.json")
    assert again.config == config and again.notes == []
    with pytest.raises(ValueError, match="frozen"):
        config.init_cls = 5


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_every_key_is_described_and_no_legacy_key_shadows_one(schema: type[RunConfig]) -> None:
    assert all(field.description for field in schema.model_fields.values())
    assert not schema.legacy_keys.keys() & schema.model_fields.keys()


# ----------------------------------------------------------------------------------------------------------
# Mistakes


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    values = {
        "nested_lora_rnk": 8, "rd_lr": "0.01", "optimizer": "sdg", "init_cls": 120, "adapt_start_layer": 12,
        "nested_lora_rank": 0, "seed": [], "device": "cudda", "increment": True, "adapt_end_layer": 10,
    }  # fmt: skip
    path = write(tmp_path, values)
    found = problems_of(path, "detect_batch_size=1", "nonsense")
    told = [
        ("--set nonsense", "allowed: --set key=value"),
        ("nested_lora_rnk = 8", "did you mean nested_lora_rank?"),
        ('rd_lr = "0.01"', "write 0.01 without quotes; allowed: a number > 0 and < 1000"),
        ('optimizer = "sdg"', 'did you mean "sgd"?; allowed: "sgd", "adam"'),
        ("nested_lora_rank = 0", "too small; allowed: an integer >= 1 and <= 4096"),
        ("seed = []", "empty; allowed: an integer from 0"),
        ("increment = true", "a wrong type (a boolean)"),
        ("detect_batch_size = 1 (--set)", "too small"),
        ('init_cls = 120, dataset = "cifar224" (default)', "allowed: init_cls from 1 to 100"),
        ('device = "cudda": names no device', 'allowed: "auto", "cpu"'),
        ("adapt_start_layer = 12, adapt_end_layer = 10", "allowed: adapt_start_layer <= adapt_end_layer"),
        ("adapt_start_layer = 12, backbone_type", "12 blocks; allowed: blocks from 0 to 11"),
    ]
    assert len(found) == len(told)
    for start, words in told:
        assert any(line.startswith(start) and words in line for line in found), (start, found)
    with pytest.raises(ConfigError, match=f"{path}: 12 problems\n  - "):
        load_config(path, ["detect_batch_size=1", "nonsense"], SCHEMAS)


def test_few_class_folders_are_told_as_what_they_are(tmp_path):
    write_folder(tmp_path, "single", ["ant"])
    (tmp_path / "empty").mkdir()
    for name, told in (("empty", ["has no class; a folder needs"]), ("single", ["has 1 class;"] * 2)):
        found = problems(model_name="ranpac", dataset=str(tmp_path / name), test_share=0.2)
        assert len(found) == len(told)
        assert all(words in line for line, words in zip(found, told, strict=True)), found


def test_an_unknown_method_does_not_keep_the_rest_from_being_checked() -> None:
    near = problems(model_name="semma", rd_dim=0, nested_lora_rnk=8)
    assert [line.split(" = ")[0] for line in near] == ["model_name", "rd_dim", "nested_lora_rnk"]
    far = problems(model_name="qqqq", rd_dim=8, increment=0, init_cls=300)
    assert [line.split(" = ")[0] for line in far] == ["model_name", "increment", "init_cls"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{\n  "rd_dim": 8,\n  "rd_lr" 0.1\n}', 'line 3, column 11: Expecting.*reads: "rd_lr" 0.1'),
        ('{"rd_dim": 8,\n', "line 2, column 1: "),
        ('{\n  "rd_dim": 8  // was 16\n}', 'line 2, column 16: .*comments.*reads: "rd_dim": 8  // was 16'),
        ('{"rd_dim": 8,  // was 16\n "rd_lr": 1}', "comments"),
        ('// was 16\n"rd_dim": 8', "comments"),
        ("", "line 1, column 1: "),
        ("[1]", "holds a list; allowed: one JSON object"),
        ('{"rd_lr": NaN}', "NaN is not a JSON number"),
        (b'{"prefix": "\xe9"}', "not valid JSON"),
        ('{"rd_dim": 8, "rd_dim": 9}', "rd_dim: written twice, as 8 and 9"),
        (None, "cannot be read"),
    ],
    ids=str,
)
def test_a_file_that_is_no_config_is_told_with_the_overrides_faults(
    tmp_path: Path, text: str | bytes | None, told: str
) -> None:
    path = tmp_path / "config.json"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(path, ["rd_dim=0"], SCHEMAS)
    assert "rd_dim = 0 (--set): too small" in caught.value.problems[-1] and len(caught.value.problems) == 2


def test_a_missing_file_names_the_one_in_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    path = write(tmp_path, '{"rd_dim": 8}', "published/sema_inr_5task.json")
    (line,) = problems_of(tmp_path / "sema_inr_5task.json")
    write(tmp_path, "{}", "sema_inr_10task.json")
    assert f"did you mean {path}?" in line and [line] == problems_of(tmp_path / "sema_inr_5task.json")


def test_the_keys_of_an_unknown_method_are_checked_as_those_of_the_one_it_means(tmp_path: Path) -> None:
    lines = problems_of(write(tmp_path, {"model_name": "nested-lora", "nested_lora_rank": 0, "qqqq": 1}))
    assert any("nested_lora_rank = 0" in line for line in lines)
    assert any("--method sema" in line for line in lines)


@pytest.mark.parametrize("asked", ["methods/sema_cifar.json", "Sema_Cifar.json", "sema_cifar"])
def test_a_missing_file_names_the_one_above_or_in_other_letters(tmp_path: Path, asked: str) -> None:
    (tmp_path / "methods").mkdir()
    write(tmp_path, "{}", "methods/slca_cifar.json")
    path = write(tmp_path, "{}", "sema_cifar.json")
    (line,) = problems_of(tmp_path / asked)
    assert f"did you mean {path}?" in line


def test_a_missing_file_names_the_nearest_and_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff{"rd_dim": 8}', "sema_cifar.json")
    (line,) = problems_of(tmp_path / "sema_cifr.json")
    assert f"did you mean {path}?" in line and load_config(path, [], SCHEMAS).config.rd_dim == 8


# ----------------------------------------------------------------------------------------------------------
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
    found = problems_of(write(tmp_path, {"base": "root.json", "rd_lr": -1}))
    assert {line.split(":")[0] for line in found} == {"rd_lr = -1", f"rd_dim = 0 (from {base})"}


def test_a_base_that_is_not_there_is_told_to_be_a_path_from_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"base": "exps/smoke.json"})
    assert any(
        f"a path from {path}" in problem and "does not exist" in problem for problem in problems_of(path)
    )


@pytest.mark.parametrize(
    "base",
    ["config.json", "again.json", "gone.json", 3, None, "a\0b", "\ud800", "b" * 300, "a/" * 3000, ".", ""],
    ids=repr,
)
def test_bad_base_is_told_with_the_file_s_own_faults(tmp_path: Path, base: Any) -> None:
    path = write(tmp_path, {"base": base, "rd_dim": 0, "init_cls": 300})
    write(tmp_path, {"base": "config.json"}, "again.json")
    first, second = problems_of(path)  # no conflicts: what the base would have said is unknown
    assert first.startswith("base = ") and second.startswith("rd_dim = 0: ")


def test_overrides_are_json_or_text_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, {"nested_lora_rank": 16, "max_tasks": 3})
    given = ["nested_lora_rank=4", "nested_lora_rank=8", "max_tasks=null", "description=a=b", "seed=[1,2]"]
    loaded = load_config(path, [*given, "optimizer=adam"], SCHEMAS)
    config = loaded.config
    assert (config.nested_lora_rank, config.max_tasks, config.description) == (8, None, "a=b")
    assert config.optimizer == "adam" and len(loaded.configs) == 2


@pytest.mark.parametrize(
    ("override", "start", "words"),
    [
        ("base=x.json", "--set base=x.json", "named in a file"),
        ("=3", "--set =3", "no key and value"),
        ("shuffle=True", 'shuffle = "True" (--set)', "write true without quotes"),
        ("rd_dimm=3", "rd_dimm = 3 (--set)", "did you mean rd_dim?"),
        ("\ud800=1", "", ""),
        ("rd_dim=\ud800", "rd_dim", ""),
        ("\udcff", "--set", ""),
        ("rd_dim=1e999", "rd_dim", ""),
        ("rd_dim=" + "9" * 5000, "rd_dim", ""),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_override_mistakes(tmp_path: Path, override: str, start: str, words: str) -> None:
    (line,) = problems_of(write(tmp_path, {}), override)
    assert line.startswith(start) and words in line


def test_null_takes_an_inherited_key_back_to_its_default(tmp_path: Path) -> None:
    base = write(tmp_path, {"rd_dim": 8, "max_tasks": 3, "min_lr": 0.001, "exp_threshold": 5}, "base.json")
    write(tmp_path, {"base": "base.json", "rd_dim": None, "exp_threshold": None}, "mid.json")
    top = {"base": "mid.json", "max_tasks": None, "min_lr": None, "exp_threshold": 4}
    config = load_config(write(tmp_path, top, "top.json"), ["device=cpu"], SCHEMAS).config
    assert (config.rd_dim, config.max_tasks, config.exp_threshold) == (128, None, 4.0)
    assert config.min_lr == 1e-8  # null is a value of its own
    assert not {"rd_dim", "max_tasks"} & config.model_fields_set
    assert load_config(base, ["rd_dim=null"], SCHEMAS).config.rd_dim == 128


def test_null_takes_back_a_key_that_the_method_of_the_child_has_not(tmp_path: Path) -> None:
    write(tmp_path, {"model_name": "sema", "rd_dim": 8}, "base.json")
    top = write(tmp_path, {"base": "base.json", "model_name": "finetune", "rd_dim": None})
    assert load_config(top, [], SCHEMAS).config.model_name == "finetune"
    first = write(tmp_path, {"base": "config.json", "model_name": None}, "first.json")
    assert load_config(first, [], SCHEMAS).config.model_name == next(iter(SCHEMAS))
    (line,) = problems_of(write(tmp_path, {"base": "base.json", "buffer_size": None}))
    assert "buffer_size = null: a wrong type" in line  # not inherited


# ----------------------------------------------------------------------------------------------------------
# Notes

CONSOLIDATION = {"nested_lora_use_consolidation": True, "nested_lora_reset": "lora"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nested_lora_lr_fast": 0.1}, 'nested_lora_lr_fast (ffn_adapter_type is "adaptmlp")'),
        ({"model_name": "simplecil", "batch_size": 8}, "batch_size (nothing is trained)"),
        ({"model_name": "ranpac", "head": "ranpac"}, "head (the ridge regression classifies)"),
        ({"ffn_adapter_scalar": "0.1"}, "ffn_adapter_scalar = 0.1 is applied here"),
        (NESTED | CONSOLIDATION | {"nested_lora_reset": "zeros"}, 'nested_lora_reset = "zeros"'),
        (
            NESTED
            | CONSOLIDATION
            | {"nested_lora_consolidation": "interpolate", "nested_lora_reset": "aligned"},
            "nested_lora_lr_slow = 0",
        ),
        (NESTED, None),
        (NESTED | CONSOLIDATION, None),
    ],
    ids=str,
)
def test_keys_without_effect_and_departures_are_noted(values: dict[str, Any], words: str | None) -> None:
    notes = check(**values).notes
    assert notes == [] if words is None else len(notes) == 1 and words in notes[0]


ONE_CLASS = {"init_cls": 1, "increment": 1}  # of 100
ALL_OF_THEM = "task 0, 1, 2, ... of 0 to 99"


@pytest.mark.parametrize(
    ("changes", "which", "words"),
    [
        ({"model_name": "sema"}, ALL_OF_THEM, ["cosine", "ranpac"]),
        ({"model_name": "finetune", "head": "cosine"}, ALL_OF_THEM, ["cosine"]),
        ({"model_name": "sdlora"}, ALL_OF_THEM, ["cosine", "ranpac"]),
        ({"model_name": "inflora"}, ALL_OF_THEM, ["cosine", "ranpac"]),
        ({"model_name": "coda_prompt"}, ALL_OF_THEM, ["cosine", "ranpac"]),
        ({"model_name": "ease"}, ALL_OF_THEM, ["ease tells such classes apart"]),
        ({"model_name": "moal"}, ALL_OF_THEM, ["moal tells such classes apart"]),
        ({"model_name": "aper"}, "task 0 of 0 to 99", ["aper tells such classes apart"]),
        ({"model_name": "ranpac", "first_session": True}, "task 0 of 0 to 99", ["ranpac"]),
        ({"model_name": "sema", "increment": 3}, "task 0 of 0 to 33", ["cosine", "ranpac"]),
        ({"model_name": "sdlora", "init_cls": 3, "increment": 3}, "task 33 of 0 to 33", ["cosine", "ranpac"]),
        ({"model_name": "ranpac"}, None, []),
        ({"model_name": "simplecil"}, None, []),
        ({"model_name": "sema", "init_cls": 3, "increment": 3, "max_tasks": 3}, None, []),
    ],
    ids=str,
)
def test_tasks_of_one_class_are_told_once_with_the_heads_that_work(
    changes: dict[str, Any], which: str | None, words: list[str]
) -> None:
    notes = [note for note in check(**ONE_CLASS | changes).notes if "one class" in note]
    assert len(notes) == (which is not None)
    for note in notes:
        assert which in note and "teaches nothing" in note and all(word in note for word in words)


def test_tasks_of_one_class_are_counted_in_the_data(tmp_path: Path) -> None:
    arrays = {f"{name}_{source}": np.zeros(3, np.uint8) for name in "xy" for source in ("train", "test")}
    np.savez(tmp_path / "mine.npz", **arrays, class_names=np.array(["a", "b", "c"]))
    (note,) = check(dataset="mine.npz", data_root=str(tmp_path), init_cls=2, increment=2).notes
    assert "task 1 of 0 to 1 brings one class" in note


def test_what_pytorch_or_timm_must_be_asked_comes_when_the_rest_is_right(tmp_path: Path) -> None:
    path = write(tmp_path, {"backbone_type": "vit_base_patch16_22", "device": "cuda:99"})
    with pytest.raises(
        ConfigError, match="1 problem \\(backbone_type and device not looked at yet\\)"
    ) as caught:
        load_config(path, ["batch_size=0"], SCHEMAS)
    assert len(caught.value.problems) == 1
    told = problems_of(path)
    assert len(told) == 2 and "not known" in told[1] and "CUDA" in told[0]
