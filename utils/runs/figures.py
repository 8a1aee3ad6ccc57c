"""Figures of a run, drawn from the files in its folder and from nothing else.

    draw_figures(Path("logs/sema/synthetic/0/2/smoke_1993_test_vit"), SEMA.figures)

A method names its own `Figures`; `CAPTIONS` says what those of a class-incremental run show. An unfinished
run is drawn as far as it got. With `figure_format` "pdf" or "svg" each figure is also drawn in that form.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from utils.files import damaged, read_json, replace_file
from utils.metric_catalogue import keyed
from utils.plotting import (
    BLUE,
    GREY,
    INK,
    MAX_NUMBERED_TASKS,
    NARROWEST,
    STYLE,
    VERMILLION,
    HeatmapSpec,
    adapter_panels,
    as_written,
    colour_bar,
    draw_chance,
    draw_heatmap,
    legend_below,
    pictures,
    task_axis,
    titled_figure,
)
from utils.runs.classes import read_classes
from utils.runs.folder import CONFIG, FIGURES, METRICS, RESULT
from utils.runs.run_log import accuracy_rows, read_metrics
from utils.runs.tables import accuracy_on
from utils.wording import named_data

MAX_NAMED_CLASSES, MAX_NUMBERED_CLASSES = 60, 16  # beyond, their names or counts would be too small
LONGEST_NAME = 22  # characters of a class's name

CAPTIONS = {  # captions of a class-incremental run's figures, in the order of its page
    "accuracy_curves.png": "Accuracy over all classes seen so far (thick) and on each task's own images "
    "(thin, a colour per task) after each task; dotted: chance.",
    "accuracy_matrix.png": "Accuracy on the images of each task (columns) after each task (rows): "
    "a task is forgotten down its column.",
    "confusion.png": "What the images of each class (rows) were taken for (columns): right answers are "
    "on the diagonal, lines separate tasks. At the right the accuracy of each class now; dots: when its task "
    "was learned.",
    "growth.png": "Number of adapters in each block after each task; frames mark growth.",
    "norms.png": "Size of the fast and the slow branch of each block's adapters over tasks; hollow: after "
    "consolidation.",
}
Figures = Callable[[Sequence[Mapping[str, Any]], str], dict[str, Figure]]


def draw_figures(run_folder: Path, figures: Figures) -> list[Path]:
    """Draw every figure that the run has numbers for into `<run_folder>/figures`; returns the files written.

    With `figure_format` "none" only the folder is made.

    Args:
        figures: a learner's, (events, line under the titles) -> figures by file name.

    Raises UserError: the folder is no run's, or one of its files is damaged.
    """
    config, folder = read_json(run_folder / CONFIG), run_folder / FIGURES
    if config.get("figure_format") == "none":
        folder.mkdir(exist_ok=True)
        return []
    about = describe(config, finished=(run_folder / RESULT).exists())
    events = read_metrics(run_folder)
    with damaged(run_folder / METRICS), mpl.rc_context(STYLE):
        found = figures(events, about)
        if classes := read_classes(run_folder):
            found["confusion.png"] = confusion_figure(*classes, about)
        drawn = pictures(found, config.get("figure_format", "png"))
    folder.mkdir(exist_ok=True)
    return [replace_file(folder / name, content) for name, content in drawn.items()]


def class_incremental_figures(events: Sequence[Mapping[str, Any]], about: str) -> dict[str, Figure]:
    """Figures of a class-incremental run that it has numbers for, by file name."""
    tasks = [event for event in events if event["event"] == "task"]
    norms = [event for event in events if event["event"] == "norms"]
    rows, images = accuracy_rows(events)
    totals = [event[keyed(images, "total")] for event in tasks]
    adapters = [event.get("adapters") or {} for event in tasks]
    figures: dict[str, Figure] = {}
    if rows:
        figures["accuracy_matrix.png"] = accuracy_matrix_figure(rows, totals, about, images)
        seen = [event["classes_seen"] for event in tasks if "classes_seen" in event]
        figures["accuracy_curves.png"] = accuracy_curves_figure(rows, totals, about, images, seen)
    if norms:
        figures["norms.png"] = norms_figure(norms, about)
    if any(adapters):
        figures["growth.png"] = growth_figure(adapters, about)
    return figures


def describe(config: Mapping[str, Any], finished: bool = True) -> str:
    """Line under a figure's title: prefix, method, data, backbone, seed, and whether it is unfinished."""
    first, last = ("prefix", "model_name"), ("backbone_type", "encoder")
    names = [*map(config.get, first), named_data(config), *map(config.get, last)]
    parts = [str(name) for name in names if name] + [f"seed {config.get('seed')}"]
    return " · ".join(parts if finished else [*parts, "unfinished"])


