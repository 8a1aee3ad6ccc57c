"""Runs on grids from the user's side: the record, the same seed twice, resume, and eval.py."""

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import eval as look
import main
from models.base import RunContext
from models.shared_subspace.evaluation import SPLIT_NAMES
from models.shared_subspace.metrics import GRIDS
from tests.conftest import TINY_GRIDS, folder_of
from tests.crash import outcome, run
from utils.errors import Interrupted
from utils.runs.run_log import read_metrics

Told = Callable[..., str]


def arguments(logs: Path, **changes: object) -> list[str]:
    """The command line of a tiny run; its configuration lies beside the logs."""
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / "tiny.json"
    path.write_text(json.dumps(TINY_GRIDS | {"logs_root": str(logs / "logs"), "seed": [1]} | changes))
    return ["--config", str(path)]


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run."""
    logs = tmp_path_factory.mktemp("finished")
    assert main.main(arguments(logs, figure_format="png")) == 0
    return folder_of(logs)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_tells_the_whole_story(finished: Path) -> None:
    files = {"config.json", "manifest.json", "metrics.jsonl", "metrics.csv", "result.json", "report.html"}
    assert names(finished) == files | {"figures", "tb", "checkpoints", "analysis"}
    assert finished.parts[-3:] == ("shared_subspace", "grids", "tiny_1_transformer")
    assert names(finished / "checkpoints") == {"task_00"} and names(finished / "tb")
    assert names(finished / "figures") == {"training.png", "zero_shot.png", "few_shot.png"}
    analyses = {path.stem for path in (finished / "analysis").glob("*.json")}
    assert analyses == {"cka", "grassmann", "probes", "units", "samples"}
    manifest = json.loads((finished / "manifest.json").read_text())
    assert len(manifest["held_out"]) == 4 and len(manifest["splits_sha256"]) == 64
    log = finished.with_name(finished.name + ".log").read_text()
    best = max(event["validation_iou"] for event in read_metrics(finished) if event.get("phase") == "train")
    assert f"Back to the weights with validation IoU {best:.2f} %" in log
    rows = [event for event in read_metrics(finished) if event["event"] == "few_shot"]
    adapted = [f"{row['composition']}: IoU {row['before']:.2f} -> {row['after']:.2f}" for row in rows]
    for part in (*adapted, "unseen length", "of 2 reached 90 %", "IoU of the input", "Subspaces of h"):
        assert part in log


def test_the_result_agrees_with_the_record(finished: Path) -> None:
    result, events = result_of(finished), read_metrics(finished)
    (task,) = [event for event in events if event["event"] == "task"]
    assert task["zero_shot"] == result["zero_shot"] and task["zero_shot"].keys() == SPLIT_NAMES.keys()
    for name in ("cka", "grassmann", "probes", "units"):
        numbers = json.loads((finished / "analysis" / f"{name}.json").read_text())["metrics"]
        assert numbers and numbers.items() <= task["analysis"].items() <= result["metrics"].items()
    assert [spec.key for spec in GRIDS] == list(result["metrics"])
    assert result["metrics"]["unseen_iou"] == result["zero_shot"]["unseen"]["iou"]
    rows = [event for event in events if event["event"] == "few_shot"]
    assert [row["composition"] for row in rows] == [row["composition"] for row in result["few_shot"]]
    assert result["metrics"]["few_shot_after"] == pytest.approx(sum(row["after"] for row in rows) / 2)
    assert result["cost"]["few_shot_seconds"] > 0 and result["parameters"]["stored"] > 0


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished: Path, tmp_path: Path) -> None:
    assert main.main(arguments(tmp_path, seed=[1, 2])) == 0
    same, other = sorted(path.parent for path in tmp_path.rglob("config.json"))
    assert outcome(same) == outcome(finished)
    assert result_of(other)["metrics"] != result_of(finished)["metrics"]


# --- resume -------------------------------------------------------------------------------------------------


def stop_at(number: int) -> Callable[[RunContext], None]:
    """What `RunContext.check_stop` does when a stop is requested before the n-th step."""
    calls = itertools.count(1)

    def check_stop(context: RunContext) -> None:
        if next(calls) == number:
            raise Interrupted

    return check_stop


@pytest.mark.parametrize(
    "at", [8, 11, 17, 21], ids=["in an epoch", "between epochs", "in few-shot", "in the second task"]
)
def test_stopped_and_resumed_is_uninterrupted(
    at: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 steps train, then 4 for each of two few-shot tasks."""
    with monkeypatch.context() as patched:
        patched.setattr(RunContext, "check_stop", stop_at(at))
        assert main.main(arguments(tmp_path)) == 130
    folder = folder_of(tmp_path)
    assert not (folder / "result.json").exists()
    assert names(folder / "checkpoints") == {f"task_00_step_{at - 1:06d}"}  # earlier ones have made room
    assert main.main(["--resume", str(folder)]) == 0
    assert outcome(folder) == outcome(finished)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run with everything that has a state of its own, and what came out."""
    changes = {"sharing_ema": 0.5, "encoder": "gru", "few_shot_method": "adapter"}
    changes |= {"batch_size": 16, "grad_accumulation": 2}
    logs = tmp_path_factory.mktemp("options")
    code, moments = run(arguments(logs, **changes))
    assert code == 0
    yield {"changes": changes, "moments": moments, "outcome": outcome(folder_of(logs))}


@pytest.mark.parametrize("after", [0, 1, 2], ids=["first save", "second save", "all is trained"])
def test_killed_and_resumed_is_uninterrupted(after: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Killed in the third step after a save; the last one is followed by few-shot adaptation."""
    saves = [i for i, moment in enumerate(options["moments"]) if moment == "rename"]
    point = saves[after] + 4 if after < 2 else saves[2] - 3
    code, _ = run(arguments(tmp_path, **options["changes"]), die_at=point)
    assert code == -signal.SIGKILL
    folder = folder_of(tmp_path)
    assert any((folder / "checkpoints").iterdir())
    assert run(["--resume", str(folder)])[0] == 0
    assert outcome(folder) == options["outcome"]


# --- eval.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run without its analysis, to be changed."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))


def test_eval_tests_the_checkpoint_again(finished: Path, told: Told) -> None:
    shown = told(0, look.main, "--run", finished).splitlines()
    for split, values in result_of(finished)["zero_shot"].items():
        (line, *_) = [line for line in shown if line.startswith(SPLIT_NAMES[split])]
        assert f"{values['iou']:.2f}" in line and f"{values['cells']:.2f}" in line


def test_an_analysis_later_is_the_one_that_the_run_made(finished: Path, copied: Path, told: Told) -> None:
    (copied / "analysis").mkdir()
    (copied / "analysis" / "cka.json").write_text("{}")  # is replaced
    shown, written = told(0, look.main, "--run", copied, "--analyse", "cka", "units"), copied / "analysis"
    assert names(written) == {n for n in names(finished / "analysis") if n.startswith(("cka", "unit"))}
    for path in written.iterdir():
        assert path.read_bytes() == (finished / "analysis" / path.name).read_bytes()
        assert f"wrote {path}" in shown
    assert "Linear CKA between tasks" in shown and "best unit of z for each primitive" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cka", "--images-per-class", "4"], "a run on grids has no images"),
        (["cka", "branches"], "branches: no such analysis"),
    ],
)
def test_an_analysis_of_images_is_a_sentence(
    arguments: list[str], expected: str, copied: Path, told: Told
) -> None:
    message = told(2, look.main, "--run", copied, "--analyse", *arguments)
    assert expected in message and message.count("\n") == 1 and not (copied / "analysis").exists()
