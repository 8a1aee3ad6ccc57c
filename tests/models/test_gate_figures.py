"""Figures of a gate: every weight in its place, what was pruned is marked once, no text runs into another."""

import json
import random
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from models.gate_figures import beta_evolution_figure, beta_heatmap_figure, beta_layers_figure
from models.sdlora import SDLoRA
from tests.drawn import assert_readable
from tests.utils.runs.test_figures import names, write_run
from utils.plotting import STYLE
from utils.runs.figures import draw_figures

EVENTS = [
    {"task": 0, "beta_values": [1.0], "pruning_mask": [True]},
    {"task": 1, "beta_values": [0.95, 0.05], "pruning_mask": [True, False]},
    {"task": 2, "beta_values": [0.4, 0.0, 0.6], "pruning_mask": [False, False, True]},
]


def invented(tasks: int, layers: int = 12) -> list[dict[str, Any]]:
    """The gate of an invented run that prunes about half of its adapters."""
    draw, mask, events = random.Random(tasks), [], []
    for t in range(tasks):
        there = [*mask, True]
        rows = [[draw.random() * was for was in there] for _ in range(layers)]
        by_layer = [[value / sum(row) for value in row] for row in rows]
        beta = np.mean(by_layer, axis=0).tolist()
        mask = [*mask, t == 0 or draw.random() < 0.5]
        events.append(
            {"task": t, "beta_values": beta, "pruning_mask": mask, "beta_values_by_layer": by_layer}
        )
    return events


def drawn(figure: Figure) -> tuple[dict[tuple[int, int], str], set[tuple[int, int]]]:
    """Numbers of a map by (column, row), and the cells that are crossed out."""
    axes = figure.axes[0]
    numbers = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    crosses = {(round(np.mean(line.get_xdata())), round(np.mean(line.get_ydata()))) for line in axes.lines}
    return numbers, crosses


def test_a_map_shows_what_there_was_and_crosses_what_fell() -> None:
    """Row 2: adapter 1 fell after task 1, so its place is empty; adapter 0 falls now."""
    with mpl.rc_context(STYLE):
        numbers, crosses = drawn(beta_heatmap_figure(EVENTS, "run"))
    assert numbers == {(0, 0): "1.00", (0, 1): "0.95", (1, 1): "0.05", (0, 2): "0.40", (2, 2): "0.60"}
    assert crosses == {(1, 1), (0, 2)}


def test_layers_of_the_last_task() -> None:
    last = EVENTS[-1] | {"beta_values_by_layer": [[0.2, 0.0, 0.8], [0.6, 0.0, 0.4]]}
    with mpl.rc_context(STYLE):
        numbers, crosses = drawn(beta_layers_figure([*EVENTS[:-1], last], "run"))
    assert numbers[0, 0] == "0.20" and numbers[2, 1] == "0.40" and len(numbers) == 6
    assert crosses == {(0, 0), (0, 1)}


def test_evolution_has_a_line_a_task_and_one_mark_for_each_adapter_that_fell() -> None:
    with mpl.rc_context(STYLE):
        figure = beta_evolution_figure(EVENTS, "run")
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in lines] == [event["beta_values"] for event in EVENTS]
    marks = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert marks == [[], [[1.0, 0.05]], [[0.0, 0.4]]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["After Task 0", "After Task 1", "After Task 2", "pruned"]


def test_a_run_with_a_gate_gets_them_and_another_does_not(tmp_path) -> None:
    plain = write_run(tmp_path / "plain")
    assert not any(name.startswith("beta") for name in names(draw_figures(plain, SDLoRA.figures)))
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"event": "gate", **event}) + "\n" for event in invented(3))
    paths = {path.name: path for path in draw_figures(run, SDLoRA.figures)}
    for name in ("beta_evolution.png", "beta_heatmap.png", "beta_layers.png"):
        assert imread(paths[name])[..., :3].std() > 0.02  # not a blank sheet


@pytest.mark.parametrize("tasks", [1, 10, 20, 40])
def test_no_text_overlaps_another_or_leaves_the_picture(tasks: int) -> None:
    subtitle = "a_rather_long_prefix · sdlora · omnibenchmark · pretrained_vit_b16_224_in21k_adapter · seed 1"
    events = invented(tasks)
    with mpl.rc_context(STYLE):
        for draw in (beta_evolution_figure, beta_heatmap_figure, beta_layers_figure):
            figure = draw(events, subtitle)
            assert_readable(figure)
