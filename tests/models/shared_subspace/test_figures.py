"""Pictures of grids: cells in their colours, wrong ones crossed, readable captions."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from models.shared_subspace.figures import GRID_COLOURS, GridSample, grid_samples_figure
from tests.drawn import assert_readable
from utils.plotting import STYLE

GRID = np.arange(64).reshape(8, 8) % 10
WORDS = "cycle_colours, z511: swap_colours, cycle_colours, transpose"


def drawn(*samples: GridSample) -> Figure:
    with mpl.rc_context(STYLE):
        return grid_samples_figure(samples, "Samples", "a_rather_long_prefix · shared_subspace · seed 1")


def test_grids_have_their_colours_and_a_cross_in_every_wrong_cell() -> None:
    wrong = GRID.copy()
    wrong[1, 5] = 9
    figure = drawn(GridSample("shift", GRID, GRID, wrong), GridSample("rotate", GRID, GRID, GRID))
    pictures = [axes for axes in figure.axes if axes.collections]
    assert len(pictures) == 6 and [axes.get_title() for axes in figure.axes[:2]] == ["shift", "rotate"]
    crosses = [axes.lines[0].get_xydata().tolist() for axes in pictures]
    assert crosses == [[], [], [], [], [[5.5, 1.5]], []]
    figure.canvas.draw()
    colours = pictures[4].collections[0].get_facecolors()[:, :3].reshape(8, 8, 3)
    assert tuple(colours[1, 5]) == pytest.approx(to_rgb(GRID_COLOURS[9]))
    assert tuple(colours[0, 0]) == pytest.approx(to_rgb(GRID_COLOURS[0]))


@pytest.mark.parametrize(
    ("count", "sample"),
    [(10, ("rotate 90, shift", GRID, GRID, GRID)), (17, (WORDS, GRID, GRID)), (1, ("shift", GRID, GRID))],
    ids=["predicted", "long captions", "one"],
)
def test_captions_are_folded_between_words_and_no_text_overlaps_another(count: int, sample: Any) -> None:
    figure = drawn(*count * [GridSample(*sample)])
    caption = figure.axes[0].get_title()
    assert caption.split() == sample[0].split() and max(map(len, caption.splitlines())) <= 18
    with mpl.rc_context(STYLE):
        assert_readable(figure)
