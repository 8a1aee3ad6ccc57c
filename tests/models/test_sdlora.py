"""SD-LoRA and Gumbel CL-LoRA as a learner on tiny generated data: training, boundaries, gate, state."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.sdlora import GatedPhase, LoRAPhase, SDLoRA
from tests.conftest import events, run_tasks, saved_state, tensors
from utils.errors import Interrupted, UserError
from utils.gumbel_utils import sparsemax

GATE = {"lambda_sparsity": 0.01, "gumbel_anneal_rate": 0.8}
KEEP = {"growth_threshold": 0.0}
Make = Callable[..., SDLoRA]


@torch.no_grad()
def features(learner: SDLoRA, task: int = 0) -> Tensor:
    return learner.features_of(task, "test")


# --- SD-LoRA ------------------------------------------------------------------------------------------------


def test_what_learns_in_a_later_task(make_sdlora: Make) -> None:
    """The new direction, the magnitudes of all, the new rows; old directions and rows stay to the bit."""
    learner = run_tasks(make_sdlora(weight_decay=0.1, init_weight_decay=0.1), 1)
    before = tensors(learner)
    learner.begin_task(1)
    optimizer = learner.update_optimizer_and_scheduler(2)
    sizes = {group.name: sum(p.numel() for p in group.parameters) for group in optimizer.groups}
    assert sizes == {"lora": 6 * 4 * 64 * 2, "alpha": 2, "head": 2 * 65}
    learner.train_task()
    after = tensors(learner)
    magnitudes = after["backbone.magnitudes"]
    assert magnitudes[0] != before["backbone.magnitudes"][0] and magnitudes[1] != 0.8
    for name, tensor in before.items():
        was = after[name][tuple(slice(size) for size in tensor.shape)]
        assert torch.equal(was, tensor) == (name != "backbone.magnitudes"), name
    assert after["backbone.vit.blocks.3.attn.qkv.up"][..., 2:].abs().max() > 0
    assert learner.summary()["adapters"] == dict.fromkeys(range(6), 2)


def test_it_is_sd_lora_written_out(make_sdlora: Make) -> None:
    """Three tasks of SGD by hand, with autograd through the dense formula, learn the same."""
    learner = make_sdlora(sdlora_scaling="reset", init_epoch=1, epochs=1, scheduler="constant")
    plain = copy.deepcopy(learner.network.vit)
    for block in plain.blocks:
        block.attn.qkv = block.attn.qkv.qkv
    projections, old = learner.network.projections, []  # of each task: unit directions (L, 2, d, d)
    for task in range(3):
        learner.begin_task(task)
        a = torch.stack([p.new.down for p in projections]).detach().requires_grad_()  # (L, 2, r, d)
        b = torch.stack([p.new.up for p in projections]).detach().requires_grad_()  # (L, 2, d, r)
        head = copy.deepcopy(learner.modules["head"].tasks[-1])
        magnitudes = torch.full((task + 1,), 0.8, requires_grad=True)
        optimizer = torch.optim.SGD([magnitudes, a, b, *head.parameters()], lr=0.05, momentum=0.9)
        for images, targets, *_ in LoRAPhase(learner).batches(0, 0):
            weights = {}
            for i, (block, new) in enumerate(zip(plain.blocks, b @ a, strict=True)):
                q, v = magnitudes[-1] * new + sum(magnitudes[k] * old[k][i] for k in range(task))
                added = torch.cat([q, torch.zeros_like(q), v])
                weights[f"blocks.{i}.attn.qkv.weight"] = block.attn.qkv.weight + added
            logits = head(torch.func.functional_call(plain, weights, (images,)))
            optimizer.zero_grad()
            F.cross_entropy(logits, targets - 2 * task).backward()
            optimizer.step()
        sizes = a.norm(dim=(2, 3), keepdim=True) * b.norm(dim=(2, 3), keepdim=True)
        old.append((b @ a / sizes).detach())
        learner.train_task()
        products = torch.stack([p.up[..., -2:] @ p.down[:, -2:] for p in projections])
        for ours, expected in (
            (learner.network.magnitudes, magnitudes),
            (learner.modules["head"].tasks[-1].weight, head.weight),
            (products, b @ a),
        ):
            torch.testing.assert_close(ours.detach(), expected.detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("scaling", "jumps"), [("carry", False), ("reset", True)])
def test_carry_leaves_old_data_as_they_were_before_the_first_step(
    make_sdlora: Make, scaling: str, jumps: bool
) -> None:
    """At every boundary; "reset" jumps, as published."""
    learner = run_tasks(make_sdlora(sdlora_scaling=scaling), 1)
    for task in (1, 2):
        before = features(learner)
        learner.begin_task(task)
        difference = (features(learner) - before).abs().max()
        assert difference > 1e-3 if jumps else difference < 1e-5
        learner.train_task()


def test_the_gate_off_is_sd_lora_bit_for_bit(make_sdlora: Make) -> None:
    """Whatever the gate's keys say."""
    runs = [
        {},
        {"gumbel_tau_init": 9.0, "gumbel_anneal_rate": 0.5, "growth_threshold": 0.9},
        {"gumbel_gate": "off", "lambda_sparsity": 0.5},
    ]
    fingerprints = set()
    for changes in runs:
        learner = run_tasks(make_sdlora(**changes), 2)
        fingerprints.add(learner.fingerprint())
        assert all("tau" not in event for event in events(learner, "epoch"))
    assert len(fingerprints) == 1


