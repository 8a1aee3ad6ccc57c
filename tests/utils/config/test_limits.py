"""What every key of every method allows: limits on both sides, text of paths, keys that fit each other.

Thousands of spoiled configurations are loaded: each is accepted or answered with a sentence.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models import SCHEMAS
from models.saved.learner import make_learner
from models.vit import pretrained as factory
from models.vit import weights
from tests.conftest import ROOT, TINY, TINY_GRIDS, TINY_SDLORA, shipped_file
from trainer import train
from utils.config.loading import ConfigError, LoadedConfig, config_from_dict, load_config
from utils.config.messages import nearest_key
from utils.errors import UserError
from utils.sweeps.spec import SweepFile

SMOKE = json.loads((ROOT / "exps/smoke.json").read_text(encoding="utf-8"))
PRIMITIVES = SCHEMAS["shared_subspace"].model_fields["primitives"].default
NO_DEVICES = ["gpu", "cuda:x", "cuda:-1", -2, "tpu:0", ["a"], ["cuda"], "²", ["²"], [], [1.5], None, True]
WHOLE = {"init_cls": 8, "increment": 8}  # all classes of the generated data in one task


def tiny(method: str) -> dict[str, Any]:
    """A tiny configuration of a method."""
    if method == "sdlora":
        return TINY_SDLORA | {"lambda_sparsity": 0.1}
    if method == "shared_subspace":
        return TINY_GRIDS
    own = SCHEMAS[method].model_fields
    values = SMOKE | TINY | (WHOLE if method in ("joint", "linear_probe") else {})
    return {key: value for key, value in values.items() if key in own} | {"model_name": method}


def check(method: str, **values: Any) -> LoadedConfig:
    return config_from_dict(tiny(method) | values, SCHEMAS, "test")


def problem(method: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(method, **values)
    (line,) = caught.value.problems
    return line


def numbers(schema: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, JSON schema) of every number in a JSON schema, at any depth."""
    if isinstance(schema, list):
        for option in schema:
            yield from numbers(option, name)
    elif isinstance(schema, dict):
        if schema.get("type") in ("integer", "number") and "enum" not in schema:
            yield name, schema
        for part in ("anyOf", "items", "additionalProperties"):
            yield from numbers(schema.get(part), name)
        for key, value in schema.get("properties", {}).items():
            yield from numbers(value, f"{name}.{key}" if name else key)


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), SweepFile], ids=lambda schema: schema.__name__)
def test_every_number_has_limits_on_both_sides_finite_in_single_precision(schema: Any) -> None:
    found = list(numbers(schema.model_json_schema()))
    lower, upper = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
    open_ended = {key for key, number in found if not lower & number.keys() or not upper & number.keys()}
    weights = {"alpha", "beta", "gamma"} & schema.model_fields.keys()  # their rule is not in the JSON schema
    weights = weights if len(weights) == 3 else set()
    assert len(found) > 1 and open_ended == weights
    limits = [number[limit] for _, number in found for limit in (lower | upper) & number.keys()]
    assert all(abs(limit) < 2**127 for limit in limits)
    for key in weights:
        for value in (-1, 1e7, [[0, 1e300]], [[0, -1]]):
            assert "allowed: a number from 0 to 1000000" in problem("shared_subspace", **{key: value})


