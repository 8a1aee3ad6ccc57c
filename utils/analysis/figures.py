"""The figures of a look at representations: maps of numbers, angles over tasks, units and labels, sample grids.

    with mpl.rc_context(STYLE):
        frame = HeatmapSpec("block", "after task", "linear CKA", limits=(0.0, 1.0))
        figure = heatmaps_figure([Heatmap("with task 0", values)], frame, "Drift", "prefix · method · seed 1993")

`utils/analysis/representations.py` draws those of class-incremental runs. Numbers that are not there (NaN) stay empty. Colours can be
told apart by colour-blind readers and in print.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
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

WIDEST = 13.0  # inches that panels side by side may take
MOST_UNITS = 40  # columns of a unit/label map
SAMPLES_A_LINE = 8
CAPTION_WIDTH = 18  # characters a line, over a sample
GRID_COLOURS = ["#111111", *mpl.color_sequences["petroff10"]]  # of the cells of a grid, by number


class Heatmap(NamedTuple):
    """One panel: its name, and values (rows, columns) of which NaN stays empty."""

    name: str
    values: np.ndarray


class HeatmapSpec(NamedTuple):
    """What the panels of a figure share.

    Attributes:
        rows, columns: what they are.
        label: what the values are, beside the colour bar.
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


def heatmaps_figure(maps: Sequence[Heatmap], frame: HeatmapSpec, title: str, subtitle: str) -> Figure:
    """Maps of one shape side by side, as many a line as fit; up to two of them with a number in every cell."""
    height, width = maps[0].values.shape
    numbered = len(maps) <= 2 and max(height, width) <= MOST_NUMBERED_TASKS
    cell = (0.5 if width <= 12 else 0.42) if numbered else min(0.24, 6.0 / max(height, width))  # inches
    names = frame.row_names or [str(row) for row in range(height)]
    panel = max(1.5, cell * width) + 0.75 + 0.07 * max(map(len, names))
    lines = math.ceil(len(maps) / max(1, int(WIDEST // panel)))
    columns = math.ceil(len(maps) / lines)
    tall = max(1.0, (0.34 if numbered else cell) * height) + 0.75
    figure = titled_figure(max(NARROWEST, columns * panel + 1.1), lines * tall + 0.75, title, subtitle)
    grid = figure.subplots(lines, columns, squeeze=False)
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= len(maps):
            axes.set_visible(False)
            continue
        image = _draw_map(axes, maps[index].values, frame, fontsize=15 * min(cell, 0.5) if numbered else None)
        axes.set_title(maps[index].name, loc="left", pad=4)
        if index % columns == 0:
            axes.set_ylabel(frame.rows)
        if index + columns >= len(maps):
            axes.set_xlabel(frame.columns)
    bar = figure.colorbar(image, ax=grid, label=frame.label, pad=0.02, aspect=max(10, 8 * lines))
    bar.outline.set_visible(False)
    return figure


def branch_angles_figure(rows: Sequence[Mapping[str, Any]], subtitle: str) -> Figure:
    """Angles of the fast and slow branch over tasks: a panel for each block, a line for each adapter.

    rows: task, block, adapter, and in degrees or None `between` (fast and slow), `fast_moved`, `slow_moved` (from
    where the branch was a task earlier) and `chance` (between two random subspaces).
    """
    blocks = sorted({row["block"] for row in rows})
    tasks = 1 + max(row["task"] for row in rows)
    title = "Fast and slow branches: angles of their output spaces"
    figure, panels = panels_by_block(blocks, tasks, title, subtitle, "degrees")
    for block, axes in panels.items():
        _draw_angles(axes, [row for row in rows if row["block"] == block])
        axes.set_ylim(-5, 95)
        axes.set_yticks([0, 30, 60, 90])
    handles = [Line2D([], [], label=label, **look) for label, look in ANGLES.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def unit_label_figure(
    correlation: np.ndarray, labels: Sequence[str], threshold: Sequence[float], title: str, subtitle: str
) -> Figure:
    """Correlations (units, labels) as a map: rows are labels, columns the strongest units of each label in turn.

    Every label has its share of `MOST_UNITS`; a unit that is among the strongest of several stands with the first of
    them. What lies beyond its label's threshold, (labels,), has a dot.
    """
    share = max(1, MOST_UNITS // len(labels))
    strongest = np.argsort(-np.abs(correlation), axis=0, kind="stable")[:share]  # (share, labels)
    shown = list(dict.fromkeys(strongest.T.ravel().tolist()))
    values = correlation[shown].T  # (labels, units)
    frame = HeatmapSpec(
        "label", "unit", "correlation", (-1.0, 1.0), 2, "RdBu_r", list(labels), [str(unit) for unit in shown]
    )
    name = (
        f"the {strongest.shape[0]} strongest of {len(correlation)} units for each label; a dot: beyond chance"
    )
    cell = 0.26
    width = max(NARROWEST, cell * len(shown) + 1.8 + 0.07 * max(map(len, labels)))
    figure = titled_figure(width, 1.75 + cell * len(labels), title, subtitle)
    axes = figure.subplots()
    image = _draw_map(axes, values, frame, fontsize=None)
    rows, columns = np.nonzero(np.abs(values) > np.asarray(threshold)[:, None])
    axes.plot(columns, rows, "o", color=INK, ms=2.6, mec="white", mew=0.5)
    axes.set_title(name, loc="left", pad=4)
    axes.set_xlabel(frame.columns)
    figure.colorbar(image, ax=axes, label=frame.label, pad=0.02).outline.set_visible(False)
    return figure


class GridSample(NamedTuple):
    """A grid before and after, and what a model made of it if there is one: (H, W) numbers of colours; a caption."""

    caption: str
    before: np.ndarray
    target: np.ndarray
    prediction: np.ndarray | None = None


def grid_samples_figure(samples: Sequence[GridSample], title: str, subtitle: str) -> Figure:
    """Samples side by side, input above target above prediction; a cross marks every cell that is predicted wrong.

    Raises:
        ValueError: a cell has a number that is no colour.
    """
    predicted = any(sample.prediction is not None for sample in samples)
    names = ["input", "target", *(["prediction"] if predicted else [])]
    columns = min(len(samples), SAMPLES_A_LINE)
    lines = math.ceil(len(samples) / columns)
    captions = [textwrap.wrap(sample.caption, CAPTION_WIDTH) for sample in samples]
    height = 0.75 + lines * (0.25 + 0.12 * max(map(len, captions)) + 1.05 * len(names))
    figure = titled_figure(max(NARROWEST, 0.9 + 1.15 * columns), height, title, subtitle)
    grid = figure.subplots(lines * len(names), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, sample in enumerate(samples):
        line, column = divmod(index, columns)
        pictures = [sample.before, sample.target, sample.prediction][: len(names)]
        for row, (name, picture) in enumerate(zip(names, pictures, strict=True)):
            axes = grid[line * len(names) + row, column]
            if picture is not None:
                _draw_grid(axes, picture, sample.target if name == "prediction" else picture)
            if row == 0:
                axes.set_title("\n".join(captions[index]), fontsize=7.5, pad=3)
            if column == 0:
                axes.text(-0.1, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=8.5)
    return figure


ANGLES: dict[str, tuple[str, dict[str, Any]]] = {
    "between": ("fast and slow", {"color": INK, "marker": "o", "ms": 3.6, "lw": 1.4}),
    "chance": ("two random subspaces", {"color": GREY, "ls": (0, (4, 2)), "lw": 1.0}),
    "fast_moved": ("fast, since the task before", {"color": VERMILLION, "marker": "^", "ms": 3.6, "lw": 1.2}),
    "slow_moved": ("slow, since the task before", {"color": BLUE, "marker": "s", "ms": 3.4, "lw": 1.2}),
}


def _draw_angles(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The lines of one block's adapters, later adapters darker; a number that is not there leaves a gap."""
    adapters = sorted({row["adapter"] for row in rows})
    strengths = np.linspace(0.4, 1.0, len(adapters)) if len(adapters) > 1 else [1.0]
    for strength, adapter in zip(strengths, adapters, strict=True):
        own = sorted((row for row in rows if row["adapter"] == adapter), key=lambda row: row["task"])
        for name, (_, look) in ANGLES.items():
            angles = [math.nan if row[name] is None else row[name] for row in own]
            axes.plot([row["task"] for row in own], angles, alpha=strength, **look)


def _draw_map(axes: Axes, values: np.ndarray, frame: HeatmapSpec, fontsize: float | None) -> Any:
    """Cells in colour, with their number where there is a font size for it; returns the image."""
    colours, scale = mpl.colormaps[frame.colours], Normalize(*frame.limits)
    image = axes.imshow(values, cmap=colours, norm=scale, interpolation="none", aspect="auto")
    if fontsize is not None:
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                ink = "white" if _is_dark(colours, scale(value)) else "black"
                text = f"{value:.{frame.decimals}f}"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=fontsize)
    _name_cells(axes.set_xticks, frame.column_names, values.shape[1])
    _name_cells(axes.set_yticks, frame.row_names, values.shape[0])
    if frame.column_names is not None:
        axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _name_cells(set_ticks: Any, names: Sequence[str] | None, count: int) -> None:
    """A tick for every cell that has a name; numbers only as many as can be read."""
    every = range(0, count, 1 if names is not None else math.ceil(count / 12))
    set_ticks(list(every), [names[i] if names is not None else str(i) for i in every])


def _is_dark(colours: Colormap, position: float) -> bool:
    """Whether white reads better than black on the colour at a position from 0 to 1."""
    red, green, blue, _ = colours(float(position))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _draw_grid(axes: Axes, picture: np.ndarray, truth: np.ndarray) -> None:
    """One grid in the colours of its numbers, crossed where it is not the truth."""
    picture = np.asarray(picture)
    if picture.min() < 0 or picture.max() >= len(GRID_COLOURS):
        raise ValueError(
            f"cells from {picture.min()} to {picture.max()}: colours are 0 to {len(GRID_COLOURS) - 1}"
        )
    axes.set_axis_on()
    axes.pcolormesh(
        picture,
        cmap=ListedColormap(GRID_COLOURS),
        vmin=0,
        vmax=len(GRID_COLOURS),
        edgecolors="#555555",
        lw=0.4,
    )
    rows, columns = np.nonzero(picture != np.asarray(truth))
    axes.plot(columns + 0.5, rows + 0.5, "x", color="white", ms=5, mew=1.8)
    axes.plot(columns + 0.5, rows + 0.5, "x", color=INK, ms=4, mew=0.8)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
