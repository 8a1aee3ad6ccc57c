"""Style and parts shared by all figures: colours, titles, an axis of tasks, panels per block, heat maps.

    with mpl.rc_context(STYLE):
        figure = titled_figure(7.2, 4.4, "Accuracy (%)", "prefix · method · data · seed 1993")
        task_axis(figure.subplots(), tasks=10)

    as_written("costs $5")                  # a user's text, not a formula
    png(figure)                             # its bytes

Colours can be told apart by colour-blind readers and in print.
"""

import io
import logging
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

logger = logging.getLogger("nested_lora")

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
MAX_NUMBERED_TASKS = 25  # beyond, numbers in cells would be too small to read
NARROWEST = 6.4  # inches: room for the titles
NO_GLYPH = re.compile(r"Glyph (\d+) ")  # Matplotlib's warning of a character that no font has
told_of: set[str] = set()  # such characters, of which the log says once that figures show boxes


def titled_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty figure (inches) with a title, a grey subtitle, and room for the axes."""
    lines = textwrap.fill(as_written(subtitle), width=int(width * 14))
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
    """A user's text in lines of at most `width` characters."""
    return "\n".join(as_written(line) for line in textwrap.wrap(text, width)) or " "


def as_written(text: str) -> str:
    """A user's text, escaped so that Matplotlib reads no formula in it."""
    return " ".join(text.split()).replace("$", r"\$")


def legend_below(figure: Figure, handles: Mapping[str, Artist], columns: int | None = None) -> None:
    """A legend under the axes, in one row or `columns` columns; handles by their labels."""
    place = {"loc": "outside lower center", "ncols": columns or len(handles), "frameon": False}
    figure.legend(list(handles.values()), list(handles), **place)


def png(figure: Figure) -> bytes:
    """The bytes of a PNG file."""
    return picture(figure, "png")


def picture(figure: Figure, form: str) -> bytes:
    """The bytes of a "png", "pdf" or "svg" file: the same at every call."""
    stream = io.BytesIO()
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with mpl.rc_context({"svg.hashsalt": "figure"}), warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", NO_GLYPH.pattern)
        figure.savefig(stream, format=form, dpi=DPI, metadata=undated[form])
    boxes = {chr(int(found[1])) for each in caught if (found := NO_GLYPH.match(str(each.message)))}
    if boxes - told_of:
        told_of.update(boxes)
        logger.warning(
            f"Figures show boxes in place of {''.join(sorted(boxes)[:8])}, which their font does not have: "
            "name a font that does as font.family in a file matplotlibrc"
        )
    for each in caught:
        if not NO_GLYPH.match(str(each.message)):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return stream.getvalue()


def pictures(figures: Mapping[str, Figure], form: str) -> dict[str, bytes]:
    """Every figure as PNG, which pages embed, and with form "pdf" or "svg" also in that form, by file name.

    figures: by the names of their PNG files.
    """
    drawn = {name: png(figure) for name, figure in figures.items()}
    if form not in ("png", "none"):
        drawn |= {f"{name.removesuffix('.png')}.{form}": picture(figures[name], form) for name in figures}
    return drawn


