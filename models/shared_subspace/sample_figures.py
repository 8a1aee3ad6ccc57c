"""Pictures of grids: what goes in, what should come out, and what a model makes of it.

with mpl.rc_context(STYLE):
    figure = grid_samples_figure([GridSample("shift", before, target, prediction)], "Samples", "prefix · seed
    1993")
"""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from utils.plotting import INK, NARROWEST, titled_figure

SAMPLES_PER_LINE = 8
CAPTION_WIDTH = 18  # characters per line, over a sample
GRID_COLOURS = ["#111111", *mpl.color_sequences["petroff10"]]  # of the cells of a grid, by number


class GridSample(NamedTuple):
    """A grid before and after a program, and a prediction if there is one: (H, W) numbers of colours."""

    caption: str
    before: np.ndarray
    target: np.ndarray
    prediction: np.ndarray | None = None


def grid_samples_figure(samples: Sequence[GridSample], title: str, subtitle: str) -> Figure:
    """Samples side by side, input above target above prediction; a cross marks every wrong cell.

    Raises:
        ValueError: a cell has a number that is no colour.
    """
    predicted = any(sample.prediction is not None for sample in samples)
    names = ["input", "target", *(["prediction"] if predicted else [])]
    columns = min(len(samples), SAMPLES_PER_LINE)
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


def _draw_grid(axes: Axes, picture: np.ndarray, truth: np.ndarray) -> None:
    """One grid in the colours of its numbers, crossed where it is not the truth."""
    picture = np.asarray(picture)
    if picture.min() < 0 or picture.max() >= len(GRID_COLOURS):
        raise ValueError(
            f"cells from {picture.min()} to {picture.max()}: colours are 0 to {len(GRID_COLOURS) - 1}"
        )
    axes.set_axis_on()
    style = {"cmap": ListedColormap(GRID_COLOURS), "vmin": 0, "vmax": len(GRID_COLOURS)}
    axes.pcolormesh(picture, edgecolors="#555555", lw=0.4, **style)
    rows, columns = np.nonzero(picture != np.asarray(truth))
    axes.plot(columns + 0.5, rows + 0.5, "x", color="white", ms=5, mew=1.8)
    axes.plot(columns + 0.5, rows + 0.5, "x", color=INK, ms=4, mew=0.8)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
