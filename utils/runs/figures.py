"""Figures of a run, drawn from the files in its folder and from nothing else.

    draw_figures(Path("logs/sema/mnist_5k/0/2/quickstart_1993_vit_small_patch14_reg4_dinov2"), SEMA.figures)

    figures/accuracy_matrix.png   accuracy on each task after each task, with numbers
    figures/accuracy_curves.png   accuracy over all classes seen, and over each task's, over tasks
    figures/norms.png             size of the fast and the slow branch in each block (where a run logs it)
    figures/growth.png            number of adapters in each block

A method names its own `Figures`. An unfinished run is drawn as far as it got. Colours can be told apart by
colour-blind readers and in print.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from utils.errors import UserError, in_one_line
from utils.files import read_json, replace_file
from utils.plotting import (
    BLUE,
    GREY,
    INK,
    MOST_NUMBERED_TASKS,
    NARROWEST,
    STYLE,
    VERMILLION,
    panels_by_block,
    png,
    task_axis,
    titled_figure,
)
from utils.runs.folder import ACCURACY, CONFIG, FIGURES, METRICS, RESULT
from utils.runs.run_log import read_accuracy_csv, read_metrics

Figures = Callable[[Sequence[Mapping[str, Any]], Sequence[Sequence[float]], str], dict[str, Figure]]


def draw_figures(run_folder: Path, figures: Figures) -> list[Path]:
    """Draw every figure the run has numbers for into `<run_folder>/figures`; returns the files written.

    Args:
        run_folder: the run's.
        figures: (events, rows of the accuracy matrix, line under the titles) -> figures by file name: a
        learner's.

    Raises UserError when the folder is not a run folder or one of its files is damaged.
    """
    run_folder = Path(run_folder)
    config = read_json(run_folder / CONFIG)
    result = read_json(run_folder / RESULT) if (run_folder / RESULT).exists() else None
    events = read_metrics(run_folder)
    rows = read_accuracy_csv(run_folder) if (run_folder / ACCURACY).exists() else []
    try:
        with mpl.rc_context(STYLE):
            found = figures(events, rows, describe(config, result))
            drawn = {name: png(figure) for name, figure in found.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        told = in_one_line(error)
        raise UserError(
            f"{run_folder / METRICS} holds events that cannot be drawn ({told}): it is damaged, restore it"
        ) from error
    folder = run_folder / FIGURES
    folder.mkdir(exist_ok=True)
    return [replace_file(folder / name, picture) for name, picture in drawn.items()]


def class_incremental_figures(
    events: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[float]], about: str
) -> dict[str, Figure]:
    """Figures of a class-incremental run that it has numbers for, by file name."""
    tasks = [event for event in events if event["event"] == "task"]
    norms = [event for event in events if event["event"] == "norms"]
    finished = min(len(rows), len(tasks))  # a run killed between the two files has one more in one of them
    rows, totals = rows[:finished], [event["total"] for event in tasks[:finished]]
    adapters = [event.get("adapters") or {} for event in tasks]
    figures: dict[str, Figure] = {}
    if rows:
        figures["accuracy_matrix.png"] = accuracy_matrix_figure(rows, totals, about)
        figures["accuracy_curves.png"] = accuracy_curves_figure(rows, totals, about)
    if norms:
        figures["norms.png"] = norms_figure(norms, about)
    if any(adapters):
        figures["growth.png"] = growth_figure(adapters, about)
    return figures


def describe(config: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    """Line under a figure's title: prefix, method, data, backbone, seed, and whether it is unfinished."""
    seed = (result or {}).get("seed", config.get("seed"))
    if isinstance(seed, list):
        seed = ", ".join(map(str, seed))
    names = [config.get(key) for key in ("prefix", "model_name", "dataset", "backbone_type", "encoder")]
    parts = [str(name) for name in names if name] + [f"seed {seed}"]
    return " · ".join(parts if result else [*parts, "unfinished"])


