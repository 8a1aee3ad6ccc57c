"""The learners that Nested LoRA is compared with, and the heads, on tiny generated data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import Interrupted, Learner
from models.vit.training import FunctionalPhase
from tests.conftest import events, run_tasks, saved_state
from trainer import train
from utils.config.schema import RunConfig
from utils.errors import UserError

Config = Callable[..., RunConfig]
Make = Callable[..., Learner]
ALL_CLASSES = {"init_cls": 8, "increment": 8}
NESTED = {"ffn_adapter_type": "nested_lora"}
METHODS: dict[str, dict[str, Any]] = {
    "simplecil": {"model_name": "simplecil"},
    "ranpac": {"model_name": "ranpac", "ranpac_dim": 50},
    "ranpac, adapted": {"model_name": "ranpac", "ranpac_dim": 50, "first_session": True},
    "aper": {"model_name": "aper"},
    "ease": {"model_name": "ease", "adapter_blocks": "growing"},
    "inflora": {"model_name": "inflora", "adapter_blocks": "growing", "lora_rank": 4},
    "moal": {"model_name": "moal", "ranpac_dim": 50},
    "coda_prompt": {
        "model_name": "coda_prompt", "prompt_blocks": [1], "prompt_components": 3, "cache_views": 1
    },
    "linear probe": {"model_name": "linear_probe", **ALL_CLASSES},
    "joint": {"model_name": "joint", **ALL_CLASSES},
    "finetune": {"model_name": "finetune"},
    "finetune, ranpac": {
        "model_name": "finetune", "head": "ranpac", "head_drift": "linear", "ranpac_dim": 50
    },
    "finetune, cosine": {"model_name": "finetune", "head": "cosine", "head_drift": "linear"},
    "finetune, merged": {"model_name": "finetune", "head": "cosine", "head_drift": "linear", "merge": "ema"},
    "finetune, fecam": {"model_name": "finetune", "head": "fecam", "head_drift": "linear"},
    "finetune, aligned": {"model_name": "finetune", "head": "aligned"},
    "sema, ranpac": {"model_name": "sema", "head": "ranpac", "head_drift": "linear", "ranpac_dim": 50},
    "sema, growing": {"model_name": "sema", "expansion": "always"},
    "sema, never growing": {"model_name": "sema", "expansion": "never", "head": "cosine"},
}  # fmt: skip
GROWING = ("ease", "inflora", "coda_prompt", "finetune, ranpac", "sema, growing")  # their state grows


def training_features(learner: Learner, tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of all training images of the first tasks in the test view, computed here, and labels."""
    data = learner.data
    indices = data.seen_indices(tasks, "train")
    with torch.no_grad():
        features = learner.features(data.views(indices, "train", None))
    return features.double().numpy(), data.targets(indices, "train").numpy()


@pytest.mark.parametrize("name", METHODS)
def test_every_baseline_runs_to_its_result(name: str, smoke_config: Config) -> None:
    """Through the command line's own path: result, accuracies and the numbers of the record."""
    result = train(smoke_config(**METHODS[name]))
    tasks = 1 if "init_cls" in METHODS[name] else 4
    assert len(result["accuracy"]) == tasks and 0 <= result["metrics"]["final"] <= 100
    parts = {part: n for part, n in result["parameters"].items() if part not in ("trained", "stored")}
    assert result["parameters"]["stored"] == sum(parts.values())
    assert (result["metrics"]["forgetting"] is None) == (tasks == 1)


@pytest.mark.parametrize("name", [*GROWING, "ranpac, adapted", "moal", "sema, ranpac"])
def test_a_baseline_resumed_is_the_one_never_stopped(name: str, make_sema: Make) -> None:
    """Stopped at several moments, between steps and between batches of features, it ends bit-identical."""
    changes = METHODS[name] | {"max_tasks": 3}
    expected = run_tasks(make_sema(**changes), 3).fingerprint()
    for stop_at in (2, 5, 9):
        asked = iter(range(10**9))
        stopped = make_sema(lambda asked=asked, at=stop_at: next(asked) >= at, **changes)
        with pytest.raises(Interrupted):
            run_tasks(stopped, 3)
        saved, again = saved_state(stopped), make_sema(**changes)  # which draws from the global generator
        again.load_state(*saved)
        again.train_task()
        assert run_tasks(again, 3).fingerprint() == expected


