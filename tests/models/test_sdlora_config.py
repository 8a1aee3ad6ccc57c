"""Config of SD-LoRA: published files and the guide's load, shipped ones carry its values."""

import json
from pathlib import Path
from typing import Any

import pytest

from models import SCHEMAS
from tests.conftest import ROOT, TINY_SDLORA, shipped_file
from utils.config.loading import ConfigError, LoadedConfig, config_from_dict, load_config
from utils.config.schema import RunConfig

PUBLISHED_C100: dict[str, Any] = {
    "prefix": "reproduce", "dataset": "cifar224", "memory_size": 0, "memory_per_class": 0,
    "fixed_memory": False,
    "shuffle": True, "init_cls": 10, "increment": 10, "model_name": "sdlora",
    "backbone_type": "vit_base_patch16_224", "device": ["0"], "seed": [1993], "scheduler": "cosine",
    "min_lr": 0.005,
    "tuned_epoch": 20, "filepath": "./CF100/", "init_epoch": 20, "init_lr": 0.008,
    "init_milestones": [60, 120, 170], "init_lr_decay": 0.1, "init_weight_decay": 0.0005, "epochs": 20,
    "lrate": 0.008, "milestones": [40, 70], "lrate_decay": 0, "batch_size": 128, "weight_decay": 0.0002,
}  # fmt: skip
PUBLISHED_DOMAINNET: dict[str, Any] = PUBLISHED_C100 | {
    "dataset": "domainnet", "init_cls": 69, "increment": 69, "device": ["0", "1"], "optimizer": "adam",
    "scheduler": "steplr", "filepath": "./domainnet-verify/", "init_epoch": 10, "init_lr": 0.02,
    "init_milestones": [4, 6, 8, 10000], "init_lr_decay": 0.005, "init_weight_decay": 0.0,
    "milestones": [4, 6, 8, 10000], "lrate_decay": 0.005,
}  # fmt: skip
GUIDE: dict[str, Any] = {
    "prefix": "test", "dataset": "cifar224", "init_cls": 10, "increment": 10, "model_name": "sdlora",
    "backbone_type": "vit_base_patch16_224", "device": ["0"], "seed": [1993], "filepath": "./CF100_test/",
    "init_epoch": 2, "epochs": 2, "batch_size": 32, "init_lr": 8e-3, "lrate": 8e-3, "scheduler": "cosine",
    "min_lr": 5e-3, "gumbel_tau_init": 5.0, "gumbel_tau_final": 0.5, "gumbel_anneal_rate": 0.999,
    "lambda_sparsity": 0.01, "growth_threshold": 0.1,
}  # fmt: skip
NAMES = ("c100", "c100_test", "c100_baseline", "inr", "ina", "domainnet", "cifar_dinov2s")


def check(**values: Any) -> LoadedConfig:
    return config_from_dict(TINY_SDLORA | values, SCHEMAS, "test")


def shipped(name: str) -> RunConfig:
    return load_config(shipped_file(name), [], SCHEMAS).config


# ----------------------------------------------------------------------------------------------------------
# Files


def test_every_promised_config_is_shipped() -> None:
    gates = {name: shipped(f"sdlora_{name}").gate for name in NAMES}
    assert gates == {name: "global" if name in ("c100", "c100_test") else "off" for name in NAMES}


def test_a_published_file_is_sd_lora_and_one_line_says_what_has_no_effect() -> None:
    loaded = config_from_dict(PUBLISHED_C100, SCHEMAS, "published")
    assert loaded.config.gate == "off" and (loaded.config.lora_rank, loaded.config.optimizer) == (10, "sgd")
    own = {key: value for key, value in PUBLISHED_C100.items() if key not in SCHEMAS["sdlora"].legacy_keys}
    assert {key: getattr(loaded.config, key) for key in own} == own | {"seed": 1993}
    (note,) = loaded.notes
    for words in ("memory_size", "tuned_epoch (", 'lrate_decay (scheduler is "cosine")', "filepath (no"):
        assert words in note


def test_a_published_file_whose_optimizer_its_code_ignores_is_told() -> None:
    loaded = config_from_dict(PUBLISHED_DOMAINNET, SCHEMAS, "published")
    assert loaded.config.milestones == [4, 6, 8, 10000] and loaded.config.optimizer == "adam"
    first, second = loaded.notes
    assert "min_lr (scheduler is" in first and "milestones" not in first
    assert second.startswith('optimizer = "adam"') and "AdamW" in second and "SGD" in second


def test_the_guides_file_loads_as_printed_and_every_key_counts() -> None:
    loaded = config_from_dict(GUIDE, SCHEMAS, "guide")
    assert loaded.notes == [] and loaded.config.gate == "global"
    ours = json.loads((ROOT / "exps/sdlora_c100_test.json").read_text())
    assert ours | GUIDE == ours and ours.keys() - GUIDE.keys() == {"description", "max_tasks", "precision"}
    scenarios = GUIDE | {"batch_size": 128, "init_epoch": 20, "epochs": 20}  # of sdlora_c100.json
    config = shipped("sdlora_c100")
    differing = {key for key, value in scenarios.items() if getattr(config, key) != value}
    assert differing == {"prefix", "filepath", "seed"}


def test_the_guides_baseline_is_made_of_the_shipped_file(tmp_path: Path) -> None:
    """Its lines: read sdlora_c100.json, set lambda_sparsity 0 and filepath; ours has no keys of the gate."""
    config = json.loads((ROOT / "exps/sdlora_c100.json").read_text())
    config |= {"lambda_sparsity": 0.0, "filepath": "./CF100_baseline/"}
    (tmp_path / "baseline.json").write_text(json.dumps(config, indent=4))
    made = load_config(tmp_path / "baseline.json", [], SCHEMAS).config
    assert made.gate == "off" and "filepath" in made.unused_keys()
    ours = shipped("sdlora_c100_baseline")
    differing = {key for key, value in ours if value != getattr(made, key)}
    assert differing == {"description", "prefix", "filepath"}


# ----------------------------------------------------------------------------------------------------------
# Meaning


@pytest.mark.parametrize(
    ("values", "gate"),
    [
        ({}, "off"),
        ({"lambda_sparsity": 0.01}, "global"),
        ({"gumbel_gate": "layer"}, "layer"),
        ({"gumbel_gate": "off", "lambda_sparsity": 0.01}, "off"),
    ],
)
def test_when_there_is_a_gate(values: dict[str, Any], gate: str) -> None:
    assert check(**values).config.gate == gate


def test_files_that_train_as_published_draw_classifier_rows_as_published() -> None:
    published = {name for name in NAMES if shipped(f"sdlora_{name}").row_init == "kaiming_linear"}
    assert published == {"inr", "ina", "domainnet"}
    assert check(sdlora_scaling="reset", classifier_init="torch_default").config.row_init == "torch_default"


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file is no folder that can be written to; allowed: a folder"):
            check(lambda_sparsity=0.1, filepath=str(path))
    assert check(lambda_sparsity=0.1, filepath=str(tmp_path / "new" / "folder")).notes == []
    assert not (tmp_path / "new").exists()