def task_axis(axes: Axes, tasks: int, most_ticks: int = 20, label: str | None = "after task") -> None:
    """Ticks at tasks 0 .. tasks - 1, as many as can be read."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, tasks) if tasks <= step * most_ticks or step == tasks)
    axes.set_xlim(-0.4, tasks - 0.6)
    axes.set_xticks(range(0, tasks, step))
    if label:
        axes.set_xlabel(label)


def draw_chance(axes: Axes, chance: Sequence[float]) -> dict[str, Line2D]:
    """The accuracy (%) by chance after each task, and its legend entry, which says where none is visible.

    The limits of the axis stay as they are.
    """
    limits, line = axes.get_ylim(), {"color": GREY, "ls": ":", "lw": 1.4}
    tasks = range(len(chance)) if len(chance) > 1 else axes.get_xlim()
    axes.plot(tasks, np.broadcast_to(chance, len(tasks)), zorder=1, **line)
    axes.set_ylim(limits)
    text = f"{chance[0]:.1f}" if len(set(chance)) == 1 else f"{chance[0]:.1f} to {chance[-1]:.1f}"
    below = ", below this axis" if max(chance) < limits[0] else ""
    return {f"chance ({text} %{below})": Line2D([], [], **line)}


def adapter_panels(
    rows: Sequence[Mapping[str, Any]], title: str, subtitle: str, label: str
) -> tuple[Figure, list[tuple[Axes, float, pd.DataFrame]]]:
    """A figure of small panels over tasks, one per block, with common axes, for lines of adapters.

    rows: each with task, block and adapter. Returns the figure, without a legend, and for each adapter its
    block's panel, the opacity of its lines (later adapters are darker), and its rows in order of tasks.
    """
    table = pd.DataFrame(rows)
    by_block, tasks = list(table.groupby("block")), int(table["task"].max()) + 1
    count = len(by_block)
    columns = min(4, count) if count not in (5, 6, 9) else 3
    lines = math.ceil(count / columns)
    figure = titled_figure(max(NARROWEST, 2.7 * columns), 1.5 + 1.95 * lines, title, subtitle)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in grid[count:]:
        axes.set_visible(False)
    found = []
    for index, ((block, own), axes) in enumerate(zip(by_block, grid, strict=False)):
        axes.set_title(f"block {block}", loc="left", pad=3)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        task_axis(axes, tasks, most_ticks=7, label=None)
        if index + columns >= count:
            axes.set_xlabel("after task")
            axes.tick_params(labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel(label)
        adapters = [adapter for _, adapter in own.groupby("adapter")]
        opacities = np.linspace(0.4 if len(adapters) > 1 else 1.0, 1.0, len(adapters))
        found += [
            (axes, opacity, adapter.sort_values("task", kind="stable"))
            for opacity, adapter in zip(opacities, adapters, strict=True)
        ]
    return figure, found


class HeatmapSpec(NamedTuple):
    """Axes, colours and number format of a heat map."""

    rows: str  # name of the axis
    columns: str
    label: str  # of the colour bar
    limits: tuple[float, float]  # of the colours
    decimals: int = 2  # of the numbers in cells
    colours: str = "viridis"  # a colour map
    row_names: Sequence[str] | None = None  # None: 0, 1, ...
    column_names: Sequence[str] | None = None
    gamma: float = 1.0  # of the colours; below 1 small values differ more


def draw_heatmap(axes: Axes, values: np.ndarray, spec: HeatmapSpec, fontsize: float | None) -> AxesImage:
    """Cells in colour, NaN empty, with their number where there is a font size for it; returns the image."""
    colours, scale = mpl.colormaps[spec.colours], PowerNorm(spec.gamma, *spec.limits)
    image = axes.imshow(values, cmap=colours, norm=scale, interpolation="none", aspect="auto")
    if fontsize is not None:
        for row, column in np.argwhere(~np.isnan(values)):
            value = values[row, column]
            red, green, blue, _ = colours(float(scale(value)))
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
            text = f"{value:.{spec.decimals}f}"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=fontsize)
    for set_ticks, names, count in zip(
        (axes.set_yticks, axes.set_xticks), (spec.row_names, spec.column_names), values.shape, strict=True
    ):
        if names is not None:
            set_ticks(range(count), names)
        else:
            set_ticks(range(0, count, math.ceil(count / 12)))  # as many numbers as can be read
    if spec.column_names is not None:
        axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def colour_bar(figure: Figure, colours: ScalarMappable, axes: Any, label: str, **options: Any) -> None:
    """A bar without outline beside the axes that explains their colours; options: of `Figure.colorbar`."""
    bar = figure.colorbar(colours, ax=axes, label=label, pad=0.02, **options)
    bar.outline.set_visible(False)
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
