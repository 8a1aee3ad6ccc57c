"""Figures of a gate over adapters, drawn from a run's `gate` events: one a task, with `task`, `beta_values` (the weight
of every task's adapter up to it), `pruning_mask` (whether it is kept) and, of a gate in every layer,
`beta_values_by_layer`.

    figures/beta_evolution.png   a line for the weights after each task, over the tasks whose adapters they are of
    figures/beta_heatmap.png     the same as a map: after task (row), adapter of task (column)
    figures/beta_layers.png      after the last task: layer (row), adapter of task (column)

`utils/runs/figures.py` draws them with the others.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.plotting import MOST_NUMBERED_TASKS, NARROWEST, VERMILLION, task_axis, titled_figure

Event = Mapping[str, Any]


def gate_figures(events: Sequence[Event], about: str) -> dict[str, Figure]:
    """Figures of the gate that a run has events of, by file name; about: the line under the titles."""
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
    """The weights after each task (a line) over the tasks whose adapters they belong to; pruned ones are crossed."""
    tasks = 1 + max(event["task"] for event in events)
    height = max(4.4, 1.3 + 0.22 * min(tasks, MOST_NUMBERED_TASKS))
    figure = titled_figure(8.4, height, "Beta Evolution During Continual Learning", subtitle)
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.92, tasks))
    handles, pruned = [], {"color": VERMILLION, "marker": "x", "ms": 7, "mew": 1.8, "ls": "none"}
    lost = _pruned_in(events)
    for event in events:
        beta, gone = event["beta_values"], lost[event["task"]]
        look = {"color": colours[event["task"]], "marker": "o", "ms": 4, "lw": 1.4}
        axes.plot(range(len(beta)), beta, **look)
        axes.plot(gone, [beta[k] for k in gone], zorder=5, **pruned)
        handles.append(Line2D([], [], label=f"After Task {event['task']}", **look))
    if len(handles) > MOST_NUMBERED_TASKS:
        handles = handles[:: math.ceil(len(handles) / 20)]
    if any(lost.values()):
        handles.append(Line2D([], [], label="pruned", **pruned))
    axes.set_ylim(-0.03, 1.06)
    task_axis(axes, tasks, label="Task Index")
    axes.set_ylabel("Beta Value")
    axes.grid(True)
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def beta_heatmap_figure(events: Sequence[Event], subtitle: str) -> Figure:
    """Weight of each adapter (column) after each task (row); what was pruned then is crossed, what before is empty."""
    tasks = 1 + max(event["task"] for event in events)
    beta, lost = np.full((tasks, tasks), np.nan), _pruned_in(events)
    for event in events:
        t = event["task"]
        there = np.array(event["pruning_mask"])
        there[lost[t]] = True
        beta[t, : t + 1] = np.where(there, event["beta_values"], np.nan)
    crosses = [(k, t) for t, gone in lost.items() for k in gone]
    title = "Weight of each task's adapter after each task"
    return _map(beta, crosses, title, subtitle, "after task")


def beta_layers_figure(events: Sequence[Event], subtitle: str) -> Figure:
    """Weight of each adapter (column) in each layer (row) after the last task; what was pruned then is crossed."""
    last = events[-1]
    beta = np.array(last["beta_values_by_layer"])  # (layers, tasks)
    crosses = [(k, layer) for k in _pruned_in(events)[last["task"]] for layer in range(len(beta))]
    title = f"Weight of each task's adapter in each layer after task {last['task']}"
    return _map(beta, crosses, title, subtitle, "layer")


def _pruned_in(events: Sequence[Event]) -> dict[int, list[int]]:
    """For each task, the tasks whose adapters went when it ended: there until then, and not kept."""
    lost, before = {}, []
    for event in events:
        kept = event["pruning_mask"]
        lost[event["task"]] = [k for k, was in enumerate([*before, True]) if was and not kept[k]]
        before = kept
    return lost


def _map(
    beta: np.ndarray, crosses: Sequence[tuple[int, int]], title: str, subtitle: str, rows: str
) -> Figure:
    """Heat map of weights (rows, tasks); NaN is left empty, (column, row) in `crosses` is crossed out."""
    lines, tasks = beta.shape
    numbered = max(lines, tasks) <= MOST_NUMBERED_TASKS
    cell = 0.5 if tasks <= 12 else 0.44 if numbered else 11.0 / tasks  # inches
    high = cell if numbered else 11.0 / max(lines, tasks)
    figure = titled_figure(max(NARROWEST, cell * tasks + 2.2), max(2.6, high * lines + 1.6), title, subtitle)
    axes = figure.subplots()
    image = axes.imshow(beta, cmap="Blues", vmin=0, vmax=1, interpolation="none", aspect="auto")
    if numbered:
        for (row, k), value in np.ndenumerate(beta):
            if not math.isnan(value):
                colour = "white" if value > 0.6 else "black"
                axes.text(k, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=15 * cell)
    _cross_out(axes, crosses)
    axes.set_xticks(range(0, tasks, 1 if numbered else math.ceil(tasks / 20)))
    shown = range(0, lines, 1 if numbered else math.ceil(lines / 20))
    axes.set_yticks(shown)
    axes.set_xlabel("adapter of task")
    axes.set_ylabel(rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="beta", pad=0.02)
    bar.outline.set_visible(False)
    return figure


def _cross_out(axes: Axes, cells: Sequence[tuple[int, int]]) -> None:
    """A line through each of these (column, row) cells of a map."""
    for k, row in cells:
        axes.plot([k - 0.42, k + 0.42], [row + 0.42, row - 0.42], color=VERMILLION, lw=1.6)
