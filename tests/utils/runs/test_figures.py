"""utils.runs.figures: drawn from a run's files alone, whatever is there, and no text runs into another."""

import json
import random
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.drawn import assert_readable
from utils.plotting import STYLE
from utils.runs.figures import (
    accuracy_curves_figure,
    accuracy_matrix_figure,
    class_incremental_figures,
    describe,
    draw_figures,
    growth_figure,
    norms_figure,
)

ALL = ["accuracy_curves.png", "accuracy_matrix.png", "growth.png", "norms.png"]
NAMES = {"prefix": "nested_lora", "model_name": "sema", "dataset": "cifar224", "backbone_type": "vit"}
CONFIG = {**NAMES, "seed": 7}


def invented(tasks: int, blocks: int = 12) -> tuple[list[list[float]], list[float], list[dict], list[dict]]:
    """(rows, totals, norms events, adapters of each task) of an invented run whose last three blocks grow."""
    draw = random.Random(tasks)
    rows = [[draw.uniform(40, 100) for _ in range(t + 1)] for t in range(tasks)]
    adapters = [{str(b): 1 + (t if b >= blocks - 3 else 0) // 3 for b in range(blocks)} for t in range(tasks)]
    norms = [
        {"event": "norms", "task": t, "block": int(b), "adapter": a, "when": when}
        | {"fast_effect": draw.random(), "slow_effect": t}
        for t in range(tasks)
        for b, number in adapters[t].items()
        for a in range(number)
        for when in ("before", "after")
    ]
    return rows, [sum(row) / len(row) for row in rows], norms, adapters


def write_run(folder: Path, tasks=3, norms=True, growth=True, result=True, **config: str) -> Path:
    """The files of an invented run, as the run log writes them; config: keys that are added to `CONFIG`."""
    folder.mkdir()
    rows, totals, norm_events, adapters = invented(tasks, blocks=4)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    events = list(norm_events) if norms else []
    for t in range(tasks):
        counts = adapters[t] if growth else {}
        measured = {"accuracy": rows[t], "total": totals[t]}
        events.append({"event": "task", "task": t, **measured, "adapters": counts})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if result:
        (folder / "result.json").write_text("{}")
    return folder


def names(paths: list[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def first_axes(draw: Any, *arguments: Any) -> Axes:
    with mpl.rc_context(STYLE):
        return draw(*arguments, "run").axes[0]


def test_every_figure_of_a_run_is_drawn_where_it_belongs_in_another_form_too_and_again_alike(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", figure_format="pdf")
    first, second = (
        {path: path.read_bytes() for path in draw_figures(run, class_incremental_figures)} for _ in range(2)
    )
    assert first == second
    assert names(list(first)) == sorted([*ALL, *(name.replace(".png", ".pdf") for name in ALL)])
    for path, content in first.items():
        assert path.parent == run / "figures"
        if path.suffix == ".pdf":
            assert content.startswith(b"%PDF")
        else:
            picture = imread(path)
            assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05  # not a blank sheet


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"norms": False, "growth": False}, ALL[:2]),
        ({"tasks": 0, "result": False}, []),
        ({"figure_format": "none"}, []),
    ],
)
def test_figures_without_numbers_or_wish_are_left_out(
    run: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    """Their folder is there all the same: without it a run is not finished."""
    folder = write_run(tmp_path / "run", **run)
    assert names(draw_figures(folder, class_incremental_figures)) == expected
    assert names(list((folder / "figures").iterdir())) == expected


def test_a_run_killed_while_recording_a_task_is_drawn_as_far_as_it_got(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tasks=3, result=False)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    torn = "".join(lines[:-1]) + lines[-1][:20]
    (run / "metrics.jsonl").write_text(torn)
    drawn: dict[str, Figure] = {}

    def figures(*arguments: Any) -> dict[str, Figure]:
        drawn.update(class_incremental_figures(*arguments))
        return drawn

    assert names(draw_figures(run, figures)) == ALL
    matrix = drawn["accuracy_matrix.png"]
    assert [tick.get_text() for tick in matrix.axes[0].get_yticklabels()] == ["0", "1"]
    assert "nested_lora · sema · cifar224 · vit · seed 7 · unfinished" in [
        text.get_text() for text in matrix.texts
    ]
    assert describe(CONFIG) == "nested_lora · sema · cifar224 · vit · seed 7"
    assert "cifar224 + birds" in describe(CONFIG | {"extra_data": ["birds"]})


@pytest.mark.parametrize("tasks", [1, 4, 10, 20, 40])
def test_no_text_overlaps_another_or_leaves_the_picture(tasks: int) -> None:
    rows, totals, norms, adapters = invented(tasks)
    about = "a_rather_long_prefix · sema · omnibenchmark · pretrained_vit_b16_224_in21k_adapter · seed 1"
    if tasks not in (1, 20):  # norms of all blocks are the slowest to draw
        norms = [event for event in norms if event["block"] < 3]
    with mpl.rc_context(STYLE):
        for figure in (
            accuracy_matrix_figure(rows, totals, about),
            accuracy_curves_figure(rows, totals, about),
            growth_figure(adapters, about),
            norms_figure(norms, about),
        ):
            assert_readable(figure)


def test_accuracy_matrix_prints_each_number_in_its_cell() -> None:
    axes = first_axes(accuracy_matrix_figure, [[90.0], [55.04, 80.0]], [90.0, 67.5])
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "90.0", (0, 1): "55.0", (1, 1): "80.0", (2, 0): "90.0", (2, 1): "67.5"}


def test_growth_frames_exactly_the_blocks_that_grew() -> None:
    axes = first_axes(growth_figure, [{"9": 1, "10": 1}, {"9": 2, "10": 1}, {"9": 2, "10": 2}])
    framed = {(round(patch.get_x() + 0.44), round(patch.get_y() + 0.42)) for patch in axes.patches}
    assert framed == {(1, 0), (2, 1)}  # (task, row)
    assert [text.get_text() for text in axes.texts] == ["1", "2", "2", "1", "1", "2"]


@pytest.mark.parametrize(("after", "told"), [(2.0, []), (2.5, ["after consolidation"])])
def test_norms_show_consolidation_only_where_something_changed(after: float, told: list[str]) -> None:
    event = {"task": 0, "block": 3, "adapter": 0, "fast_effect": 1.0}
    events = [event | {"when": when, "slow_effect": x} for when, x in (("before", 2.0), ("after", after))]
    axes = first_axes(norms_figure, events)
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["fast", "slow", *told]
    slow = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "s"]
    assert slow == [[[-0.1, 2.0]], [[-0.1, 2.5]] if told else []]