def accuracy_matrix_figure(rows: Sequence[Sequence[float]], totals: Sequence[float], subtitle: str) -> Figure:
    """Heat map of a[t][k] (row t, column k, percent); the last column is accuracy over all seen classes."""
    tasks = len(rows)
    numbered = tasks <= MOST_NUMBERED_TASKS
    cell = 0.56 if tasks <= 12 else 0.44 if numbered else 11.0 / tasks  # inches
    size = cell * (tasks + 1.4)
    figure = titled_figure(
        max(NARROWEST, size + 1.9), max(2.6, cell * tasks + 1.6), "Accuracy after each task (%)", subtitle
    )
    axes = figure.subplots()
    matrix = np.full((tasks, tasks), np.nan)
    for t, row in enumerate(rows):
        matrix[t, : t + 1] = row
    all_seen = tasks + 0.4  # x of the separate column
    style: dict[str, Any] = {
        "cmap": "viridis",
        "vmin": 0,
        "vmax": 100,
        "interpolation": "none",
        "aspect": "auto",
    }
    image = axes.imshow(matrix, **style)
    beside = (all_seen - 0.5, all_seen + 0.5, tasks - 0.5, -0.5)
    axes.imshow(np.array(totals)[:, None], extent=beside, **style)
    axes.set_xlim(-0.5, all_seen + 0.5)
    axes.set_ylim(tasks - 0.5, -0.5)
    if numbered:
        for t, row in enumerate(rows):
            for x, value in [*enumerate(row), (all_seen, totals[t])]:
                colour = "white" if value < 60 else "black"
                axes.text(x, t, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=17 * cell)
    every = range(0, tasks, 1 if numbered else math.ceil(tasks / 20))
    axes.set_xticks([*every, all_seen], [*map(str, every), "all seen"])
    axes.set_yticks(list(every))
    axes.set_xlabel("test images of task")
    axes.set_ylabel("after task")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="accuracy (%)", aspect=max(10, 3 * tasks), pad=0.02)
    bar.outline.set_visible(False)
    return figure


