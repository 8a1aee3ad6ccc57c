"""Figures of the documents: drawn from tables of exps/RESULTS.md and of pages in docs/.

python docs/figures/draw.py                   redraws every PNG beside this file
python docs/figures/draw.py --to FOLDER       writes them elsewhere
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
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
RESULTS, LOG = ROOT / "exps/RESULTS.md", ROOT / "docs/experiment_log.md"
EXPERIMENTS = ROOT / "docs/experiments.md"
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


def table(document: Path, first_column: str, heading: str = "") -> dict[str, dict[str, str]]:
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


def finish(figure: Figure, title: str, note: str) -> None:
    """Title above the panels, note below them."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.text(0.01, 0.01, note, color=GREY, fontsize=8.5)
    figure.tight_layout(rect=(0, 0.03 + 0.025 * note.count("\n"), 1, 1), h_pad=2)


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
# Does nesting help


def interval_panels(
    panels: Sequence[Axes],
    columns: Mapping[str, str],
    cells: Mapping[str, Mapping[str, str]],
    labels: Mapping[str, str],
    colours: Mapping[str, str],
    baseline: str,
    lowest: float = -math.inf,
) -> None:
    """Differences from a baseline with their intervals: a panel per column (by title), a line per row.

    Args:
        labels: of the rows, the lowest first. Rows without a colour are grey, of joint training green.
        lowest: means further left are printed as numbers at the edge.
    """
    colours = {name: GREEN if name.startswith("joint") else GREY for name in labels} | colours
    for panel, (title, column) in zip(panels, columns.items(), strict=True):
        for place, name in enumerate(labels):
            difference = numbers(cells[name][column])
            if name == baseline:
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
    panels[0].set_yticks(range(len(labels)), labels.values())
    for tick, name in zip(panels[0].get_yticklabels(), labels, strict=True):
        tick.set_color(INK if colours[name] == GREY else colours[name])


def draw_answer() -> Figure:
    """Differences of A_N from frozen RanPAC on two data sets, with 95 % intervals, one row per method."""
    cells = table(RESULTS, "method", "# Results")
    labels = {name: name for name in reversed(cells)}
    colours = {name: BLUE for name in labels if name.lower().startswith("nested")}
    colours |= {"carried": ORANGE, "carried, all blocks": ORANGE}
    colours |= {"matched adapter": INK, "matched adapter, all blocks": INK}
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.8), sharex=True, sharey=True)
    columns = {"CIFAR-100, 3 seeds": "against RanPAC", "Grocery, 5 seeds": "against RanPAC, Grocery"}
    interval_panels(panels, columns, cells, labels, colours, "RanPAC", lowest=-18.0)
    for panel in panels:
        panel.set_xlabel("A_N against RanPAC without adapters (points)")
    note = "Points: means of differences paired by seed; lines: 95 % intervals. ViT-Ti/16 with ImageNet "
    note += "weights, 160 px.\nAdapters in blocks 9-11 unless the row says otherwise (SD-LoRA: all). "
    note += 'Blue: nested. Orange: moving average ("carried"). Green: joint.'
    title = "Adapters in all blocks, averaged over tasks, end above RanPAC"
    finish(figure, title, note)
    return figure


def draw_nesting() -> Figure:
    """Differences of A_N and forgetting from the matched adapter, with 95 % intervals, one row per method."""
    cells = table(LOG, "cell", "does nesting help, on MRI-tuned weights\n")
    final = {name: numbers(row["A_N"])[0] for name, row in cells.items()}
    labels = {name: f"{name}   {final[name] + 1e-9:.1f}" for name in sorted(cells, key=final.get)}
    colours = {"nested mean": BLUE, "nested mean, interpolated": BLUE, "nested": ORANGE}
    colours |= {"matched adapter": INK}
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 5.2), sharey=True, width_ratios=(1.2, 1))
    columns = {"A_N: right is better": "A_N against matched"}
    columns |= {"Forgetting: left is better": "forgetting against matched"}
    interval_panels(panels, columns, cells, labels, colours, "matched adapter")
    for panel in panels:
        panel.set_xlabel("points against the matched adapter")
    above = {"xycoords": "axes fraction", "ha": "right", "va": "bottom", "color": GREY, "fontsize": 9}
    panels[0].annotate("A_N (%)", (-0.015, 1.02), **above)
    note = "Points: means of differences paired by seed; lines: 95 % intervals; 5 seeds. CIFAR-100 10x10, "
    note += "20 images per class, MRI-tuned DINOv2-S, 84 px.\nBlue, orange: nested. "
    note += "Green: trained on all classes at once, so nothing is forgotten."
    finish(figure, "Two learning rates alone do not help; slow as the running mean over tasks does", note)
    return figure


