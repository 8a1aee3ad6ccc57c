"""Conditional growth: which adapters stay, what log and files say, what is warned of, and the figures."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from models import SCHEMAS
from models.gumbel_growth import GateDecision, active_adapters_table, decide, gate_figures
from models.sdlora import SDLoRA, SDLoRAConfig
from tests.conftest import TINY_SDLORA, events, run_tasks
from tests.drawn import assert_readable
from tests.models.test_sdlora import GATE, KEEP
from utils.config.loading import config_from_dict
from utils.errors import UserError
from utils.plotting import STYLE

PRUNE = {"growth_threshold": 0.999}
TOP_2 = {"growth": "top_k", "growth_top_k": 2}
Make = Callable[..., SDLoRA]


def make_config(**changes: Any) -> SDLoRAConfig:
    return config_from_dict(TINY_SDLORA | GATE | changes, SCHEMAS, "test").config


def decided(beta: Any, adapters: tuple[int, ...] | None = None, **changes: Any) -> GateDecision:
    weights = torch.tensor(beta)
    adapters = tuple(range(weights.shape[-1])) if adapters is None else adapters
    return decide(adapters[-1], adapters, weights, make_config(**changes))


# --- decisions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "changes", "kept"),
    [
        ([0.15, 0.32, 0.48, 0.05], {}, [0, 1, 2]),
        ([0.0, 0.32, 0.57, 0.11], {}, [0, 1, 2, 3]),
        ([[0.0, 0.0, 0.7, 0.3], [0.5, 0.5, 0.0, 0.0]], {}, [0, 1, 2, 3]),  # the mean over layers
        ([1.0], PRUNE, [0]),
        ([0.15, 0.32, 0.48, 0.05], TOP_2, [1, 2]),
        ([0.0, 0.0, 0.0, 1.0], TOP_2, [0, 3]),  # of equal ones the older
        ([0.4, 0.6], TOP_2, [0, 1]),
    ],
)
def test_rules_of_growth(beta: Any, changes: dict[str, Any], kept: list[int]) -> None:
    assert decided(beta, **changes).kept == kept


def test_pruning_frees_and_leaves_no_trace(make_sdlora: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Network, logits and counts shrink to the kept adapters; the record is of the weights before."""
    with caplog.at_level("WARNING", logger="nested_lora"):
        learner = run_tasks(make_sdlora(**GATE, **PRUNE), 3)
    assert any("all adapters but the first were pruned" in message for message in caplog.messages)
    assert learner.adapters == [0] and learner.network.ranks == [2] and learner.beta().tolist() == [1]
    stored, owners = learner.summary()["parameters"]["stored"], 2  # of the two rank-one terms left
    assert sum(t.numel() for t in learner.learned_tensors().values()) == stored + owners
    event = events(learner, "gate")[1]
    assert event["pruning_mask"] == [True, False] and event["beta_values"][1] > 0
    assert sum(event["beta_values"]) == pytest.approx(1)
    assert run_tasks(make_sdlora(**GATE, **KEEP), 3).adapters == [0, 1, 2]


# --- log and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "adapters", "changes", "lines"),
    [
        (
            [0.15, 0.32, 0.48, 0.05], (0, 1, 2, 3), {},
            """Task 3 - Beta values: [0.15 0.32 0.48 0.05]
               Current task beta: 0.0500, threshold: 0.1000
               ✗ Pruning adapter for task 3 (beta=0.0500 <= 0.1000)
               Active adapters: 3/4 (75.0%)""",
        ),
        (
            [0.45, 0.55], (0, 1), {},
            """Task 1 - Beta values: [0.45 0.55]
               Current task beta: 0.5500, threshold: 0.1000
               ✓ Keeping adapter for task 1 (beta=0.5500 > 0.1000)
               Active adapters: 2/2 (100.0%)""",
        ),
        (
            [0.2, 0.3, 0.5], (0, 3, 4), TOP_2,
            """Task 4 - Beta values: [0.20 0.00 0.00 0.30 0.50]
               Current task beta: 0.5000, top_k: 2
               ✗ Pruning adapter for task 0 (beta=0.2000 not among the 2 greatest)
               ✓ Keeping adapter for task 4 (beta=0.5000 among the 2 greatest)
               Active adapters: 2/5 (40.0%)""",
        ),
    ],
    ids=["pruned", "kept", "top_k"],
)  # fmt: skip
def test_log_lines_have_the_published_form(
    beta: list[float], adapters: tuple[int, ...], changes: dict[str, Any], lines: str
) -> None:
    """An adapter pruned earlier keeps its place."""
    expected = [f"[Conditional Growth] {line.strip()}" for line in lines.splitlines()]
    assert decided(beta, adapters, **changes).lines(make_config(**changes)) == expected


