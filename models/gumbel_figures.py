"""Figures of a gate's weights over tasks, adapters and layers, from the `gate` events of a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.analysis.figures import Heatmap, HeatmapSpec, heatmaps_figure
from utils.plotting import MOST_NUMBERED_TASKS, VERMILLION, task_axis, titled_figure

Event = Mapping[str, Any]
CAPTIONS = {
    "beta_evolution.png": "Weight that the gate gives the adapter of each task (x), a line after every task; "
    "crosses: pruned.",
    "beta_heatmap.png": "The same as a map: adapters in columns, tasks in rows.",
    "beta_layers.png": "Weight of every adapter in each layer after the last task.",
}


def gate_figures(events: Sequence[Event], about: str) -> dict[str, Figure]:
    """Figures of a run's `gate` events, by file name; none without such events. `about` is the subtitle.

    beta_evolution.png: weights (y) of the adapters of all tasks (x), one line per finished task.
    beta_heatmap.png: the same as a heat map, finished task (row) by adapter (column).
    beta_layers.png: with a gate per layer, layer (row) by adapter (column) after the last task.
    """
    gates = [event for event in events if event["event"] == "gate"]
    if not gates:
        return {}
    figures = {
        "beta_evolution.png": beta_evolution_figure(gates, about),
        "beta_heatmap.png": beta_heatmap_figure(gates, about),
    }
    if "beta_values_by_layer" in gates[-1]:
        figures["beta_layers.png"] = beta_layers_figure(gates, about)
    return figures


def beta_evolution_figure(events: Sequence[Event], subtitle: str) -> Figure:
    """Weights after each task (one line each) over the tasks that grew the adapters, pruned ones crossed."""
    tasks = 1 + max(event["task"] for event in events)
    height = max(4.4, 1.3 + 0.22 * min(tasks, MOST_NUMBERED_TASKS))
    figure = titled_figure(8.4, height, "Beta Evolution During Continual Learning", subtitle)
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.92, tasks))
    crosses = {"color": VERMILLION, "marker": "x", "ms": 7, "mew": 1.8, "ls": "none"}
    pruned, handles = pruned_adapters(events), []
    for event in events:
        beta, gone = event["beta_values"], pruned[event["task"]]
        style = {"color": colours[event["task"]], "marker": "o", "ms": 4, "lw": 1.4}
        axes.plot(range(len(beta)), beta, **style)
        axes.plot(gone, [beta[k] for k in gone], zorder=5, **crosses)
        handles.append(Line2D([], [], label=f"After Task {event['task']}", **style))
    if len(handles) > MOST_NUMBERED_TASKS:
        handles = handles[:: math.ceil(len(handles) / 20)]
    if any(pruned.values()):
        handles.append(Line2D([], [], label="pruned", **crosses))
    axes.set_ylim(-0.03, 1.06)
    task_axis(axes, tasks, label="Task Index")
    axes.set_ylabel("Beta Value")
    axes.grid(True)
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def beta_heatmap_figure(events: Sequence[Event], subtitle: str) -> Figure:
    """Weight of each adapter (column) after each task (row), crossed out if pruned then, empty if earlier."""
    tasks = 1 + max(event["task"] for event in events)
    beta, pruned = np.full((tasks, tasks), np.nan), pruned_adapters(events)
    for event in events:
        t = event["task"]
        present = np.array(event["pruning_mask"])
        present[pruned[t]] = True
        beta[t, : t + 1] = np.where(present, event["beta_values"], np.nan)
    cells = [(t, k) for t, gone in pruned.items() for k in gone]
    return _heatmap(beta, cells, "Weight of each task's adapter after each task", subtitle, "after task")


def beta_layers_figure(events: Sequence[Event], subtitle: str) -> Figure:
    """Weight of each adapter (column) in each layer (row) after the last task, crossed out if pruned then."""
    last = events[-1]
    beta = np.array(last["beta_values_by_layer"])  # (layers, tasks)
    cells = [(layer, k) for k in pruned_adapters(events)[last["task"]] for layer in range(len(beta))]
    title = f"Weight of each task's adapter in each layer after task {last['task']}"
    return _heatmap(beta, cells, title, subtitle, "layer")


def pruned_adapters(events: Sequence[Event]) -> dict[int, list[int]]:
    """For each task, the adapters pruned at its end, named by the tasks that grew them."""
    pruned, before = {}, []
    for event in events:
        kept = event["pruning_mask"]
        pruned[event["task"]] = [k for k, was in enumerate([*before, True]) if was and not kept[k]]
        before = kept
    return pruned


def _heatmap(
    beta: np.ndarray, crossed_out: Sequence[tuple[int, int]], title: str, subtitle: str, rows: str
) -> Figure:
    """Heat map of weights (rows, tasks); NaN stays empty, cells (row, task) may be crossed out."""
    spec = HeatmapSpec(rows, "adapter of task", "beta", (0.0, 1.0), colours="Blues")
    figure = heatmaps_figure([Heatmap("", beta)], spec, title, subtitle)
    for row, task in crossed_out:
        corners = [task - 0.42, task + 0.42], [row + 0.42, row - 0.42]
        figure.axes[0].plot(*corners, color=VERMILLION, lw=1.6)
    return figure
