"""Figures of analyses: heat maps side by side, angles of branches over tasks, units against labels.

    with mpl.rc_context(STYLE):
        spec = HeatmapSpec("block", "after task", "linear CKA", limits=(0.0, 1.0))
        figure = heatmaps_figure([Heatmap("with task 0", values)], spec, "Drift", "prefix · method · seed
        1993")

Missing numbers (NaN) stay empty. Colours can be told apart by colour-blind readers and in print.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from utils.plotting import (
    BLUE,
    GREY,
    INK,
    MOST_NUMBERED_TASKS,
    NARROWEST,
    VERMILLION,
    panels_by_block,
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


class HeatmapSpec(NamedTuple):
    """Axes, colours and number format that the panels of a figure share.

    Attributes:
        rows, columns: names of the axes.
        label: of the colour bar.
        limits: of the colours.
        decimals: of the numbers in cells.
        colours: name of a colour map.
        row_names, column_names: None for 0, 1, ...
    """

    rows: str
    columns: str
    label: str
    limits: tuple[float, float]
    decimals: int = 2
    colours: str = "viridis"
    row_names: Sequence[str] | None = None
    column_names: Sequence[str] | None = None


def heatmaps_figure(maps: Sequence[Heatmap], spec: HeatmapSpec, title: str, subtitle: str) -> Figure:
    """Maps of one shape side by side; up to two of them have a number in every cell."""
    height, width = maps[0].values.shape
    numbered = len(maps) <= 2 and max(height, width) <= MOST_NUMBERED_TASKS
    cell = (0.5 if width <= 12 else 0.42) if numbered else min(0.24, 6.0 / max(height, width))  # inches
    names = spec.row_names or [str(row) for row in range(height)]
    panel = max(1.5, cell * width) + 0.75 + 0.07 * max(map(len, names))
    lines = math.ceil(len(maps) / max(1, int(MAX_WIDTH // panel)))
    columns = math.ceil(len(maps) / lines)
    tall = max(1.0, (0.34 if numbered else cell) * height) + 0.75
    figure = titled_figure(max(NARROWEST, columns * panel + 1.1), lines * tall + 0.75, title, subtitle)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for index, (axes, one) in enumerate(zip(grid.flat, maps, strict=False)):
        image = _draw_heatmap(axes, one, spec, fontsize=15 * min(cell, 0.5) if numbered else None)
        if index % columns == 0:
            axes.set_ylabel(spec.rows)
        if index + columns >= len(maps):
            axes.set_xlabel(spec.columns)
    bar = figure.colorbar(image, ax=grid, label=spec.label, pad=0.02, aspect=max(10, 8 * lines))
    bar.outline.set_visible(False)
    return figure


def branch_angles_figure(rows: Sequence[Mapping[str, Any]], subtitle: str) -> Figure:
    """Angles of the fast and slow branch over tasks: a panel for each block, a line for each adapter.

    rows: task, block, adapter, and in degrees or None `between` (fast and slow), `fast_moved`, `slow_moved`
    (from where the branch was one task earlier) and `chance` (between two random subspaces). Later adapters
    are darker; None leaves a gap.
    """
    blocks = sorted({row["block"] for row in rows})
    tasks = 1 + max(row["task"] for row in rows)
    title = "Fast and slow branches: angles of their output spaces"
    figure, panels = panels_by_block(blocks, tasks, title, subtitle, "degrees")
    for block, axes in panels.items():
        adapters = sorted({row["adapter"] for row in rows if row["block"] == block})
        strengths = np.linspace(0.4, 1.0, len(adapters)) if len(adapters) > 1 else [1.0]
        for strength, adapter in zip(strengths, adapters, strict=True):
            own = sorted(
                (row for row in rows if (row["block"], row["adapter"]) == (block, adapter)),
                key=lambda row: row["task"],
            )
            for name, (_, style) in ANGLES.items():
                angles = [math.nan if row[name] is None else row[name] for row in own]
                axes.plot([row["task"] for row in own], angles, alpha=strength, **style)
        axes.set_ylim(-5, 95)
        axes.set_yticks([0, 30, 60, 90])
    handles = [Line2D([], [], label=label, **style) for label, style in ANGLES.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def unit_label_figure(
    correlation: np.ndarray, labels: Sequence[str], threshold: Sequence[float], title: str, subtitle: str
) -> Figure:
    """Map of correlations (units, labels): rows are labels, columns their strongest units.

    Every label has its share of `MAX_UNITS`; a unit that is among the strongest of several stands with the
    first of them. What lies beyond its label's threshold, (labels,), has a dot.
    """
    share = max(1, MAX_UNITS // len(labels))
    strongest = np.argsort(-np.abs(correlation), axis=0, kind="stable")[:share]  # (share, labels)
    shown = list(dict.fromkeys(strongest.T.ravel().tolist()))
    name = f"the {len(strongest)} strongest of {len(correlation)} units for each label; a dot: beyond chance"
    values = correlation[shown].T  # (labels, units)
    units = [str(unit) for unit in shown]
    spec = HeatmapSpec("label", "unit", "correlation", (-1.0, 1.0), 2, "RdBu_r", list(labels), units)
    cell = 0.26
    width = max(NARROWEST, cell * len(shown) + 1.8 + 0.07 * max(map(len, labels)))
    figure = titled_figure(width, 1.75 + cell * len(labels), title, subtitle)
    axes = figure.subplots()
    image = _draw_heatmap(axes, Heatmap(name, values), spec, fontsize=None)
    rows, columns = np.nonzero(np.abs(values) > np.asarray(threshold)[:, None])
    axes.plot(columns, rows, "o", color=INK, ms=2.6, mec="white", mew=0.5)
    axes.set_xlabel(spec.columns)
    figure.colorbar(image, ax=axes, label=spec.label, pad=0.02).outline.set_visible(False)
    return figure


def _draw_heatmap(axes: Axes, one: Heatmap, spec: HeatmapSpec, fontsize: float | None) -> AxesImage:
    """Cells in colour, with their number where there is a font size for it; returns the image."""
    colours, scale = mpl.colormaps[spec.colours], Normalize(*spec.limits)
    image = axes.imshow(one.values, cmap=colours, norm=scale, interpolation="none", aspect="auto")
    if fontsize is not None:
        for (row, column), value in np.ndenumerate(one.values):
            if not math.isnan(value):
                red, green, blue, _ = colours(float(scale(value)))
                ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
                text = f"{value:.{spec.decimals}f}"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=fontsize)
    for set_ticks, names, count in zip(
        (axes.set_yticks, axes.set_xticks), (spec.row_names, spec.column_names), one.values.shape, strict=True
    ):
        if names is not None:
            set_ticks(range(count), names)
        else:
            set_ticks(range(0, count, math.ceil(count / 12)))  # as many numbers as can be read
    if spec.column_names is not None:
        axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes.set_title(one.name, loc="left", pad=4)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image