@pytest.mark.parametrize("kind", ["global", "layer"])
def test_the_files_read_as_the_users_guide_reads_them(make_sdlora: Make, tmp_path: Path, kind: str) -> None:
    """In `filepath` and in the run folder; JSON and event say the same. Weights sum to one, two are kept."""
    learner = make_sdlora(**GATE, **TOP_2, gumbel_gate=kind, filepath=str(tmp_path / "CF100" / ""))
    run_tasks(learner, 4)
    assert learner.gate.logits.shape[-1] == len(learner.network.magnitudes) == len(learner.adapters) == 2
    for t, event in enumerate(events(learner, "gate")):
        for folder in (tmp_path / "CF100", learner.log.folder / "gate"):
            data = torch.load(folder / f"beta_values_task_{t}.pt", weights_only=True)
            plain = json.loads((folder / f"beta_values_task_{t}.json").read_text())
            assert plain == {"task": t} | {name: tensor.tolist() for name, tensor in data.items()}
            assert plain.items() <= event.items()
        betas, mask = data["beta_values"].numpy(), data["pruning_mask"][: t + 1]
        assert (
            betas.shape == (t + 1,) and betas.sum() == pytest.approx(1) and mask.sum().item() == min(2, t + 1)
        )
        assert ("beta_values_by_layer" in data) == (kind == "layer")
        if kind == "layer":
            assert data["beta_values_by_layer"].shape == (6, t + 1)
            torch.testing.assert_close(data["beta_values_by_layer"].mean(dim=0), data["beta_values"])
    assert not list(tmp_path.rglob("*.tmp"))


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


# --- warnings -----------------------------------------------------------------------------------------------

FEW = [0.4, 0.5] + [0.0] * 7 + [0.1]


@pytest.mark.parametrize(
    ("beta", "kept", "tau", "changes", "expected"),
    [
        ([0.1, 0.7, 0.2], [0, 1, 2], 0.5, {}, []),
        ([1.0], [0], 0.5, {}, []),
        ([0.24, 0.25, 0.26, 0.25], [0, 1, 2, 3], 0.5, {}, ["uniform", "lambda_sparsity (now 0.01)"]),
        (FEW, [0, 1], 0.5, {}, ["only 2 of 10", "growth_threshold (now 0.1)"]),
        (FEW, [0, 1], 0.5, {"growth": "top_k"}, []),
        ([0.9, 0.05, 0.05], [0], 0.5, {}, ["all adapters but the first", "growth_threshold"]),
        ([0.95, 0.05], [0], 0.5, {}, []),  # one is too few to tell
        ([0.2, 0.8], [0, 1], 0.7, {}, []),
        ([0.2, 0.8], [0, 1], 3.5, {}, ["tau = 3.500", "gumbel_anneal_rate (now 0.999", "gumbel_tau_init"]),
    ],
)
def test_the_guides_symptoms_are_warned_of_and_only_they(
    beta: list[float], kept: list[int], tau: float, changes: dict[str, Any], expected: list[str]
) -> None:
    decision = GateDecision(len(beta) - 1, list(range(len(beta))), torch.tensor(beta), kept)
    text = "\n".join(decision.warnings(make_config(gumbel_anneal_rate=0.999, **changes), tau, steps=800))
    assert all(words in text for words in expected) and bool(text) == bool(expected)
    if tau == 3.5:  # the named rate gets to the final temperature
        rate = float(text.split("now 0.999; ")[1].split(" ")[0])
        assert 5.0 * rate**800 <= 0.5 < 5.0 * (rate + 1e-3) ** 800


