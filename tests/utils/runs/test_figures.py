"""utils.runs.figures: figures are drawn from a run's files alone, whatever is there, and no text runs into another."""

import json
import random

import matplotlib as mpl
import pytest
from matplotlib.image import imread

from tests.drawn import assert_readable
from utils.errors import UserError
from utils.runs import figures as plots
from utils.runs.figures import class_incremental_figures, draw_figures

ALL = ["accuracy_curves.png", "accuracy_matrix.png", "growth.png", "norms.png"]
NAMES = {"prefix": "nested_lora", "model_name": "sema", "dataset": "cifar224", "backbone_type": "vit"}
CONFIG = {**NAMES, "seed": [1993, 7]}


def invented(tasks: int, blocks: int = 12) -> tuple[list[list[float]], list[float], list[dict], list[dict]]:
    """(rows, totals, norms events, adapters of each task) of an invented run whose last three blocks grow."""
    draw = random.Random(tasks)
    rows = [[draw.uniform(40, 100) for _ in range(t + 1)] for t in range(tasks)]
    adapters = [{str(b): 1 + (t if b >= blocks - 3 else 0) // 3 for b in range(blocks)} for t in range(tasks)]
    norms = [
        {
            "event": "norms",
            "task": t,
            "block": int(b),
            "adapter": a,
            "when": when,
            "fast_effect": draw.random(),
            "slow_effect": t,
        }
        for t in range(tasks)
        for b, number in adapters[t].items()
        for a in range(number)
        for when in ("before", "after")
    ]
    return rows, [sum(row) / len(row) for row in rows], norms, adapters


def write_run(folder, tasks=3, blocks=4, norms=True, growth=True, result=True):
    """The files of an invented run, as the run log writes them."""
    folder.mkdir()
    rows, totals, norm_events, adapters = invented(tasks, blocks)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    events = list(norm_events) if norms else []
    for t in range(tasks):
        events.append(
            {"event": "task", "task": t, "total": totals[t], "adapters": adapters[t] if growth else {}}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    cells = [[*map(repr, row), *[""] * (tasks - len(row))] for row in rows]
    if tasks:
        (folder / "accuracy.csv").write_text("".join(",".join(row) + "\n" for row in cells))
    if result:
        (folder / "result.json").write_text(json.dumps({"seed": 1993, "metrics": {}}))
    return folder


def names(paths) -> list[str]:
    return sorted(path.name for path in paths)


def test_every_figure_of_a_run_is_drawn_where_it_belongs(tmp_path):
    run = write_run(tmp_path / "run")
    paths = draw_figures(run, class_incremental_figures)
    assert names(paths) == ALL
    for path in paths:
        assert path.parent == run / "figures"
        picture = imread(path)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05  # not a blank sheet


def test_drawing_again_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "run")
    first = {path: path.read_bytes() for path in draw_figures(run, class_incremental_figures)}
    assert {path: path.read_bytes() for path in draw_figures(run, class_incremental_figures)} == first


def test_figures_without_numbers_are_left_out(tmp_path):
    run = write_run(tmp_path / "plain", norms=False, growth=False)
    assert names(draw_figures(run, class_incremental_figures)) == [
        "accuracy_curves.png",
        "accuracy_matrix.png",
    ]
    assert (
        draw_figures(write_run(tmp_path / "just_started", tasks=0, result=False), class_incremental_figures)
        == []
    )


def test_a_run_killed_while_recording_a_task_is_drawn_as_far_as_it_got(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", tasks=3, result=False)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(
        "".join(lines[:-1]) + lines[-1][:20]
    )  # accuracy.csv knows task 2, this does not
    seen = {}
    real = plots.accuracy_matrix_figure

    def spy(rows, totals, subtitle):
        seen.update(rows=rows, totals=totals, subtitle=subtitle)
        return real(rows, totals, subtitle)

    monkeypatch.setattr(plots, "accuracy_matrix_figure", spy)
    assert names(draw_figures(run, class_incremental_figures)) == ALL
    assert len(seen["rows"]) == len(seen["totals"]) == 2
    assert seen["subtitle"] == "nested_lora · sema · cifar224 · vit · seed 1993, 7 · unfinished"


def test_the_subtitle_names_the_seed_of_this_run():
    assert plots.describe(CONFIG, {"seed": 7}) == "nested_lora · sema · cifar224 · vit · seed 7"


def test_what_is_no_run_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no config.json"):
        draw_figures(tmp_path, class_incremental_figures)
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        draw_figures(run, class_incremental_figures)


@pytest.mark.parametrize("tasks", [1, 4, 10, 20, 40])
def test_no_text_overlaps_another_or_leaves_the_picture(tasks):
    rows, totals, norms, adapters = invented(tasks)
    subtitle = "a_rather_long_prefix · sema · omnibenchmark · pretrained_vit_b16_224_in21k_adapter · seed 1"
    three_blocks = [event for event in norms if event["block"] < 3]
    with mpl.rc_context(plots.STYLE):
        figures = [
            plots.accuracy_matrix_figure(rows, totals, subtitle),
            plots.accuracy_curves_figure(rows, totals, subtitle),
            plots.growth_figure(adapters, subtitle),
            plots.norms_figure(three_blocks, subtitle),
        ]
        if tasks in (1, 20):  # the slowest to draw
            figures.append(plots.norms_figure(norms, subtitle))
        for figure in figures:
            assert_readable(figure)


def test_accuracy_matrix_prints_each_number_in_its_cell():
    rows, totals = [[90.0], [55.04, 80.0]], [90.0, 67.5]
    with mpl.rc_context(plots.STYLE):
        axes = plots.accuracy_matrix_figure(rows, totals, "run").axes[0]
    cells = {
        (round(text.get_position()[0], 1), text.get_position()[1]): text.get_text() for text in axes.texts
    }
    assert cells == {(0, 0): "90.0", (0, 1): "55.0", (1, 1): "80.0", (2.4, 0): "90.0", (2.4, 1): "67.5"}


def test_growth_frames_exactly_the_blocks_that_grew():
    with mpl.rc_context(plots.STYLE):
        axes = plots.growth_figure([{"9": 1, "10": 1}, {"9": 2, "10": 1}, {"9": 2, "10": 2}], "run").axes[0]
    framed = {(int(patch.get_x()), int(patch.get_y())) for patch in axes.patches}
    assert framed == {(1, 0), (2, 1)}  # (task, line): block 9 below block 10
    assert [text.get_text() for text in axes.texts] == ["1", "2", "2", "1", "1", "2"]


def test_norms_show_consolidation_only_where_something_changed():
    def labels(after: float) -> list[str]:
        event = {"task": 0, "block": 3, "adapter": 0, "fast_effect": 1.0}
        events = [
            {**event, "when": "before", "slow_effect": 2.0},
            {**event, "when": "after", "slow_effect": after},
        ]
        with mpl.rc_context(plots.STYLE):
            return [text.get_text() for text in plots.norms_figure(events, "run").legends[0].get_texts()]

    assert labels(2.0) == ["fast", "slow"]
    assert labels(2.5) == ["fast", "slow", "after consolidation"]
