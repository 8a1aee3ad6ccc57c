"""utils.reports.figures: the numbers that are drawn, cells told apart, and no text that runs into another."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from tests.drawn import assert_readable
from tests.utils.reports.test_report import invented, metric_runs
from utils.reports.cells import tabulate
from utils.reports.figures import (
    bars_figure,
    cell_looks,
    curves_figure,
    differences_figure,
    highlighted,
    trade_off_figure,
)
from utils.runs.figures import STYLE


def many_cells(number: int) -> dict[str, dict[int, dict]]:
    """Cells of a grid with long names, beside all classes at once; later ones are better."""
    cells = {
        f"nested, nested_lora_rank={i}, nested_lora_freeze=never": {s: invented(s, 30 + i) for s in (1, 2)}
        for i in range(number - 1)
    }
    return {**cells, "joint": {s: invented(s, 70, tasks=1) for s in (1, 2)}}


def test_many_cells_are_told_apart_and_the_best_are_highlighted():
    cells = tabulate(many_cells(28), None)
    baseline = cells[3].name
    names = [cell.name for cell in highlighted(cells, baseline)]
    assert names == [cells[i].name for i in (3, 22, 23, 24, 25, 26, 27)]
    assert len(highlighted(cells[:12], None)) == 12
    looks = cell_looks(cells, baseline)
    assert len(set(looks.values())) == 28
    assert len({looks[name].colour for name in names}) == len(names)
    channels = [to_rgb(look.colour) for name, look in looks.items() if name != baseline]
    assert min(max(rgb) - min(rgb) for rgb in channels) > 0.2  # grey is for what is not highlighted


@pytest.mark.parametrize("number", [2, 10, 28])
def test_no_text_overlaps_another_or_leaves_the_picture(number):
    runs = (
        many_cells(number)
        if number > 10
        else {f"cell {i}": r for i, r in enumerate(many_cells(number).values())}
    )
    baseline = next(iter(runs))
    cells = tabulate(runs, baseline)
    several, looks, subtitle = cells[:-1], cell_looks(cells, baseline), "a long name of a sweep " * 8
    with mpl.rc_context(STYLE):
        figures = [
            bars_figure(cells, baseline, subtitle),
            curves_figure(cells, looks, baseline, subtitle),
            trade_off_figure(several, looks, subtitle),
            differences_figure(cells[1:], subtitle),
        ]
        for figure in figures:
            assert_readable(figure)


def test_bars_and_differences_show_the_numbers():
    runs = metric_runs("final", [44.0, 45.0, 46.0], [40.0, 41.5, 43.0])
    cells = tabulate(runs, "base")
    with mpl.rc_context(STYLE):
        bars = bars_figure(cells, "base", "run").axes[0]
        differences = differences_figure(cells[:1], "run").axes[0]
    assert [text.get_text() for text in bars.texts] == ["45.00 ± 1.00", "41.50 ± 1.50"]
    assert [patch.get_width() for patch in bars.patches] == [45.0, 41.5]
    paired = cells[0].comparisons["final"].paired
    drawn = [list(line.get_xdata()) for line in differences.lines]
    assert [0, 0] in drawn and [paired.low, paired.high] in drawn and [paired.mean] in drawn


def test_a_name_is_drawn_as_it_is_written():
    """A dollar sign starts no formula, and a name that no formula could be is no error."""
    runs = {name: {1: invented(1, 40 + i)} for i, name in enumerate(["costs $5^ and $6_", "_hidden"])}
    with mpl.rc_context(STYLE):
        figure = curves_figure(tabulate(runs, None), cell_looks(tabulate(runs, None), None), None, "run")
        figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0].startswith("_hidden") and labels[1].startswith(r"costs \$5^ and \$6_")


def test_one_seed_is_a_hollow_point_without_an_interval():
    cells = tabulate({"base": {1: invented(1, 40)}, "a": {1: invented(1, 42)}}, "base")
    with mpl.rc_context(STYLE):
        figure = differences_figure(cells[1:], "run")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one seed"]
    zero, point = figure.axes[0].lines
    assert list(point.get_xdata()) == [cells[1].comparisons["final"].paired.mean]
    assert point.get_markerfacecolor() == "white"


def test_curves_show_the_mean_and_a_dashed_line_for_one_task():
    runs = {"a": {s: invented(s, 40) for s in (1, 2)}, "joint": {s: invented(s, 60, tasks=1) for s in (1, 2)}}
    cells = tabulate(runs, None)
    with mpl.rc_context(STYLE):
        axes = curves_figure(cells, cell_looks(cells, None), None, "run").axes[0]
    curve, line = axes.lines
    assert list(curve.get_ydata()) == pytest.approx(np.mean([r["curve"] for r in runs["a"].values()], axis=0))
    assert (
        list(line.get_ydata()) == pytest.approx([cells[1].estimates["final"].mean] * 2) and line.is_dashed()
    )
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    last = [result["curve"][-1] for result in runs["a"].values()]
    assert np.mean(last) + np.std(last, ddof=1) == pytest.approx(band[band > np.mean(last)].min())
