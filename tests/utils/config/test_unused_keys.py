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
from utils.config.loading import config_from_dict
from utils.config.schema import RunConfig
from utils.runs.run_log import read_metrics

Config = Callable[..., RunConfig]
Make = Callable[..., SEMA]

SMALL = {"max_train_per_class": 8, "max_test_per_class": 4, "func_epoch": 2, "rd_epoch": 1, "ranpac_dim": 20}
ALIGNMENT = "ca_samples ca_epochs ca_lr ca_restart"
SHRINKAGE = "alpha1 alpha2"
ONE_TASK = {"init_cls": 8, "increment": 8, "max_train_per_class": 4}
OTHER: dict[str, Any] = {  # values that change a run where the key counts
    "func_epoch": 3, "init_lr": 0.5, "weight_decay": 0.1, "optimizer": "adam", "cache_views": 2,
    "batch_size": 3, "grad_accumulation": 2, "augmentation": "none", "increment": 99, "max_tasks": 3,
    "checkpoints": "last",
    "head_drift": "linear", "ranpac_dim": 7,
    "merge": "mean", "merge_alpha": 0.7, "merge_start": "merged",
    "ca_samples": 9, "ca_epochs": 2, "ca_lr": 0.3, "ca_restart": True, "alpha1": 2.0, "alpha2": 0.5,
    "ffn_num": 5, "adapter_lr": 0.3, "adapter_blocks": "growing",
    "adapt_start_layer": 1, "adapt_end_layer": 2,
    "nested_lora_rank": 3, "nested_lora_lr_fast": 0.3, "nested_lora_lr_slow": 0.5,
    "nested_lora_freeze": "never",
    "nested_lora_update_interval_slow": 2, "nested_lora_slow_grad": "accumulate",
    "nested_lora_consolidation": "weights", "nested_lora_consolidation_alpha": 0.7,
    "nested_lora_consolidation_schedule": "mean", "nested_lora_reset": "zeros",
    "rd_epoch": 2, "rd_lr": 0.5, "rd_dim": 3, "rd_views": 0, "buffer_size": 9, "exp_threshold": 0.1,
    "detect_batch_size": 5,
    "lrate": 0.5, "lrate_decay": 0.5, "milestones": [1], "init_lr_decay": 0.2, "min_lr": 0.04,
    "lambda_sparsity": 0.5, "gumbel_tau_init": 2.0, "gumbel_anneal_rate": 0.5, "growth": "top_k",
    "growth_top_k": 1, "growth_threshold": 0.2,
    "training_classifier": "cosine", "ease_temperature": 0.01, "ema_every": "epoch",
}  # fmt: skip
RHYTHM = "nested_lora_update_interval_slow nested_lora_slow_grad"
SCHEDULE = "nested_lora_consolidation_schedule"
SHARES = f"nested_lora_consolidation_alpha {SCHEDULE}"
BRANCHES = "nested_lora_rank nested_lora_lr_fast nested_lora_lr_slow nested_lora_freeze"
GROWTH = "rd_epoch rd_lr rd_dim rd_views buffer_size exp_threshold detect_batch_size"
GATE = "gumbel_tau_init gumbel_anneal_rate growth growth_top_k"
TRAINING = "init_lr batch_size grad_accumulation augmentation"
ADAPTERS = "weight_decay optimizer nested_lora_lr_fast head_drift"
FINETUNE = {"model_name": "finetune"}
COSINE = FINETUNE | {"head": "cosine"}
RANPAC = {"model_name": "ranpac"}
JOINT = {"model_name": "joint", "head": "ranpac", **ONE_TASK}
NO_CONSOLIDATION = {"nested_lora_use_consolidation": False}
ALPHA_0 = {"nested_lora_consolidation": "weights", "nested_lora_consolidation_alpha": 0}
PLAIN_VIEWS = {"augmentation": "none", "rd_epoch": 3, "rd_lr": 0.5, "exp_threshold": 1.0}
GATED = TINY_SDLORA | {"gumbel_gate": "global"}
COLD = GATED | {"gumbel_tau_init": 1.0, "gumbel_tau_final": 1.0}

