"""Style shared by all figures: colours, a titled figure, an axis of tasks, panels per block.

    with mpl.rc_context(STYLE):
        figure = titled_figure(7.2, 4.4, "Accuracy (%)", "prefix · method · data · seed 1993")
        task_axis(figure.subplots(), tasks=10)

    as_written("costs $5")                  # text of the user's, not a formula
    png(figure)                             # its bytes

Colours can be told apart by colour-blind readers and in print.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

DPI = 160
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}
BLUE, VERMILLION, INK, GREY = "#0072B2", "#D55E00", "#222222", "#666666"  # the first two: Okabe and Ito
MOST_NUMBERED_TASKS = 25  # beyond, numbers in cells would be too small to read
NARROWEST = 6.4  # inches: room for the titles


def titled_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure (inches) with a title, a grey line under it, and the rest of it for the axes."""
    lines = textwrap.fill(subtitle, width=int(width * 14))
    header = 0.42 + 0.17 * (1 + lines.count("\n"))  # inches
    height += header - 0.6
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - header / height), w_pad=0.08, h_pad=0.06)
    figure.text(
        0.1 / width, 1 - 0.1 / height, title, ha="left", va="top", fontsize=12, weight="bold", color=INK
    )
    figure.text(0.1 / width, 1 - 0.37 / height, lines, ha="left", va="top", fontsize=8.5, color=GREY)
    return figure


def wrapped(text: str, width: int) -> str:
    """Text of the user's in lines of so many characters at most."""
    return "\n".join(as_written(line) for line in textwrap.wrap(text, width)) or " "


def as_written(text: str) -> str:
    """Text of the user's that Matplotlib shall not read as a formula."""
    return " ".join(text.split()).replace("$", r"\$")


def legend_below(figure: Figure, handles: Mapping[str, Line2D]) -> None:
    """A legend in one row under the axes; handles by their labels."""
    named = {"handles": list(handles.values()), "labels": list(handles)}
    figure.legend(**named, loc="outside lower center", ncols=len(handles), frameon=False)


def png(figure: Figure) -> bytes:
    """The picture, as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def task_axis(axes: Axes, tasks: int, most_ticks: int = 20, label: str | None = "after task") -> None:
    """Ticks at tasks 0 .. tasks - 1, as many as can be read."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, tasks) if tasks <= step * most_ticks or step == tasks)
    axes.set_xlim(-0.4, tasks - 0.6)
    axes.set_xticks(range(0, tasks, step))
    if label:
        axes.set_xlabel(label)


def panels_by_block(
    blocks: Sequence[int], tasks: int, title: str, subtitle: str, label: str
) -> tuple[Figure, dict[int, Axes]]:
    """A figure of small panels over tasks, one per block, with common axes; `label` names the values.

    Returns:
        The figure, without a legend, and the panel of each block.
    """
    columns = min(4, len(blocks)) if len(blocks) not in (5, 6, 9) else 3
    lines = math.ceil(len(blocks) / columns)
    figure = titled_figure(max(NARROWEST, 2.7 * columns), 1.5 + 1.95 * lines, title, subtitle)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in grid[len(blocks) :]:
        axes.set_visible(False)
    panels = dict(zip(blocks, grid, strict=False))
    for index, (block, axes) in enumerate(panels.items()):
        axes.set_title(f"block {block}", loc="left", pad=3)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        task_axis(axes, tasks, most_ticks=7, label=None)
        if index + columns >= len(blocks):
            axes.set_xlabel("after task")
            axes.tick_params(labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel(label)
    return figure, panels
