"""Keys without effect are named with the reason, and a run with another value is the same."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import SCHEMAS
from models.sema import SEMA
from models.shared_subspace.learner import SharedSubspace
from tests.conftest import TINY_GRIDS, TINY_SDLORA, learner_of, run_scores
from utils.config.loading import ConfigError, config_from_dict
from utils.config.schema import RunConfig
from utils.runs.run_log import read_metrics

Config = Callable[..., RunConfig]
Make = Callable[..., SEMA]

SMALL = {"max_train_per_class": 8, "max_test_per_class": 4, "func_epoch": 2, "rd_epoch": 1, "ranpac_dim": 20}
ONE_TASK = {"init_cls": 8, "increment": 8, "max_train_per_class": 4}
SLOW_RHYTHM = {"nested_lora_update_interval_slow": 2, "nested_lora_slow_grad": "accumulate"}
GROWTH = {"rd_epoch": 2, "rd_lr": 0.5, "rd_dim": 3, "rd_views": 2, "buffer_size": 9, "exp_threshold": 0.1}
GATE = {"gumbel_tau_init": 2.0, "gumbel_anneal_rate": 0.5, "growth": "top_k", "growth_top_k": 1}
TRAINING = {"batch_size": 3, "grad_accumulation": 2, "augmentation": "none"}

# Name: the keys that decide, keys that change nothing then, the reason they are named with.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "slow fixed": ({"nested_lora_lr_slow": 0}, SLOW_RHYTHM, "nested_lora_lr_slow is 0"),
    "slow fixed, schedule rising": ({"nested_lora_lr_slow": 0, "min_lr": 0.001}, SLOW_RHYTHM, "lr_slow is 0"),
    "slow every step": (
        {"nested_lora_update_interval_slow": 1},
        {"nested_lora_slow_grad": "accumulate"},
        "every step",
    ),
    "no consolidation": (
        {"nested_lora_use_consolidation": False},
        {
            "nested_lora_consolidation": "weights",
            "nested_lora_consolidation_alpha": 0.7,
            "nested_lora_consolidation_schedule": "mean",
            "nested_lora_reset": "zeros",
        },
        "nested_lora_use_consolidation is false",
    ),
    "nothing moves over": (
        {"nested_lora_consolidation": "weights", "nested_lora_consolidation_alpha": 0},
        {"nested_lora_consolidation_schedule": "mean"},
        "alpha is 0",
    ),
    "fast silent": (
        {"nested_lora_lr_fast": 0, "nested_lora_lr_slow": 0.05},
        {"nested_lora_consolidation_alpha": 0.7, "nested_lora_consolidation_schedule": "mean"},
        "lr_fast is 0",
    ),
    "nested": ({}, {"ffn_num": 5, "adapter_lr": 0.3}, "nested_lora_"),
    "one adapter": (
        {"ffn_adapter_type": "adaptmlp"},
        {
            "nested_lora_rank": 3,
            "nested_lora_lr_fast": 0.5,
            "nested_lora_lr_slow": 0.5,
            "nested_lora_freeze": "never",
        },
        'ffn_adapter_type is "adaptmlp"',
    ),
    "no growth": ({"expansion": "never"}, GROWTH | {"detect_batch_size": 5}, 'expansion is "never"'),
    "no growth, all blocks": (
        {"expansion": "never"},
        {"adapt_start_layer": 1, "adapt_end_layer": 2},
        "none grows",
    ),
    "no growth, features fixed": (
        {"expansion": "never", "head": "ranpac"},
        {"head_drift": "linear", "nested_lora_consolidation_schedule": "mean"},
        "first task only",
    ),
    "growth in every task": ({"expansion": "always"}, {"exp_threshold": 0.1}, 'expansion is "always"'),
    "descriptors untrained": ({"rd_epoch": 0}, {"rd_lr": 0.5, "exp_threshold": 0.0}, "rd_epoch is 0"),
    "descriptors with one view": (
        {"augmentation": "none", "rd_epoch": 3, "rd_lr": 0.5, "exp_threshold": 1.0},
        {"rd_views": 0},
        'augmentation is "none"',
    ),
    "fc head": ({"head": "fc"}, {"head_drift": "linear", "ranpac_dim": 7}, 'head is "fc"'),
    "cosine head": ({"model_name": "finetune", "head": "cosine"}, {"ranpac_dim": 7}, 'head is "cosine"'),
    "one view": (
        {"model_name": "finetune", "augmentation": "none", "cache_gb": 0},
        {"cache_views": 2},
        'augmentation is "none"',
    ),
    "finetune, all blocks": ({"model_name": "finetune"}, {"adapt_start_layer": 1}, "none grows"),
    "finetune, no epoch": (
        {"model_name": "finetune", "func_epoch": 0, "head": "cosine"},
        {
            "init_lr": 0.5,
            "weight_decay": 0.1,
            "optimizer": "adam",
            "nested_lora_lr_fast": 0.3,
            "head_drift": "linear",
            **TRAINING,
        },
        "func_epoch is 0",
    ),
    "joint": (
        {"model_name": "joint", "head": "ranpac", **ONE_TASK},
        {"head_drift": "linear", "max_tasks": 3, "checkpoints": "last"},
        "there is one task",
    ),
    "linear probe": (
        {"model_name": "linear_probe", **ONE_TASK},
        {"max_tasks": 3, "checkpoints": "last"},
        "there is one task",
    ),
    "ranpac": (
        {"model_name": "ranpac"},
        {
            "func_epoch": 3,
            "init_lr": 0.5,
            "ffn_num": 3,
            "cache_views": 2,
            "adapter_blocks": "growing",
            **TRAINING,
        },
        "first_session is false",
    ),
    "sdlora": (
        TINY_SDLORA,
        {"lrate_decay": 0.5, "milestones": [1], "init_lr_decay": 0.2},
        'scheduler is "cosine"',
    ),
    "sdlora, no schedule": (
        TINY_SDLORA | {"scheduler": "constant"},
        {"min_lr": 0.04},
        'scheduler is "constant"',
    ),
    "sdlora, no steps": (TINY_SDLORA | {"scheduler": "steplr"}, {"init_lr_decay": 0.2}, "no init_milestones"),
    "sdlora, no gate": (TINY_SDLORA, GATE, "no gate where lambda_sparsity is 0"),
    "gate off": (
        TINY_SDLORA | {"gumbel_gate": "off"},
        {"lambda_sparsity": 0.5, **GATE},
        'gumbel_gate is "off"',
    ),
    "gate by threshold": (
        TINY_SDLORA | {"gumbel_gate": "global"},
        {"growth_top_k": 1},
        'growth is "threshold"',
    ),
    "gate at rest": (
        TINY_SDLORA | {"gumbel_gate": "global", "gumbel_tau_init": 1.0, "gumbel_tau_final": 1.0},
        {"gumbel_anneal_rate": 0.5},
        "gumbel_tau_init is gumbel_tau_final",
    ),
    "sdlora, one epoch-less half": (
        TINY_SDLORA | {"epochs": 0},
        {"lrate": 0.5, "weight_decay": 0.1},
        "epochs is 0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_key_without_effect_is_named_and_has_none(name: str, smoke_config: Config) -> None:
    deciding, unused, reason = CASES[name]
    small = SMALL if ONE_TASK.items() <= deciding.items() else SMALL | {"max_tasks": 2}
    method = SCHEMAS[deciding.get("model_name", "sema")].model_fields
    known = {key: value for key, value in small.items() if key in method}
    plain, with_unused = smoke_config(**known | deciding), smoke_config(**known | deciding | unused)
    named = with_unused.unused_keys()
    assert unused.keys() <= named.keys() and any(reason in named[key] for key in unused)
    torch.testing.assert_close(run_scores(with_unused), run_scores(plain), rtol=0, atol=0)


def test_keys_of_grids_without_effect_are_named_and_have_none(tmp_path: Path) -> None:
    deciding = {
        "encoder": "gru",
        "alpha": 0,
        "beta": 0,
        "few_shot_tasks": 0,
        "epochs": 1,
        "logs_root": str(tmp_path),
    }
    unused = {
        "heads": 1,
        "sharing_ema": 0.5,
        "sharing_detach": True,
        "sparse_activity": 0.4,
        "few_shot_rank": 1,
    }
    plain, with_unused = (
        config_from_dict(TINY_GRIDS | deciding | changes, SCHEMAS, "test").config for changes in ({}, unused)
    )
    assert unused.keys() <= with_unused.unused_keys().keys()

    def predictions(config: RunConfig) -> torch.Tensor:
        learner = learner_of(config)
        assert isinstance(learner, SharedSubspace)
        learner.begin_task(0)
        learner.train_task()
        return learner.evaluator.predict(learner.tasks.draw("train", 16, torch.Generator().manual_seed(0)))

    assert torch.equal(predictions(plain), predictions(with_unused))


def test_a_resolved_configuration_states_every_key_and_names_none(smoke_config: Config) -> None:
    config = smoke_config(nested_lora_lr_slow=0)
    assert "nested_lora_update_interval_slow" in config.unused_keys()
    assert config_from_dict(config.model_dump(mode="json"), SCHEMAS, "config.json").notes == []


def test_folders_that_nothing_is_looked_for_in_are_named(smoke_config: Config) -> None:
    named = smoke_config(data_root="x", weights_root="x").unused_keys()
    assert {"data_root", "weights_root"} <= named.keys()


# ----------------------------------------------------------------------------------------------------------
# Rates at which nothing learns


@pytest.mark.parametrize("model_name", ["sema", "finetune", "joint", "ranpac"])
@pytest.mark.parametrize(
    "rates",
    [
        {"ffn_adapter_type": "nested_lora", "nested_lora_lr_fast": 0, "nested_lora_lr_slow": 0},
        {"ffn_adapter_type": "adaptmlp", "adapter_lr": 0},
    ],
    ids=["nested", "one adapter"],
)
def test_adapters_that_would_learn_nothing_are_refused(
    model_name: str, rates: dict[str, Any], smoke_config: Config
) -> None:
    classes = ONE_TASK if model_name == "joint" else {}
    first = {"first_session": True} if model_name == "ranpac" else {}
    with pytest.raises(ConfigError) as caught:
        smoke_config(model_name=model_name, **classes, **first, **rates)
    (problem,) = caught.value.problems
    assert (
        all(key in problem for key in rates if "lr" in key)
        and "learn nothing; allowed: a rate above 0" in problem
    )


def test_rates_of_adapters_that_are_not_there_are_no_mistake(smoke_config: Config) -> None:
    assert "adapter_lr" in smoke_config(model_name="ranpac", adapter_lr=0).unused_keys()


def test_slow_at_rate_zero_stays_and_nothing_says_it_was_updated(
    make_sema: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where the schedule ends above its rate: slow keeps every bit, no trace, one line says why."""
    learner = make_sema(
        nested_lora_lr_slow=0, nested_lora_use_consolidation=False, func_epoch=3, min_lr=0.005
    )
    learner.begin_task(0)
    slow = [
        p for modules in learner.network.modules_by_block.values() for p in modules.parameter_groups()["slow"]
    ]
    before = [p.clone() for p in slow]
    with caplog.at_level(logging.INFO, logger="nested_lora"):
        learner.train_task()
    assert slow and all(torch.equal(now, then) for now, then in zip(slow, before, strict=True))
    assert "slow updated" not in caplog.text and "slow stays as it is" in caplog.text
    assert not any(event["event"] == "slow_step" for event in read_metrics(learner.log.folder))