NO_RATE = {"ffn_adapter_type": "adaptmlp", "adapter_lr": 0}
NO_RATES = {"ffn_adapter_type": "nested_lora", "nested_lora_lr_fast": 0, "nested_lora_lr_slow": 0}
NOT_ALLOWED: list[tuple[str, dict[str, Any], str]] = [
    ("sema", {"shuffle": 1}, "a wrong type (an integer); allowed: true or false"),
    ("sema", {"func_epoch": 2.5}, "(a decimal number); allowed: an integer >= 0 and <= 1000000"),
    ("sema", {"init_lr": True}, "a wrong type (a boolean)"),
    ("sema", {"init_lr": None}, "a wrong type (null)"),
    ("sema", {"prefix": 3}, "a wrong type (an integer); allowed: a name without / and \\"),
    ("sema", {"prefix": "a/b"}, "cannot be part of a folder's name"),
    ("sema", {"dataset": ""}, "empty; allowed: non-empty text in double quotes"),
    ("sema", {"max_tasks": 0}, "too small; allowed: an integer >= 1 and <= 1000000 or null"),
    ("sema", {"ffn_adapter_scalar": "big"}, "a wrong type (text); allowed: a number >= -1000 and <= 1000"),
    ("sema", {"ffn_adapter_scalar": 0}, "adapters would add nothing"),
    ("sema", {"nested_lora_consolidation_alpha": 2}, "too large; allowed: a number >= 0 and <= 1"),
    ("sema", {"min_lr": -1}, "allowed: a number >= 0 and < 1000, or null for 1e-8"),
    ("sema", {"rd_lr": math.inf}, "not a finite number"),
    ("sema", {"seed": [1, -2]}, "item 2 (-2) is too small"),
    ("sema", {"seed": [3, 3]}, "holds 3 more than once"),
    ("sema", {"seed": [True]}, "item 1 (true) is a wrong type"),
    *[("sema", {"device": none}, 'names no device; allowed: "auto"') for none in NO_DEVICES],
    ("sema", {"backbone_type": "vit_bse_patch16_224"}, "vit_base_patch16_224"),
    ("sema", {"backbone_type": "vit_base_patch16_224", "image_size": 230}, "a multiple of 16, such as 224"),
    ("sema", {"weights": "nowhere.safetensors"}, 'it is not there; allowed: null, "random"'),
    ("sema", {"model_name": "semma"}, 'did you mean "sema"?; allowed: "sema", "finetune", "ranpac"'),
    ("sema", {"model_name": "nothing"}, ", ".join(f'"{method}"' for method in SCHEMAS)),
    ("sema", {"model_name": "nested_lora"}, "did you mean sema with ffn_adapter_type=nested_lora?"),
    ("sema", {"model_name": "Nested LoRA"}, "did you mean sema with ffn_adapter_type=nested_lora?"),
    ("sema", {"model_name": "Gumbel_CL_LoRA"}, "did you mean sdlora with lambda_sparsity=0.01?"),
    ("sema", {"qqqq": 8}, "unknown key; python main.py --list keys --method sema lists the keys"),
    ("sema", {"batch_size": 10**6 + 1}, "too large; allowed: an integer >= 1 and <= 1000000"),
    ("sema", {"func_epoch": 10**400}, "too large; allowed: an integer >= 0"),
    ("sdlora", {"gumbel_tau_final": 1e-7}, "too small; allowed: a number >= 1e-06"),
    ("sdlora", {"milestones": [0]}, "item 1 (0) is too small; allowed: a list, each item an integer >= 1"),
    ("sdlora", {"lora_rank_schedule": [[4, 8], [4, 6]]}, "not in ascending order; allowed: a list of ["),
    ("sdlora", {"lora_rank_schedule": [[4]]}, "no [task, rank]; allowed: "),
    ("sdlora", {"lora_rank_schedule": [[0, 8]]}, "item 1 (0) is too small"),
    ("sdlora", {"lora_rank_schedule": [4, 8]}, "item 1 (4) is a wrong type (an integer)"),
    ("sdlora", {"rd_dim": 8}, 'not a key of model_name "sdlora"; it belongs to "sema"'),
    ("finetune", {"scheduler": "steplr"}, 'not a key of model_name "finetune"; it belongs to "sdlora"'),
    ("shared_subspace", {"patch": "4"}, "write 4 without quotes; allowed: 1, 2, 4"),
    ("shared_subspace", {"patch": "four"}, "not a choice; allowed: 1, 2, 4"),
    ("shared_subspace", {"primitives": ["rotate"]}, "too few items; allowed: a list of at least two"),
    ("sema", {"logs_root": "a\0b"}, "holds a NUL character"),
    ("sema", {"description": "a\0b"}, "holds a NUL character"),
    ("sema", {"description": "\ud800"}, "half a surrogate pair"),
    ("sema", {"prefix": "\ud800"}, "half a surrogate pair"),
    ("sema", {"dataset": "\udcff.npz"}, "half a surrogate pair"),
    ("sema", {"data_root": "d" * 256}, "holds a name of 256 bytes; file systems take 255"),
    ("sema", {"cache_root": "é" * 128}, "holds a name of 256 bytes"),
    ("sdlora", {"filepath": "/".join(["f" * 200] * 20)}, "longer than the 3840 bytes"),
    ("sema", {"prefix": "p" * 226}, "its longest name 240"),
    ("finetune", {"grad_accumulation": 9}, "allowed: from 1 to 8"),
    ("finetune", {"head": "fecam", "alpha1": 0.5}, "allowed: alpha2 from 0 to 0.5"),
    ("finetune", {"min_lr": 0.5}, "allowed: min_lr from 0 to 0.001"),
    ("sema", {"nested_lora_lr_slow": 0, "min_lr": 0.006}, "allowed: min_lr from 0 to 0.005"),
    ("sdlora", {"min_lr": 0.06}, "allowed: min_lr from 0 to 0.05"),
    ("sdlora", {"gumbel_tau_init": 0.1}, "allowed: gumbel_tau_init >= gumbel_tau_final"),
    ("sdlora", {"lora_rank": 65}, "tokens have width 64; allowed: at most 64"),
    ("sdlora", {"lora_rank_schedule": [[1, 65]]}, "tokens have width 64; allowed: at most 64"),
    ("shared_subspace", {"min_lr": 0.1}, "allowed: min_lr from 0 to 0.001"),
    ("sema", {"nested_lora_rank": 65}, "tokens have width 64; allowed: at most 64"),
    ("sema", {"ffn_adapter_type": "adaptmlp", "ffn_num": 129}, "tokens have width 64; allowed: at most 128"),
    ("shared_subspace", {"few_shot_rank": 13}, "h has 12 dimensions; allowed: from 1 to 12"),
    ("shared_subspace", {"steps_per_epoch": 10**6, "batch_size": 24}, "allowed: at most 20000000"),
    (
        "shared_subspace",
        {"primitives": PRIMITIVES, "test_length": 7},
        "of length 7; allowed: at most 1000000",
    ),
    ("shared_subspace", {"primitives": ["rotate", "spin", "fall"]}, "no such primitive: spin"),
    ("shared_subspace", {"primitives": ["rotate", "fall", "fall"]}, "holds fall more than once"),
    ("shared_subspace", {"test_length": 6}, "there are 5; allowed: lengths from 1 to 5"),
    ("shared_subspace", {"train_lengths": [1, 9]}, "lengths from 1 to 5"),
    ("shared_subspace", {"train_lengths": [1, 1]}, "holds 1 more than once"),
    ("shared_subspace", {"test_length": 2}, "not be unseen"),
    ("shared_subspace", {"held_out_pairs": 11}, "5 primitives make 10 pairs; allowed: from 1 to 10"),
    ("shared_subspace", {"train_lengths": [2], "held_out_pairs": 10}, "allowed: from 1 to 9"),
    ("shared_subspace", {"train_lengths": [3], "test_length": 1, "held_out_pairs": 4}, "from 1 to 3"),
    ("shared_subspace", {"train_lengths": [5], "held_out_pairs": 1}, "allowed: more primitives"),
    ("shared_subspace", {"sharing_rank": 4}, "sharing_rank below group_size"),
    ("shared_subspace", {"batch_size": 10}, "whole groups"),
    ("shared_subspace", {"batch_size": 4}, "at least two"),
    ("shared_subspace", {"alpha": 0, "grad_accumulation": 4}, "from 1 to 3"),
    ("shared_subspace", {"grad_accumulation": 2}, "two groups at least"),
    ("shared_subspace", {"heads": 3}, "heads divides"),
    ("shared_subspace", {"few_shot_tasks": 11}, "from 0 to 10"),
    ("shared_subspace", {"alpha": [[0.5, 1], [0.2, 0]]}, "ascending"),
    ("shared_subspace", {"gamma": "much"}, "a number from 0"),
    ("joint", {"init_cls": 2}, "joint learns all classes at once; allowed: init_cls = 8"),
    ("linear_probe", {"init_cls": 2}, "linear_probe learns all classes at once; allowed: init_cls = 8"),
    ("ranpac", {"first_session": True} | NO_RATE, "allowed: a rate above 0"),
    *[(method, NO_RATE, "allowed: a rate above 0") for method in ("sema", "finetune", "joint")],
    *[(method, NO_RATES, "allowed: a rate above 0") for method in ("sema", "finetune", "joint")],
]