# -----------------------------------------------------------------------------------------------------------
# H1 to H4


WEIGHTS = {"no sharing": "0", "weak sharing": "0.003", "sharing": "0.01", "strong sharing": "0.1"}


def draw_hypotheses() -> Figure:
    """One panel per hypothesis: means and standard deviations by the weight alpha of the sharing loss."""
    cells = table(LOG, "cell", "### All cells")
    answers = table(LOG, "hypothesis", "H1-H4 on grids\n")

    def title(hypothesis: str, says: str, unit: str) -> str:
        answer = next(row for name, row in answers.items() if name.split()[0].rstrip(",") == hypothesis)
        mean, interval = answer["difference (95 %)"].replace("-", "\N{MINUS SIGN}").split(maxsplit=1)
        return f"{hypothesis}  {says}: {answer['verdict']}\n{mean}{unit} {interval}"

    def means(panel: Axes, names: dict[str, str], column: str, label: str = "", second: bool = False) -> None:
        values = [numbers(cells[name][column]) for name in names]
        panel.errorbar(
            [place + (0.07 if second else -0.07) * bool(label) for place in range(len(values))],
            [mean for mean, _ in values],
            [deviation for _, deviation in values],
            fmt="s" if second else "o",
            color=ORANGE if second else BLUE,
            markersize=7,
            elinewidth=1.8,
            capsize=3,
            label=label,
        )
        panel.set_xticks(range(len(names)), list(names.values()))
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.grid(axis="y", color=LIGHT)

    figure, ((h1, h2), (h3, h4)) = plt.subplots(2, 2, figsize=(9.6, 6.6))
    means(h1, WEIGHTS, "distance, sharing", "tasks that share primitives")
    means(h1, WEIGHTS, "others", "tasks that share none", second=True)
    h1.axhline(2.85, color=GREY, linestyle="--", linewidth=1)
    h1.text(3.45, 2.81, "random subspaces", color=GREY, ha="right", va="top", fontsize=9)
    h1.set(ylim=(0, 3.1), ylabel="Grassmann distance (rad)")
    h1.legend(frameon=False, loc="lower left", fontsize=9)
    h1.set_title(title("H1", "subspaces come nearer", " rad"))
    means(h2, WEIGHTS, "unseen")
    h2.set(ylim=(40, 56), ylabel="unseen IoU (%)")
    h2.set_title(title("H2", "unseen compositions gain", " points"))
    means(h3, WEIGHTS, "steps")
    h3.set(ylim=(0, 100), ylabel="few-shot steps to 60 % IoU")
    h3.set_title(title("H3", "few-shot adaptation needs fewer steps", " steps"))
    for panel in (h1, h2, h3):
        panel.set_xlabel("weight alpha of the sharing loss")
    names = {
        "no sharing": "no sharing",
        "sharing": "sharing",
        "sharing, no naming": "sharing, no\nprimitive loss",
    }
    means(h4, names, "best |r| of z", "one unit of the sparse code z")
    means(h4, names, "of h", "one unit of h", second=True)
    h4.axhline(0.09, color=GREY, linestyle="--", linewidth=1)
    h4.text(2.45, 0.11, "chance (95 %)", color=GREY, ha="right", fontsize=9)
    h4.set(ylim=(0, 1), ylabel="best |r| with a primitive")
    h4.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.12), fontsize=9)
    h4.set_title(title("H4", "units align with primitives", ""))
    note = "Mean ± std over 5 seeds. Titles: difference paired by seed with its 95 % interval, at alpha 0.01 "
    note += "against 0 (H4: against chance)."
    finish(figure, "The sharing loss moves subspaces together, without gain in the tasks", note)
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
    parser = argparse.ArgumentParser(description="Draw the figures of the documents.")
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="where (default: here)"
    )
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in (draw_quickstart, draw_answer, draw_nesting, draw_hypotheses, draw_architecture):
            figure, path = draw(), folder / f"{draw.__name__.removeprefix('draw_')}.png"
            figure.savefig(path, metadata={"Software": None})
            plt.close(figure)
            with Image.open(path) as image:  # 64 colours are enough, and a third of the size
                image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
