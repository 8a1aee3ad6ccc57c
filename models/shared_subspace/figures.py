"""Figures of a run on grids, drawn from its events, and pictures of grids.

figures/training.png    validation IoU and the terms of the loss over epochs
figures/zero_shot.png   accuracy on new grids of every split
figures/few_shot.png    IoU of unseen compositions over steps of their adapters

`grid_samples_figure` draws grids with their targets and predictions, for the analyses.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from models.shared_subspace.evaluation import SPLIT_NAMES
from utils.plotting import BLUE, GREY, INK, NARROWEST, VERMILLION, titled_figure

Event = Mapping[str, Any]
TERMS = {  # key of an epoch's event: label and colour (Okabe and Ito)
    "prediction": ("prediction", INK),
    "sharing": ("distance of sharing groups", BLUE),
    "reconstruction": ("reconstruction error", VERMILLION),
    "auxiliary": ("primitive head", "#009E73"),
    "active_fraction": ("active fraction of units", "#CC79A7"),
}
CAPTIONS = {
    "training.png": "Left: IoU on validation grids over epochs, with the best. Right: the terms of the loss.",
    "zero_shot.png": "IoU and solved grids on new grids of every split; black: the IoU of the input itself.",
    "few_shot.png": "IoU of unseen compositions while adapters learn from few samples.",
    "cka.png": "How alike the network represents two tasks on the same grids: 1 alike, 0 unrelated.",
    "grassmann.png": "How far the principal subspaces of two tasks lie apart; 0: the same subspace.",
    "probes.png": "How well the primitives can be read linearly from each layer; last row: by chance.",
    "units_z.png": "Which units of the sparse code go with which primitive.",
    "units_h.png": "The same for units of the bottleneck h.",
    "unit_samples.png": "For each primitive the samples that most activate its unit.",
    "samples.png": "New grids with the network's predictions; crosses: wrong cells.",
}
SAMPLES_PER_LINE = 8
CAPTION_WIDTH = 18  # characters per line, over a sample
GRID_COLOURS = ["#111111", *mpl.color_sequences["petroff10"]]  # of the cells of a grid, by number


def grid_figures(events: Sequence[Event], subtitle: str) -> dict[str, Figure]:
    """Figures of a run by file name, from its events."""
    validated = [event for event in events if "validation_iou" in event]
    tested = [event["zero_shot"] for event in events if "zero_shot" in event]
    few_shot = [event for event in events if event["event"] == "few_shot"]
    figures: dict[str, Figure] = {}
    if validated:
        figures["training.png"] = training_figure(validated, subtitle)
    if tested:
        figures["zero_shot.png"] = zero_shot_figure(tested[-1], subtitle)
    if few_shot:
        figures["few_shot.png"] = few_shot_figure(few_shot, subtitle)
    return figures


def training_figure(epochs: Sequence[Event], subtitle: str) -> Figure:
    """Validation IoU (percent), and the terms of the loss without their weights, over epochs."""
    figure = titled_figure(9.6, 4.2, "Training: validation IoU (%) and the terms of the loss", subtitle)
    left, right = figure.subplots(1, 2)
    numbers = [event["epoch"] for event in epochs]
    validation = [event["validation_iou"] for event in epochs]
    best = int(np.argmax(validation))
    left.plot(numbers, validation, color=BLUE, lw=1.6)
    label = f"best, {validation[best]:.2f} %"
    left.plot(numbers[best], validation[best], "o", color=VERMILLION, ms=6, label=label)
    left.set_ylabel("IoU (%)")
    left.legend(frameon=False, loc="lower right")
    for name, (label, colour) in TERMS.items():
        values = np.array([event.get(name, np.nan) for event in epochs], dtype=float)
        if not np.isnan(values).all():
            right.plot(numbers, values, color=colour, lw=1.6, label=label)
    right.set_yscale("log")
    handles, _ = right.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True)
    return figure


def zero_shot_figure(splits: Mapping[str, Mapping[str, float]], subtitle: str) -> Figure:
    """IoU and solved grids of each split (percent), with the IoU of the copy-input baseline."""
    figure = titled_figure(6.8, 4.0, "New grids, no adaptation (%)", subtitle)
    axes = figure.subplots()
    for offset, key, label, colour in ((-0.19, "iou", "IoU", BLUE), (0.19, "solved", "grids solved", GREY)):
        values = [splits[split][key] for split in SPLIT_NAMES]
        places = np.arange(len(values)) + offset
        bars = axes.bar(places, values, width=0.36, color=colour, alpha=0.75, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    for x, split in enumerate(SPLIT_NAMES):
        axes.plot([x - 0.37, x - 0.01], 2 * [splits[split]["copied"]], color=INK, lw=1.4)
    axes.set_xticks(range(len(SPLIT_NAMES)), list(SPLIT_NAMES.values()))
    axes.set_ylim(0, 105)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    copied = Line2D([], [], color=INK, lw=1.4, label="IoU of the input itself")
    handles = [*axes.get_legend_handles_labels()[0], copied]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def few_shot_figure(rows: Sequence[Event], subtitle: str) -> Figure:
    """IoU (percent) over steps: thin lines for compositions, a thick one for their mean."""
    figure = titled_figure(6.8, 4.0, "Adapters learn unseen compositions: IoU (%)", subtitle)
    axes = figure.subplots()
    values = np.array([row["looks"] for row in rows])  # (tasks, tests)
    steps = np.minimum(rows[0]["every"] * np.arange(values.shape[1]), rows[0]["all_steps"])
    lines = axes.plot(steps, values.T, color=BLUE, lw=0.9, alpha=0.45)
    lines[0].set_label("one composition")
    axes.plot(steps, values.mean(axis=0), color=INK, lw=2.4, label="mean")
    axes.axhline(rows[0]["target"], color=VERMILLION, lw=1.2, ls="--", label="target")
    axes.set(xlabel="steps", ylabel="IoU (%)", ylim=(0, 102))
    axes.grid(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


class GridSample(NamedTuple):
    """An input grid with its target: (H, W) numbers of colours; all of a figure have predictions, or none."""

    caption: str
    input: np.ndarray
    target: np.ndarray
    prediction: np.ndarray | None = None


def grid_samples_figure(samples: Sequence[GridSample], title: str, subtitle: str) -> Figure:
    """Samples side by side, input above target above prediction; a cross marks every wrong cell."""
    names = [name for name in GridSample._fields[1:] if getattr(samples[0], name) is not None]
    columns = min(len(samples), SAMPLES_PER_LINE)
    lines = math.ceil(len(samples) / columns)
    captions = [textwrap.wrap(sample.caption, CAPTION_WIDTH) for sample in samples]
    height = 0.75 + lines * (0.25 + 0.12 * max(map(len, captions)) + 1.05 * len(names))
    figure = titled_figure(max(NARROWEST, 0.9 + 1.15 * columns), height, title, subtitle)
    panels = figure.subplots(lines * len(names), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for index, sample in enumerate(samples):
        line, column = divmod(index, columns)
        for row, name in enumerate(names):
            axes, grid = panels[line * len(names) + row, column], getattr(sample, name)
            _draw_grid(axes, grid, sample.target if name == "prediction" else grid)
            if row == 0:
                axes.set_title("\n".join(captions[index]), fontsize=7.5, pad=3)
            if column == 0:
                axes.text(-0.1, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=8.5)
    return figure


def _draw_grid(axes: Axes, grid: np.ndarray, truth: np.ndarray) -> None:
    """One grid in the colours of its numbers, crossed where it differs from the truth."""
    axes.set_axis_on()
    colours = ListedColormap(GRID_COLOURS)
    axes.pcolormesh(grid, edgecolors="#555555", lw=0.4, cmap=colours, vmin=0, vmax=len(GRID_COLOURS))
    rows, columns = np.nonzero(grid != truth)
    axes.plot(columns + 0.5, rows + 0.5, "x", color="white", ms=5, mew=1.8)
    axes.plot(columns + 0.5, rows + 0.5, "x", color=INK, ms=4, mew=0.8)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