def accuracy_matrix_figure(
    rows: Sequence[Sequence[float]], totals: Sequence[float], subtitle: str, images: str = "test"
) -> Figure:
    """Heat map of a[t][k] (row t, column k, percent); the last column is accuracy over all seen classes."""
    tasks = len(rows)
    numbered = tasks <= MAX_NUMBERED_TASKS
    cell = 0.56 if tasks <= 12 else 0.44 if numbered else 11.0 / tasks  # inches
    width, height = max(NARROWEST, cell * tasks + 2.6), max(2.6, cell * tasks + 1.6)
    figure = titled_figure(width, height, f"{accuracy_on(images)} after each task (%)", subtitle)
    axes = figure.subplots()
    values = np.full((tasks, tasks + 1), np.nan)
    for t, row in enumerate(rows):
        values[t, : t + 1], values[t, tasks] = row, totals[t]
    spec = HeatmapSpec("after task", f"{images} images of task", "accuracy (%)", (0.0, 100.0), 1)
    image = draw_heatmap(axes, values, spec, fontsize=17 * cell if numbered else None)
    axes.axvline(tasks - 0.5, color="white", lw=5)
    every = range(0, tasks, 1 if numbered else math.ceil(tasks / 20))
    axes.set_xticks([*every, tasks], [*map(str, every), "all"])
    axes.set_yticks(every)
    axes.set_xlabel(spec.columns)
    axes.set_ylabel(spec.rows)
    colour_bar(figure, image, axes, spec.label, aspect=max(10, 3 * tasks))
    return figure


