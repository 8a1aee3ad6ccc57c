"""utils.analysis.figures: every number in its place, what is missing stays empty, no text runs into another."""

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tests.drawn import assert_readable
from utils.analysis.figures import (
    GRID_COLOURS,
    GridSample,
    Heatmap,
    HeatmapSpec,
    branch_angles_figure,
    grid_samples_figure,
    heatmaps_figure,
    unit_label_figure,
)
from utils.plotting import STYLE

ABOUT = "a_rather_long_prefix · sema · omnibenchmark · pretrained_vit_b16_224_in21k_adapter · seed 1 · 2000 test images"
FRAME = HeatmapSpec("block", "after task", "linear CKA", (0.5, 1.0), 3)


def drawn(draw: Any, *arguments: Any) -> Figure:
    with mpl.rc_context(STYLE):
        return draw(*arguments)


def maps(count: int, rows: int, columns: int) -> list[Heatmap]:
    values = np.random.default_rng(0).uniform(0.5, 1, (count, rows, columns))
    return [Heatmap(f"block {i}", matrix) for i, matrix in enumerate(values)]


def angles(tasks: int, blocks: int, adapters: int = 2) -> list[dict[str, Any]]:
    """Rows in which fast is silent after task 0."""
    rows = [(t, b, a) for t in range(tasks) for b in range(blocks) for a in range(adapters)]
    return [
        {
            "task": t,
            "block": b,
            "adapter": a,
            "between": 10.0 * a + t if t else None,
            "fast_moved": None,
            "slow_moved": 5.0 if t else None,
            "chance": 80.0 if t else None,
        }
        for t, b, a in rows
    ]


def test_a_map_has_its_numbers_in_their_cells_and_nothing_where_there_is_none() -> None:
    values = np.array([[1.0, 0.51234], [math.nan, 0.75]])
    figure = drawn(heatmaps_figure, [Heatmap("one", values), Heatmap("two", values)], FRAME, "CKA", ABOUT)
    for axes, name in zip(figure.axes[:2], ("one", "two"), strict=True):
        cells = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
        assert cells == {(0, 0): "1.000", (1, 0): "0.512", (1, 1): "0.750"}
        assert axes.get_title(loc="left") == name
    assert not drawn(heatmaps_figure, maps(3, 4, 4), FRAME, "CKA", ABOUT).axes[0].texts  # too many to be read


def test_a_line_for_each_adapter_with_gaps_where_a_branch_is_silent() -> None:
    axes = drawn(branch_angles_figure, angles(3, 1), ABOUT).axes[0]
    between = [line for line in axes.lines if line.get_marker() == "o"]
    assert [[x for x in line.get_ydata() if not math.isnan(x)] for line in between] == [[1, 2], [11, 12]]
    assert all(math.isnan(line.get_ydata()[0]) for line in axes.lines)


def test_units_stand_by_their_label_and_only_what_is_beyond_chance_has_a_dot() -> None:
    correlation = np.array([[0.1, 0.9], [-0.8, 0.0], [0.2, 0.3], [0.05, 0.0], [0.7, 0.4]])
    axes = drawn(unit_label_figure, correlation, ["rotate", "shift"], [0.5, 0.35], "Units", ABOUT).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "2", "0", "3"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["rotate", "shift"]
    dots = {tuple(map(int, point)) for point in axes.lines[0].get_xydata()}
    assert dots == {(0, 0), (1, 0), (1, 1), (3, 1)}


def test_every_label_has_its_strongest_units_and_no_unit_stands_twice() -> None:
    """Ten units for each of four labels, though all of the first label's are stronger than any of the others'."""
    correlation = np.zeros((300, 4))
    correlation[:100, 0] = np.linspace(0.9, 0.8, 100)
    for label in (1, 2):
        correlation[100 * label : 100 * (label + 1), label] = -np.linspace(0.3, 0.2, 100)
    correlation[[5, 105, *range(290, 298)], 3] = (
        0.1  # the strongest of the last label, two of them shown already
    )
    axes = drawn(unit_label_figure, correlation, list("abcd"), [0.5] * 4, "Units", ABOUT).axes[0]
    shown = [int(tick.get_text()) for tick in axes.get_xticklabels()]
    assert shown == [*range(10), *range(100, 110), *range(200, 210), *range(290, 298)]
    assert "the 10 strongest of 300 units for each label" in axes.get_title(loc="left")