def test_ranks_follow_the_schedule_for_any_number_of_tasks(make_sdlora: Make) -> None:
    """Beyond the twenty of the published code."""
    learner = make_sdlora(lora_rank=4, lora_rank_schedule=[[1, 3], [3, 1]], epochs=1)
    run_tasks(learner, 4)
    assert learner.network.ranks == [4, 3, 3, 1]
    assert learner.summary()["parameters"]["adapters"] == 6 * 4 * 64 * 11
    for _ in range(20):
        learner.grow()
        learner.network.freeze_newest()
    assert len(learner.adapters) == 24 and features(learner).isfinite().all()


@pytest.mark.parametrize(
    ("scaling", "init", "bound"),
    [
        ("carry", "auto", 1 / 8),
        ("reset", "auto", math.sqrt(3) / 8),
        ("reset", "torch_default", 1 / 8),
        ("carry", "kaiming_linear", math.sqrt(3) / 8),
    ],
)
def test_new_classifier_rows_are_uniform_up_to_a_bound(
    make_sdlora: Make, scaling: str, init: str, bound: float
) -> None:
    """For d = 64 inputs up to 1 / sqrt(d), or with "reset" as published up to sqrt(3 / d); bias zero."""
    learner = make_sdlora(sdlora_scaling=scaling, classifier_init=init)
    learner.begin_task(0)
    rows = learner.modules["head"].tasks[-1]
    assert rows.weight.numel() == 2 * 64 and not rows.bias.any()
    assert 0.9 * bound < rows.weight.abs().max() <= bound * (1 + 1e-6)
    assert rows.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # of a uniform one


def test_a_gate_with_one_adapter_is_sd_lora(make_sdlora: Make) -> None:
    """In the first task its weight is 1, its entropy 0: every tensor is the same to the bit."""
    plain, gated = (tensors(run_tasks(make_sdlora(**changes), 1)) for changes in ({}, GATE))
    assert gated.keys() - plain.keys() == {"gate.logits"} and gated["gate.logits"].tolist() == [0.0]
    assert all(torch.equal(tensor, gated[name]) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("scheduler", "first", "later"),
    [
        ("constant", [0.1, 0.1, 0.1], [0.2, 0.2, 0.2]),
        ("steplr", [0.1, 0.05, 0.05], [0.2, 0.02, 0.002]),
        ("cosine", [0.1, 0.0775, 0.0325], [0.2, 0.1525, 0.0575]),
    ],
)
def test_rates_of_first_and_later_tasks_and_their_schedules(
    make_sdlora: Make, scheduler: str, first: list[float], later: list[float]
) -> None:
    keys = {"init_lr": 0.1, "lrate": 0.2, "min_lr": 0.01}
    size = {"init_epoch": 3, "epochs": 3, "max_train_per_class": 4}
    steps = {"init_milestones": [1], "init_lr_decay": 0.5, "milestones": [1, 2], "lrate_decay": 0.1}
    learner = run_tasks(make_sdlora(**keys, **size, **steps, scheduler=scheduler), 2)
    assert [event["lr"]["lora"] for event in events(learner, "epoch")] == pytest.approx([*first, *later])


