"""W&B (offline) and MLflow (a folder of files) beside a run's record: numbers, resume, failures."""

import csv
import json
import logging
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import main
from tests.conftest import TINY, command, folder_of
from utils.runs import trackers
from utils.runs.folder import SWEEP
from utils.runs.run_log import RunLog

Capture = pytest.CaptureFixture[str]
Rows = list[tuple[str, int, float]]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def new_log(folder: Path, *trackers: str) -> RunLog:
    config = {"trackers": list(trackers), "logs_root": str(folder.parent), "prefix": "nested", "rank": 4}
    return RunLog.create(folder, config=config, overwrite=False)


def recorded(folder: Path) -> Rows:
    """The rows of a run's metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        return sorted((row["tag"], int(row["step"]), float(row["value"])) for row in csv.DictReader(file))


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records in a run's offline files, session by session: blocks of 32 KiB after a header of 7 bytes."""
    pytest.importorskip("wandb", reason="needs requirements-trackers.txt")
    from wandb.proto import wandb_internal_pb2 as proto

    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            left = 2**15 - at % 2**15
            if left < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            if at + 7 + length > len(data):  # not all on disk yet
                break
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or its last part
                yield proto.Record.FromString(record)
                record = b""


def wandb_rows(folder: Path, count: int) -> Rows:
    """At least so many rows, waited for: W&B's own process writes them."""
    rows, until = [], time.monotonic() + 20
    while len(rows) < count and time.monotonic() < until:
        time.sleep(0.1)
        rows = []
        for record in wandb_records(folder):
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            names = [name for name in items if not name.startswith(("_", "figures/")) and name != "at"]
            rows += [(name, items["at"], items[name]) for name in names]
    return sorted(rows)


def mlflow_run(folder: Path, logs: Path) -> tuple[Any, Any]:
    """(client, run) of a run folder."""
    mlflow = pytest.importorskip("mlflow", reason="needs requirements-trackers.txt")
    client = mlflow.MlflowClient((logs / "mlruns").as_uri())
    return client, client.get_run(json.loads((folder / "trackers.json").read_text())["mlflow"])


def mlflow_rows(folder: Path, logs: Path) -> Rows:
    client, run = mlflow_run(folder, logs)
    histories = (client.get_metric_history(run.info.run_id, name) for name in run.data.metrics)
    return sorted((one.key, one.step, one.value) for history in histories for one in history)


def test_a_run_is_shown_whole_with_its_name_group_and_figures(tmp_path: Path) -> None:
    """Trained on the tiny data, by both trackers and without TensorBoard."""
    pytest.importorskip("wandb", reason="needs requirements-trackers.txt")
    small = {**TINY, "max_tasks": 2, "rd_epoch": 1, "max_train_per_class": 8, "seed": 7}
    small["figure_format"] = "png"
    assert main.main(command("smoke.json", tmp_path, **small, trackers=["wandb", "mlflow"])) == 0
    folder = folder_of(tmp_path)
    rows = recorded(folder)
    assert rows and not (folder / "tb").exists()
    assert wandb_rows(folder, len(rows)) == mlflow_rows(folder, tmp_path) == rows
    client, run = mlflow_run(folder, tmp_path)
    pictures = {Path(one.path).name for one in client.list_artifacts(run.info.run_id, "figures")}
    assert pictures == {path.name for path in (folder / "figures").glob("*.png")} != set()
    assert (run.info.run_name, run.info.status) == (folder.name, "FINISHED")
    assert run.data.tags["group"] == "smoke" and run.data.params["nested_lora_rank"] == "4"
    (began,) = (one.run for one in wandb_records(folder) if one.WhichOneof("record_type") == "run")
    assert (began.display_name, began.run_group) == (folder.name, "smoke")
    assert {one.key: one.value_json for one in began.config.update}["nested_lora_rank"] == "4"


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_resumed_run_goes_on_in_the_same_place_and_says_nothing_twice(tracker: str, tmp_path: Path) -> None:
    """Killed two events after its checkpoint; a tracker that joins gets everything."""
    pytest.importorskip(tracker, reason="needs requirements-trackers.txt")
    folder = tmp_path / "run_1"
    with new_log(folder, tracker) as log:
        log.metric("task", task=0, total=50.0)
        size = log.metrics_bytes
        log.metric("epoch", task=1, epoch=1, loss=0.5)
        log.metric("epoch", task=1, epoch=2, loss=0.25)
    ids = json.loads((folder / "trackers.json").read_text())
    with RunLog.reopen(folder, size) as log:
        for epoch, loss in ((1, 0.5), (2, 0.25), (3, 0.125)):
            log.metric("epoch", task=1, epoch=epoch, loss=loss)
        log.result({"final": 50.0})
    assert json.loads((folder / "trackers.json").read_text()) == ids
    shown = wandb_rows(folder, 4) if tracker == "wandb" else mlflow_rows(folder, tmp_path)
    assert shown == recorded(folder) and len(shown) == 4
    if tracker == "wandb":
        runs = [one.run.run_id for one in wandb_records(folder) if one.WhichOneof("record_type") == "run"]
        assert runs == [ids["wandb"]] * 2
        return
    assert mlflow_run(folder, tmp_path)[1].info.status == "FINISHED"
    other = tmp_path / "run_2"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("trackers.json"))
    RunLog.reopen(other, (other / "metrics.jsonl").stat().st_size).close()
    assert mlflow_rows(other, tmp_path) == recorded(other)


