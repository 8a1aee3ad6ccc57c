"""Figures of analyses: heat maps side by side, angles of branches over tasks, units against labels.

with mpl.rc_context(STYLE):
    spec = HeatmapSpec("block", "after task", "linear CKA", limits=(0.0, 1.0))
    figure = heatmaps_figure([Heatmap("with task 0", values)], spec, "Drift", "prefix · method · seed 1993")
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.plotting import (
    BLUE,
    GREY,
    INK,
    MAX_NUMBERED_TASKS,
    NARROWEST,
    VERMILLION,
    HeatmapSpec,
    adapter_panels,
    colour_bar,
    draw_heatmap,
    legend_below,
    titled_figure,
)

MAX_WIDTH = 13.0  # inches that panels side by side may take
MAX_UNITS = 40  # columns of a unit/label map
ANGLES: dict[str, tuple[str, dict[str, Any]]] = {  # key of a row -> its label and style
    "between": ("fast and slow", {"color": INK, "marker": "o", "ms": 3.6, "lw": 1.4}),
    "chance": ("two random subspaces", {"color": GREY, "ls": (0, (4, 2)), "lw": 1.0}),
    "fast_moved": ("fast, since the task before", {"color": VERMILLION, "marker": "^", "ms": 3.6, "lw": 1.2}),
    "slow_moved": ("slow, since the task before", {"color": BLUE, "marker": "s", "ms": 3.4, "lw": 1.2}),
}


class Heatmap(NamedTuple):
    """One panel: its name, and values (rows, columns) of which NaN stays empty."""

    name: str
    values: np.ndarray


def heatmaps_figure(maps: Sequence[Heatmap], spec: HeatmapSpec, title: str, subtitle: str) -> Figure:
    """Maps of one shape side by side; up to two of them have a number in every cell."""
    height, width = maps[0].values.shape
    numbered = len(maps) <= 2 and max(height, width) <= MAX_NUMBERED_TASKS
    cell = (0.5 if width <= 12 else 0.42) if numbered else min(0.24, 6.0 / max(height, width))  # inches
    names = spec.row_names or [str(row) for row in range(height)]
    title_width = 0.085 * max(len(one.name) for one in maps)
    panel = max(1.5, cell * width, title_width) + 0.75 + 0.07 * max(map(len, names))
    lines = math.ceil(len(maps) / max(1, int(MAX_WIDTH // panel)))
    columns = math.ceil(len(maps) / lines)
    tall = max(1.0, (0.34 if numbered else cell) * height) + 0.75
    figure = titled_figure(max(NARROWEST, columns * panel + 1.1), lines * tall + 0.75, title, subtitle)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for index, (axes, one) in enumerate(zip(grid.flat, maps, strict=False)):
        image = draw_heatmap(axes, one.values, spec, fontsize=15 * min(cell, 0.5) if numbered else None)
        axes.set_title(one.name, loc="left", pad=4)
        if index % columns == 0:
            axes.set_ylabel(spec.rows)
        if index + columns >= len(maps):
            axes.set_xlabel(spec.columns)
    colour_bar(figure, image, grid, spec.label, aspect=max(10, 8 * lines))
    return figure


def branch_angles_figure(rows: Sequence[Mapping[str, Any]], subtitle: str) -> Figure:
    """Angles of the fast and slow branch over tasks: a panel for each block, a line for each adapter.

    rows: task, block, adapter, and in degrees or None `between` (fast and slow), `fast_moved`, `slow_moved`
    (from where the branch was one task earlier) and `chance` (between two random subspaces). Later adapters
    are darker; None leaves a gap.
    """
    title = "Fast and slow branches: angles of their output spaces"
    figure, lines = adapter_panels(rows, title, subtitle, "degrees")
    for axes, opacity, own in lines:
        for name, (_, style) in ANGLES.items():
            axes.plot(own["task"], own[name].astype(float), alpha=opacity, **style)
        axes.set_ylim(-5, 95)
        axes.set_yticks([0, 30, 60, 90])
    legend_below(figure, {label: Line2D([], [], **style) for label, style in ANGLES.values()}, columns=2)
    return figure


def weights_figure(rows: Sequence[Mapping[str, Any]], subtitle: str) -> Figure:
    """Scatter plot of gate weights of earlier tasks' adapters (y) over the similarity of the tasks (x).

    rows: task, adapter, similarity, and share, the weight as a multiple of the mean one. Later tasks are
    darker.
    """
    title = "Gate weights of earlier tasks and similarity of tasks"
    figure = titled_figure(NARROWEST, 4.2, title, subtitle)
    axes = figure.subplots()
    similarity, share, task = ([row[key] for row in rows] for key in ("similarity", "share", "task"))
    points = axes.scatter(similarity, share, c=task, cmap="viridis_r", s=26, edgecolors="none")
    axes.axhline(1, color=GREY, lw=0.9, ls=(0, (4, 2)))
    axes.set_ylim(bottom=min(0.0, *share) - 0.05)
    axes.set_xlabel("similarity of the tasks (cosine of mean class tokens, centred)")
    axes.set_ylabel("weight (1: as all adapters on average)")
    colour_bar(figure, points, axes, "after task")
    return figure


def unit_label_figure(
    correlation: np.ndarray, labels: Sequence[str], threshold: Sequence[float], title: str, subtitle: str
) -> Figure:
    """Map of correlations (units, labels): rows are labels, columns their strongest units.

    Every label has an equal share of `MAX_UNITS`; a unit that is among the strongest of several labels is
    shown with the first of them. Correlations beyond the threshold of their label, (labels,), have a dot.
    """
    share = max(1, MAX_UNITS // len(labels))
    strongest = np.argsort(-np.abs(correlation), axis=0, kind="stable")[:share]  # (share, labels)
    shown = list(dict.fromkeys(strongest.T.ravel().tolist()))
    values = correlation[shown].T  # (labels, units)
    units = [str(unit) for unit in shown]
    spec = HeatmapSpec("label", "unit", "correlation", (-1.0, 1.0), 2, "RdBu_r", list(labels), units)
    cell = 0.26
    width = max(NARROWEST, cell * len(shown) + 1.8 + 0.07 * max(map(len, labels)))
    figure = titled_figure(width, 1.75 + cell * len(labels), title, subtitle)
    axes = figure.subplots()
    image = draw_heatmap(axes, values, spec, fontsize=None)
    name = f"the {len(strongest)} strongest of {len(correlation)} units for each label; a dot: beyond chance"
    axes.set_title(name, loc="left", pad=4)
    rows, columns = np.nonzero(np.abs(values) > np.asarray(threshold)[:, None])
    axes.plot(columns, rows, "o", color=INK, ms=2.6, mec="white", mew=0.5)
    axes.set_xlabel(spec.columns)
    colour_bar(figure, image, axes, spec.label)
    return figure