def accuracy_curves_figure(
    rows: Sequence[Sequence[float]],
    totals: Sequence[float],
    subtitle: str,
    images: str = "test",
    classes_seen: Sequence[int] = (),
) -> Figure:
    """A_t over all seen classes (thick) and accuracy on each task's own images (thin), percent.

    classes_seen: after each task, for the line of chance; empty where it is not recorded.
    """
    tasks = len(rows)
    crowded = tasks > 12
    width, height = (9.0, 5.4) if crowded else (7.2, 4.4)
    title = f"{accuracy_on(images)} while learning task after task (%)"
    figure = titled_figure(width, height, title, subtitle)
    axes = figure.subplots()
    shades = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.0, 0.92, tasks)))
    of_tasks = ScalarMappable(BoundaryNorm(np.arange(tasks + 1) - 0.5, tasks), shades)
    own = {"lw": 0.9 if crowded else 1.2, "marker": "o", "ms": 3.5}
    for k in range(tasks):
        after = range(k, tasks)
        marked = [0, -1] if crowded else None  # where the task is learned, and the end
        axes.plot(after, [rows[t][k] for t in after], color=shades(k), markevery=marked, alpha=0.9, **own)
    seen = {"color": INK, "lw": 2.6, "marker": "s", "ms": 6, "mec": "white", "mew": 0.8}
    axes.plot(range(tasks), totals, zorder=5, **seen)
    lowest = min(min(row) for row in rows)
    axes.set_ylim(max(-2, min(80, 10 * math.floor((lowest - 2) / 10))), 102)
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    task_axis(axes, tasks)
    axes.set_ylabel(f"{accuracy_on(images).lower()} (%)")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    label = f"all classes seen so far (last {totals[-1]:.2f}, average {statistics.fmean(totals):.2f})"
    handles = {label: Line2D([], [], **seen)}
    if tasks > 1:
        handles["each task's own classes (colour)"] = Line2D([], [], color=shades(tasks // 2), **own)
        ticks = range(0, tasks, math.ceil(tasks / 20))
        colour_bar(figure, of_tasks, axes, f"{images} images of task", ticks=ticks)
    if len(classes_seen) == tasks:
        handles |= draw_chance(axes, [100 / classes for classes in classes_seen])
    legend_below(figure, handles, columns=2)
    return figure


def norms_figure(events: Sequence[Mapping[str, Any]], subtitle: str) -> Figure:
    """Norms of the fast and slow branch over tasks: a panel for each block, a line for each adapter.

    events: `norms` events with task, block, adapter, fast_effect and slow_effect, the Frobenius norm of
    W_up W_down; of one task first that before consolidation, then that after it. Where a branch changed, the
    line goes from the filled to the hollow marker.
    """
    title = "Norms of the fast and the slow branch, ||W_up W_down||"
    figure, lines = adapter_panels(events, title, subtitle, "norm")
    size = 3.6 if max(event["task"] for event in events) < 12 else 2.6
    consolidated = False
    for axes, opacity, own in lines:
        again = own["task"].duplicated()
        for branch, colour, marker, aside in (("slow", BLUE, "s", -0.1), ("fast", VERMILLION, "o", 0.1)):
            norms = own[f"{branch}_effect"]
            changed = again & (norms != norms.shift())
            x, style = own["task"] + aside, {"color": colour, "alpha": opacity}  # the branches stand apart
            points = changed | ~again
            axes.plot(x[points], norms[points], lw=1.3, **style)
            axes.plot(x[~again], norms[~again], marker, ms=size, **style)
            axes.plot(x[changed], norms[changed], marker, ms=size, mfc="white", **style)
            consolidated |= changed.any()
    first = lines[0][0]
    first.set_ylim(0, 1.08 * first.get_ylim()[1])
    handles = {
        "fast": Line2D([], [], color=VERMILLION, marker="o", ms=4, lw=1.4),
        "slow": Line2D([], [], color=BLUE, marker="s", ms=4, lw=1.4),
    }
    if consolidated:
        handles["after consolidation"] = Line2D([], [], color=GREY, marker="o", ms=4, mfc="white", lw=0)
    if any(opacity < 1 for _, opacity, _ in lines):
        handles["one per adapter, later ones darker"] = Line2D([], [], color=GREY, alpha=0.5, lw=1.4)
    legend_below(figure, handles)
    return figure


def growth_figure(adapters: Sequence[Mapping[str, int]], subtitle: str) -> Figure:
    """Number of adapters in each block (row) after each task (column); blocks that grew in a task are framed.

    adapters: for each finished task, block -> number.
    """
    counts = pd.DataFrame(adapters).fillna(0).rename(columns=int).sort_index(axis="columns").T
    values, tasks = counts.to_numpy(float), len(adapters)  # (blocks, tasks)
    cell = 0.5 if tasks <= 12 else 0.4 if tasks <= MAX_NUMBERED_TASKS else 11.0 / tasks
    width, height = max(NARROWEST, cell * tasks + 2.2), 1.9 + 0.3 * len(values)
    figure = titled_figure(width, height, "Adapters in each block after each task (number)", subtitle)
    axes = figure.subplots()
    limits = (0.0, 1.3 * max(4, values.max()))  # few adapters: pale colours
    spec = HeatmapSpec("block", "after task", "adapters", limits, 0, "Blues", list(map(str, counts.index)))
    draw_heatmap(axes, values, spec, fontsize=9 if tasks <= MAX_NUMBERED_TASKS else None)
    axes.set_xlabel(spec.columns)
    axes.set_ylabel(spec.rows)
    framed = {"fill": False, "ec": VERMILLION, "lw": 1.8}
    grew = np.argwhere(np.diff(values, axis=1) > 0)
    for row, before in grew:
        axes.add_patch(Rectangle((before + 0.56, row - 0.42), 0.88, 0.84, **framed))
    if len(grew):
        legend_below(figure, {"grew in this task": Patch(**framed)})
    return figure


def confusion_figure(per_class: pd.DataFrame, counts: np.ndarray, images: str, subtitle: str) -> Figure:
    """Share of each class's images (row) taken for each class (column), and each class's accuracy.

    per_class, counts, images: of `read_classes`. Classes are ordered by task, with a line between tasks;
    where names do not fit, ticks are tasks.
    """
    classes, tasks = len(counts), per_class["task"].to_numpy()
    named, numbered = classes <= MAX_NAMED_CLASSES, classes <= MAX_NUMBERED_CLASSES
    cell = 0.46 if numbered else max(0.155, 8 / classes) if named else 8 / classes  # inches
    shortened = (textwrap.shorten(name, LONGEST_NAME, placeholder="…") for name in per_class["name"])
    names = [as_written(name) for name in shortened]
    side, beside = max(1.9, cell * classes), 0.075 * max(map(len, names)) if named else 0.5
    title = f"True and predicted classes of all {images} images (%)"
    figure = titled_figure(max(NARROWEST, side + beside + 3.4), side + beside + 1.5, title, subtitle)
    axes, right = figure.subplots(1, 2, sharey=True, width_ratios=[side, 1.5])
    shares = np.where(counts, 100.0 * counts / counts.sum(axis=1, keepdims=True), np.nan)
    limits, label = (0.0, 100.0), "share of images (%)"
    spec = HeatmapSpec("true class", "predicted class", label, limits, 0, "Blues", gamma=0.5)
    image = draw_heatmap(axes, shares, spec, fontsize=7.5 if numbered else None)
    first = np.flatnonzero(np.diff(tasks, prepend=-1))  # class of each task
    for border in first[1:] - 0.5:
        for line in (axes.axhline, axes.axvline, right.axhline):
            line(border, color=VERMILLION, lw=0.8 if classes <= 100 else 0.5)
    if named:
        ticks, labels = range(classes), names
    else:
        ticks = (first + np.append(first[1:], classes) - 1) / 2
        step = math.ceil(len(ticks) / 20)
        ticks, labels = ticks[::step], [f"task {task}" for task in tasks[first][::step]]
    axes.set_xticks(ticks, labels, rotation=90, size=8)
    axes.set_yticks(ticks, labels, size=8)
    axes.set_xlabel(spec.columns)
    axes.set_ylabel(spec.rows)
    places = np.arange(classes)
    right.barh(places, per_class["accuracy"], height=0.8, color=BLUE, alpha=0.6, lw=0)
    learned = {"color": INK, "marker": "o", "ls": "", "ms": min(4.0, 36 * cell), "mfc": "white", "mew": 0.8}
    (dots,) = right.plot(per_class["accuracy_when_learned"], places, clip_on=False, **learned)
    right.set_xlim(0, 100)
    right.set_xlabel("accuracy (%)")
    right.tick_params(axis="y", length=0, labelleft=False)
    right.grid(axis="x")
    right.set_axisbelow(True)
    handles = {"accuracy now": Patch(color=BLUE, alpha=0.6, lw=0), "when its task was learned": dots}
    if len(first) > 1:
        handles["a new task"] = Line2D([], [], color=VERMILLION, lw=1)
    legend_below(figure, handles)
    colour_bar(figure, image, axes, spec.label, aspect=25)
    return figure