# What decides, the keys that change nothing then, and the reason they are named with.
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"nested_lora_lr_slow": 0}, RHYTHM, "nested_lora_lr_slow is 0"),
    ({"nested_lora_lr_slow": 0, "min_lr": 0.001}, RHYTHM, "lr_slow is 0"),
    ({"nested_lora_update_interval_slow": 1}, "nested_lora_slow_grad", "every step"),
    (NO_CONSOLIDATION, f"nested_lora_consolidation nested_lora_reset {SHARES}", "use_consolidation is false"),
    (ALPHA_0, SCHEDULE, "alpha is 0"),
    ({"nested_lora_lr_fast": 0, "nested_lora_lr_slow": 0.05}, SHARES, "lr_fast is 0"),
    ({}, "ffn_num adapter_lr", "nested_lora_"),
    ({"ffn_adapter_type": "adaptmlp"}, BRANCHES, 'ffn_adapter_type is "adaptmlp"'),
    ({"expansion": "never"}, GROWTH, 'expansion is "never"'),
    ({"expansion": "never"}, "adapt_start_layer adapt_end_layer", "none grows"),
    ({"expansion": "never", "head": "ranpac"}, f"head_drift {SCHEDULE}", "first task only"),
    ({"expansion": "always"}, "exp_threshold", 'expansion is "always"'),
    ({"rd_epoch": 0}, "rd_lr exp_threshold detect_batch_size", "rd_epoch is 0"),
    (PLAIN_VIEWS, "rd_views", 'augmentation is "none"'),
    ({"head": "fc"}, f"head_drift ranpac_dim {ALIGNMENT} {SHRINKAGE}", 'head is "fc"'),
    (COSINE, "merge_start merge_alpha", 'merge is "none"'),
    (COSINE | {"merge": "mean"}, "merge_alpha", 'merge is "mean"'),
    (FINETUNE | {"head": "fecam"}, f"ranpac_dim {ALIGNMENT}", 'head is "fecam"'),
    (COSINE, "ranpac_dim", 'head is "cosine"'),
    (FINETUNE | {"augmentation": "none", "cache_gb": 0}, "cache_views", 'augmentation is "none"'),
    (FINETUNE, "adapt_start_layer", '"adapter_blocks": "growing"'),
    (COSINE | {"func_epoch": 0}, f"{TRAINING} {ADAPTERS}", "func_epoch is 0"),
    (JOINT, "increment head_drift max_tasks", "there is one task"),
    (JOINT | {"head": "aligned"}, "ca_restart", "there is one task"),
    ({"model_name": "linear_probe", **ONE_TASK}, "increment max_tasks", "there is one task"),
    (RANPAC, f"{TRAINING} func_epoch ffn_num cache_views adapter_blocks", "first_session is false"),
    (RANPAC | {"first_session": True, "func_epoch": 0}, "training_classifier", "func_epoch is 0"),
    ({"model_name": "ease", "alpha": 0}, "ease_temperature", "alpha is 0"),
    ({"model_name": "moal", "ema_decay": 0}, "ema_every", "ema_decay is 0"),
    (TINY_SDLORA, "lrate_decay milestones init_lr_decay", 'scheduler is "cosine"'),
    (TINY_SDLORA | {"scheduler": "constant"}, "min_lr", 'scheduler is "constant"'),
    (TINY_SDLORA | {"scheduler": "steplr"}, "init_lr_decay", "no init_milestones"),
    (TINY_SDLORA | {"scheduler": "steplr", "milestones": [2, 9]}, "lrate_decay", "epochs is 2"),
    (TINY_SDLORA | {"scheduler": "steplr", "init_milestones": [2]}, "init_lr_decay", "init_epoch is 2"),
    (TINY_SDLORA, GATE, "no gate where lambda_sparsity is 0"),
    (TINY_SDLORA | {"gumbel_gate": "off"}, f"lambda_sparsity {GATE}", 'gumbel_gate is "off"'),
    (GATED, "growth_top_k", 'growth is "threshold"'),
    (GATED | {"growth": "top_k"}, "growth_threshold", 'growth is "top_k"'),
    (COLD, "gumbel_anneal_rate", "gumbel_tau_init is gumbel_tau_final"),
    (TINY_SDLORA | {"epochs": 0}, "lrate weight_decay", "epochs is 0"),
]


