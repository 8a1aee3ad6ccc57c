"""Figure of the answers to a sweep's hypotheses (`utils/reports/answers.py`).

    figure = answers_figure(answer(hypotheses, results), results, "ranks on CIFAR-100")

A panel for each hypothesis: a thin line for every seed, from the other side to the cell's; the means are
thick marks in the verdict's colour. Colours can be told apart by colour-blind readers; text of the user's is
drawn as it is.
"""

import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.metric_catalogue import ABSENT
from utils.plotting import (
    BLUE,
    GREY,
    INK,
    NARROWEST,
    VERMILLION,
    as_written,
    legend_below,
    titled_figure,
    wrapped,
)
from utils.reports.answers import CONTRADICTED, SIDES, SUPPORTED, comparison
from utils.reports.results import Results

CAPTION = (
    "For every seed a thin line with dots, from the other side of the hypothesis to its cell's; thick "
    "marks are means. The mean difference has its 95 % interval. Blue: the interval excludes zero on the "
    "expected side, supported; orange: on the other side, contradicted; grey: the seeds do not decide."
)
COLUMNS = 2
COLOURS = {SUPPORTED: BLUE, CONTRADICTED: VERMILLION}  # other verdicts are grey
PALE = "#a8a8a8"
PANEL, AXES_HEIGHT = 4.7, 1.75  # inches: width of a panel with its margins, height of its axes
TEXT_WIDTH, SIDE_WIDTH = 54, 24  # characters a line: above a panel, below each of its sides
LONGEST_NAME = 24  # characters of a hypothesis's name
SMALL, LINE = 8.5, 11.0  # points: size of the text around a panel, and what a line of it takes
HALF_MARK = 0.13  # of a mean, where the sides lie 1 apart


def answers_figure(answers: pd.DataFrame, results: Results, subtitle: str) -> Figure:
    """A panel per hypothesis, two in a row; above each its verdict, both sides, and the mean difference."""
    panels = [_Panel(answer, results) for answer in answers.to_dict("records")]
    columns = min(COLUMNS, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    height = 0.95 + sum(max(panel.height for panel in row) for row in rows)
    width = max(NARROWEST, PANEL * columns)
    figure = titled_figure(width, height, "Hypotheses", f"{subtitle} · paired by seed")
    figure.get_layout_engine().set(hspace=0.05)
    every_axes = list(figure.subplots(len(rows), columns, squeeze=False).flat)
    for axes in every_axes[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(every_axes, panels, strict=False):
        panel.draw(axes)
    seed = Line2D([], [], color=PALE, lw=0.9, marker="o", ms=4, mfc=INK, mew=0)
    legend_below(figure, {"one seed": seed, "mean": Line2D([], [], color=INK, lw=3.5)})
    return figure


class _Panel:
    """The panel of an answer, a row of the table of answers."""

    def __init__(self, answer: Mapping[str, Any], results: Results) -> None:
        spec, other = results.spec(answer["metric"]), results.spec(answer["against_metric"])
        cells = [answer["against"], answer["cell"]]
        names = cells if cells[0] != cells[1] else [other.heading, spec.heading]
        name = textwrap.shorten(answer["hypothesis"], LONGEST_NAME, placeholder=" …")
        self.title = as_written(f"{name}: {answer['verdict']}")
        self.colour = COLOURS.get(answer["verdict"], GREY)
        self.sides = [wrapped(name, SIDE_WIDTH) for name in names]
        self.text = wrapped(comparison(answer, results), TEXT_WIDTH)
        if answer["n"]:
            limits = spec.difference_text(answer["difference_low95"], answer["difference_high95"])
            interval = "" if limits == ABSENT else f", 95 % {limits}"
            numbers = f"{spec.difference_text(answer['difference'])}{interval} (n = {answer['n']})"
            self.text += f"\n{wrapped(numbers, TEXT_WIDTH)}"
        pairs = results.pairs(*(answer[side] for side in SIDES))
        self.pairs = pairs[["theirs", "ours"]].to_numpy() / spec.scale  # (seeds, 2)

    @property
    def height(self) -> float:
        """Inches of the axes and of the texts above and below them."""
        lines = self.text.count("\n") + max(side.count("\n") for side in self.sides)
        return AXES_HEIGHT + 0.85 + LINE / 72 * lines

    def draw(self, axes: Axes) -> None:
        """Draw the other side at 0, the cell's at 1."""
        pad = 7 + LINE * (1 + self.text.count("\n"))
        axes.set_title(self.title, loc="left", color=self.colour, weight="bold", pad=pad)
        above = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom", "size": SMALL}
        axes.annotate(self.text, (0, 1), (0, 5), **above)
        axes.set_xlim(-0.5, 1.5)
        if not len(self.pairs):
            axes.set_axis_off()
            middle = {"transform": axes.transAxes, "ha": "center", "va": "center", "color": GREY}
            axes.text(0.5, 0.5, "no seed has both sides", **middle)
            return
        for pair in self.pairs:
            axes.plot([0, 1], pair, "o-", color=PALE, lw=0.9, ms=4, mfc=INK, mew=0, zorder=3)
        for x, mean in enumerate(self.pairs.mean(axis=0)):
            ends = [x - HALF_MARK, x + HALF_MARK]
            axes.plot(ends, [mean, mean], color=self.colour, lw=3.5, solid_capstyle="butt")
        axes.set_xticks([0, 1], self.sides, size=SMALL)
        axes.margins(y=0.1)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)  # nothing stands above the axis
        axes.grid(axis="y")
        axes.set_axisbelow(True)
