"""Kinds of runs: a sweep of runs on grids has the same report, with their own numbers."""

import json
from pathlib import Path

import pytest

from tests.utils.reports.test_report import invented
from utils.errors import UserError
from utils.reports.cells import tabulate
from utils.reports.metric_catalogue import KINDS, kind_of
from utils.reports.report import write_report
from utils.reports.tables import difference_tables, main_table

SEEDS = (1, 2, 3)


def grids(seed: int, iou: float, distance: float) -> dict:
    """A result.json of a run on grids."""
    few_shot = {
        "few_shot_before": iou,
        "few_shot_after": iou + 30,
        "few_shot_steps": 60 - seed,
        "few_shot_reached": 50.0,
    }
    metrics = dict.fromkeys(KINDS["grids"].metrics, 0.5) | {
        "train_iou": iou + 20, "train_solved": 5.0, "held_out_iou": iou + 10, "held_out_solved": 4.0,
        "unseen_iou": iou + seed, "unseen_solved": 3.0, "grassmann_shared": distance + seed / 1000,
        "grassmann_other": 0.8, "grassmann_gap": 0.8 - distance, "unit_alignment": 0.4 + seed / 100,
        "unit_chance": 0.1, "hidden_alignment": 0.3, "probe_unseen": 80.0, **few_shot,
    }  # fmt: skip
    return {
        "kind": "grids",
        "seed": seed,
        "metrics": metrics,
        "parameters": {"encoder": 100, "stored": 300},
        "weights": {"tag": "trained from scratch", "note": ""},
        "cost": {"seconds": 120.0, "peak_memory_mb": 500.0, "few_shot_seconds": 0.4},
    }


RUNS = {
    "sharing": {seed: grids(seed, 40 + 0.1 * seed, 0.2) for seed in SEEDS},
    "no sharing": {seed: grids(seed, 38, 0.5 + seed / 1000) for seed in SEEDS},
}


def test_a_sweep_of_runs_on_grids_is_reported_in_their_numbers(tmp_path: Path) -> None:
    write_report(tmp_path, "grids", "does it help?", RUNS, baseline="no sharing", commands={}, unfinished={})
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["bars.png", "differences.png"]
    for name in ("summary.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "IoU, unseen (%)" in text and "distance of tasks that share a primitive" in text
        assert (
            "A_N" not in text and "class order" not in text and "the same compositions in every split" in text
        )


def test_differences_know_which_direction_is_better() -> None:
    cells = tabulate(RUNS, "no sharing")
    compared = cells[0].comparisons
    assert compared["unseen_iou"].verdict == "better" and compared["unseen_iou"].paired.mean == pytest.approx(
        2.2
    )
    assert compared["grassmann_shared"].verdict == "better" and compared["grassmann_shared"].paired.mean < 0
    assert compared["unit_alignment"].verdict == compared["few_shot_steps"].verdict == "same in every seed"
    (table,) = [
        table for table in difference_tables(cells, "no sharing") if table.caption.startswith("distance")
    ]
    assert "lower is better" in table.caption and table.rows[0][2].text == "-0.302"
    headings = main_table(cells).headings
    assert "few-shot steps" in headings and "peak memory (MB)" not in headings


def test_runs_of_different_kinds_are_not_compared() -> None:
    with pytest.raises(UserError, match='cells "sharing" and "other" measure different things'):
        tabulate({**RUNS, "other": {1: invented(1, 40)}}, None)


def test_a_result_without_its_main_metric_is_damaged() -> None:
    damaged = json.loads(json.dumps(RUNS["sharing"][1]))
    damaged["metrics"]["unseen_iou"] = None
    with pytest.raises(UserError, match="it has no IoU on unseen compositions"):
        tabulate({"a": {1: damaged}}, None)


def test_a_kind_that_is_not_known_is_a_sentence() -> None:
    with pytest.raises(UserError, match="of kind 'maps'; allowed: class_incremental, grids"):
        kind_of({"kind": "maps"})


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_whole(name: str) -> None:
    kind = KINDS[name]
    assert kind.main in kind.metrics and kind.main in kind.quantities and kind.main in kind.panels
    assert set(kind.panels) <= set(kind.compared) <= set(kind.metrics)
    assert {"bars.png", "differences.png"} <= set(kind.captions)
