"""models.shared_subspace.metrics: a sweep of runs on grids has the same report, with their own numbers."""

from pathlib import Path

import pytest

from models.shared_subspace.metrics import GRIDS
from utils.reports.answers import answer
from utils.reports.hypotheses import read_hypotheses
from utils.reports.report import write_report
from utils.reports.results import Results
from utils.reports.tables import difference_tables, hypotheses_table, means_table
from utils.runs.metrics import fault_of

SEEDS = (1, 2, 3)


def grids(seed: int, iou: float, distance: float) -> dict:
    """A result.json of a run on grids."""
    measured = {
        "unseen_iou": iou + seed,
        "held_out_iou": iou + 10,
        "grassmann_shared": distance + seed / 1000,
        "unit_alignment": 0.4 + seed / 100,
        "few_shot_steps": 60 - seed,
    }
    return {
        "seed": seed,
        "metrics": {spec.key: 0.5 for spec in GRIDS} | measured,
        "parameters": {"encoder": 100, "stored": 300},
        "weights": {"tag": "trained from scratch", "note": ""},
        "cost": {"seconds": 120.0, "peak_memory_mb": 500.0, "few_shot_seconds": 0.4},
    }


RUNS = {
    "sharing": {seed: grids(seed, 40 + 0.1 * seed, 0.2) for seed in SEEDS},
    "no sharing": {seed: grids(seed, 38, 0.5 + seed / 1000) for seed in SEEDS},
}


def test_a_sweep_of_runs_on_grids_is_reported_in_their_numbers(tmp_path: Path) -> None:
    results = Results(RUNS, GRIDS, "no sharing")
    write_report(tmp_path, "grids", "does it help?", results, commands={}, unfinished={})
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["bars.png", "differences.png"]
    for name in ("summary.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "unseen IoU (%)" in text and "distance of sharing tasks" in text and "A_N" not in text


def test_differences_know_which_direction_is_better() -> None:
    results = Results(RUNS, GRIDS, "no sharing")
    found = results.summary.loc["sharing"]
    assert found["verdict"]["unseen_iou"] == found["verdict"]["grassmann_shared"] == "better"
    assert found["difference"]["unseen_iou"] == pytest.approx(2.2)
    assert found["verdict"]["unit_alignment"] == found["verdict"]["few_shot_steps"] == "same in every seed"
    tables = {table.caption.split(",")[0]: table for table in difference_tables(results)}
    distance = tables["distance of sharing tasks"]
    assert "lower is better" in distance.caption and distance.rows[0][2].text == "-0.302"
    headings = means_table(results).headings
    assert "few-shot steps" in headings and not {"peak memory (MB)", "adapter parameters (k)"} & set(headings)


def test_a_hypothesis_about_a_distance_is_shown_in_its_digits() -> None:
    given = {"says": "nearer", "cell": "sharing", "metric": "grassmann_shared", "expected": "lower"}
    hypotheses, _ = read_hypotheses({"H1": given | {"against": "no sharing"}}, list(RUNS))
    results = Results(RUNS, GRIDS)
    row = hypotheses_table(answer(hypotheses, results), results).rows[0]
    assert [entry.text for entry in row[:2]] == ["H1: nearer", "supported"]
    assert [entry.text for entry in row[7:]] == ["0.202 ± 0.001", "0.504 ± 0.002"]


def test_a_result_without_its_main_metric_is_damaged() -> None:
    damaged = grids(1, 40, 0.2)
    damaged["metrics"]["unseen_iou"] = None
    assert "no unseen IoU" in fault_of(damaged, GRIDS)
