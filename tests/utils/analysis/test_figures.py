"""utils.analysis.figures: numbers in their places, what is missing stays empty, no text runs into another."""

import math
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.drawn import assert_readable
from utils.analysis.figures import (
    Heatmap,
    HeatmapSpec,
    branch_angles_figure,
    heatmaps_figure,
    unit_label_figure,
)
from utils.plotting import STYLE

ABOUT = "prefix_$5^a^b$ · sema · omnibenchmark · pretrained_vit_b16_224_in21k_adapter · seed 1 · 200 images"
DRIFT = HeatmapSpec("block", "after task", "linear CKA", (0.5, 1.0), 3)
TRANSFER = HeatmapSpec("fitted after task", "tested after task", "accuracy (%)", (0.0, 1.0), 1)


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with mpl.rc_context(STYLE):
        yield


def maps(count: int, rows: int, columns: int, spec: HeatmapSpec = DRIFT) -> tuple[Any, ...]:
    """What draws a figure of random maps."""
    values = np.random.default_rng(0).uniform(0.5, 1, (count, rows, columns))
    panels = [Heatmap(f"block {i}", matrix) for i, matrix in enumerate(values)]
    return heatmaps_figure, panels, spec, "Accuracy of linear probes", ABOUT


def angles(tasks: int, blocks: int, adapters: int = 2) -> list[dict[str, Any]]:
    """Rows of which those of task 0 have no angle, as the output of fast is zero."""
    rows = []
    for t, b, a in np.ndindex(tasks, blocks, adapters):
        found = {"between": 10.0 * a + t, "slow_moved": 5.0, "chance": 80.0}
        row = {"task": t, "block": b, "adapter": a, "fast_moved": None}
        rows.append(row | (found if t else dict.fromkeys(found)))
    return rows


def units(correlation: np.ndarray, threshold: list[float]) -> tuple[Any, ...]:
    labels = [f"primitive_{i}" for i in range(correlation.shape[1])]
    return unit_label_figure, correlation, labels, threshold, "Units and primitives", ABOUT


def shown_units(figure: Figure) -> list[int]:
    return [int(tick.get_text()) for tick in figure.axes[0].get_xticklabels()]


def test_a_map_has_its_numbers_in_their_cells_and_nothing_where_there_is_none() -> None:
    values = np.array([[1.0, 0.51234], [math.nan, 0.75]])
    figure = heatmaps_figure([Heatmap("one", values), Heatmap("two", values)], DRIFT, "CKA", ABOUT)
    for axes, name in zip(figure.axes[:2], ("one", "two"), strict=True):
        cells = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
        assert cells == {(0, 0): "1.000", (1, 0): "0.512", (1, 1): "0.750"}
        assert axes.get_title(loc="left") == name
    draw, *arguments = maps(3, 4, 4)
    assert not draw(*arguments).axes[0].texts  # too many to be read


def test_a_line_for_each_adapter_with_gaps_where_a_branch_is_zero() -> None:
    axes = branch_angles_figure(angles(3, 1), ABOUT).axes[0]
    between = [line for line in axes.lines if line.get_marker() == "o"]
    assert [[x for x in line.get_ydata() if not math.isnan(x)] for line in between] == [[1, 2], [11, 12]]
    assert all(math.isnan(line.get_ydata()[0]) for line in axes.lines)


def test_units_stand_by_their_label_and_only_what_is_beyond_chance_has_a_dot() -> None:
    correlation = np.array([[0.1, 0.9], [-0.8, 0.0], [0.2, 0.3], [0.05, 0.0], [0.7, 0.4]])
    figure = unit_label_figure(correlation, ["rotate", "shift"], [0.5, 0.35], "Units", ABOUT)
    assert shown_units(figure) == [1, 4, 2, 0, 3]
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["rotate", "shift"]
    dots = {tuple(map(int, point)) for point in axes.lines[0].get_xydata()}
    assert dots == {(0, 0), (1, 0), (1, 1), (3, 1)}


def test_every_label_has_its_strongest_units_and_no_unit_stands_twice() -> None:
    """Ten units for each of four labels, though those of the first are stronger than any other's."""
    correlation = np.zeros((300, 4))
    correlation[:100, 0] = np.linspace(0.9, 0.8, 100)
    for label in (1, 2):
        correlation[100 * label : 100 * (label + 1), label] = -np.linspace(0.3, 0.2, 100)
    correlation[[5, 105, *range(290, 298)], 3] = 0.1  # of the last label's, two are shown already
    figure = unit_label_figure(correlation, list("abcd"), [0.5] * 4, "Units", ABOUT)
    assert shown_units(figure) == [*range(10), *range(100, 110), *range(200, 210), *range(290, 298)]
    assert "10 strongest of 300" in figure.axes[0].get_title(loc="left")


LONG_NAME = "tasks without it and with nothing in common"
RANDOM = np.random.default_rng(0).uniform(-1, 1, (128, 12))
FIGURES = {
    "drift of 12 x 10": maps(2, 12, 10),
    "drift of 24 x 40": maps(2, 24, 40),
    "transfer of 10 tasks": maps(7, 10, 10, TRANSFER),
    "transfer of 20 tasks": maps(6, 20, 20, TRANSFER),
    "transfer of one task": maps(12, 1, 1, TRANSFER),
    "long names": (heatmaps_figure, 2 * [Heatmap(LONG_NAME, np.ones((4, 3)))], DRIFT, "CKA", ABOUT),
    "angles": (branch_angles_figure, angles(20, 7, 2), ABOUT),
    "units": units(RANDOM, [0.2] * 12),
    "a unit": units(RANDOM[:1, :1], [0.2]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_another_or_leaves_the_picture(name: str) -> None:
    draw, *arguments = FIGURES[name]
    assert_readable(draw(*arguments))