@pytest.mark.parametrize("name", [*GROWING, "finetune, fecam", "finetune, aligned", "finetune, merged"])
def test_a_learner_that_takes_one_checkpoint_after_the_other_is_each_of_them(
    name: str, make_sema: Make
) -> None:
    """As analyses and `eval.py --test` do: nothing that follows from the tensors outlives them."""
    learner, saved = make_sema(**METHODS[name]), []
    for tasks in (1, 2):
        run_tasks(learner, tasks)
        saved.append((saved_state(learner), scores(learner)))
    other = make_sema(**METHODS[name])
    for state, expected in saved:
        other.load_state(*state)
        torch.testing.assert_close(scores(other), expected)


def scores(learner: Learner) -> Tensor:
    """Scores of the first task's test images, (n, C)."""
    with torch.no_grad():
        return learner.classify(learner.features_of(0, "test"))


def test_simplecil_scores_are_cosines_with_class_means(make_sema: Make) -> None:
    learner = run_tasks(make_sema(model_name="simplecil"), 2)
    features, labels = training_features(learner, 2)
    means = np.stack([features[labels == c].mean(axis=0) for c in range(4)])
    queries = features[:5]
    cosine = queries @ means.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(learner.classify(torch.tensor(queries)).numpy(), cosine, atol=1e-4)


def test_training_free_ranpac_task_by_task_has_the_sums_of_all_tasks(make_sema: Make) -> None:
    learner = run_tasks(make_sema(**METHODS["ranpac"]), 4)
    features, labels = training_features(learner, 4)
    hidden = np.maximum(features @ learner.closed_form.projection.numpy(), 0)
    gram, cross = learner.closed_form.gram.sum(dim=0).numpy(), learner.closed_form.cross.sum(dim=0).numpy()
    np.testing.assert_allclose(gram, hidden.T @ hidden, rtol=1e-4)
    np.testing.assert_allclose(cross, hidden.T @ np.eye(8)[labels], rtol=1e-4, atol=1e-4)
    assert not learner.network.modules_by_block and "adapters" not in learner.summary()["parameters"]


def moving(learner: Learner) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in learner.learned_tensors().items() if ".adapter_module." in n}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "freezes"),
    [("ranpac, adapted", True), ("sema, never growing", True), ("finetune", False)],
)
def test_all_adapt_in_the_first_task_and_finetune_alone_in_the_second(
    name: str, freezes: bool, make_sema: Make
) -> None:
    learner = make_sema(**METHODS[name])
    start = moving(learner)
    adapted = moving(run_tasks(learner, 1))
    assert not same(start, adapted)
    assert same(adapted, moving(run_tasks(learner, 2))) == freezes
    if name == "ranpac, adapted":
        assert not [p for p in learner.modules.parameters() if p.requires_grad]


def test_what_a_task_adds_lies_on_the_learners_device(make_sema: Make) -> None:
    """Shown with the device that holds no values, in place of a GPU."""
    for method in ("sema", "finetune"):
        learner = make_sema(model_name=method)
        learner.context.device = torch.device("meta")
        learner.begin_task(0)
        assert {parameter.device.type for parameter in learner.modules.parameters()} == {"meta"}


def test_always_growing_grows_every_block_once_a_task_and_never_growing_none(make_sema: Make) -> None:
    counts = {}
    for expansion in ("always", "never"):
        learner = run_tasks(make_sema(expansion=expansion, exp_threshold=1e9), 3)
        counts[expansion] = [learner.network.adapters_per_block()[block] for block in (4, 5)]
    assert counts == {"always": [3, 3], "never": [1, 1]}
    assert learner.summary()["parameters"]["descriptors"] == 0  # nothing to detect with where nothing grows


def test_the_adapter_rate_is_its_own_where_it_is_given(make_sema: Make) -> None:
    rates = {}
    for given in (None, 0.123):
        learner = make_sema(
            model_name="finetune", ffn_adapter_type="adaptmlp", adapter_lr=given, init_lr=0.004
        )
        learner.begin_task(0)
        rates[given] = learner.update_optimizer_and_scheduler(1).lrs
    assert rates == {None: {"adapter": 0.004, "other": 0.004}, 0.123: {"adapter": 0.123, "other": 0.004}}


