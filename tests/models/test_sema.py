"""SEMA as a learner on tiny data: what learns when, growth, traces, consolidation, reuse of features."""

import json
import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backbone.frozen_block import is_learning
from models.sema import SEMA
from models.vit.activations import Images
from models.vit.training import FunctionalPhase
from tests.conftest import events, run_tasks, tensors
from utils.errors import Interrupted

Make = Callable[..., SEMA]
GROW, STAY = {"exp_threshold": 0.0}, {"exp_threshold": 1e9}  # every batch is novel; none is


def recording(learner: SEMA) -> bool:
    """Whether the step that comes next records errors of descriptors."""
    return bool(learner.progress.finished) and "descriptors" in learner.progress.finished[-1]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of tensors that differ, the counts of tasks aside."""
    names = [name for name in before if not name.endswith("tasks_learned")]
    return {name for name in names if not torch.equal(before[name], after[name])}


def test_groups_are_a_partition_with_the_configured_rates(make_sema: Make) -> None:
    """Every learning tensor but the descriptors' is in exactly one of slow, fast, other."""
    learner = make_sema(nested_lora_lr_fast=0.02, nested_lora_lr_slow=0.003, init_lr=0.004)
    learner.begin_task(0)
    optimizer = learner.update_optimizer_and_scheduler(2)
    assert optimizer.lrs == {"slow": 0.003, "fast": 0.02, "other": 0.004}
    grouped = [id(p) for group in optimizer.groups for p in group.parameters]
    learning = {id(p) for p in learner.modules.parameters() if p.requires_grad}
    descriptors = {id(p) for p in learner.network.descriptor_parameters()}
    assert len(grouped) == len(set(grouped)) and set(grouped) == learning - descriptors
    functional = [block.adapters[0].functional for block in learner.network.modules_by_block.values()]
    for group in optimizer.groups[:2]:
        own = {id(p) for nested in functional for p in getattr(nested, group.name).parameters()}
        assert {id(p) for p in group.parameters} == own


def test_the_table_of_groups_is_logged_at_the_start_of_every_phase(
    make_sema: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="nested_lora"):
        run_tasks(make_sema(**STAY), 2)
    tables = [message for message in caplog.messages if "tensors" in message and "parameters" in message]
    phases = [message for message in caplog.messages if re.search(" epochs? of ", message)]
    assert tables == phases and len(phases) == 3  # func and rd of task 0, func of task 1
    assert "slow" in tables[0] and "fast" in tables[0] and "other" in tables[0] and "rd" in tables[1]


def test_nothing_grown_trains_only_the_new_classes(make_sema: Make) -> None:
    """freeze "task": without growth a later task moves only the newest classifier rows, no older bit.

    The scan says how near every block came to growing.
    """
    learner = run_tasks(make_sema(nested_lora_use_consolidation=False, weight_decay=0.1, **STAY), 1)
    before = tensors(learner)
    run_tasks(learner, 2)
    assert changed(before, tensors(learner)) == set()
    assert learner.head.tasks[1].weight.shape[0] == 2
    assert learner.network.adapters_per_block() == dict.fromkeys(range(6), 1)
    (scan,) = events(learner, "scan")
    assert scan["task"] == 1 and set(scan["highest_z"]) == {"4", "5"}
    assert all(z > 0 for z in scan["highest_z"].values())


def test_growth_is_once_a_block_and_task_shallowest_first_and_moves_nothing_older(make_sema: Make) -> None:
    """freeze "task": growth leaves task 0's parts bit-identical but for longer routers."""
    learner = run_tasks(make_sema(nested_lora_use_consolidation=False, weight_decay=0.1, **GROW), 1)
    before = tensors(learner)
    after = tensors(run_tasks(learner, 2))
    growths = [(event["task"], event["block"], event["adapters"]) for event in events(learner, "growth")]
    assert growths == [(1, 4, 2), (1, 5, 2)]
    phases = [(e["phase"], e["block"]) for e in events(learner, "epoch") if e["task"] == 1]
    assert list(dict.fromkeys(phases)) == [("func", 4), ("rd", 4), ("func", 5), ("rd", 5)]
    assert not any(is_learning(modules) for modules in learner.network.modules_by_block.values())
    routers = {name for name in before if ".router." in name}
    longer = {name for name in before if after[name].shape != before[name].shape}
    assert {name for name in longer if not name.endswith("tasks_learned")} == routers
    assert changed(before, after | {name: after[name][:1] for name in routers}) == set()


