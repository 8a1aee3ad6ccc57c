"""Figures of the README: two drawn from tables of exps/RESULTS.md and docs/experiments.md, one schematic.

python docs/figures/draw.py                   redraws them beside this file
python docs/figures/draw.py --to FOLDER       writes them elsewhere
"""

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULTS, EXPERIMENTS = ROOT / "exps/RESULTS.md", ROOT / "docs/experiments.md"
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#8E5A9F"  # safe for colour-blind readers
INK, GREY, LIGHT = "#222222", "#767676", "#E4E4E4"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


def table(document: Path, first_column: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table below `heading` with that first column: row name -> column -> text, without marks."""
    lines = document.read_text(encoding="utf-8").partition(heading)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        rows.append([cell.strip().replace("**", "").replace("\\|", "|") for cell in cells])
    header, body = rows[0], rows[2:]
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def numbers(text: str) -> list[float]:
    """All numbers of a cell: "35.87 ± 0.83" -> [35.87, 0.83]; a dash between digits is not a sign."""
    return [float(number) for number in re.findall(r"(?<![\w.])[+-]?\d+(?:\.\d+)?", text)]


# -----------------------------------------------------------------------------------------------------------
# What `python main.py` runs


def draw_quickstart() -> Figure:
    """Accuracy over all digits seen after each task, a line per cell, and chance."""
    cells = table(EXPERIMENTS, "cell", "## What `python main.py` runs")
    digits = [int(column) for column in next(iter(cells.values())) if column != "cell"]
    colours = dict(zip(cells, (GREY, GREEN, INK, BLUE, ORANGE), strict=True))
    figure, panel = plt.subplots(figsize=(7.2, 3.6))
    lines = {cell: [float(row[str(seen)]) for seen in digits] for cell, row in cells.items()}
    lowest = -100.0  # of the labels so far, kept 5 apart
    for cell in sorted(lines, key=lambda name: lines[name][-1]):
        panel.plot(digits, lines[cell], "o-", color=colours[cell], linewidth=2, markersize=4)
        lowest = max(lines[cell][-1], lowest + 5)
        panel.text(digits[-1] + 0.2, lowest, cell, color=colours[cell], va="center")
    panel.plot(digits, [100 / seen for seen in digits], ":", color=GREY)
    panel.text(digits[-1] + 0.2, 100 / digits[-1], "chance", color=GREY, va="center")
    panel.set(xlim=(digits[0] - 0.3, digits[-1] + 4), ylim=(0, 100), xticks=digits)
    panel.set(xlabel="digits learned, two per task", ylabel="accuracy over all digits learned (%)")
    panel.grid(axis="y", color=LIGHT)
    figure.tight_layout()
    return figure


# -----------------------------------------------------------------------------------------------------------
# The answer


def draw_answer() -> Figure:
    """Differences of A_N from frozen RanPAC, a panel per data set, with 95 % intervals, a row per method."""
    cells = table(RESULTS, "method", "# Results")
    labels = list(reversed(cells))
    colours = {name: GREEN if name.startswith("joint") else GREY for name in labels}
    colours |= {name: BLUE for name in labels if name.lower().startswith("nested")}
    colours |= {"carried": ORANGE, "carried, all blocks": ORANGE}
    colours |= {"matched adapter": INK, "matched adapter, all blocks": INK}
    lowest = -14.0  # means further left are printed as numbers at the edge
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.6), sharex=True, sharey=True)
    columns = {
        "CIFAR-100, 500 images per class": "against RanPAC, 500 images",
        "CIFAR-100, 100 images per class": "against RanPAC, 100 images",
        "Grocery": "against RanPAC, Grocery",
    }
    for panel, (title, column) in zip(panels, columns.items(), strict=True):
        for place, name in enumerate(labels):
            difference = numbers(cells[name][column])
            if name == "RanPAC":
                panel.plot(0, place, "D", color=INK, markersize=6)
            elif difference and difference[0] < lowest:
                text = f"\N{BLACK LEFT-POINTING SMALL TRIANGLE} \N{MINUS SIGN}{-difference[0]:.1f}"
                panel.annotate(text, (lowest, place), color=colours[name], va="center", fontsize=10)
            elif difference:
                mean, low, high = difference
                line = {"color": colours[name], "linewidth": 2.2, "solid_capstyle": "round"}
                panel.plot([low, high], [place, place], **line)
                panel.plot(mean, place, "o", color=colours[name], markersize=6)
        panel.axvline(0, color=INK, linewidth=0.8)
        panel.set_title(title)
        panel.grid(axis="x", color=LIGHT)
        panel.set_axisbelow(True)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(-0.7, len(labels) - 0.5)
    for tick, name in zip(panels[0].get_yticklabels(), labels, strict=True):
        tick.set_color(INK if colours[name] == GREY else colours[name])
    title = "Adapters in all blocks, averaged over tasks, end above RanPAC"
    note = "Points: means of differences paired by seed; lines: 95 % intervals. ViT-Ti/16 with ImageNet "
    note += "weights, 160 px; no mark: not run.\nAdapters in blocks 9-11 unless the row says otherwise. "
    note += 'Blue: nested. Orange: moving average ("carried"). Green: joint.'
    figure.supxlabel("A_N against RanPAC without adapters (points)", y=0.1, fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.text(0.01, 0.01, note, color=GREY, fontsize=8.5)
    figure.tight_layout(rect=(0, 0.055, 1, 1), h_pad=2)
    return figure


# -----------------------------------------------------------------------------------------------------------
# Architecture

Point = tuple[float, float]
Style = tuple[str, str]  # colours of a box: inside, edge
PLAIN, FROZEN = ("white", GREY), ("#EDEDED", GREY)
GROWN, NEW = ("#DCEBF5", BLUE), ("white", BLUE)
FAST, SLOW, JUDGE = ("#FBE3D2", ORANGE), ("#D3EDE4", GREEN), ("#EBE0EF", PURPLE)


class Drawing:
    """Boxes, arrows and sums on a panel without axes, in its coordinates."""

    def __init__(self, panel: Axes) -> None:
        self.panel = panel

    def box(self, corner: Point, size: Point, text: str, style: Style = PLAIN, **font: Any) -> None:
        """A rounded box with centred text."""
        rounded = "round,pad=0,rounding_size=0.09"
        self.panel.add_patch(FancyBboxPatch(corner, *size, rounded, facecolor=style[0], edgecolor=style[1]))
        self.text((corner[0] + size[0] / 2, corner[1] + size[1] / 2), text, **font)

    def text(self, place: Point, text: str, **font: Any) -> None:
        """Text, centred by default."""
        self.panel.text(*place, text, **{"fontsize": 9.5, "ha": "center", "va": "center", **font})

    def arrow(self, *points: Point, **line: Any) -> None:
        """An arrow along straight pieces."""
        style = {"color": INK, "linewidth": 1.3, **line}
        self.panel.plot(*zip(*points[:-1], strict=True), **style)
        head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11, **style}
        self.panel.annotate("", points[-1], points[-2], arrowprops=head)

    def enlargement(self, *sides: tuple[Point, Point]) -> None:
        """Thin lines from a box to what is inside it."""
        for side in sides:
            self.panel.plot(*zip(*side, strict=True), color=BLUE, linewidth=0.8, alpha=0.6)

    def plus(self, place: Point) -> None:
        """A sum."""
        circle = Circle(place, 0.16, facecolor="white", edgecolor=INK, linewidth=1.3, zorder=3)
        self.panel.add_patch(circle)
        self.text((place[0], place[1] - 0.01), "+", fontsize=14, va="center_baseline", zorder=4)


def draw_architecture() -> Figure:
    """The network, one growing block, and one nested adapter, from left to right."""
    figure, panel = plt.subplots(figsize=(10.6, 5.0))
    panel.set(xlim=(0, 10.6), ylim=(0, 5.0))
    panel.axis("off")
    on = Drawing(panel)
    for x, title in ((0.3, "Frozen ViT"), (2.95, "A growing block (SEMA)"), (7.3, "A nested adapter")):
        on.text((x, 4.78), title, fontsize=11.5, fontweight="bold", ha="left")
    on.box((2.95, 0.12), (4.1, 4.4), "", ("#F6FAFD", BLUE))
    on.box((7.3, 0.12), (3.2, 4.4), "", ("#FDFDFD", BLUE))

    # The network, from the image up.
    on.box((0.3, 0.15), (1.9, 0.4), "image")
    on.box((0.3, 0.9), (1.9, 0.95), "blocks 0 – 8", FROZEN)
    on.box((0.3, 2.4), (1.9, 0.95), "blocks 9 – 11\ngrow adapters", GROWN)
    on.box((0.3, 3.75), (1.9, 0.77), "classifier: fc, class means\nor ridge regression", fontsize=8.5)
    for low, high in ((0.55, 0.9), (1.85, 2.4), (3.35, 3.75)):
        on.arrow((1.25, low), (1.25, high))
    on.enlargement(((2.2, 2.4), (2.95, 0.17)), ((2.2, 3.35), (2.95, 4.47)))

    # One growing block.
    on.box((3.3, 0.3), (1.3, 0.45), "attention", FROZEN)
    panel.plot([3.5, 4.75], [0.84, 0.84], color=GREY, linestyle=":", linewidth=1.3)
    on.text((4.82, 0.84), "tokens stored (first growing block)", fontsize=8, color=GREY, ha="left")
    on.box((3.3, 1.55), (1.3, 0.6), "MLP", FROZEN)
    adapters = (("adapter\n1", GROWN, INK), ("adapter\n2", GROWN, INK), ("+ new", NEW, BLUE))
    for place, (name, style, colour) in enumerate(adapters):
        x = 4.82 + 0.68 * place
        on.box((x, 1.55), (0.58, 0.6), name, style, fontsize=8.5, color=colour)
        on.arrow((3.95, 1.12), (x + 0.29, 1.12), (x + 0.29, 1.55))
        on.arrow((x + 0.29, 2.15), (x + 0.29, 2.5))
    on.box((4.82, 2.5), (1.94, 0.45), "sum weighted by router", fontsize=9)
    on.plus((3.95, 3.4))
    on.arrow((3.95, 0.75), (3.95, 1.55))
    on.arrow((3.95, 2.15), (3.95, 3.24))
    on.arrow((5.79, 2.95), (5.79, 3.4), (4.11, 3.4))
    on.arrow((3.95, 0.93), (3.1, 0.93), (3.1, 3.4), (3.79, 3.4))
    on.arrow((3.95, 3.56), (3.95, 4.5))
    judge = "a descriptor per adapter: is this\ntask new (high z-score)? then grow"
    on.box((4.3, 3.72), (2.46, 0.66), judge, JUDGE, fontsize=8.5)
    around = ((6.66, 3.72), (6.66, 3.3), (6.94, 3.3), (6.94, 1.85), (6.76, 1.85))
    on.arrow(*around, color=PURPLE, linestyle="--")
    on.enlargement(((6.76, 1.58), (7.3, 0.17)), ((6.76, 2.12), (7.3, 4.47)))

    # One nested adapter.
    on.text((8.9, 0.33), "x", fontsize=11, style="italic")
    on.plus((8.9, 3.1))
    for x, name, style, rhythm, aside in (
        (7.5, "fast", FAST, "learns in\nevery step", -0.16),
        (9.2, "slow", SLOW, "learns rarely\nor never", 0.16),
    ):
        centre = x + 0.55
        on.box((x, 1.0), (1.1, 1.5), "", style)
        on.text((centre, 2.27), name, fontsize=10.5, fontweight="bold", color=style[1])
        on.text((centre, 1.85), "down, ReLU, up", fontsize=8.5)
        on.text((centre, 1.35), rhythm, fontsize=8.5, color=GREY)
        on.arrow((8.9, 0.5), (8.9, 0.75), (centre, 0.75), (centre, 1.0))
        on.arrow((centre, 2.5), (centre, 3.1), (8.9 + aside, 3.1))
    on.arrow((8.9, 3.26), (8.9, 3.62))
    on.arrow((8.6, 1.85), (9.2, 1.85), color=ORANGE, linewidth=2, linestyle="--")
    taken_over = "end of a task: slow takes over\na share of fast, fast restarts"
    on.text((8.9, 4.05), taken_over, fontsize=9, color=ORANGE)
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def main() -> None:
    """Draw every figure."""
    parser = argparse.ArgumentParser(description="Draw the figures of the README.")
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="where (default: here)"
    )
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in (draw_quickstart, draw_answer, draw_architecture):
            figure, path = draw(), folder / f"{draw.__name__.removeprefix('draw_')}.png"
            figure.savefig(path, metadata={"Software": None})
            plt.close(figure)
            with Image.open(path) as image:  # 64 colours are enough, and a third of the size
                image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