def test_the_readout_follows_only_where_it_is_asked_to(make_sema: Make) -> None:
    """Only "linear" compares features with those the task began with, logs it, and carries old sums."""
    sums = {}
    for drift in ("none", "linear"):
        learner = make_sema(
            model_name="finetune", head="ranpac", head_drift=drift, ranpac_dim=50, func_epoch=2
        )
        run_tasks(learner, 2)
        found = events(learner, "feature_drift")
        assert len(found) == (drift == "linear")
        sums[drift] = learner.closed_form.cross.sum(dim=0)
    assert found[0]["moved"] > 0 and found[0]["explained"] <= 1
    assert not torch.equal(sums["none"], sums["linear"])


def test_heads_do_not_change_what_is_trained(make_sema: Make) -> None:
    adapters = []
    for head in ("fc", "cosine", "ranpac"):
        learner = make_sema(model_name="finetune", head=head, ranpac_dim=50)
        adapters.append(moving(run_tasks(learner, 2)))
    assert same(adapters[0], adapters[1]) and same(adapters[0], adapters[2])


def test_the_mean_schedule_divides_alpha_by_the_number_of_an_adapter_s_tasks(make_sema: Make) -> None:
    keys = {"nested_lora_consolidation_alpha": 1.0, "nested_lora_consolidation_schedule": "mean"}
    learner = run_tasks(
        make_sema(
            **NESTED | {"nested_lora_freeze": "never"},
            nested_lora_use_consolidation=True,
            expansion="always",
            **keys,
        ),
        3,
    )
    found = {(e["task"], e["block"], e["adapter"]): e["alpha"] for e in events(learner, "consolidation")}
    newest = max(learner.network.growing)
    assert [found[task, newest, 0] for task in range(3)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert [found[task, newest, 1] for task in (1, 2)] == pytest.approx([1, 1 / 2])


@pytest.mark.parametrize("name", METHODS)
def test_scores_that_are_not_numbers_are_no_accuracy(name: str, make_sema: Make) -> None:
    """Whatever classifies, a network that gives NaN is not tested; the advice fits the run's precision."""
    learner = run_tasks(make_sema(**METHODS[name]), 1)
    learner.network.vit.norm.bias.data[0] = torch.nan
    learner.cache.limit_gb = 0  # what is stored belongs to the network before
    with pytest.raises(UserError, match="not finite") as caught:
        learner.evaluate()
    assert "fp32" not in str(caught.value) and "\n" not in str(caught.value)


def test_scores_beyond_the_largest_number_are_no_accuracy(make_sema: Make) -> None:
    """Features are fine; the classifier has grown without bound."""
    learner = run_tasks(make_sema(model_name="finetune"), 1)
    learner.head.tasks[0].weight.data.fill_(3e38)
    with pytest.raises(UserError, match="scores of the test images of task 0 are not finite"):
        learner.evaluate()


@pytest.mark.parametrize("head", ["cosine", "ranpac"])
def test_a_readout_takes_in_no_features_that_are_not_numbers(head: str, make_sema: Make) -> None:
    learner = make_sema(model_name="finetune", head=head, ranpac_dim=50, func_epoch=0, cache_gb=0)
    learner.network.vit.norm.bias.data[0] = torch.inf
    learner.begin_task(0)
    with pytest.raises(UserError, match="features of task 0's training images are not finite"):
        learner.train_task()


def test_weights_that_the_last_step_of_a_phase_ruined_end_the_run(make_sema: Make) -> None:
    """The loss was still a number then, and no further one would be computed."""
    learner = make_sema(model_name="finetune", ffn_adapter_type="adaptmlp")
    learner.begin_task(0)
    phase = FunctionalPhase(learner)
    last, (group, *_) = phase.epochs * phase.steps_per_epoch, phase.optimizer.groups

    def ruin(step: int, moved: dict[str, bool]) -> None:
        if step == last:
            group.parameters[0].data[0] = torch.nan

    phase.after_step = ruin
    with pytest.raises(UserError, match="Task 0 func: the weights of group adapter are not finite"):
        learner.run_phase(phase)