def test_weight_decay_of_first_and_later_tasks(make_sdlora: Make) -> None:
    """Without a gradient only weight decay moves: rows shrink by the task's own."""
    learner = make_sdlora(init_weight_decay=0.3, weight_decay=0.2, init_lr=0.5, lrate=0.5)
    for task, decay in enumerate((0.3, 0.2)):
        learner.begin_task(task)
        rows, optimizer = learner.modules["head"].tasks[-1].weight, learner.update_optimizer_and_scheduler(1)
        before = rows.detach().clone()
        for group in optimizer.groups:
            for parameter in group.parameters:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(rows.detach(), (1 - 0.5 * decay) * before)
        learner.network.freeze_newest()


def test_gradients_add_up_over_parts(make_sdlora: Make) -> None:
    """Three parts of a step, the noise of the gate in each the same."""
    whole, parts = (tensors(run_tasks(make_sdlora(**GATE, grad_accumulation=n), 2)) for n in (1, 3))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=1e-3)


# --- the gate in training -----------------------------------------------------------------------------------


def test_noise_and_temperature_step_by_step(make_sdlora: Make) -> None:
    """tau falls by the rate to its floor, starts again with every task; every step has noise of its own."""
    learner = make_sdlora(**GATE, gumbel_tau_init=2.0, gumbel_tau_final=1.0)
    learner.begin_task(0)
    before = torch.get_rng_state()
    learner.train_task()
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn from the global generator
    assert learner.method_state["tau"] == 1.0 and learner.progress.steps == 6
    learner.begin_task(1)
    assert learner.method_state["tau"] == 2.0
    phase, draws, taus = GatedPhase(learner), [], []
    for step in range(4):
        learner.progress.steps = step
        draws.append(phase.step_beta().detach())
        assert torch.equal(draws[-1], phase.step_beta())
        phase.after_step(step + 1, {})
        taus.append(learner.method_state["tau"])
    assert taus == pytest.approx([1.6, 1.28, 1.024, 1.0])
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert learner.beta().tolist() == [0.5, 0.5]  # without noise


@pytest.mark.parametrize("kind", ["global", "layer"])
def test_the_gate_learns_and_the_penalty_is_its_entropy(make_sdlora: Make, kind: str) -> None:
    learner = run_tasks(make_sdlora(gumbel_gate=kind, lambda_sparsity=0.3, **KEEP), 2)
    logits = learner.gate.logits
    assert logits.shape == ((2,) if kind == "global" else (6, 2)) and (logits != 0).any()
    torch.testing.assert_close(learner.beta().sum(dim=-1), torch.ones(logits.shape[:-1]))
    learner.begin_task(2)
    beta = torch.tensor([0.25, 0.75]) if kind == "global" else torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    penalty = GatedPhase(learner).penalty(beta).item()
    assert penalty == pytest.approx(0.3 * entropy / len(torch.atleast_2d(beta)))