def test_freeze_never_lets_both_branches_of_all_adapters_go_on(make_sema: Make) -> None:
    """With and without growth, while descriptors and router rows of earlier tasks stay."""
    for threshold in (GROW, STAY):
        changes = {"nested_lora_use_consolidation": False, "nested_lora_update_interval_slow": 1, **threshold}
        learner = run_tasks(make_sema(nested_lora_freeze="never", **changes), 1)
        before = tensors(learner)
        after = tensors(run_tasks(learner, 2))
        same_rows = {name: after[name][: len(t)] if t.dim() else after[name] for name, t in before.items()}
        moved = changed(before, same_rows)
        functional = {name for name in before if ".functional." in name}
        assert moved == functional


@pytest.mark.parametrize("interval", [1, 3])
def test_the_trace_shows_the_interval(make_sema: Make, interval: int) -> None:
    """Steps that do not update slow move it by exactly zero; the others by more."""
    learner = run_tasks(make_sema(nested_lora_update_interval_slow=interval, func_epoch=2, **STAY), 1)
    trace = events(learner, "slow_step")
    assert [event["step"] for event in trace] == list(range(1, 9))
    assert [event["updated"] for event in trace] == [step % interval == 0 for step in range(1, 9)]
    assert all((event["moved"] > 0) == event["updated"] for event in trace)


@pytest.mark.parametrize("rule", ["weights", "function"])
def test_consolidation_is_logged_with_norms_and_drift(
    make_sema: Make, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nested_lora")
    learner = run_tasks(
        make_sema(nested_lora_consolidation=rule, nested_lora_consolidation_alpha=0.2, **STAY), 2
    )
    consolidated = events(learner, "consolidation")
    assert [(e["task"], e["block"]) for e in consolidated] == [(0, block) for block in range(6)]
    assert all(e["alpha"] == 0.2 and e["rule"] == rule and 0 < e["drift"] <= 1.5 for e in consolidated)
    first, second = [line for line in caplog.messages if "onsolidate" in line]
    assert "alpha=0.2" in first and "task 0" in first and "Nothing" in second and "task 1" in second
    norms = events(learner, "norms")
    assert {(e["task"], e["when"]) for e in norms} == {(0, "before"), (0, "after"), (1, "after")}
    for modules in learner.network.modules_by_block.values():
        assert torch.count_nonzero(modules.adapters[0].functional.fast.up_proj.weight) == 0


def test_consolidation_does_not_depend_on_the_batch_size(make_sema: Make) -> None:
    """It fits on some tokens of an image: the same ones, however many images pass at once."""
    found = []
    for size in (64, 3):
        changes = {"nested_lora_consolidation_alpha": 0.2, "max_train_per_class": 4, "image_size": 112}
        learner = run_tasks(make_sema(eval_batch_size=size, **changes, **STAY), 1)
        found.append((tensors(learner), [event["drift"] for event in events(learner, "consolidation")]))
    (whole, drift), (parts, drift_of_parts) = found
    assert drift_of_parts == pytest.approx(drift, rel=1e-4)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-7)


def test_adapters_in_growing_blocks_only_and_fast_kept_without_consolidation(make_sema: Make) -> None:
    learner = run_tasks(make_sema(adapter_blocks="growing", nested_lora_use_consolidation=False, **GROW), 2)
    assert learner.network.adapters_per_block() == {4: 2, 5: 2} and events(learner, "consolidation") == []
    adapters = [adapter for m in learner.network.modules_by_block.values() for adapter in m.adapters]
    assert all(adapter.functional.fast.up_proj.weight.any() for adapter in adapters)