@pytest.mark.parametrize(
    ("method", "values", "told"),
    NOT_ALLOWED,
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_allowed_is_one_sentence_that_says_what_is(
    method: str, values: dict[str, Any], told: str
) -> None:
    line = problem(method, **values)
    assert told in line and any(key in line for key in values) and len(line) < 400


def test_weights_that_are_no_file_are_named_before_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.pth")
    for path, told in (("pipe.pth", "it is a FIFO"), (".", "it is a folder")):
        assert f'"{path}": {told}; allowed: null, "random"' in problem("sema", weights=path)


def test_paths_that_the_locale_cannot_write_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("ascii"))  # as with LC_ALL=C PYTHONUTF8=0
    for values in ({"prefix": "é"}, {"logs_root": "é"}, {"cache_root": "é"}):
        line = problem("sema", **values)
        assert "holds 'é', which no path has in this locale (ascii)" in line and "PYTHONUTF8=1" in line
    check("sema", description="é")


SPOILED: list[Any] = [
    0, -1, -2, 2**31, 2**63, 10**30, 10**400, 1e-320, 1e-30, 0.5, 999.0, 1e38, 1e39, 1e300, math.nan,
    math.inf, -math.inf, True, None, "", "4", "nan", "\0", "\ud800", "²", "cuda:99", "~", "~nobody/x", ".",
    "/", "é\u0301", "\x1b[31m", "x" * 300, "a/" * 3000, "a.npz", [], [True], ["-2"], [-2], ["²"], [[]],
    [[0, 1e300]], [[10**9, 1]], [10**400], {}, {"a": 1}, ["rotate", "x\0"],
]  # fmt: skip