@pytest.mark.parametrize(
    ("deciding", "keys", "reason"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_key_without_effect_is_named_and_has_none(
    deciding: dict[str, Any], keys: str, reason: str, smoke_config: Config
) -> None:
    unused = {key: OTHER[key] for key in keys.split()}
    small = SMALL if ONE_TASK.items() <= deciding.items() else SMALL | {"max_tasks": 2}
    method = SCHEMAS[deciding.get("model_name", "sema")].model_fields
    known = {key: value for key, value in small.items() if key in method}
    plain, with_unused = smoke_config(**known | deciding), smoke_config(**known | deciding | unused)
    named = with_unused.unused_keys()
    assert unused.keys() <= named.keys() and any(reason in named[key] for key in unused)
    assert with_unused.folder_names(0) == plain.folder_names(0)
    torch.testing.assert_close(run_scores(with_unused), run_scores(plain), rtol=0, atol=0)


@pytest.mark.parametrize(("code", "unused_of_code"), [({"beta": 0}, {}), ({"sparse_units": 0}, {"beta": 1})])
def test_keys_of_grids_without_effect_are_named_and_have_none(
    code: dict[str, Any], unused_of_code: dict[str, Any], tmp_path: Path
) -> None:
    deciding = {"encoder": "gru", "alpha": 0, "few_shot_tasks": 0, "epochs": 1} | code
    unused = {"heads": 1, "sharing_ema": 0.5, "sharing_detach": True, "few_shot_rank": 1}
    unused |= {"sparse_activity": 0.4} | unused_of_code
    base = TINY_GRIDS | deciding | {"logs_root": str(tmp_path)}
    plain, with_unused = (config_from_dict(base | more, SCHEMAS, "test").config for more in ({}, unused))
    assert unused.keys() <= with_unused.unused_keys().keys()

    def predictions(config: RunConfig) -> torch.Tensor:
        learner = learner_of(config)
        assert isinstance(learner, SharedSubspace)
        learner.begin_task(0)
        learner.train_task()
        return learner.evaluator.predict(learner.tasks.draw("train", 16, torch.Generator().manual_seed(0)))

    assert torch.equal(predictions(plain), predictions(with_unused))


def test_a_key_that_an_editable_one_leaves_without_effect_is_no_difference(smoke_config: Config) -> None:
    """What is stored changes no number, though `cache_views` has an effect only where something is."""
    stored = smoke_config(model_name="finetune", augmentation="none", cache_gb=1)
    plain = stored.model_copy(update={"cache_gb": 0})
    assert "cache_views" in plain.without_effect() and "cache_views" not in stored.without_effect()
    assert stored.differing(plain) == plain.differing(stored) == {}
    assert stored.edited(plain) == {"cache_gb": (1, 0)}


def test_folders_and_rates_that_nothing_uses_are_named(smoke_config: Config) -> None:
    named = smoke_config(data_root="x", weights_root="x").unused_keys()
    assert {"data_root", "weights_root"} <= named.keys()
    assert "adapter_lr" in smoke_config(model_name="ranpac", adapter_lr=0).unused_keys()  # and no mistake


def test_slow_at_rate_zero_stays_and_nothing_says_it_was_updated(
    make_sema: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where the schedule ends above its rate: slow keeps every bit, no trace, one line says why."""
    learner = make_sema(**NO_CONSOLIDATION, nested_lora_lr_slow=0, func_epoch=3, min_lr=0.005)
    learner.begin_task(0)
    blocks = learner.network.modules_by_block.values()
    slow = [p for modules in blocks for p in modules.parameter_groups()["slow"]]
    before = [p.clone() for p in slow]
    with caplog.at_level(logging.INFO, logger="nested_lora"):
        learner.train_task()
    assert slow and all(torch.equal(now, then) for now, then in zip(slow, before, strict=True))
    assert "slow updated" not in caplog.text and "slow stays as it is" in caplog.text
    assert not any(event["event"] == "slow_step" for event in read_metrics(learner.log.folder))