@pytest.mark.parametrize(
    ("kind", "matched", "more"), [("nested_lora", "adaptmlp", 6 * 64), ("nested_lora_linear", "lora", 0)]
)
def test_one_branch_of_twice_the_rank_has_the_parameters_of_two(
    make_sema: Make, kind: str, matched: str, more: int
) -> None:
    """Two branches with biases have one more output bias an adapter; one branch has no norms and no trace."""
    nested = run_tasks(make_sema(ffn_adapter_type=kind, nested_lora_rank=4, **STAY), 1)
    assert events(nested, "slow_step") and events(nested, "consolidation")
    single = run_tasks(make_sema(ffn_adapter_type=matched, ffn_num=8, **STAY), 1)
    assert [group.name for group in single.update_optimizer_and_scheduler(1).groups] == ["other"]
    assert events(single, "norms") == [] and events(single, "slow_step") == []
    counts = [learner.summary()["parameters"]["adapters"] for learner in (nested, single)]
    assert counts[0] - counts[1] == more


REPEATED = {"rd_views": 1, "rd_epoch": 6, "rd_lr": 0.05}  # training views come again
ONCE = {  # no view comes again, or there is no other
    "new": {"rd_views": 0, "rd_epoch": 6},
    "as many as epochs": {"rd_views": 2, "rd_epoch": 2},
    "the only one": {"rd_views": 1, "rd_epoch": 6, "augmentation": "none"},
}


def errors_of(learner: SEMA, block: int, means: Tensor) -> Tensor:
    """Mean squared reconstruction errors of the newest descriptor of a block, written out."""
    rd = learner.network.modules_by_block[block].adapters[-1].rd
    code = means @ rd.encoder.weight.T + rd.encoder.bias
    return (means - code @ rd.decoder.weight.T - rd.decoder.bias).square().mean(dim=1).detach()


def train_first_task(learner: SEMA, block: int) -> tuple[Tensor, Tensor]:
    """Train task 0; what the block's descriptor read (images, d): with gradients, and to record errors."""
    read: dict[bool, list[Tensor]] = {True: [], False: []}
    learner.begin_task(0)
    rd = learner.network.modules_by_block[block].adapters[0].rd
    rd.register_forward_hook(
        lambda module, inputs, _: read[torch.is_grad_enabled()].append(inputs[0].clone())
    )
    learner.train_task()
    return torch.cat(read[True]), torch.cat(read[False])


def seen_before(rows: Tensor, others: Tensor) -> Tensor:
    """Whether each row is one of the others up to rounding, bool (B,)."""
    return (torch.cdist(rows, others) < 1e-4).any(dim=1)


@pytest.mark.parametrize(
    ("changes", "errors"),
    [
        ({}, 64),  # as many as the records hold
        ({"rd_views": 2}, 64),
        ({"cache_views": 2}, 64),
        ({"rd_views": 6, "cache_views": 2}, 64),  # six epochs of two views
        ({"rd_epoch": 3, "buffer_size": 500}, 3 * 32),  # as many as training would give
    ],
)
def test_recorded_errors_are_of_views_that_training_never_saw(
    make_sema: Make, changes: dict[str, int], errors: int
) -> None:
    """They are the trained descriptor's, with trained views stored or not."""
    learner = make_sema(**REPEATED | changes, **STAY)
    trained, recorded = train_first_task(learner, 4)
    record = learner.network.modules_by_block[4].adapters[0].rd_loss_record
    assert len(record) == errors and not seen_before(recorded, trained).any()
    torch.testing.assert_close(record.errors, errors_of(learner, 4, recorded))


@pytest.mark.parametrize("case", ONCE)
def test_where_no_view_comes_again_errors_are_recorded_in_training(make_sema: Make, case: str) -> None:
    """As published: the last errors that training saw, each measured before the step that it led to."""
    learner = make_sema(**ONCE[case], **STAY)
    trained, recorded = train_first_task(learner, 4)
    assert torch.equal(trained, recorded)
    assert len(learner.network.modules_by_block[4].adapters[0].rd_loss_record) == 64