def test_a_tracker_that_fails_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its files cannot be written, from the start or from the second event on."""
    pytest.importorskip("mlflow", reason="needs requirements-trackers.txt")
    store = tmp_path / "mlruns"
    for name, blocked in (("late", False), ("early", True)):
        caplog.clear()
        with new_log(tmp_path / name, "mlflow") as log:
            if not blocked:
                log.metric("task", task=0, total=50.0)
                shutil.rmtree(store)
                store.write_text("in the way")
            log.metric("task", task=1, total=40.0)
            log.metric("task", task=2, total=30.0)
        warnings = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        assert len([text for text in warnings if text.startswith("mlflow gets nothing more")]) == 1
        assert recorded(tmp_path / name)[-1] == ("task/total", 2, 30.0)


def test_a_tracker_that_fails_at_the_end_is_none_of_the_runs_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unreachable:
        id = "1"

        def __init__(self, *where: object) -> None:
            self.rows: list[object] = []

        def add(self, rows: list[object]) -> None:
            self.rows += rows

        def close(self, finished: bool) -> None:
            raise ConnectionError("nobody answers")

    monkeypatch.setattr(trackers, "CLASSES", {"wandb": Unreachable})
    with new_log(tmp_path / "run_1", "wandb") as log:
        log.metric("task", task=0, total=50.0)
    assert "nobody answers" in caplog.text and "nobody answers" not in log.log_path.read_text()


class Kept:
    """A tracker whose numbers stay in `sent`, and that fails while `down`."""

    id, sent, down = "1", [], False

    def __init__(self, *where: object) -> None:
        pass

    def add(self, rows: Rows) -> None:
        if Kept.down:
            raise ConnectionError("nobody answers")
        Kept.sent += rows

    def close(self, finished: bool) -> None:
        pass


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    """The tracker behind "wandb", which has nothing yet."""
    monkeypatch.setattr(trackers, "CLASSES", {"wandb": Kept})
    monkeypatch.setattr(Kept, "sent", [])
    return Kept


@pytest.mark.parametrize("left_out", [False, True], ids=["fails", "is left out of a session"])
def test_a_resumed_run_sends_what_a_tracker_lacks(
    left_out: bool, kept: type[Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first gap on, each number once: it is back in the third session, and away in the fourth."""
    folder, size = tmp_path / "run_1", 0
    for session, down in enumerate((False, True, False, True, False)):
        named = ["tensorboard"] if left_out and down else ["tensorboard", "wandb"]
        if not session:
            new_log(folder, *named).close()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"trackers": named}))
        monkeypatch.setattr(kept, "down", down and not left_out)
        with RunLog.reopen(folder, size) as log:
            for task in (2 * session, 2 * session + 1):
                log.metric("task", task=task, total=50.0)
            size = log.metrics_bytes
        assert kept.sent == [("task/total", task, 50.0) for task in range(len(kept.sent))]
        assert len(kept.sent) == (2 * session if down else 2 * session + 2)


def test_a_cell_of_a_sweep_is_grouped_by_both_names(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs requirements-trackers.txt")
    runs = tmp_path / "ranks/runs"
    runs.mkdir(parents=True)
    (tmp_path / "ranks" / SWEEP).write_text("{}")
    with new_log(runs / "nested_1", "mlflow") as log:
        log.metric("task", task=0, total=50.0)
    assert mlflow_run(runs / "nested_1", runs)[1].data.tags["group"] == "ranks/nested"


@pytest.mark.parametrize("sweep", [False, True])
def test_a_package_that_is_missing_is_a_sentence_before_anything_is_written(
    sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = command(
        "sweeps/smoke.json" if sweep else "smoke.json", tmp_path, trackers=["wandb", "tensorboard"]
    )
    assert main.main(["--sweep" if sweep else "--config", *arguments[1:]]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "wandb is not installed" in told and "requirements-trackers.txt" in told
    assert """--set 'trackers=["tensorboard"]'""" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("down", [False, True], ids=["was killed", "failed"])
def test_a_run_that_stops_before_it_is_where_it_was_says_nothing_twice(
    down: bool, kept: type[Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed four events after its checkpoint, of which the tracker has all or none, then stopped twice."""
    folder, size = tmp_path / "run_1", 0
    new_log(folder, "wandb").close()
    for first, last, fails in ((0, 1, False), (2, 5, down), (2, 2, False), (3, 4, False), (5, 7, False)):
        monkeypatch.setattr(kept, "down", fails)
        with RunLog.reopen(folder, size) as log:
            for task in range(first, last + 1):
                log.metric("task", task=task, total=50.0)
            size = size if last == 5 else log.metrics_bytes
    assert kept.sent == [("task/total", task, 50.0) for task in range(8)]
