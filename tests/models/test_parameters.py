"""Costs of every method by hand, on a tiny ViT after two tasks: trained and stored numbers, passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import SCHEMAS
from models.base import Learner
from tests.conftest import TINY_GRIDS, learner_of, run_tasks, saved_state
from utils.config.loading import config_from_dict

Make = Callable[..., Learner]
D, L, T, C = 64, 6, 2, 4  # width and blocks of the ViT, tasks, classes
R, M = 3, 20  # rank or bottleneck, random features
ADAPTER = {"ffn_adapter_type": "adaptmlp", "ffn_num": R}
NESTED = {"ffn_adapter_type": "nested_lora", "nested_lora_rank": R}
ALL = {"init_cls": 8, "increment": 8}
UNEQUAL = {"init_cls": 4, "nested_lora_update_interval_slow": 3}  # three steps, and two in the second task
P = L * (2 * D * R + R + D)  # one adapter in every block


def rows(classes: int = C) -> int:
    return classes * (D + 1)


def means(width: int = D) -> int:
    return C * width + C  # and the images of each class


RIDGE = (
    M * (M + 1) + 3 * M * C + 3 * C
)  # triangles of G, and Q, in two parts; W; images in both parts, in all
GAUSSIANS = means() + C * D * (D + 1) // 2
PROMPTS = 2 * (T * 5) * (D + D + 4 * D)  # in two blocks five components a task: A, K and P of length four
DESCRIBED = 2 * D * 8 + 8 + D
GROWN = 8 * (2 * D * R + R + D) + 4 * DESCRIBED + 4 * (D + 1)  # 6 adapters and 2 more, 4 of them described


def merged(rule: str, **more: str) -> dict[str, Any]:
    return {"model_name": "finetune", **ADAPTER, "head": "cosine", "merge": rule, **more}


def headed(head: str, **more: Any) -> dict[str, Any]:
    return {"model_name": "finetune", **ADAPTER, "head": head, "ca_samples": 4, **more}


CASES: dict[str, tuple[dict[str, Any], int, int]] = {  # changes, trained, stored
    "simplecil": ({"model_name": "simplecil"}, 0, means()),
    "linear_probe": ({"model_name": "linear_probe", **ALL}, rows(8), rows(8)),
    "joint": ({"model_name": "joint", **ALL, **ADAPTER}, P + rows(8), P + rows(8)),
    "ranpac": ({"model_name": "ranpac", "ranpac_dim": M}, 0, RIDGE),
    "ranpac, adapted": (
        {"model_name": "ranpac", "ranpac_dim": M, "first_session": True, **ADAPTER}, P + rows(2), P + RIDGE
    ),
    "aper": ({"model_name": "aper", **ADAPTER}, P + rows(2), P + means(2 * D)),
    "ease": ({"model_name": "ease", **ADAPTER}, T * P + rows(), T * P + T * C * D + 2 * C),
    "moal": ({"model_name": "moal", "ranpac_dim": M, **ADAPTER}, P + rows(), 2 * P + RIDGE + C * D),
    "coda_prompt": (
        {"model_name": "coda_prompt", "prompt_blocks": [1, 2], "prompt_components": 5, "prompt_length": 4},
        PROMPTS + rows(), PROMPTS + rows(),
    ),
    "finetune": ({"model_name": "finetune", **ADAPTER}, P + rows(), P + rows()),
    "slow is not trained": (
        {"model_name": "finetune", **NESTED, "nested_lora_lr_slow": 0, "head": "cosine"},
        P + rows(), 2 * P + means(),
    ),
    "slow is never due": (
        {"model_name": "finetune", **NESTED, "nested_lora_update_interval_slow": 100},
        P + rows(), 2 * P + rows(),
    ),
    "slow is due in the first task": (
        {"model_name": "finetune", **NESTED, **UNEQUAL}, 2 * P + rows(6), 2 * P + rows(6),
    ),
    "slow is due in the first task, adapters learn in one": (
        {"model_name": "ease", **NESTED, **UNEQUAL}, 3 * P + rows(6), 4 * P + T * 6 * D + 2 * 6,
    ),
    "merge mean": (merged("mean"), P + rows(), 2 * P + means()),
    "merge ema": (merged("ema"), P + rows(), 2 * P + means()),
    "merge ema, restarted": (merged("ema", merge_start="merged"), P + rows(), P + means()),
    "merge max_magnitude": (merged("max_magnitude"), P + rows(), 3 * P + means()),
    "merge orthogonal": (merged("orthogonal"), P + rows(), 2 * P + means()),
    "head ranpac": (headed("ranpac", ranpac_dim=M), P + rows(), P + RIDGE),
    "head fecam": (headed("fecam"), P + rows(), P + GAUSSIANS),
    "head fecam, frozen": (headed("fecam", func_epoch=0), 0, GAUSSIANS),
    "head aligned": (headed("aligned"), P + rows(), P + GAUSSIANS + rows() + C),
    "head aligned, restarted": (
        headed("aligned", ca_restart=True), P + rows(), P + GAUSSIANS + 2 * rows() + C
    ),
    "sema": (
        {"model_name": "sema", **ADAPTER, "expansion": "always", "rd_dim": 8, "buffer_size": 10},
        GROWN + rows(), GROWN + 4 * 10 + rows(),
    ),
    "sema, descriptors are not trained": (
        {"model_name": "sema", **ADAPTER, "expansion": "always", "rd_dim": 8, "rd_epoch": 0},
        GROWN - 4 * DESCRIBED + rows(), GROWN + rows(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_counted_by_hand(name: str, make_sema: Make) -> None:
    changes, trained, stored = CASES[name]
    learner = make_sema(**changes, max_train_per_class=5)
    run_tasks(learner, min(T, learner.nb_tasks))
    counts = learner.parameter_counts()
    assert (counts["trained"], counts["stored"]) == (trained, stored), counts
    again = make_sema(**changes, max_train_per_class=5)
    again.load_state(*saved_state(learner))
    assert again.parameter_counts() == counts


@pytest.mark.parametrize("lr", [0, 0.1])
def test_a_checkpoint_that_does_not_say_what_was_updated_has_a_slow_branch_that_was(
    lr: float, make_sema: Make
) -> None:
    changes = {"model_name": "finetune", **NESTED, "nested_lora_lr_slow": lr, "max_train_per_class": 5}
    learner = run_tasks(make_sema(**changes), 1)
    state, saved = saved_state(learner)
    del state["updated"]
    learner.load_state(state, saved)
    assert learner.parameter_counts()["trained"] == (2 * P if lr else P) + rows(2)


@pytest.mark.parametrize("name", ["moal", "coda_prompt", "inflora", "merge max_magnitude", "sema"])
def test_without_functional_training_only_descriptors_are_trained(name: str, make_sema: Make) -> None:
    """Prompts stay as they are drawn, and are stored; the rest adds nothing, nor do copies of it."""
    changes = CASES[name][0] if name in CASES else {"model_name": name, "lora_rank": R}
    counts = run_tasks(make_sema(**changes, func_epoch=0, max_train_per_class=5), T).parameter_counts()
    assert counts["trained"] == (4 * DESCRIBED if name == "sema" else 0), counts
    stored = {"moal": RIDGE + C * D, "coda_prompt": PROMPTS + rows(), "merge max_magnitude": means()}
    assert counts["stored"] == stored.get(name, counts["stored"]), counts


@pytest.mark.parametrize(
    ("name", "passes"), [("aper", 2), ("ease", T), ("moal", 1), ("inflora", 1), ("coda_prompt", 2)]
)
def test_passes_of_a_test_image_are_those_of_the_table(name: str, passes: int, make_sema: Make) -> None:
    """Through the last block, T adapters in all blocks; a prompt's query that is not stored is a pass."""
    changes = CASES[name][0] if name in CASES else {"model_name": name, "lora_rank": R}
    learner, calls = run_tasks(make_sema(**changes, max_train_per_class=5), T), []
    learner.network.vit.blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    learner.features(torch.rand(2, 3, 32, 32))
    assert len(calls) == passes