@pytest.mark.parametrize("method", ["sema", "ranpac", "sdlora", "shared_subspace"])
def test_a_spoiled_configuration_is_accepted_or_answered(method: str, tmp_path: Path) -> None:
    """Every key with every value; what is accepted has a run folder whose names a file system takes."""
    values, answered = tiny(method), 0
    for key in [*SCHEMAS[method].model_fields, *SCHEMAS[method].legacy_keys, "no_such_key"]:
        for value in [*SPOILED, str(tmp_path), __file__]:
            try:
                config = config_from_dict(values | {key: value}, SCHEMAS, "test").config
            except ConfigError as error:
                str(error).encode()
                answered += 1
            else:
                names = config.folder_names(config.seed)
                assert all(len(os.fsencode(name)) < 240 and "\0" not in name for name in names)
    assert answered > 500


def test_what_a_method_does_not_use_is_not_refused() -> None:
    """RanPAC without a first session has no adapters and trains nothing; a constant rate ends nowhere."""
    blocks = {"adapt_start_layer": 50, "adapt_end_layer": 40}
    unused = {**blocks, "nested_lora_rank": 4096, "ffn_num": 8192, "min_lr": 1, "grad_accumulation": 100}
    assert check("ranpac", first_session=False, **unused)
    with pytest.raises(ConfigError) as caught:
        whole = {"first_session": True, "adapter_blocks": "growing", "backbone_type": "vit_base_patch16_224"}
        check("ranpac", **whole, **unused)
    assert len(caught.value.problems) >= 4
    shallow = {"backbone_type": "test_vit", "adapt_end_layer": 11}  # of 6 blocks
    assert check("finetune", **shallow)
    assert "the backbone has 6 blocks" in problem("finetune", adapter_blocks="growing", **shallow)
    assert check("simplecil", grad_accumulation=100)
    assert check("sdlora", scheduler="constant", min_lr=10)
    assert check("sdlora", epochs=0, lrate=0.001, min_lr=0.01)
    assert check("sema", rd_epoch=0, rd_lr=0.0001, min_lr=0.001)
    assert check("finetune", func_epoch=0, adapter_lr=0.0001, min_lr=0.001, grad_accumulation=100)
    assert check("shared_subspace", few_shot_tasks=0, few_shot_steps=1)
    assert check("sema", ffn_adapter_type="nested_lora", ffn_num=8192)


