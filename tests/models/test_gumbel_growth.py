"""Conditional growth: which adapters stay, what the log and the gate's files say, and what is warned of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import SCHEMAS
from models.gumbel_growth import GateRecord, GateState, growth_lines, kept_adapters, symptoms
from models.sdlora import SDLoRA
from models.sdlora_config import SDLoRAConfig
from tests.conftest import TINY_SDLORA
from tests.models.test_sdlora import GATE, KEEP, events, run_tasks
from utils.config.loading import config_from_dict
from utils.errors import UserError
from utils.runs.tables import active_adapters_table

PRUNE = {"growth_threshold": 0.999}
Make = Callable[..., SDLoRA]


def make_config(**changes: Any) -> SDLoRAConfig:
    return config_from_dict(TINY_SDLORA | changes, SCHEMAS, "test").config


def test_pruning_frees_and_leaves_no_trace(make_sdlora: Make) -> None:
    """Parameters, logits, magnitudes and checkpoint shrink to what the kept adapters need."""
    learner = run_tasks(make_sdlora(**GATE, **PRUNE), 3)
    assert learner.adapters == [0] and learner.network.ranks == [2]
    counts = learner.summary()["parameters"]
    assert counts == {
        "adapters": 6 * 4 * 64 * 2,
        "magnitudes": 1,
        "gate": 1,
        "head": 6 * 65,
        "stored": 3072 + 2 + 390,
    }
    assert sum(t.numel() for t in learner.checkpoint_tensors().values()) == counts["stored"]
    assert torch.equal(learner.beta(), torch.ones(1))
    kept = run_tasks(make_sdlora(**GATE, **KEEP), 3)
    assert kept.adapters == [0, 1, 2] and kept.summary()["parameters"]["adapters"] == 3 * counts["adapters"]


def test_top_k_holds_at_most_k_and_exactly_k_once_they_are_there(make_sdlora: Make) -> None:
    learner = make_sdlora(**GATE, growth="top_k", growth_top_k=2, epochs=1)
    active = []
    for task in range(4):
        run_tasks(learner, 1, first=task)
        active.append(len(learner.adapters))
        assert learner.gate.logits.shape == learner.network.magnitudes.shape == (active[-1],)
    assert active == [1, 2, 2, 2]
    decisions = events(learner, "gate")
    assert [sum(event["pruning_mask"]) for event in decisions] == active
    for event, before in zip(decisions[2:], decisions[1:], strict=False):
        there = [*before["pruning_mask"], True]
        best = sorted((k for k, was in enumerate(there) if was), key=lambda k: -event["beta_values"][k])[:2]
        assert [k for k, kept in enumerate(event["pruning_mask"]) if kept] == sorted(best)


def state(beta: Any, task: int = 3, adapters: tuple[int, ...] = (0, 1, 2, 3)) -> GateState:
    return GateState(task, list(adapters), torch.tensor(beta))


def test_rules_of_growth() -> None:
    threshold = make_config(**GATE)
    assert kept_adapters(state([0.15, 0.32, 0.48, 0.05]), threshold) == [0, 1, 2]
    assert kept_adapters(state([0.0, 0.32, 0.57, 0.11]), threshold) == [0, 1, 2, 3]
    assert kept_adapters(state([[0.0, 0.0, 0.7, 0.3], [0.5, 0.5, 0.0, 0.0]]), threshold) == [
        0,
        1,
        2,
        3,
    ]  # the mean
    assert kept_adapters(state([1.0], 0, (0,)), make_config(**GATE, **PRUNE)) == [0]
    top = make_config(**GATE, growth="top_k", growth_top_k=2)
    assert kept_adapters(state([0.15, 0.32, 0.48, 0.05]), top) == [1, 2]
    assert kept_adapters(state([0.0, 0.0, 0.0, 1.0]), top) == [0, 3]  # of equal ones the older
    assert kept_adapters(state([0.4, 0.6], 1, (0, 1)), top) == [0, 1]


def test_growth_lines_have_the_published_form() -> None:
    config, gate = make_config(**GATE), state([0.15, 0.32, 0.48, 0.05])
    assert growth_lines(gate, [0, 1, 2], config) == [
        "[Conditional Growth] Task 3 - Beta values: [0.15 0.32 0.48 0.05]",
        "[Conditional Growth] Current task beta: 0.0500, threshold: 0.1000",
        "[Conditional Growth] ✗ Pruning adapter for task 3 (beta=0.0500 <= 0.1000)",
        "[Conditional Growth] Active adapters: 3/4 (75.0%)",
    ]
    assert growth_lines(state([0.45, 0.55], 1, (0, 1)), [0, 1], config) == [
        "[Conditional Growth] Task 1 - Beta values: [0.45 0.55]",
        "[Conditional Growth] Current task beta: 0.5500, threshold: 0.1000",
        "[Conditional Growth] ✓ Keeping adapter for task 1 (beta=0.5500 > 0.1000)",
        "[Conditional Growth] Active adapters: 2/2 (100.0%)",
    ]
    top = make_config(**GATE, growth="top_k", growth_top_k=2)
    assert growth_lines(state([0.2, 0.3, 0.5], 4, (0, 3, 4)), [1, 2], top) == [
        "[Conditional Growth] Task 4 - Beta values: [0.20 0.00 0.00 0.30 0.50]",
        "[Conditional Growth] Current task beta: 0.5000, top_k: 2",
        "[Conditional Growth] ✗ Pruning adapter for task 0 (beta=0.2000 not among the 2 greatest)",
        "[Conditional Growth] ✓ Keeping adapter for task 4 (beta=0.5000 among the 2 greatest)",
        "[Conditional Growth] Active adapters: 2/5 (40.0%)",
    ]


@pytest.mark.parametrize("kind", ["global", "layer"])
def test_the_files_read_as_the_users_guide_reads_them(make_sdlora: Make, tmp_path: Path, kind: str) -> None:
    """In `filepath` and in the run folder; JSON says the same. Weights sum to one, pruned adapters are zero."""
    learner = make_sdlora(
        **GATE, growth="top_k", growth_top_k=2, gumbel_gate=kind, filepath=str(tmp_path / "CF100" / "")
    )
    run_tasks(learner, 4)
    for t in range(4):
        for folder in (tmp_path / "CF100", learner.log.folder / "gate"):
            data = torch.load(folder / f"beta_values_task_{t}.pt", weights_only=True)
            plain = json.loads((folder / f"beta_values_task_{t}.json").read_text())
            assert plain == {"task": t} | {name: tensor.tolist() for name, tensor in data.items()}
        betas, mask = data["beta_values"].numpy(), data["pruning_mask"][: t + 1]
        assert betas.shape == (t + 1,) and betas.sum() == pytest.approx(1)
        active = mask.sum().item()
        assert f"{t:4d} | {active:15d} | {t + 1 - active:6d}".endswith(
            f"{min(2, t + 1)} |      {max(0, t - 1)}"
        )
        assert ("beta_values_by_layer" in data) == (kind == "layer")
        if kind == "layer":
            torch.testing.assert_close(data["beta_values_by_layer"].mean(dim=0), data["beta_values"])
            assert data["beta_values_by_layer"].shape == (6, t + 1)
    assert [event["beta_values"] for event in events(learner, "gate")][-1] == plain["beta_values"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_weights_are_those_before_the_decision(make_sdlora: Make) -> None:
    """As recorded they sum to one, although what fell is gone from the network."""
    learner = run_tasks(make_sdlora(**GATE, **PRUNE), 2)
    (_, event) = events(learner, "gate")
    assert sum(event["beta_values"]) == pytest.approx(1) and event["beta_values"][1] > 0
    assert event["pruning_mask"] == [True, False] and learner.adapters == [0]


def test_what_was_pruned_earlier_keeps_its_place() -> None:
    record = GateRecord.of(state([0.2, 0.3, 0.5], 4, (0, 3, 4)), [1, 2])
    assert record.numbers() == {
        "beta_values": pytest.approx([0.2, 0, 0, 0.3, 0.5]),
        "pruning_mask": [False, False, False, True, True],
    }


def test_the_table_of_active_adapters_is_the_guides(
    make_sdlora: Make, caplog: pytest.LogCaptureFixture
) -> None:
    masks = {t: [True] * t + [t < 3] for t in range(4)}
    assert active_adapters_table(masks) == (
        "Task | Active Adapters | Pruned | Percentage\n"
        "--------------------------------------------------\n"
        "   1 |               2 |      0 | 100.0%\n"
        "   2 |               3 |      0 | 100.0%\n"
        "   3 |               3 |      1 |  75.0%"
    )
    learner = run_tasks(make_sdlora(**GATE, **PRUNE), 2)
    with caplog.at_level("INFO", logger="nested_lora"):
        learner.close_run()
    assert "   1 |               1 |      1 |  50.0%" in caplog.messages[-1]


def warned(beta: Any, kept: list[int], tau: float = 0.5, steps: int = 800, **changes: Any) -> str:
    task = (torch.tensor(beta).shape[-1]) - 1
    gate = state(beta, task, tuple(range(task + 1)))
    return "\n".join(
        symptoms(gate, kept, make_config(**GATE | {"gumbel_anneal_rate": 0.999} | changes), tau, steps)
    )


def test_the_guides_symptoms_are_warned_of_and_only_they() -> None:
    assert warned([0.1, 0.7, 0.2], [0, 1, 2]) == ""
    assert warned([1.0], [0]) == ""
    assert warned([0.24, 0.25, 0.26, 0.25], [0, 1, 2, 3]) == (
        "[Gumbel CL-LoRA] beta values are almost uniform: increase lambda_sparsity (now 0.01)"
    )
    few = [0.4, 0.5] + [0.0] * 7 + [0.1]
    assert "only 2 of 10 are kept: lower growth_threshold (now 0.1)" in warned(few, [0, 1])
    assert warned(few, [0, 1], growth="top_k") == ""
    assert "all adapters but the first were pruned: lower growth_threshold" in warned([0.9, 0.05, 0.05], [0])
    assert warned([0.95, 0.05], [0]) == ""  # one is too few to tell
    hot = warned([0.2, 0.8], [0, 1], tau=3.5, steps=800)
    assert (
        "tau = 3.500 at the end of task 1, which should be near 0.5: lower gumbel_anneal_rate (now 0.999; "
        in hot
    )
    rate = float(hot.split("now 0.999; ")[1].split(" ")[0])
    assert 5.0 * rate**800 <= 0.5 < 5.0 * (rate + 1e-3) ** 800
    assert warned([0.2, 0.8], [0, 1], tau=0.7) == ""
    assert warned([0.2, 0.8], [0, 1], tau=5.0, steps=0) == ""


def test_warnings_reach_the_log_of_a_run(make_sdlora: Make, caplog: pytest.LogCaptureFixture) -> None:
    learner = make_sdlora(lambda_sparsity=0.01, gumbel_anneal_rate=0.999, lrate=1e-6)
    with caplog.at_level("WARNING", logger="nested_lora"):
        run_tasks(learner, 2)
    assert any("almost uniform" in message for message in caplog.messages)
    assert any("should be near 0.5" in message for message in caplog.messages)


def test_losses_that_are_not_numbers_name_the_gates_keys_too(
    make_sdlora: Make, caplog: pytest.LogCaptureFixture
) -> None:
    learner = make_sdlora(**GATE, init_lr=999, init_weight_decay=999)
    learner.begin_task(0)
    with (
        caplog.at_level("WARNING", logger="nested_lora"),
        pytest.raises(UserError, match="not finite.*lower the learning rates"),
    ):
        learner.train_task()
    (message,) = {text for text in caplog.messages if "gradients are not finite" in text}
    assert "lambda_sparsity (now 0.01)" in message and "gumbel_anneal_rate" in message
