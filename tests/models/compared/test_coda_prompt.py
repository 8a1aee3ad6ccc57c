"""CODA-Prompt's learner: stored queries, what learns, and its penalty in the loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backbone.prompts import PrefixAttention
from models.base import Learner
from tests.conftest import run_tasks

Make = Callable[..., Learner]
CODA = {"model_name": "coda_prompt", "prompt_blocks": [0, 2], "prompt_components": 3}


def plain_passes(learner: Learner) -> list[int]:
    """Images of every forward without prompts, in a list that grows."""
    seen: list[int] = []

    def see(attention: PrefixAttention, inputs: tuple[Tensor, ...]) -> None:
        if attention.prefix is None:
            seen.append(len(inputs[0]))

    attention = learner.network.vit.blocks[2].attn
    attention.attention.qkv.register_forward_pre_hook(lambda _, inputs: see(attention, inputs))
    return seen


def test_a_query_is_computed_once_for_each_image_and_view(make_sema: Make) -> None:
    learner = make_sema(**CODA, cache_views=1, func_epoch=3)
    seen = plain_passes(learner)
    run_tasks(learner, 2)
    learner.evaluate()
    trained = sum(learner.data.count(learner.data.task_classes(task), "train") for task in range(2))
    tested = sum(learner.data.count(learner.data.task_classes(task), "test") for task in range(2))
    calibrated = trained  # their test views
    assert trained + tested <= sum(seen) <= trained + tested + calibrated


@pytest.mark.parametrize("views", [0, 1])
def test_stored_queries_and_computed_ones_train_the_same(views: int, make_sema: Make) -> None:
    keys = CODA | {"cache_views": views, "augmentation": "none"}
    stored, computed = (run_tasks(make_sema(**keys, **engine), 2) for engine in ({}, {"engine": "reference"}))
    ours, theirs = stored.learned_tensors(), computed.learned_tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-3)


def test_components_of_earlier_tasks_stay_as_they_are(make_sema: Make) -> None:
    learner = run_tasks(make_sema(**CODA), 1)
    before = {name: tensor.clone() for name, tensor in learner.network.pools.state_dict().items()}
    run_tasks(learner, 2)
    after = learner.network.pools.state_dict()
    for name in ("keys", "attention", "prompts"):
        assert torch.equal(after[f"2.{name}"][:3], before[f"2.{name}"])
        assert len(after[f"2.{name}"]) == 6
    assert learner.network.parameter_counts()["prompts"] == sum(tensor.numel() for tensor in after.values())


def test_components_of_the_first_task_are_no_expansion(make_sema: Make) -> None:
    learner, evaluations = make_sema(**CODA), []
    for task, added in enumerate([0, 2 * 3]):
        evaluations.append(run_tasks(learner, task + 1).evaluate())
        assert learner.report(evaluations).result["metrics"]["expansions"] == added


def test_the_penalty_keeps_components_nearer_to_orthonormal(make_sema: Make) -> None:
    penalties = [
        float(run_tasks(make_sema(**CODA, ortho_mu=mu, func_epoch=3, init_lr=0.05), 1).network.penalty("sum"))
        for mu in (0, 10)
    ]
    assert penalties[1] < penalties[0]
