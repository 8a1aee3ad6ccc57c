"""Figures of a sweep's report, drawn from its results (`utils/reports/results.py`).

    pictures = sweep_figures(results, "ranks on CIFAR-100")     # file name -> (PNG, caption)

They are those of `FIGURES`, and the answers to the sweep's hypotheses (`utils/reports/answers.py`); figures
without numbers are left out. The baseline is black or grey; colours are distinguishable for colour-blind
readers, and cells of the same colour differ in their marker. Users' texts are drawn as they are written.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.metric_catalogue import ABSENT, MetricSpec, Shown
from utils.plotting import (
    BLUE,
    GREY,
    INK,
    NARROWEST,
    STYLE,
    VERMILLION,
    draw_chance,
    legend_below,
    pictures,
    task_axis,
    titled_figure,
    wrapped,
)
from utils.reports.answers import CONTRADICTED, SIDES, SUPPORTED, comparison
from utils.reports.results import Results
from utils.reports.stats import ONE_SEED, SAME, UNDECIDED

HYPOTHESES_FIGURE = "hypotheses.png"
HYPOTHESES_CAPTION = (
    "Difference that each hypothesis is about, paired by seed, with its 95 % interval if any; small dots are "
    "seeds. Blue: the interval excludes zero on the expected side, supported; orange: on the other side, "
    "contradicted; grey: the seeds do not decide. Hypotheses without a number are in the table alone."
)
MANY_CELLS = 12  # with more, curves and points show only the best in colour
HIGHLIGHTED = 5
LABEL_WIDTH = 44  # characters per line
LINE, LETTER = 0.155, 0.068  # inches: height of a line of text, width of a letter
FOREST_WIDTH, AXIS_HEIGHT = 9.4, 0.65  # inches: of the figure of hypotheses, of an axis below its panel
PALE = "#c4c4c4"
VERDICT_COLOURS = {"better": BLUE, SUPPORTED: BLUE, "worse": VERMILLION, CONTRADICTED: VERMILLION}
VERDICT_COLOURS |= dict.fromkeys((UNDECIDED, SAME, ONE_SEED), GREY)
GREYS = ("#94a4a2", "#717581")
COLOURS = [colour for colour in map(to_hex, mpl.color_sequences["petroff10"]) if colour not in GREYS]
MARKERS = "oDv^PX<>"
Style = dict[str, Any]  # "color" and "marker" of a cell


def sweep_figures(
    results: Results, subtitle: str, answers: pd.DataFrame | None = None, form: str = "png"
) -> dict[str, tuple[bytes, str]]:
    """Every figure that has numbers, with its caption by file name, in the order of `FIGURES`.

    form: "png", or "pdf" or "svg" for files of that form as well.
    """
    captions = {name: caption.format(main=results.main.name) for name, (_, caption) in FIGURES.items()}
    captions[HYPOTHESES_FIGURE] = HYPOTHESES_CAPTION
    with mpl.rc_context(STYLE):
        drawn = {name: draw(results, subtitle) for name, (draw, _) in FIGURES.items()}
        if answers is not None:
            drawn[HYPOTHESES_FIGURE] = hypotheses_figure(answers, results, subtitle)
        files = pictures({name: figure for name, figure in drawn.items() if figure}, form)
    return {name: (content, captions[Path(name).with_suffix(".png").name]) for name, content in files.items()}


def cell_styles(results: Results) -> dict[str, Style]:
    """Colour and marker of each cell drawn in colour, the same in every figure; the baseline is black.

    With more than `MANY_CELLS` cells these are the baseline, the best `HIGHLIGHTED` of several tasks in the
    main metric, and the best of one task.
    """
    cells = results.finished
    if len(cells) > MANY_CELLS:
        ranked = results.ranked.index
        best = [cell for cell in ranked if results.tasks(cell) > 1][:HIGHLIGHTED]
        best += [cell for cell in ranked if results.tasks(cell) == 1][:1]
        cells = [cell for cell in cells if cell in best or cell == results.baseline]
    others = [cell for cell in cells if cell != results.baseline]
    styles = {
        cell: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        }
        for i, cell in enumerate(others)
    }
    return {cell: styles.get(cell, {"color": INK, "marker": "s"}) for cell in cells}


def _over_seeds(results: Results) -> str:
    """What the numbers of cells are, with n: "one seed", "mean ± std over 2 to 5 seeds"."""
    counts = [len(results.cells[cell]) for cell in results.finished]
    least, most = min(counts), max(counts)
    if most == 1:
        return "one seed"
    return f"mean ± std over {most if least == most else f'{least} to {most}'} seeds"


def bars_figure(results: Results, subtitle: str) -> Figure:
    """The main metric of every cell: a bar to the mean, ± std over seeds, a dot per seed."""
    main = results.main
    labels = [wrapped(cell, LABEL_WIDTH) for cell in results.finished]
    subtitle = f"{subtitle} · {_over_seeds(results)}"
    figure, (axes,) = _figure_with_rows(labels, _sentence(main.definition), subtitle)
    handles = {"one seed": Line2D([], [], color=INK, marker="o", ms=3, mfc="white", lw=0)}
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # keeps lines out of the numbers
    ends: list[float] = []  # of bar, whisker and dots
    for y, cell in enumerate(results.finished):
        mean, std = results.summary.loc[(cell, main.key), ["mean", "std"]]
        values = results.values(cell, main.key)
        colour = GREY if cell == results.baseline else BLUE
        axes.barh(y, mean, height=0.66, color=colour, alpha=0.45, lw=0)
        if pd.notna(std):
            axes.errorbar(mean, y, xerr=std, ecolor=INK, elinewidth=1.3, capsize=3, fmt="none")
            handles["mean ± std"] = Line2D([], [], color=INK, lw=1.3)
        heights = y + np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [y]
        axes.plot(values, heights, "o", color=INK, ms=3, mfc="white", mew=0.8)
        ends.append(max(values.max(), mean + np.nan_to_num(std)))
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(main.text(mean, std), (ends[-1], y), bbox=behind, **place)
        if cell == results.baseline:
            axes.axvline(mean, color=INK, lw=0.9, ls="--", zorder=0)
            handles["the baseline's mean"] = Line2D([], [], color=INK, lw=0.9, ls="--")
    if chance := results.chance()[-1:]:
        axes.axvline(chance[0], color=GREY, ls=":", lw=1.4, zorder=0)
        handles[f"chance ({chance[0]:.1f} %)"] = Line2D([], [], color=GREY, ls=":", lw=1.4)
    axes.set_xlim(0, max(1.0, *ends) * 1.04)
    axes.set_xlabel(main.heading)
    legend_below(figure, handles)
    return figure


def differences_figure(results: Results, subtitle: str) -> Figure | None:
    """Difference from the baseline with its 95 % interval: a row per cell, a panel per metric.

    None where no cell with the tasks of the baseline is compared with it.
    """
    drawn = results.summary.dropna(subset="difference")
    drawn = drawn[[results.same_tasks(cell, results.baseline) for cell, _ in drawn.index]]
    if drawn.empty:
        return None
    numbers = drawn["paired_n"].xs(results.main.key, level="metric")
    cells = list(numbers.index)
    compared = set(drawn.index.get_level_values("metric"))
    panels = [spec for spec in results.metrics if spec.shown == Shown.FIGURES and spec.key in compared]
    drawn = drawn[drawn.index.isin([spec.key for spec in panels], level="metric")]
    most = numbers[cells].max()
    labels = [cell if numbers[cell] == most else f"{cell} (n = {numbers[cell]})" for cell in cells]
    labels = [wrapped(label, LABEL_WIDTH) for label in labels]
    subtitle = f"{subtitle} · baseline: {results.baseline} · paired by seed, n = {most}"
    title = f"Difference from the baseline{_with_interval(drawn)}"
    figure, axes_of_panels = _figure_with_rows(labels, title, subtitle, panels=len(panels))
    for axes, spec in zip(axes_of_panels, panels, strict=True):
        found = drawn.xs(spec.key, level="metric").to_dict("index")
        _draw_differences(axes, {cells.index(cell): row for cell, row in found.items()}, spec)
        side = "left" if spec.lower_is_better else "right"
        axes.set_title(f"{spec.name}: {side} is better", loc="left", pad=5)
    handles = {
        f"{verdict}: the interval holds zero" if verdict == UNDECIDED else verdict: _verdict_handle(verdict)
        for verdict in VERDICT_COLOURS
        if verdict in set(drawn["verdict"])
    }
    legend_below(figure, handles)
    return figure


def hypotheses_figure(answers: pd.DataFrame, results: Results, subtitle: str) -> Figure | None:
    """Difference that each hypothesis is about, with its 95 % interval: a row each, a panel per metric.

    Dots below are seeds. None where no hypothesis has a number.
    """
    answered = answers[answers["n"] > 0]
    if answered.empty:
        return None
    most = answered["n"].max()
    panels = [rows.to_dict("records") for _, rows in answered.groupby("metric", sort=False)]
    labels = [[_label(row, results) for row in rows] for rows in panels]
    row_height = 0.1 + _row_height([label for own in labels for label in own])
    heights = [AXIS_HEIGHT + row_height * len(own) for own in labels]
    subtitle = f"{subtitle} · paired by seed, n = {most}"
    title = f"Difference of each hypothesis{_with_interval(answered)}"
    figure = titled_figure(FOREST_WIDTH, AXIS_HEIGHT + sum(heights), title, subtitle)
    axes_of_panels = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, rows, own in zip(axes_of_panels, panels, labels, strict=True):
        spec = results.spec(rows[0]["metric"])
        _label_rows(axes, own)
        _draw_differences(axes, dict(enumerate(rows)), spec)
        for y, row in enumerate(rows):
            pairs = results.pairs(*(row[side] for side in SIDES)) / spec.scale
            axes.plot(pairs["ours"] - pairs["theirs"], [y + 0.25] * len(pairs), "o", color=INK, ms=2.5)
            interval = spec.difference_text(row["difference_low95"], row["difference_high95"])
            lines = [f"{row['verdict']}, n = {row['n']}" if row["n"] < most else row["verdict"]]
            lines += [spec.difference_text(row["difference"]) + f" ({interval})" * (interval != ABSENT)]
            beside = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
            colour = VERDICT_COLOURS[row["verdict"]]
            axes.annotate("\n".join(lines), (1, y), (8, 0), color=colour, size=9, **beside)
    return figure


def curves_figure(results: Results, subtitle: str) -> Figure | None:
    """Mean over seeds of the metric per task, with a band of ± std; a cell of one task is a dashed line.

    None where no cell has several tasks.
    """
    tasks = max(map(results.tasks, results.finished))
    if tasks == 1:
        return None
    spec, styles = next(spec for spec in results.metrics if spec.per_task), cell_styles(results)
    shown = [cell for cell in results.ranked.index if cell in styles]
    labels = [f"{cell} ({results.ranked[cell]:.1f})" for cell in shown]
    subtitle = f"{subtitle} · {_over_seeds(results)} (in brackets: {results.main.name})"
    figure, axes = _figure_with_legend(labels, _sentence(spec.definition), subtitle)
    handles = {}
    for cell in sorted(results.finished, key=lambda cell: cell in styles):  # colours above grey
        curves = np.array([run.result[spec.key] for run in results.cells[cell].values()])  # (seeds, tasks)
        width = 2.4 if cell == results.baseline else 1.6 if cell in styles else 0.9
        handles[cell] = _draw_curve(axes, curves, styles.get(cell), tasks, width)
    task_axis(axes, tasks)
    axes.set_ylabel(spec.heading)
    axes.grid(axis="y")
    if (chance := results.chance()) and len(chance) == tasks:
        dotted = draw_chance(axes, chance)
        handles |= dotted
        labels, shown = [*labels, *dotted], [*shown, *dotted]
    _legend_beside(axes, labels, [handles[cell] for cell in shown], handles.values())
    return figure


def trade_off_figure(results: Results, subtitle: str) -> Figure | None:
    """Plasticity against forgetting: a large point for a cell's mean with ± std, a small one per seed.

    None where no cell has both.
    """
    measured = [spec for spec in results.metrics if spec.name.endswith(("plasticity", "forgetting"))]
    metrics = sorted(measured, key=lambda spec: spec.name, reverse=True)
    cells = [
        cell for cell in results.finished if all(len(results.values(cell, spec.key)) for spec in metrics)
    ]
    if not metrics or not cells:
        return None
    styles = {cell: style for cell, style in cell_styles(results).items() if cell in cells}
    title = "Learning new tasks (plasticity) against losing old ones (forgetting)"
    averaged = any(len(results.cells[cell]) > 1 for cell in results.finished)
    subtitle = f"{subtitle} · " + "large: " * averaged + _over_seeds(results) + ", small: one seed" * averaged
    figure, axes = _figure_with_legend(list(styles), title, subtitle)
    handles = {}
    for cell in cells:
        (x, dx), (y, dy) = (results.summary.loc[(cell, spec.key), ["mean", "std"]] for spec in metrics)
        style, order = styles.get(cell, {"color": PALE, "marker": "o"}), 3 + (cell in styles)
        seeds = pd.concat([results.values(cell, spec.key) for spec in metrics], axis=1, join="inner")
        axes.plot(*seeds.to_numpy().T, ls="", ms=3.2, alpha=0.45, mew=0, zorder=order, **style)
        bars = {"ecolor": style["color"], "elinewidth": 0.9, "fmt": "none", "alpha": 0.6}
        axes.errorbar(x, y, np.nan_to_num(dy), np.nan_to_num(dx), zorder=order, **bars)
        (handles[cell],) = axes.plot(x, y, ls="", ms=9, mec="white", mew=0.9, zorder=order + 2, **style)
    axes.margins(0.12)
    for spec, set_label in zip(metrics, (axes.set_xlabel, axes.set_ylabel), strict=True):
        set_label(f"{spec.heading}, {spec.better} is better")
    if metrics[0].unit == "%":  # room for points at 100, and no number beyond it
        least, most = axes.get_xlim()
        axes.set_xticks([tick for tick in axes.get_xticks() if least <= tick <= 100])
        axes.set_xlim(least, min(most, 100 + 0.06 * (100 - least)))
    axes.grid()
    axes.set_axisbelow(True)
    _legend_beside(axes, list(styles), [handles[cell] for cell in styles], handles.values())
    return figure


FIGURES = {  # file name -> what draws it, caption
    "bars.png": (
        bars_figure,
        "{main} of every cell: the bar ends at the mean, the whiskers show ± std, dots are seeds.",
    ),
    "differences.png": (
        differences_figure,
        "Difference from the baseline, paired by seed, with its 95 % interval if any. Where the interval "
        "holds zero the seeds do not decide. Cells with other tasks are in the tables alone.",
    ),
    "curves.png": (
        curves_figure,
        "Accuracy over all classes seen so far, after each task: mean over seeds, band ± std. A dashed "
        "line is a cell that learned all classes in one task.",
    ),
    "plasticity_forgetting.png": (
        trade_off_figure,
        "How well each task is learned (plasticity) against how much of it is lost later (forgetting). "
        "Better is right and down.",
    ),
}


def _draw_curve(axes: Axes, curves: np.ndarray, style: Style | None, tasks: int, width: float) -> Line2D:
    """The mean of curves (seeds, tasks), a dashed line for one task; in grey and without band if no style."""
    mean = curves.mean(axis=0)
    std = curves.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
    x, line = np.arange(len(mean)), {"color": PALE, "zorder": 2} if style is None else {**style, "zorder": 3}
    if len(mean) == 1:
        x, mean, std = np.array([-0.4, tasks - 0.6]), mean.repeat(2), std.repeat(2)
        line |= {"ls": (0, (4, 2)), "marker": ""}
    if style is not None:
        low, high = np.clip([mean - std, mean + std], 0, 100)  # percent
        axes.fill_between(x, low, high, color=style["color"], alpha=0.1, lw=0)
    return axes.plot(x, mean, lw=width, ms=5, markevery=max(1, tasks // 20), **line)[0]


def _draw_differences(axes: Axes, rows: Mapping[int, Mapping[str, Any]], spec: MetricSpec) -> None:
    """Mean difference and interval of each row at its height, and the axis of a panel about one metric."""
    axes.axvline(0, color=INK, lw=1)
    for y, row in rows.items():
        low, mean, high = (row[f"difference{end}"] / spec.scale for end in ("_low95", "", "_high95"))
        handle = _verdict_handle(row["verdict"])
        axes.plot([low, high], [y, y], color=handle.get_color(), lw=2, solid_capstyle="butt")
        mark = {"marker": handle.get_marker(), "mfc": handle.get_markerfacecolor(), "ms": 6.5}
        axes.plot(mean, y, color=handle.get_color(), **mark)
    axes.set_xlabel(f"difference ({spec.difference_unit})" if spec.unit else "difference")
    axes.margins(x=0.08)


def _with_interval(differences: pd.DataFrame) -> str:
    """End of a figure's title: whether any of its differences has an interval, as one seed gives none."""
    return " with 95 % interval" if differences["difference_low95"].notna().any() else ""


