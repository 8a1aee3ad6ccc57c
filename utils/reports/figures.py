"""The figures of a sweep's report, drawn from its cells (`utils/reports/cells.py`) and from nothing else.

    pictures = sweep_figures(tabulate(runs, baseline), baseline, "ranks on CIFAR-100")     # file name -> PNG

    curves.png                  accuracy over all classes seen, as the run goes on, mean and deviation over seeds
    plasticity_forgetting.png   how well new tasks are learned against how much of old ones is lost
    differences.png             difference from the baseline with its 95 % interval
    bars.png                    the main metric of every cell, with every seed

Figures without numbers are left out. The baseline is black or grey; colours can be told apart by colour-blind
readers, and cells of the same colour differ in their marker. Text of the user's is drawn as it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from utils.plotting import (
    BLUE,
    GREY,
    INK,
    NARROWEST,
    STYLE,
    VERMILLION,
    as_written,
    png,
    task_axis,
    titled_figure,
    wrapped,
)
from utils.reports.cells import Cell
from utils.reports.metric_catalogue import BARS, CURVES, DIFFERENCES, TRADE_OFF
from utils.reports.stats import SAME

FIGURES = (BARS, DIFFERENCES, CURVES, TRADE_OFF)  # in the order of the report
MANY_CELLS = 12  # beyond, curves show the best alone, and labels beside points become numbers
HIGHLIGHTED = 5
LABEL_WIDTH = 44  # characters a line
LONGEST_BESIDE = 24  # characters of a label that may stand beside its point
LINE, LETTER = 0.155, 0.068  # inches that a line of text and a letter of it take
PALE = "#c4c4c4"
VERDICT_COLOURS = {"better": BLUE, "worse": VERMILLION, "undecided": GREY, SAME: GREY, "one seed": GREY}
COLOURS = [
    c for c in map(to_hex, mpl.color_sequences["petroff10"]) if c not in ("#94a4a2", "#717581")
]  # no greys
MARKERS = "oDv^PX<>"
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps text readable on lines


class Look(NamedTuple):
    """How a cell is drawn, the same in every figure."""

    colour: str
    marker: str


def sweep_figures(cells: Sequence[Cell], baseline: str | None, subtitle: str) -> dict[str, bytes]:
    """Every figure there are numbers for, as PNG by file name, in the order of `FIGURES`.

    subtitle: the grey line under each title.
    """
    cells = [cell for cell in cells if cell.results]
    traded = [cell for cell in cells if {"plasticity", "forgetting"} <= cell.estimates.keys()]
    reference = next((cell for cell in cells if cell.name == baseline), None)
    compared = [cell for cell in cells if cell.comparisons and reference and cell.tasks == reference.tasks]
    looks = cell_looks(cells, baseline)
    subtitle = as_written(subtitle)
    figures = {}
    with mpl.rc_context(STYLE):
        figures[BARS] = bars_figure(cells, baseline, subtitle)
        if compared:
            figures[DIFFERENCES] = differences_figure(
                compared, f"{subtitle} · baseline: {as_written(str(baseline))}"
            )
        if any(cell.tasks > 1 for cell in cells):
            figures[CURVES] = curves_figure(cells, looks, baseline, subtitle)
        if traded:
            figures[TRADE_OFF] = trade_off_figure(traded, looks, subtitle)
        return {name: png(figure) for name, figure in figures.items()}


def highlighted(cells: Sequence[Cell], baseline: str | None) -> list[Cell]:
    """The cells that curves show in colour: all while they are few, else the baseline and the best in A_N.

    The best `HIGHLIGHTED` of several tasks, and the best of one task.
    """
    if len(cells) <= MANY_CELLS:
        return list(cells)
    ranked = _ranked(cells)
    best = [cell for cell in ranked if cell.tasks > 1][:HIGHLIGHTED] + [
        cell for cell in ranked if cell.tasks == 1
    ][:1]
    return [cell for cell in cells if cell in best or cell.name == baseline]


def cell_looks(cells: Sequence[Cell], baseline: str | None) -> dict[str, Look]:
    """A colour and a marker for each cell; the highlighted ones take the first colours, the baseline black squares."""
    names = dict.fromkeys(
        cell.name for cell in [*highlighted(cells, baseline), *cells] if cell.name != baseline
    )
    looks = {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])
        for i, name in enumerate(names)
    }
    return looks if baseline is None else {**looks, baseline: Look(INK, "s")}


def curves_figure(
    cells: Sequence[Cell], looks: dict[str, Look], baseline: str | None, subtitle: str
) -> Figure:
    """Mean of A_t over seeds with a band of one standard deviation, percent; cells of one task as dashed lines.

    The `highlighted` cells have colours, the others are grey.
    """
    shown = _ranked(highlighted(cells, baseline))
    others = [cell for cell in cells if cell not in shown]
    labels = [_wrapped(f"{cell.name} ({cell.estimates['final'].mean:.1f})") for cell in shown]
    labels += [f"{len(others)} other cells"] if others else []
    title = "Accuracy over all classes seen so far (%)"
    figure, axes = _figure_with_legend(
        labels, title, f"{subtitle} · mean ± std over seeds (in brackets: A_N)"
    )
    tasks = max(cell.tasks for cell in cells)
    for cell in others:
        _draw_curve(axes, cell, Look(PALE, ""), tasks, width=0.9)
    handles = []
    for cell in reversed(shown):  # the best on top
        handles.append(
            _draw_curve(axes, cell, looks[cell.name], tasks, width=2.4 if cell.name == baseline else 1.6)
        )
    task_axis(axes, tasks)
    axes.set_ylabel("accuracy (%)")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    _legend_beside(
        axes, [*reversed(handles), *([Line2D([], [], color=PALE, lw=0.9)] if others else [])], labels
    )
    return figure


def trade_off_figure(cells: Sequence[Cell], looks: dict[str, Look], subtitle: str) -> Figure:
    """Plasticity (%) against forgetting (points): a large point for a cell's mean with ± std, a small one a seed.

    Cells are named beside their points, or numbered there and named in a legend where the names need too much room.
    """
    beside = len(cells) <= MANY_CELLS and all(len(cell.name) <= LONGEST_BESIDE for cell in cells)
    names = (
        [] if beside else [_wrapped(f"{number} {cell.name}") for number, cell in enumerate(cells, start=1)]
    )
    title = "Learning new tasks (plasticity) against losing old ones (forgetting)"
    figure, axes = _figure_with_legend(names, title, f"{subtitle} · large: mean ± std, small: one seed")
    handles, means, covered = [], [], []
    for cell in cells:
        colour, marker = looks[cell.name]
        x, y = cell.estimates["plasticity"], cell.estimates["forgetting"]
        plasticity, forgetting = cell.values("plasticity"), cell.values("forgetting")
        points = [(plasticity[seed], forgetting[seed]) for seed in plasticity if seed in forgetting]
        axes.plot(*zip(*points, strict=True), marker, color=colour, ms=3.2, alpha=0.45, mew=0)
        if x.std is not None and y.std is not None:
            axes.errorbar(x.mean, y.mean, y.std, x.std, ecolor=colour, elinewidth=0.9, fmt="none", alpha=0.6)
            steps = np.linspace(-1, 1, 9)
            points += [
                *((x.mean + x.std * s, y.mean) for s in steps),
                *((x.mean, y.mean + y.std * s) for s in steps),
            ]
        handles += axes.plot(x.mean, y.mean, marker, color=colour, ms=9, mec="white", mew=0.9, zorder=4)
        covered += points
        means.append((x.mean, y.mean))
    axes.margins(0.12)
    axes.set_xlabel("plasticity: accuracy on each task just learned (%), higher is better")
    axes.set_ylabel("forgetting (points), lower is better")
    axes.grid()
    axes.set_axisbelow(True)
    if not beside:
        _legend_beside(axes, handles, names)
    labels = [as_written(cell.name) if beside else str(number) for number, cell in enumerate(cells, start=1)]
    _label_points(figure, axes, labels, np.array(means), np.array(covered))
    return figure


def differences_figure(cells: Sequence[Cell], subtitle: str) -> Figure:
    """Paired difference of the kind's panels from the baseline with its 95 % interval; a line a cell."""
    kind = cells[0].kind
    panels = {
        metric: p for metric, p in kind.panels.items() if any(metric in cell.comparisons for cell in cells)
    }
    most = max(cell.comparisons[kind.main].paired.n for cell in cells)
    labels = []
    for cell in cells:
        n = cell.comparisons[kind.main].paired.n
        labels.append(_wrapped(cell.name if n == most else f"{cell.name} (n = {n})"))
    subtitle = f"{subtitle} · paired by seed, n = {most}"
    title = "Difference from the baseline with 95 % interval"
    figure, row = _figure_with_rows(labels, title, subtitle, panels=len(panels))
    for axes, (metric, panel) in zip(row, panels.items(), strict=True):
        axes.axvline(0, color=INK, lw=1)
        for y, cell in enumerate(cells):
            if comparison := cell.comparisons.get(metric):
                look, paired = _verdict_handle(comparison.verdict), comparison.paired
                if paired.low is not None:
                    axes.plot(
                        [paired.low, paired.high], [y, y], color=look.get_color(), lw=2, solid_capstyle="butt"
                    )
                mark = {"marker": look.get_marker(), "mfc": look.get_markerfacecolor(), "ms": 6.5}
                axes.plot(paired.mean, y, color=look.get_color(), **mark)
        axes.set_title(panel.title, loc="left", pad=5)
        axes.set_xlabel(f"difference ({panel.unit})")
        axes.margins(x=0.08)
    found = {comparison.verdict for cell in cells for comparison in cell.comparisons.values()}
    handles = [_verdict_handle(verdict) for verdict in VERDICT_COLOURS if verdict in found]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def bars_figure(cells: Sequence[Cell], baseline: str | None, subtitle: str) -> Figure:
    """The main metric of every cell: a bar to the mean, ± std over seeds, a dot a seed; a line at the baseline's."""
    main, (title, axis) = cells[0].kind.main, cells[0].kind.bars
    figure, (axes,) = _figure_with_rows([_wrapped(cell.name) for cell in cells], title, subtitle)
    for y, cell in enumerate(cells):
        estimate, values = cell.estimates[main], list(cell.values(main).values())
        axes.barh(
            y, estimate.mean, height=0.66, color=GREY if cell.name == baseline else BLUE, alpha=0.45, lw=0
        )
        if estimate.std is not None:
            axes.errorbar(
                estimate.mean, y, xerr=estimate.std, ecolor=INK, elinewidth=1.3, capsize=3, fmt="none"
            )
        heights = y + np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [y]
        axes.plot(values, heights, "o", color=INK, ms=3, mfc="white", mew=0.8)
        spread = "" if estimate.std is None else f" ± {estimate.std:.2f}"
        end = max(*values, estimate.mean + (estimate.std or 0.0))
        text = f"{estimate.mean:.2f}{spread}"
        behind = {
            "facecolor": "white",
            "edgecolor": "none",
            "pad": 1,
        }  # keeps the baseline's line out of the number
        axes.annotate(text, (end, y), (7, 0), textcoords="offset points", va="center", bbox=behind)
        if cell.name == baseline:
            axes.axvline(estimate.mean, color=INK, lw=0.9, ls="--", zorder=0)
    axes.set_xlim(0, max(1.0, max(max(cell.values(main).values()) for cell in cells)) * 1.04)
    axes.set_xlabel(axis)
    handles = [Line2D([], [], color=INK, marker="o", ms=3, mfc="white", lw=0, label="one seed")]
    if any(cell.estimates[main].std is not None for cell in cells):
        handles.append(Line2D([], [], color=INK, lw=1.3, label="mean ± std"))
    if any(cell.name == baseline for cell in cells):
        handles.append(Line2D([], [], color=INK, lw=0.9, ls="--", label="the baseline's mean"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _ranked(cells: Sequence[Cell]) -> list[Cell]:
    """The cells by their mean A_N, the best first."""
    return sorted(cells, key=lambda cell: -cell.estimates[cell.kind.main].mean)


def _draw_curve(axes: Axes, cell: Cell, look: Look, tasks: int, width: float) -> Line2D:
    """A cell's mean curve, or a dashed line where it has one task; with its band where it has a marker."""
    curves = np.array([result["curve"] for result in cell.results.values()])  # (seeds, tasks)
    mean, std = (
        curves.mean(axis=0),
        curves.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(curves.shape[1]),
    )
    if cell.tasks == 1:
        x, mean, std = np.array([-0.4, tasks - 0.6]), mean.repeat(2), std.repeat(2)
        style = {"ls": (0, (4, 2)), "lw": width}
    else:
        x, style = (
            np.arange(len(mean)),
            {"marker": look.marker, "ms": 5, "markevery": max(1, tasks // 20), "lw": width},
        )
    if look.marker:
        axes.fill_between(x, mean - std, mean + std, color=look.colour, alpha=0.1, lw=0)
    return axes.plot(x, mean, color=look.colour, zorder=3 if look.marker else 2, **style)[0]


def _verdict_handle(verdict: str) -> Line2D:
    """How a comparison is drawn, for the legend: hollow where there is no interval."""
    label = "undecided: the interval holds zero" if verdict == "undecided" else verdict
    look = {"mfc": "white", "lw": 0} if verdict in (SAME, "one seed") else {"lw": 2}
    return Line2D(
        [], [], color=VERDICT_COLOURS[verdict], marker="s" if verdict == SAME else "o", label=label, **look
    )


def _figure_with_legend(labels: Sequence[str], title: str, subtitle: str) -> tuple[Figure, Axes]:
    """A figure with room at its right for a legend of these labels, if there are any."""
    height = max(5.0, 1.3 + sum(LINE * (1 + label.count("\n")) + 0.06 for label in labels))
    width = 6.8 + (0.6 + LETTER * _longest(labels) if labels else 0)
    figure = titled_figure(width, height, title, subtitle)
    return figure, figure.subplots()


def _legend_beside(axes: Axes, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """A legend right of the axes."""
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def _figure_with_rows(
    labels: Sequence[str], title: str, subtitle: str, panels: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with a labelled line for each cell, the first on top, and one or more panels side by side."""
    lines = max(1 + label.count("\n") for label in labels)
    height = 1.55 + len(labels) * max(0.3, LINE * lines + 0.08)
    figure = titled_figure(
        max(NARROWEST, 3 * panels + 2 + LETTER * _longest(labels)), max(2.6, height), title, subtitle
    )
    row = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for axes in row:
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0, labelleft=axes is row[0])
        axes.spines["left"].set_visible(False)
    return figure, row


def _label_points(
    figure: Figure, axes: Axes, labels: Sequence[str], means: np.ndarray, covered: np.ndarray
) -> None:
    """Write each label near its point, where it meets the fewest labels, points and edges; with a thin line where far.

    means: (cells, 2), what the labels belong to; covered: (points, 2), what they rather leave free. Data coordinates.
    """
    figure.draw_without_rendering()  # settles where the axes are
    pixel = figure.dpi / 72  # pixels a typographic point
    centres, dots = axes.transData.transform(means), axes.transData.transform(covered)
    taken = [(*(centre - 6 * pixel), *(centre + 6 * pixel)) for centre in centres]  # boxes x0, y0, x1, y1
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    line = {"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 5}
    look = {"ha": "center", "va": "center", "fontsize": 9, "color": INK, "path_effects": HALO, "zorder": 6}
    for label, point, centre in zip(labels, means, centres, strict=True):
        text = axes.annotate(label, point, (0, 0), textcoords="offset points", arrowprops=line, **look)
        text.set_in_layout(False)
        half = np.array(Text.get_window_extent(text).size) / 2 + pixel
        tried = []
        for radius in (7, 14, 24, 38, 56, 80):
            for angle in angles:
                offset = np.array([np.cos(angle), np.sin(angle)]) * (half + radius * pixel)
                box = (*(centre + offset - half), *(centre + offset + half))
                tried.append((_cost(box, taken, dots, axes) + radius, len(tried), radius, offset, box))
        _, _, radius, offset, box = min(tried, key=lambda place: place[:2])
        text.set_position(offset / pixel)
        text.arrow_patch.set_visible(radius > 14)
        taken.append(box)


def _cost(box: tuple[float, ...], taken: Sequence[tuple[float, ...]], dots: np.ndarray, axes: Axes) -> float:
    """How bad a label's place is: leaving the axes and covering labels or means weighs most."""
    x0, y0, x1, y1 = box
    frame = axes.bbox
    outside = x0 < frame.x0 or y0 < frame.y0 or x1 > frame.x1 or y1 > frame.y1
    hidden = sum(x0 < u1 and u0 < x1 and y0 < v1 and v0 < y1 for u0, v0, u1, v1 in taken)
    crossed = np.sum((dots[:, 0] > x0) & (dots[:, 0] < x1) & (dots[:, 1] > y0) & (dots[:, 1] < y1))
    return 1000.0 * (outside + hidden) + 8.0 * crossed


def _longest(labels: Sequence[str]) -> int:
    """Characters of the longest line."""
    return max(len(line) for label in labels for line in label.split("\n"))


def _wrapped(name: str) -> str:
    """A cell's name in lines of `LABEL_WIDTH` characters at most, for a figure."""
    return wrapped(name, LABEL_WIDTH)