def test_captions_are_folded_between_words() -> None:
    grid = np.zeros((8, 8), dtype=int)
    words = "cycle_colours, z17: swap_colours, cycle_colours, transpose"
    samples = [GridSample(words, grid, grid), GridSample("fall", grid, grid)]
    long, short = (
        axes.get_title() for axes in drawn(grid_samples_figure, samples, "Samples", ABOUT).axes[:2]
    )
    assert long.replace("\n", " ") == words and short == "fall"
    assert long.count("\n") == 3 and max(map(len, long.splitlines())) <= 18


def test_only_the_strongest_units_are_shown() -> None:
    correlation = np.linspace(0, 1, 300)[:, None]
    axes = drawn(unit_label_figure, correlation, ["rotate"], [0.9], "Units", ABOUT).axes[0]
    assert {tick.get_text() for tick in axes.get_xticklabels()} == {str(unit) for unit in range(260, 300)}


def test_grids_have_their_colours_and_a_cross_in_every_wrong_cell() -> None:
    before = np.arange(64).reshape(8, 8) % 4
    wrong = before.copy()
    wrong[1, 5] = 9
    samples = [GridSample("shift", before, before, wrong), GridSample("rotate", before, before, before)]
    figure = drawn(grid_samples_figure, samples, "Samples", ABOUT)
    pictures = [axes for axes in figure.axes if axes.collections]
    assert len(pictures) == 6 and [axes.get_title() for axes in figure.axes[:2]] == ["shift", "rotate"]
    crosses = {i: axes.lines[0].get_xydata().tolist() for i, axes in enumerate(pictures)}
    assert crosses == {0: [], 1: [], 2: [], 3: [], 4: [[5.5, 1.5]], 5: []}
    figure.canvas.draw()
    mesh = pictures[4].collections[0]
    colours = mesh.get_facecolors()[:, :3].reshape(8, 8, 3)
    assert tuple(colours[1, 5]) == pytest.approx(to_rgb(GRID_COLOURS[9]))
    assert tuple(colours[0, 0]) == pytest.approx(to_rgb(GRID_COLOURS[0]))


def test_a_number_without_a_colour_is_refused() -> None:
    grid = np.full((8, 8), len(GRID_COLOURS))
    with pytest.raises(ValueError, match="colours are 0 to"):
        drawn(grid_samples_figure, [GridSample("shift", grid, grid)], "Samples", ABOUT)


def figures() -> dict[str, Any]:
    """Name -> what draws a figure, from a single cell to as much as there ever is."""
    wide = HeatmapSpec("fitted after task", "tested after task", "accuracy (%)", (0.0, 1.0), 1)
    grid = np.arange(64).reshape(8, 8) % 10
    samples = [GridSample("rotate 90, shift", grid, grid, grid)] * 10
    worded = [GridSample("cycle_colours, z511: swap_colours, cycle_colours, transpose", grid, grid)] * 17
    correlation = np.random.default_rng(0).uniform(-1, 1, (128, 12))
    names = [f"primitive_{i}" for i in range(12)]
    found = {
        f"drift over {tasks} tasks": (
            heatmaps_figure,
            maps(2, blocks, tasks),
            FRAME,
            "CKA of class tokens",
            ABOUT,
        )
        for tasks, blocks in ((1, 12), (10, 12), (25, 4), (40, 24))
    }
    return found | {
        "transfer of 10 tasks": (heatmaps_figure, maps(7, 10, 10), wide, "Accuracy of linear probes", ABOUT),
        "transfer of 20 tasks": (heatmaps_figure, maps(6, 20, 20), wide, "Accuracy of linear probes", ABOUT),
        "transfer of one task": (heatmaps_figure, maps(12, 1, 1), wide, "Accuracy of linear probes", ABOUT),
        "angles": (branch_angles_figure, angles(20, 7, 2), ABOUT),
        "angles of a block": (branch_angles_figure, angles(1, 1, 1), ABOUT),
        "units": (unit_label_figure, correlation, names, [0.2] * 12, "Units and primitives", ABOUT),
        "a unit": (unit_label_figure, correlation[:1, :1], names[:1], [0.2], "Units and primitives", ABOUT),
        "samples": (grid_samples_figure, samples, "Samples", ABOUT),
        "samples with long captions": (grid_samples_figure, worded, "Samples", ABOUT),
        "one sample": (grid_samples_figure, [GridSample("shift", grid, grid)], "Samples", ABOUT),
    }


@pytest.mark.parametrize("name", figures())
def test_no_text_overlaps_another_or_leaves_the_picture(name: str) -> None:
    draw, *arguments = figures()[name]
    with mpl.rc_context(STYLE):
        figure = draw(*arguments)
        assert_readable(figure)