def test_epoch_lines_have_the_published_form(make_sdlora: Make, caplog: pytest.LogCaptureFixture) -> None:
    """`Loss 1.234 (clf=1.200, sparse=0.034), tau=4.567, Train_accy ...`, whose parts add up."""
    with caplog.at_level("INFO", logger="nested_lora"):
        recorded = events(run_tasks(make_sdlora(**GATE), 2), "epoch")
    settings = "tau_init=5.0, tau_final=0.5, anneal_rate=0.8, lambda_sparsity=0.01"
    assert f"[Gumbel CL-LoRA] {settings}" in caplog.messages
    assert [event["tau"] for event in recorded] == pytest.approx([5 * 0.8**3, 5 * 0.8**6] * 2)
    assert recorded[0]["sparse"] == 0 < recorded[2]["sparse"] <= 0.01 * math.log(2)
    for e in recorded:
        assert e["clf"] + e["sparse"] == pytest.approx(e["loss"])
        parts = f"(clf={e['clf']:.3f}, sparse={e['sparse']:.3f}), tau={e['tau']:.3f}"
        loss = f"Loss {e['loss']:.3f} {parts}, Train_accy {e['train_accuracy']:.2f}"
        line = f"Task {e['task']}, Epoch {e['epoch']}/2 => {loss}"
        assert any(message.endswith(line) for message in caplog.messages)


# --- evaluation and state -----------------------------------------------------------------------------------


def test_evaluation_is_merged_and_its_weights_have_no_noise(make_sdlora: Make) -> None:
    learner = run_tasks(make_sdlora(**GATE, **KEEP), 2)
    beta = sparsemax(learner.gate.logits / 0.5)
    assert learner.evaluate() == learner.evaluate() and learner.network.is_merged
    images = learner.data.views(learner.data.indices(range(2), "test"), "test", None)
    merged = features(learner)
    learner.network.unmerge()
    with torch.no_grad():
        torch.testing.assert_close(learner.network(images, beta=beta), merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["off", "global", "layer"])
@pytest.mark.parametrize("open_task", [False, True])
def test_state_comes_back_in_a_fresh_learner(make_sdlora: Make, kind: str, open_task: bool) -> None:
    """After a task, and inside one; going on gives the same.

    So it does in a learner that was another one before, as in analyses and `eval.py --test`.
    """
    changes = {"gumbel_gate": kind, "lora_rank_schedule": [[1, 3]], **KEEP}
    learner = run_tasks(make_sdlora(**changes), 1)
    earlier, seen = saved_state(learner), features(learner)
    run_tasks(learner, 2)
    if open_task:
        learner.begin_task(2)
    saved = saved_state(learner)

    def go_on(one: SDLoRA) -> tuple[str, list[int], list[float], str]:
        """What it is, and what it becomes."""
        now = one.fingerprint(), list(one.adapters), features(one).flatten().tolist()
        torch.manual_seed(5)
        if not open_task:
            one.begin_task(2)
        one.train_task()
        return *now, one.fingerprint()

    expected, other = go_on(learner), make_sdlora(**changes)
    other.load_state(*earlier)
    assert torch.equal(features(other), seen)
    other.load_state(*saved)
    assert go_on(other) == expected


def test_a_checkpoint_of_another_shape_is_refused(make_sdlora: Make) -> None:
    saved = saved_state(run_tasks(make_sdlora(), 1))
    with pytest.raises(UserError, match="does not fit this configuration: gate.logits is missing"):
        make_sdlora(gumbel_gate="global").load_state(*saved)


def test_a_stop_while_batches_are_waited_for_is_one_between_two_steps(make_sdlora: Make) -> None:
    """Resumed from there, the task ends as it would have."""
    whole, stopped, again = run_tasks(make_sdlora(), 1).fingerprint(), make_sdlora(), make_sdlora()
    batches = stopped.data.batches

    def two_batches(*args: Any, **keys: Any) -> Iterator[Any]:
        yield from itertools.islice(batches(*args, **keys), 2)
        raise Interrupted

    stopped.data.batches = two_batches
    stopped.begin_task(0)
    with pytest.raises(Interrupted):
        stopped.train_task()
    again.load_state(*saved_state(stopped))
    assert again.progress.steps == 2
    again.train_task()
    assert again.fingerprint() == whole