def test_inflora_s_share_grows_over_the_tasks_of_the_data_set_and_stays(make_sema: Make) -> None:
    """Of its four tasks, though two are learned; further ones are those of added data."""
    learner, shares = make_sema(model_name="inflora", lamb=0.9, lame=0.98, max_tasks=2), []
    for learner.task in (0, 1, 3, 4, 5):
        shares.append(learner.share)
    assert shares == pytest.approx([0.9, 0.92, 0.96, 0.98, 0.98])


def test_inflora_stores_fixed_directions_and_the_basis_of_old_inputs(make_sema: Make) -> None:
    learner = run_tasks(make_sema(model_name="inflora", lora_rank=R), T)
    counts, written = learner.parameter_counts(), T * L * 2 * D * R  # B of keys and values
    basis = D * sum(projection.basis.shape[1] for projection in learner.network.modules_by_block.values())
    assert basis > 0 and counts["trained"] == written + rows()
    assert counts["stored"] == written + T * L * R * D + basis + rows()


def test_sdlora_stores_what_it_trains_unless_it_prunes(make_sdlora: Make) -> None:
    learner = run_tasks(make_sdlora(lora_rank=2, lora_rank_schedule=[[1, 1]]), T)
    counts, directions = learner.parameter_counts(), L * 4 * D * (2 + 1)
    assert counts["trained"] == counts["stored"] == directions + T + rows()
    gated = {"lambda_sparsity": 0.01, "gumbel_gate": "layer", "growth_threshold": 0.99}
    pruned = run_tasks(make_sdlora(**gated, lora_rank=2), T).parameter_counts()
    assert pruned["trained"] == L * 4 * D * 2 * T + T * (1 + L) + rows()
    assert pruned["stored"] == L * 4 * D * 2 + (1 + L) + rows()
    first = run_tasks(make_sdlora(lora_rank=2, epochs=0), T).parameter_counts()
    assert first["trained"] == L * 4 * D * 2 + 1 + rows(2)


def test_a_network_on_grids_is_trained_whole(tmp_path: Any) -> None:
    config = config_from_dict(TINY_GRIDS | {"logs_root": str(tmp_path)}, SCHEMAS, "test").config
    learner = learner_of(config)
    counts, whole = learner.parameter_counts(), sum(p.numel() for p in learner.model.parameters())
    assert counts["trained"] == counts["stored"] == whole
