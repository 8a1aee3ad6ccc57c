"""models.shared_subspace.metrics: a sweep of runs on grids has the same report, with their own numbers."""

from pathlib import Path

from models.shared_subspace.metrics import GRIDS
from tests.utils.reports.test_report import results_of
from utils.reports.report import write_report
from utils.reports.tables import means_table

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
    results = results_of(RUNS, "no sharing", metrics=GRIDS)
    write_report(tmp_path, "grids", "does it help?", results, commands={}, unfinished={})
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["bars.png", "differences.png"]
    for name in ("summary.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "unseen IoU (%)" in text and "distance of sharing tasks" in text and "A_N" not in text
    headings = means_table(results).headings
    assert "few-shot steps" in headings and not {"peak memory (MiB)", "adapter parameters (k)"} & set(
        headings
    )
    verdicts = results.summary.loc["sharing"]["verdict"]
    assert verdicts["unseen_iou"] == verdicts["grassmann_shared"] == "better"  # higher, and lower