def accuracy_curves_figure(rows: Sequence[Sequence[float]], totals: Sequence[float], subtitle: str) -> Figure:
    """A_t over all seen classes (thick) and accuracy on each task's own test images (thin), percent."""
    tasks = len(rows)
    crowded = tasks > 12
    width, height = (9.0, 5.4) if crowded else (7.2, 4.4)
    figure = titled_figure(width, height, "Accuracy while learning task after task (%)", subtitle)
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.92, tasks))
    own = {"lw": 0.9 if crowded else 1.2, "marker": "o", "ms": 3.5}
    for k in range(tasks):
        after = range(k, tasks)
        marked = [0, -1] if crowded else None  # where the task is learned, and the end
        axes.plot(after, [rows[t][k] for t in after], color=colours[k], markevery=marked, alpha=0.9, **own)
    seen = {"color": INK, "lw": 2.6, "marker": "s", "ms": 6, "mec": "white", "mew": 0.8}
    axes.plot(range(tasks), totals, zorder=5, **seen)
    lowest = min(min(row) for row in rows)
    axes.set_ylim(max(-2, min(80, 10 * math.floor((lowest - 2) / 10))), 102)
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    task_axis(axes, tasks)
    axes.set_ylabel("accuracy (%)")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    handles = [Line2D([], [], **seen)]
    labels = [f"all classes seen so far (last {totals[-1]:.2f}, average {statistics.fmean(totals):.2f})"]
    if tasks > 1:
        handles.append(Line2D([], [], color=colours[tasks // 2], **own))
        labels.append("each task's own classes (colour)")
        _task_colour_bar(figure, axes, colours)
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def norms_figure(events: Sequence[Mapping[str, Any]], subtitle: str) -> Figure:
    """Norms of the fast and slow branch over tasks: a panel for each block, a line for each adapter.

    events: `norms` events with task, block, adapter, when ("before" or "after" consolidation), fast_effect
    and slow_effect, the Frobenius norm of W_up W_down. Where a branch changed at the task's end, the line
    goes from the filled to the hollow marker.
    """
    blocks = sorted({event["block"] for event in events})
    tasks = 1 + max(event["task"] for event in events)
    title = "Norms of the fast and the slow branch, ||W_up W_down||"
    figure, panels = panels_by_block(blocks, tasks, title, subtitle, "norm")
    consolidated = False
    for block, axes in panels.items():
        chosen = [event for event in events if event["block"] == block]
        consolidated |= _draw_norms(axes, chosen, marker_size=3.6 if tasks <= 12 else 2.6)
    axes = panels[blocks[0]]
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    handles = [
        Line2D([], [], color=VERMILLION, marker="o", ms=4, lw=1.4, label="fast"),
        Line2D([], [], color=BLUE, marker="s", ms=4, lw=1.4, label="slow"),
    ]
    if consolidated:
        hollow = {"marker": "o", "ms": 4, "mfc": "white", "lw": 0}
        handles.append(Line2D([], [], color=GREY, label="after consolidation", **hollow))
    if len({event["adapter"] for event in events}) > 1:
        handles.append(
            Line2D([], [], color=GREY, alpha=0.5, lw=1.4, label="one per adapter, later ones darker")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def growth_figure(adapters: Sequence[Mapping[str, int]], subtitle: str) -> Figure:
    """Number of adapters in each block (row) after each task (column); blocks that grew in a task are framed.

    adapters: for each finished task, block -> number.
    """
    tasks = len(adapters)
    blocks = sorted({int(block) for counts in adapters for block in counts})
    rows = [[after.get(str(block), 0) for after in adapters] for block in blocks]
    counts = np.array(rows)  # (blocks, tasks)
    most = max(4, int(counts.max()))  # few adapters: pale colours
    cell = 0.5 if tasks <= 12 else 0.4 if tasks <= MOST_NUMBERED_TASKS else 11.0 / tasks
    width, height = max(NARROWEST, cell * tasks + 2.2), 1.9 + 0.3 * len(blocks)
    figure = titled_figure(width, height, "Adapters in each block after each task (number)", subtitle)
    axes = figure.subplots()
    shades = ListedColormap(mpl.colormaps["Blues"](np.linspace(0.06, 0.85, most + 1)))
    axes.pcolormesh(counts, cmap=shades, vmin=-0.5, vmax=most + 0.5, edgecolors="white", linewidth=1.2)
    grew = False
    for y, t in np.ndindex(counts.shape):
        number = int(counts[y, t])
        if tasks <= MOST_NUMBERED_TASKS:
            colour = "white" if number > 0.6 * most else "black"
            axes.text(t + 0.5, y + 0.5, str(number), ha="center", va="center", color=colour, fontsize=9)
        if t and number > counts[y, t - 1]:
            grew = True
            axes.add_patch(Rectangle((t + 0.06, y + 0.08), 0.88, 0.84, fill=False, ec=VERMILLION, lw=1.8))
    every = range(0, tasks, 1 if tasks <= MOST_NUMBERED_TASKS else math.ceil(tasks / 20))
    axes.set_xticks([t + 0.5 for t in every], [str(t) for t in every])
    axes.set_yticks(np.arange(len(blocks)) + 0.5, [str(block) for block in blocks])
    axes.set_xlabel("after task")
    axes.set_ylabel("block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if grew:
        frame = Patch(fill=False, ec=VERMILLION, lw=1.8, label="grew in this task")
        figure.legend(handles=[frame], loc="outside lower center", frameon=False)
    return figure


def _task_colour_bar(figure: Figure, axes: Axes, colours: np.ndarray) -> None:
    """A bar with the colour of each task, numbered; colours: (tasks, 4)."""
    tasks = len(colours)
    mappable = ScalarMappable(BoundaryNorm(np.arange(tasks + 1) - 0.5, tasks), ListedColormap(colours))
    ticks = range(0, tasks, math.ceil(tasks / 20))
    bar = figure.colorbar(mappable, ax=axes, ticks=ticks, pad=0.02, label="test images of task")
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


def _draw_norms(axes: Axes, events: Sequence[Mapping[str, Any]], marker_size: float) -> bool:
    """Draw both branches of one block's adapters; returns whether any of them changed at a task's end."""
    adapters = sorted({event["adapter"] for event in events})
    strengths = np.linspace(0.4, 1.0, len(adapters)) if len(adapters) > 1 else [1.0]
    in_order = sorted(events, key=lambda event: (event["task"], event["when"] != "before"))
    changed = False
    for strength, adapter in zip(strengths, adapters, strict=True):
        own = [event for event in in_order if event["adapter"] == adapter]
        for branch, colour, marker, aside in (("slow", BLUE, "s", -0.1), ("fast", VERMILLION, "o", 0.1)):
            points: list[tuple[int, float, bool]] = []  # (task, norm, is it after a change?)
            for event in own:
                norm, again = event[f"{branch}_effect"], bool(points) and points[-1][0] == event["task"]
                if not again or norm != points[-1][1]:
                    points.append((event["task"], norm, again))
            tasks, norms, after = (np.array(values) for values in zip(*points, strict=True))
            x = tasks + aside  # the branches stand a little apart
            style: dict[str, Any] = {"color": colour, "alpha": strength}
            axes.plot(x, norms, lw=1.3, **style)
            axes.plot(x[~after], norms[~after], marker, ms=marker_size, **style)
            axes.plot(x[after], norms[after], marker, ms=marker_size, mfc="white", **style)
            changed |= bool(after.any())
    return changed