def test_losses_that_are_not_numbers_name_the_gates_keys_too(
    make_sdlora: Make, caplog: pytest.LogCaptureFixture
) -> None:
    learner = make_sdlora(**GATE, init_lr=999, init_weight_decay=999)
    with caplog.at_level("WARNING", logger="nested_lora"), pytest.raises(UserError, match="not finite"):
        run_tasks(learner, 1)
    (message,) = {text for text in caplog.messages if "gradients are not finite" in text}
    assert "lambda_sparsity (now 0.01)" in message and "gumbel_anneal_rate" in message


# --- figures ------------------------------------------------------------------------------------------------

EVENTS = [
    {"task": 0, "beta_values": [1.0], "pruning_mask": [True]},
    {"task": 1, "beta_values": [0.95, 0.05], "pruning_mask": [True, False]},
    {
        "task": 2, "beta_values": [0.4, 0.0, 0.6], "pruning_mask": [False, False, True],
        "beta_values_by_layer": [[0.2, 0.0, 0.8], [0.6, 0.0, 0.4]],
    },
]  # fmt: skip


def synthetic_events(tasks: int, layers: int = 12) -> list[dict[str, Any]]:
    """The `gate` events of a run that prunes about half of its adapters."""
    draw, mask, found = random.Random(tasks), [], []
    for t in range(tasks):
        rows = [[draw.random() * was for was in [*mask, True]] for _ in range(layers)]
        by_layer = [[value / sum(row) for value in row] for row in rows]
        mask = [*mask, t == 0 or draw.random() < 0.5]
        beta = np.mean(by_layer, axis=0).tolist()
        found.append({"task": t, "beta_values": beta, "pruning_mask": mask, "beta_values_by_layer": by_layer})
    return found


def figures_of(gates: list[dict[str, Any]], about: str = "run") -> dict[str, Figure]:
    with mpl.rc_context(STYLE):
        return gate_figures([{"event": "gate", **event} for event in gates], about)


def drawn(figure: Figure) -> tuple[dict[tuple[int, int], str], set[tuple[int, int]]]:
    """The numbers of a heat map by (column, row), and the cells that are crossed out."""
    axes = figure.axes[0]
    numbers = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    return numbers, {(round(np.mean(x.get_xdata())), round(np.mean(x.get_ydata()))) for x in axes.lines}


def test_heat_maps_show_present_adapters_and_cross_out_pruned_ones() -> None:
    """Adapter 1 was pruned after task 1, so its cell in row 2 is empty; adapter 0 is pruned after task 2."""
    figures = figures_of(EVENTS)
    numbers, crosses = drawn(figures["beta_heatmap.png"])
    by_layer, crosses_by_layer = drawn(figures["beta_layers.png"])
    assert numbers == {(0, 0): "1.00", (0, 1): "0.95", (1, 1): "0.05", (0, 2): "0.40", (2, 2): "0.60"}
    assert crosses == {(1, 1), (0, 2)}
    assert by_layer[0, 0] == "0.20" and by_layer[2, 1] == "0.40" and len(by_layer) == 6
    assert crosses_by_layer == {(0, 0), (0, 1)}


def test_evolution_has_one_line_per_task_and_one_mark_per_pruned_adapter() -> None:
    figure = figures_of(EVENTS)["beta_evolution.png"]
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in lines] == [event["beta_values"] for event in EVENTS]
    marks = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert marks == [[], [[1.0, 0.05]], [[0.0, 0.4]]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["After Task 0", "After Task 1", "After Task 2", "pruned"]


@pytest.mark.parametrize("tasks", [1, 10, 20, 40])
def test_no_text_overlaps_another_or_leaves_the_picture(tasks: int) -> None:
    subtitle = "a_rather_long_prefix · sdlora · omnibenchmark · pretrained_vit_b16_224_in21k_adapter · seed 1"
    figures = figures_of(synthetic_events(tasks), subtitle)
    for figure in figures.values():
        assert_readable(figure)
    assert figures.keys() == {"beta_evolution.png", "beta_heatmap.png", "beta_layers.png"}
    assert gate_figures([], subtitle) == {}
