"""Figures of a run on grids, drawn from its events.

figures/training.png    validation IoU and the terms of the loss, epoch by epoch
figures/zero_shot.png   new grids of compositions that were met in training, and that were not
figures/few_shot.png    IoU of unseen compositions while adapters learn them
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from models.shared_subspace.tables import SPLIT_NAMES
from utils.plotting import BLUE, GREY, INK, VERMILLION, titled_figure

Event = Mapping[str, Any]
# what an epoch's event calls a term, its label and its colour (Okabe and Ito)
TERMS = {
    "prediction": ("prediction", INK),
    "sharing": ("distance of sharing groups", BLUE),
    "reconstruction": ("error of the sparse code", VERMILLION),
    "naming": ("naming the primitives", "#009E73"),
    "activity": ("share of active units", "#CC79A7"),
}


def grid_figures(events: Sequence[Event], rows: Sequence[Sequence[float]], about: str) -> dict[str, Figure]:
    """Figures of a run on grids that it has events of, by file name; it has no accuracy matrix, so no `rows`."""
    tasks = [event for event in events if event["event"] == "task"]
    validated = [event for event in events if event["event"] == "epoch" and "validation_iou" in event]
    few_shot = [event for event in events if event["event"] == "few_shot"]
    figures: dict[str, Figure] = {}
    if validated:
        figures["training.png"] = training_figure(validated, about)
    if tasks and "zero_shot" in tasks[-1]:
        figures["zero_shot.png"] = zero_shot_figure(tasks[-1]["zero_shot"], about)
    if few_shot:
        figures["few_shot.png"] = few_shot_figure(few_shot, about)
    return figures


def training_figure(epochs: Sequence[Event], subtitle: str) -> Figure:
    """Validation IoU (percent), and the terms of the loss without their weights, over epochs."""
    figure = titled_figure(9.6, 4.2, "Training: validation IoU (%) and the terms of the loss", subtitle)
    left, right = figure.subplots(1, 2)
    numbers = [event["epoch"] for event in epochs]
    validation = [event["validation_iou"] for event in epochs]
    left.plot(numbers, validation, color=BLUE, lw=1.6)
    best = int(np.argmax(validation))
    left.plot(
        numbers[best], validation[best], "o", color=VERMILLION, ms=6, label=f"best, {validation[best]:.2f} %"
    )
    left.set_ylabel("IoU (%)")
    left.legend(frameon=False, loc="lower right")
    for name, (label, colour) in TERMS.items():
        values = [event.get(name) for event in epochs]
        if any(value is not None for value in values):
            right.plot(
                numbers, [np.nan if v is None else v for v in values], color=colour, lw=1.6, label=label
            )
    right.set_yscale("log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(True)
        axes.set_axisbelow(True)
    return figure


def zero_shot_figure(lines: Mapping[str, Mapping[str, float]], subtitle: str) -> Figure:
    """IoU and solved grids of each split (percent), with the IoU of who hands the input back."""
    figure = titled_figure(6.8, 4.0, "New grids, no adaptation (%)", subtitle)
    axes = figure.subplots()
    for offset, key, label, colour in ((-0.19, "iou", "IoU", BLUE), (0.19, "solved", "grids solved", GREY)):
        values = [lines[split][key] for split in SPLIT_NAMES]
        bars = axes.bar(
            np.arange(len(values)) + offset, values, width=0.36, color=colour, alpha=0.75, label=label
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    for x, split in enumerate(SPLIT_NAMES):
        axes.plot([x - 0.37, x - 0.01], 2 * [lines[split]["copied"]], color=INK, lw=1.4)
    axes.set_xticks(range(len(SPLIT_NAMES)), list(SPLIT_NAMES.values()))
    axes.set_ylim(0, 105)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    handles = [
        *axes.get_legend_handles_labels()[0],
        Line2D([], [], color=INK, lw=1.4, label="IoU of the input itself"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def few_shot_figure(rows: Sequence[Event], subtitle: str) -> Figure:
    """IoU (percent) over steps: a thin line a composition, a thick one their mean; dashed, the target."""
    figure = titled_figure(6.8, 4.0, "Adapters learn unseen compositions: IoU (%)", subtitle)
    axes = figure.subplots()
    looks = np.array([row["looks"] for row in rows])  # (tasks, looks)
    steps = rows[0]["every"] * np.arange(looks.shape[1])
    axes.plot(steps, looks.T, color=BLUE, lw=0.9, alpha=0.45)
    axes.plot(steps, looks.mean(axis=0), color=INK, lw=2.4)
    axes.axhline(rows[0]["target"], color=VERMILLION, lw=1.2, ls="--")
    axes.set_xlabel("steps")
    axes.set_ylabel("IoU (%)")
    axes.set_ylim(0, 102)
    axes.grid(True)
    axes.set_axisbelow(True)
    handles = [
        Line2D([], [], color=BLUE, lw=0.9, alpha=0.6, label="one composition"),
        Line2D([], [], color=INK, lw=2.4, label="mean"),
        Line2D([], [], color=VERMILLION, lw=1.2, ls="--", label="target"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure
