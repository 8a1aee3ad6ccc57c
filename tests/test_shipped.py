"""The files in exps/: which are there, their values, that every key of theirs counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from models import SCHEMAS
from tests.conftest import EXPS, ROOT, SWEEPS, shipped_file
from utils.config.loading import load_config
from utils.config.schema import RunConfig
from utils.sweeps.spec import load_sweep

DATA = ("cifar", "cifar_dinov2s", "inr_10task")
BASELINES = ("simplecil", "ranpac", "linear_probe", "finetune", "joint", "sema_always", "sema_never")
DINOV2S = {"backbone_type", "image_size", "input_normalization", "precision"}


def shipped(name: str, *overrides: str) -> RunConfig:
    return load_config(shipped_file(name), overrides, SCHEMAS).config


def differing(first: RunConfig, second: RunConfig) -> set[str]:
    """Keys that are not the same in both, or that only one method has."""
    ours, theirs = first.model_dump(), second.model_dump()
    keys = ours.keys() | theirs.keys()
    return {key for key in keys if ours.get(key) != theirs.get(key)} - {"description", "prefix"}


def test_every_promised_config_is_shipped() -> None:
    kinds = ("nested_lora", "baseline_sema", "nested_mean", "matched_adapter")
    ours = {f"{kind}_{name}" for kind in kinds for name in DATA}
    sema = {"sema_cifar", "sema_inr_5task", "sema_inr_10task", "sema_inr_20tasks", "sema_ina", "sema_vtab"}
    baselines = {
        f"{kind}_{name}" for kind in BASELINES for name in ("cifar", "cifar_dinov2s", "inr", "ina", "vtab")
    }
    others = {"smoke", "sema_growth_demo", "debug_nested_lora", "shared_subspace", "shared_subspace_small"}
    assert ours | sema | baselines | others <= {path.stem for path in EXPS}


# ----------------------------------------------------------------------------------------------------------
# Values

SPECIFIED = {
    "model_name": "sema", "expansion": "novelty", "head": "fc",
    "rd_epoch": 20, "init_lr": 0.005, "rd_lr": 0.01, "batch_size": 32, "optimizer": "sgd",
    "weight_decay": 0.0005,
    "exp_threshold": 2.0, "adapter_blocks": "all", "adapt_start_layer": 9, "adapt_end_layer": 11,
    "ffn_adapter_type": "nested_lora", "nested_lora_rank": 16,
    "nested_lora_lr_fast": 0.01, "nested_lora_lr_slow": 0.001, "nested_lora_update_interval_slow": 5,
    "nested_lora_slow_grad": "discard", "nested_lora_freeze": "task",
    "nested_lora_use_consolidation": False, "nested_lora_consolidation_alpha": 0.1,
}  # fmt: skip
SPECIFIED_FILES = {
    "nested_lora_cifar": {"dataset": "cifar224", "init_cls": 10, "increment": 10, "func_epoch": 5},
    "nested_lora_cifar_dinov2s": {"dataset": "cifar224", "init_cls": 10, "increment": 10, "func_epoch": 5},
    "nested_lora_inr_10task": {"dataset": "imagenetr", "init_cls": 20, "increment": 20, "func_epoch": 20},
    "debug_nested_lora": {"init_cls": 50, "increment": 50, "max_tasks": 1, "func_epoch": 1, "rd_epoch": 1},
}

PUBLISHED_SEMA = {
    "model_name": "sema", "expansion": "novelty", "seed": 1993,
    "backbone_type": "pretrained_vit_b16_224_adapter", "input_normalization": "none",
    "augmentation": "crop_flip",
    "func_epoch": 20, "rd_epoch": 20, "init_lr": 0.005, "rd_lr": 0.01,
    "batch_size": 32, "optimizer": "sgd", "weight_decay": 0.0005, "min_lr": 0.0,
    "ffn_adapter_type": "adaptmlp", "ffn_num": 16, "ffn_adapter_scalar": 1.0, "adapter_blocks": "all",
    "adapt_start_layer": 9, "adapt_end_layer": 11, "rd_dim": 128, "buffer_size": 500,
    "detect_batch_size": 128,
}  # fmt: skip
PUBLISHED_SDLORA = {
    "model_name": "sdlora", "gumbel_gate": "auto", "lambda_sparsity": 0.0, "lora_rank": 10,
    "sdlora_scaling": "reset",
    "backbone_type": "vit_base_patch16_224", "shuffle": True, "optimizer": "sgd", "batch_size": 128,
    "init_weight_decay": 0.0, "weight_decay": 0.0,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    name: PUBLISHED_SEMA
    | {"dataset": dataset, "shuffle": shuffle, "init_cls": classes, "increment": classes}
    | {"exp_threshold": threshold, "func_epoch": 5 if name == "sema_cifar" else 20}
    for name, dataset, shuffle, classes, threshold in [
        ("sema_cifar", "cifar224", True, 10, 2.0),
        ("sema_inr_5task", "imagenetr", True, 40, 2.0),
        ("sema_inr_10task", "imagenetr", True, 20, 2.0),
        ("sema_inr_20tasks", "imagenetr", True, 10, 2.0),
        ("sema_ina", "imageneta", False, 10, 1.0),
        ("sema_vtab", "vtab", False, 10, 1.0),
    ]
} | {
    name: PUBLISHED_SDLORA
    | {"dataset": dataset, "init_cls": classes, "increment": classes, "seed": seed, "scheduler": scheduler}
    | {"init_epoch": epochs, "epochs": epochs, "init_lr": first, "lrate": later}
    | {"init_milestones": steps, "milestones": steps, "init_lr_decay": decay, "lrate_decay": decay}
    for name, dataset, classes, seed, epochs, first, later, scheduler, steps, decay in [
        ("sdlora_inr", "imagenetr", 20, 1995, 20, 0.01, 0.01, "constant", [], 0.1),
        ("sdlora_ina", "imageneta", 20, 1993, 20, 0.01, 0.005, "steplr", [10, 15], 0.05),
        ("sdlora_domainnet", "domainnet", 69, 1993, 10, 0.02, 0.02, "steplr", [4, 6, 8], 0.005),
    ]
}  # as the published code trains; its lists of milestones go on to epoch 10000, and 0.1 is never used


@pytest.mark.parametrize("name", [*SPECIFIED_FILES, *PUBLISHED])
def test_files_that_carry_a_name_carry_its_values(name: str) -> None:
    expected = SPECIFIED | SPECIFIED_FILES[name] if name in SPECIFIED_FILES else PUBLISHED[name]
    config = shipped(name).model_dump()
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("data", ["ina", "vtab"])
@pytest.mark.parametrize("method", BASELINES)
def test_baselines_learn_the_classes_of_the_published_file_in_its_order(method: str, data: str) -> None:
    published, ours = shipped(f"sema_{data}"), shipped(f"{method}_{data}")
    assert (ours.dataset, ours.shuffle, ours.seed) == (published.dataset, published.shuffle, published.seed)
    classes = {"ina": 200, "vtab": 50}[data] if method in ("linear_probe", "joint") else published.init_cls
    assert ours.folder_names(0)[2:4] == ["0", str(classes)]  # equal tasks of so many classes


@pytest.mark.parametrize("data", DATA)
def test_baseline_differs_from_nested_in_the_adapter_alone(data: str) -> None:
    nested, baseline = shipped(f"nested_lora_{data}"), shipped(f"baseline_sema_{data}")
    changed = {key for key in differing(nested, baseline) if not key.startswith("nested_lora_")}
    assert changed == {"ffn_adapter_type", "ffn_num"} and baseline.ffn_num == 2 * nested.nested_lora_rank


@pytest.mark.parametrize("data", DATA)
def test_matched_adapter_differs_from_nested_mean_in_the_adapter_and_its_rate_alone(data: str) -> None:
    nested, matched = shipped(f"nested_mean_{data}"), shipped(f"matched_adapter_{data}")
    theirs = set(type(matched).model_fields)
    own = ("nested_lora_", "merge", "loss")  # keys that one of the two methods has
    changed = {key for key in differing(nested, matched) & theirs if not key.startswith(own)}
    assert changed == {"model_name", "ffn_adapter_type", "ffn_num", "adapter_lr"}
    assert matched.ffn_num == 2 * nested.nested_lora_rank


@pytest.mark.parametrize("kind", ["nested_lora", "baseline_sema", "nested_mean", "matched_adapter"])
def test_dinov2s_and_imagenet_r_are_the_same_experiment_on_other_weights_and_data(kind: str) -> None:
    cifar = shipped(f"{kind}_cifar")
    assert differing(cifar, shipped(f"{kind}_cifar_dinov2s")) == DINOV2S
    data = {"dataset", "init_cls", "increment", "func_epoch"}
    assert differing(cifar, shipped(f"{kind}_inr_10task")) == data


def test_gumbel_differs_from_sd_lora_in_the_gate_alone() -> None:
    changed = differing(shipped("sdlora_cifar_dinov2s"), shipped("gumbel_cifar_dinov2s"))
    assert changed == {"gumbel_gate", "lambda_sparsity", "gumbel_anneal_rate"}


@pytest.mark.parametrize("kind", ["nested_lora", "nested_mean"])
def test_a_nested_file_names_every_nested_key_that_counts(kind: str) -> None:
    written = json.loads(shipped_file(f"{kind}_cifar").read_text()).keys()
    nested = {key for key in SCHEMAS["sema"].model_fields if key.startswith("nested_lora_")}
    consolidation = {key for key in nested if "_consolidation" in key or key.endswith("_reset")}
    unused = {
        "nested_lora": consolidation - {"nested_lora_use_consolidation"},
        "nested_mean": {"nested_lora_update_interval_slow", "nested_lora_slow_grad"},
    }
    assert nested & written == nested - unused[kind]


# ----------------------------------------------------------------------------------------------------------
# No dead keys


@pytest.mark.parametrize("path", EXPS, ids=lambda path: path.stem)
def test_a_shipped_file_states_its_command_and_precision_and_every_key_counts(path: Path) -> None:
    """The same numbers come out on other hardware; your own photos are learned as fast as can be."""
    loaded = load_config(path, [], SCHEMAS)
    assert (loaded.config.precision == "auto") == (path.stem == "own_photos")
    description = loaded.config.description
    assert description.startswith(f"python main.py --config {path.relative_to(ROOT)} ")
    assert "expected" in description
    assert loaded.config.unused_keys() == {} and not any("no effect" in note for note in loaded.notes)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_cell_counts(path: Path) -> None:
    dead = {cell.name: cell.config.unused_keys() for cell in load_sweep(path, [], SCHEMAS).cells}
    assert not any(dead.values()), dead