def test_new_views_of_seen_images_are_as_new_as_what_was_recorded(make_sema: Make) -> None:
    """z-scores of the task's own images in further views are those of a normal sample, about 0.8."""
    learner = run_tasks(make_sema(**REPEATED | {"rd_epoch": 60, "optimizer": "adam"}, **STAY), 1)
    further = learner.inputs.fresh((7,)).take(learner.data.indices(learner.classes, "train"))
    means = learner.network.token_means(further, 0, [4, 5])
    assert all(0.5 < learner.network.modules_by_block[block].novelty(means[block]) < 1.2 for block in (4, 5))


def test_what_z_scores_compare_with_is_in_the_record(make_sema: Make) -> None:
    """One line for each trained descriptor: how many errors, of which views, their mean and deviation."""
    learner = run_tasks(make_sema(**REPEATED, **GROW), 2)
    found = events(learner, "records")
    places = [(0, 4, 0), (0, 5, 0), (1, 4, 1), (1, 5, 1)]
    assert [(e["task"], e["block"], e["adapter"]) for e in found] == places
    for event in found:
        record = learner.network.modules_by_block[event["block"]].adapters[event["adapter"]].rd_loss_record
        numbers = 64, float(record.mean), float(record.stddev)
        assert (event["errors"], event["mean"], event["std"]) == numbers and event["views"] == "new"
    learner = run_tasks(make_sema(rd_views=0, **STAY), 1)
    assert [event["views"] for event in events(learner, "records")] == ["training"] * 2


def test_both_engines_record_the_same_errors(make_sema: Make) -> None:
    records = []
    for engine in ("fast", "reference"):
        learner = run_tasks(make_sema(engine=engine, **REPEATED, **STAY), 1)
        records.append(learner.network.modules_by_block[5].adapters[0].rd_loss_record.errors.clone())
    torch.testing.assert_close(*records, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("task", [0, 1])
def test_stopped_while_errors_are_recorded_ends_the_same(make_sema: Make, task: int) -> None:
    """In task 0 and after a growth: nothing is recorded twice or lost."""
    changes = {**REPEATED, "eval_batch_size": 16, **GROW}  # four batches of new views
    whole = run_tasks(make_sema(**changes), 2)
    asked: list[int] = []

    def at_the_third_batch() -> bool:
        if learner.task == task and recording(learner):
            asked.append(task)
        return len(asked) == 3

    learner = make_sema(at_the_third_batch, **changes)
    with pytest.raises(Interrupted):
        run_tasks(learner, 2)
    assert learner.task == task and recording(learner)
    state = learner.state()
    resumed = make_sema(**changes)
    resumed.load_state(*state)
    resumed.train_task()
    assert run_tasks(resumed, 2).fingerprint() == whole.fingerprint()


def test_old_classes_take_no_part_in_the_loss(make_sema: Make) -> None:
    """Cross-entropy over the newest rows equals cross-entropy with older logits at minus infinity."""
    learner = run_tasks(make_sema(**STAY), 1)
    learner.begin_task(1)
    batch = next(learner.inputs.read(1, Images(learner.data, "train", (1,), learner.device), (1, 1, 0, 0), 8))
    logits = learner.classify(learner.features(batch.inputs))
    logits[:, :2] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, batch.targets)
    torch.testing.assert_close(FunctionalPhase(learner).loss(batch).loss, expected)


def test_no_drawn_view_outlives_its_task_where_no_epoch_reads_one(make_sema: Make) -> None:
    """Blocks that grow in every task are scanned for it, also where nothing is trained then."""
    idle = {"func_epoch": 0, "rd_epoch": 0, "expansion": "always", "adapter_blocks": "growing"}
    learner = run_tasks(make_sema(**idle), 2)
    assert learner.method_state["grown"] == [4, 5]
    about = [json.loads(path.read_text()) for path in learner.cache.root.rglob("about.json")]
    assert about and not [each for each in about if each["view"] is not None]