def test_the_method_that_needs_all_classes_tells_of_unknown_data_with_the_rest() -> None:
    with pytest.raises(ConfigError) as caught:
        check("joint", dataset="cifra100", batch_size=0)
    assert [line.split(" ")[0] for line in caught.value.problems] == ["batch_size", "dataset"]


def test_the_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.json").write_text(json.dumps(tiny("sdlora") | {"batch_size": 5}), encoding="utf-8")
    (tmp_path / "w.pth").touch()
    paths = {key: "~/x" for key in ("logs_root", "data_root", "weights_root", "cache_root", "filepath")}
    values = {"base": "~/base.json", **paths, "weights": "~/w.pth", "dataset": "~/d.npz"}
    (tmp_path / "own.json").write_text(json.dumps(values), encoding="utf-8")
    config = load_config("~/own.json", [], SCHEMAS).config
    files = (f"{tmp_path}/w.pth", f"{tmp_path}/d.npz")
    assert config.batch_size == 5 and (config.weights, config.dataset) == files
    assert {getattr(config, key) for key in paths} == {f"{tmp_path}/x"}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("nested_lora_fast_lr", "nested_lora_lr_fast"),
        ("nested_lora_consolidate", "nested_lora_consolidation"),
        ("Batch-Size", "batch_size"),
        ("batchsize", "batch_size"),
        ("learning_rate", "init_lr"),
        ("epoch_func", "func_epoch"),
        ("threshold", "exp_threshold"),
    ],
)
def test_the_nearest_key(name: str, key: str) -> None:
    schema = SCHEMAS["sema"]
    assert nearest_key(name, schema.model_fields, schema.known_as) == key


def test_missing_data_and_weights_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the files to run instead, which are shipped, need what is said, and keep the images small."""

    def unreachable() -> None:
        raise OSError("no way to the hub")

    monkeypatch.setattr(weights, "require_hub", unreachable)
    absent = {"dataset": "imagenetr", "backbone_type": "vit_tiny_patch16_224.augreg_in21k", "weights": None}
    config = check("sema", **absent, data_root=str(tmp_path), weights_root=str(tmp_path)).config
    with pytest.raises(UserError) as caught:
        make_learner(config)
    told = str(caught.value)
    assert "imagenetr" in told and "vit_tiny_patch16_224.augreg_in21k.safetensors" in told
    assert list(tmp_path.iterdir()) == []
    for name in ("sema_growth_demo", "smoke", "nested_lora_cifar_dinov2s"):
        assert str(shipped_file(name).relative_to(ROOT)) in told
        config = load_config(shipped_file(name), [], SCHEMAS).config
        factory.find_weights(config.backbone_type, weights=config.weights, weights_root=tmp_path)
        assert config.image_size is not None and config.image_size <= 224


@pytest.mark.parametrize(
    ("method", "values", "told"),
    [
        ("shared_subspace", {"init_lr": 999.0, "few_shot_tasks": 0}, "not finite"),
        ("sdlora", {"weight_decay": 999.0, "max_tasks": 2}, "loss of task 1.* not finite"),
    ],
)
def test_a_run_at_the_limits_that_diverges_ends_in_a_sentence(
    method: str, values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Not inside the mathematics: sparse weights and subspaces of what is no number are no numbers."""
    roots = {key: str(tmp_path) for key in {"logs_root", "cache_root"} & SCHEMAS[method].model_fields.keys()}
    with pytest.raises(UserError, match=told):
        train(check(method, **values, **roots).config)
