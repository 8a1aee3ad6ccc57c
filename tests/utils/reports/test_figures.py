"""utils.reports.figures: the numbers that are drawn, cells told apart, and no text that runs into another."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from tests.drawn import assert_readable
from tests.utils.reports.test_report import invented, metric_runs, results_of, table_of_runs
from utils.plotting import STYLE
from utils.reports.answers import answer
from utils.reports.figures import (
    FIGURES,
    bars_figure,
    cell_styles,
    curves_figure,
    differences_figure,
    hypotheses_figure,
    trade_off_figure,
)
from utils.reports.hypotheses import Hypothesis


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context(STYLE):
        yield


def many_cells(number: int) -> dict[str, dict[int, dict]]:
    """Cells of a grid with long names, beside all classes at once; later ones are better."""
    cells = {
        f"nested, nested_lora_rank={i}, nested_lora_freeze=never": {s: invented(s, 30 + i) for s in (1, 2)}
        for i in range(number - 1)
    }
    return {**cells, "joint": {s: invented(s, 70, tasks=1) for s in (1, 2)}}


def test_the_best_of_many_cells_are_in_colour_and_told_apart():
    runs = many_cells(28)
    names = list(runs)
    styles = cell_styles(results_of(runs, names[3]))
    assert list(styles) == [names[i] for i in (3, 22, 23, 24, 25, 26, 27)]
    few = cell_styles(results_of(dict(list(runs.items())[:12])))
    for shown in (styles, few):
        assert len({tuple(style.values()) for style in shown.values()}) == len(shown)
    assert len(few) == 12 and len({style["color"] for style in styles.values()}) == 7
    channels = [to_rgb(style["color"]) for cell, style in styles.items() if cell != names[3]]
    assert min(max(rgb) - min(rgb) for rgb in channels) > 0.2  # grey is for what is not highlighted


@pytest.mark.parametrize("number", [2, 10, 28])
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_another_or_leaves_the_picture(name, number):
    runs = many_cells(number)
    if number == 10:
        runs = {f"cell {i}": results for i, results in enumerate(runs.values())}
    first, second = list(runs)[:2]
    runs |= {second: {s: invented(s, 40) for s in (1, 2)}}  # as many tasks as the baseline
    assert_readable(FIGURES[name][0](results_of(runs, first), "a long name of a sweep " * 8))


@pytest.mark.parametrize("seeds", [1, 2])
def test_titles_promise_no_interval_where_there_is_one_seed(seeds):
    runs = {name: {s: invented(s, level) for s in range(seeds)} for name, level in (("a", 40), ("b", 43))}
    results = results_of(runs, "a")
    stated = {"H1": Hypothesis(says="b is better", cell="b", metric="final", expected="higher", against="a")}
    drawn = differences_figure(results, ""), hypotheses_figure(answer(stated, results), results, "")
    titles = [" ".join(text.get_text() for text in figure.texts) for figure in drawn]
    assert ["interval" in title for title in titles] == [seeds > 1] * 2


def test_no_accuracy_beyond_100_is_written_on_an_axis():
    runs = {cell: {s: invented(s, 40) for s in (1, 2)} for cell in ("a", "b")}
    for result in (result for seeds in runs.values() for result in seeds.values()):
        result["metrics"]["plasticity"] = 100.0
    axes = FIGURES["plasticity_forgetting.png"][0](results_of(runs, "a"), "run").axes[0]
    assert max(axes.get_xticks()) <= 100 < axes.get_xlim()[1]


def test_bars_and_differences_show_the_numbers():
    results = results_of(metric_runs("final", [44.0, 45.0, 46.0], [40.0, 41.5, 43.0]), "base")
    bars, differences = (draw(results, "run").axes[0] for draw in (bars_figure, differences_figure))
    assert [text.get_text() for text in bars.texts] == ["45.00 ± 1.00", "41.50 ± 1.50"]
    assert [patch.get_width() for patch in bars.patches] == [45.0, 41.5]
    row = results.summary.loc["ours", "final"]
    drawn = [list(line.get_xdata()) for line in differences.lines]
    assert drawn == [[0, 0], [row["difference_low95"], row["difference_high95"]], [row["difference"]]]


def test_the_legend_of_differences_names_what_is_drawn():
    """Numbers of adapters are the same in every seed, and have no panel."""
    results = results_of(table_of_runs(), "base")
    assert "same in every seed" in set(results.summary["verdict"])
    labels = [text.get_text() for text in differences_figure(results, "run").legends[0].get_texts()]
    assert [label.split(":")[0] for label in labels] == ["worse", "undecided"]


def test_a_name_is_drawn_as_it_is_written():
    """A dollar sign starts no formula, and a name that no formula could be is no error."""
    runs = {name: {1: invented(1, 40 + i)} for i, name in enumerate(["costs $5^ and $6_", "_hidden"])}
    figure = curves_figure(results_of(runs), "run")
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0].startswith("_hidden") and labels[1].startswith(r"costs \$5^ and \$6_")


def test_one_seed_is_a_hollow_point_without_an_interval():
    results = results_of({"base": {1: invented(1, 40)}, "a": {1: invented(1, 42)}}, "base")
    figure = differences_figure(results, "run")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one seed"]
    _, interval, point = figure.axes[0].lines
    assert np.isnan(interval.get_xdata()).all() and point.get_markerfacecolor() == "white"
    assert list(point.get_xdata()) == [results.summary.loc[("a", "final"), "difference"]]


@pytest.mark.parametrize(
    ("seeds", "said"), [((1, 1), "one seed"), ((1, 3), "1 to 3 seeds"), ((3, 3), "3 seeds")]
)
def test_figures_of_means_say_over_how_many_seeds(seeds, said):
    runs = {f"cell {i}": {s: invented(s, 40 + i) for s in range(n)} for i, n in enumerate(seeds)}
    for draw in (bars_figure, curves_figure, trade_off_figure):
        subtitle = " ".join(text.get_text() for text in draw(results_of(runs), "run").texts)
        assert said in subtitle and ("std" in subtitle) == (max(seeds) > 1)


def test_curves_show_the_mean_and_a_dashed_line_for_one_task():
    runs = {"a": {s: invented(s, 40) for s in (1, 2)}, "joint": {s: invented(s, 60, tasks=1) for s in (1, 2)}}
    results = results_of(runs)
    axes = curves_figure(results, "run").axes[0]
    curve, line = axes.lines
    curves = [result["curve"] for result in runs["a"].values()]
    assert list(curve.get_ydata()) == pytest.approx(np.mean(curves, axis=0))
    joint = results.summary.loc[("joint", "final"), "mean"]
    assert list(line.get_ydata()) == pytest.approx([joint] * 2) and line.is_dashed()
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    last = np.array(curves)[:, -1]
    assert last.mean() + last.std(ddof=1) == pytest.approx(band[band > last.mean()].min())


def test_whiskers_lie_inside_the_axes_and_bands_between_0_and_100_percent():
    """Two seeds far apart: the mean and its deviation reach beyond every seed."""
    runs = {
        "base": {1: invented(1, 20), 2: invented(2, 85)},
        "other": {1: invented(1, 40), 2: invented(2, 41)},
    }
    results = results_of(runs, "base")
    (axes,) = bars_figure(results, "smoke").axes
    assert len(axes.texts) == 2
    mean, std = results.summary.loc[("base", "final"), ["mean", "std"]]
    assert mean + std < axes.get_xlim()[1]
    bands = [
        band.get_paths()[0].vertices[:, 1] for band in curves_figure(results, "smoke").axes[0].collections
    ]
    assert bands and all(band.min() >= 0 and band.max() <= 100 for band in bands)
