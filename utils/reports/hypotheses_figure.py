"""The figure of a sweep's hypotheses, drawn from their answers (`utils/reports/hypotheses.py`) and from nothing else.

    picture = hypotheses_png(answer(hypotheses, cells), "ranks on CIFAR-100")

A panel for each hypothesis: a thin line for every seed, from the other side to the cell's; the means are thick marks
in the verdict's colour. Colours can be told apart by colour-blind readers; text of the user's is drawn as it is.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.plotting import (
    BLUE,
    GREY,
    INK,
    NARROWEST,
    STYLE,
    VERMILLION,
    as_written,
    png,
    titled_figure,
    wrapped,
)
from utils.reports.hypotheses import CONTRADICTED, SUPPORTED, Answer

CAPTION = (
    "For every seed a thin line with dots, from the other side of the hypothesis to its cell's; thick marks are means. "
    "The mean difference has its 95 % interval. Blue: the interval excludes zero on the expected side, supported; "
    "orange: on the other side, contradicted; grey: the seeds do not decide."
)
COLUMNS = 2
COLOURS = {SUPPORTED: BLUE, CONTRADICTED: VERMILLION}  # other verdicts are grey
PALE = "#a8a8a8"
PANEL, AXES_HEIGHT = 4.7, 1.75  # inches: width of a panel with its margins, height of its axes
TEXT_WIDTH, SIDE_WIDTH = 54, 24  # characters a line: above a panel, below each of its sides
LONGEST_NAME = 24  # characters of a hypothesis's name
SMALL, LINE = 8.5, 11.0  # points: size of the text around a panel, and what a line of it takes
HALF_MARK = 0.13  # of a mean, where the sides lie 1 apart


def hypotheses_png(answers: Sequence[Answer], subtitle: str) -> bytes:
    """The figure as a PNG; subtitle: the grey line under its title."""
    with mpl.rc_context(STYLE):
        return png(hypotheses_figure(answers, as_written(subtitle)))


def hypotheses_figure(answers: Sequence[Answer], subtitle: str) -> Figure:
    """A panel a hypothesis, two in a line; above each its verdict, what it compares, and the mean difference."""
    columns = min(COLUMNS, len(answers))
    lines = [answers[start : start + columns] for start in range(0, len(answers), columns)]
    height = 0.95 + sum(max(map(_panel_height, line)) for line in lines)
    figure = titled_figure(
        max(NARROWEST, PANEL * columns), height, "Hypotheses", f"{subtitle} · paired by seed"
    )
    figure.get_layout_engine().set(hspace=0.05)
    panels = list(figure.subplots(math.ceil(len(answers) / columns), columns, squeeze=False).flat)
    for axes in panels[len(answers) :]:
        axes.set_visible(False)
    for axes, answer in zip(panels, answers, strict=False):
        _draw_panel(axes, answer)
    handles = [
        Line2D([], [], color=PALE, lw=0.9, marker="o", ms=4, mfc=INK, mew=0, label="one seed"),
        Line2D([], [], color=INK, lw=3.5, label="mean"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw_panel(axes: Axes, answer: Answer) -> None:
    """The other side at 0, the cell's at 1."""
    colour, text = COLOURS.get(answer.verdict, GREY), _text_above(answer)
    name = textwrap.shorten(answer.name, LONGEST_NAME, placeholder=" …")
    axes.set_title(
        as_written(f"{name}: {answer.verdict}"),
        loc="left",
        color=colour,
        weight="bold",
        pad=7 + LINE * (1 + text.count("\n")),
    )
    axes.annotate(
        text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", va="bottom", size=SMALL
    )
    axes.set_xlim(-0.5, 1.5)
    if not answer.pairs:
        axes.set_axis_off()
        axes.text(
            0.5, 0.5, "no seed has both sides", transform=axes.transAxes, ha="center", va="center", color=GREY
        )
        return
    unit = answer.quantity.unit
    for ours, theirs in answer.pairs.values():
        axes.plot(
            [0, 1], [theirs / unit, ours / unit], "o-", color=PALE, lw=0.9, ms=4, mfc=INK, mew=0, zorder=3
        )
    for x, estimate in zip((1, 0), answer.estimates, strict=True):
        mean = estimate.mean / unit
        axes.plot([x - HALF_MARK, x + HALF_MARK], [mean, mean], color=colour, lw=3.5, solid_capstyle="butt")
    axes.set_xticks([0, 1], _side_labels(answer), size=SMALL)
    axes.margins(y=0.1)
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)  # nothing stands above the axis
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _text_above(answer: Answer) -> str:
    """What is compared, wrapped, and the mean difference with its interval and number of seeds."""
    lines = wrapped(answer.comparison, TEXT_WIDTH)
    difference, limits = answer.difference_text
    if not difference:
        return lines
    numbers = f"{difference}{f', 95 % {limits}' if limits else ''} (n = {len(answer.pairs)})"
    return f"{lines}\n{wrapped(numbers, TEXT_WIDTH)}"


def _side_labels(answer: Answer) -> list[str]:
    """What the two sides are called on the axis: their cells, or their metrics where the cell is the same."""
    (cell, _), (other, _) = answer.hypothesis.sides
    names = (answer.other_heading, answer.quantity.heading) if cell == other else (other, cell)
    return [wrapped(name, SIDE_WIDTH) for name in names]


def _panel_height(answer: Answer) -> float:
    """Inches for the texts above and below a panel and for its axes."""
    below = max(label.count("\n") for label in _side_labels(answer))
    return AXES_HEIGHT + 0.85 + LINE / 72 * (_text_above(answer).count("\n") + below)