def _verdict_handle(verdict: str) -> Line2D:
    """Legend entry of a comparison: hollow where there is no interval."""
    line = {"mfc": "white", "lw": 0} if verdict in (SAME, ONE_SEED) else {"lw": 2}
    return Line2D([], [], color=VERDICT_COLOURS[verdict], marker="s" if verdict == SAME else "o", **line)


def _figure_with_legend(labels: Sequence[str], title: str, subtitle: str) -> tuple[Figure, Axes]:
    """A figure with room at its right for a legend of these labels."""
    lines = [line for label in labels for line in wrapped(label, LABEL_WIDTH).split("\n")]
    height = max(5.0, 1.5 + LINE * len(lines) + 0.06 * len(labels))
    figure = titled_figure(7.4 + LETTER * max(map(len, lines)), height, title, subtitle)
    return figure, figure.subplots()


def _legend_beside(
    axes: Axes, labels: Sequence[str], handles: Sequence[Line2D], drawn: Iterable[Line2D]
) -> None:
    """A legend right of the axes, with an entry for what else is drawn, in grey."""
    others = [handle for handle in drawn if handle not in handles]
    labels = [wrapped(label, LABEL_WIDTH) for label in labels]
    labels += [f"{len(others)} other cells"] if others else []
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
    axes.legend([*handles, *others[:1]], labels, frameon=False, **place)


def _figure_with_rows(
    labels: Sequence[str], title: str, subtitle: str, panels: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with a labelled row per cell, the first on top, and one or more panels side by side."""
    lines = [line for label in labels for line in label.split("\n")]
    height = 1.55 + len(labels) * _row_height(labels)
    width = max(NARROWEST, 3 * panels + 2 + LETTER * max(map(len, lines)))
    figure = titled_figure(width, max(2.6, height), title, subtitle)
    row = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for axes in row:
        _label_rows(axes, labels)
        axes.tick_params(axis="y", labelleft=axes is row[0])
    return figure, row


def _label(answer: Mapping[str, Any], results: Results) -> str:
    """Name of a hypothesis, and what it compares."""
    texts = (answer["hypothesis"], comparison(answer, results))
    return "\n".join(wrapped(text, LABEL_WIDTH) for text in texts)


def _row_height(labels: Sequence[str]) -> float:
    """Inches that a row takes, so that the longest label fits."""
    return max(0.3, LINE * max(1 + label.count("\n") for label in labels) + 0.08)


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Rows with their labels, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
