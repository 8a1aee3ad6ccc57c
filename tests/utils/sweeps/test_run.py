"""Tests of `utils.sweeps.run` and `utils.sweeps.folder`: order, what is skipped and resumed, failures, Ctrl-C, Ray.

Most run the command line's `main` in this process in place of one of its own, which costs a second instead of several;
Ctrl-C and Ray are tried with real processes.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import main
import utils.sweeps.folder
from models import SCHEMAS
from tests.conftest import ROOT, TINY
from tests.crash import outcome
from tests.utils.runs.test_manifest import record
from utils.config.loading import load_config
from utils.errors import UserError
from utils.runs.folder import FIGURES, RESULT, FolderLock, folder_of
from utils.runs.manifest import MANIFEST
from utils.sweeps.executors import ENGINES, Job, Needs, Outcome

TABLE = {
    "description": "what it is for",
    "base": str(ROOT / "exps/smoke.json"),
    "seeds": [1, 2],
    "set": {**TINY, "max_tasks": 2, "rd_epoch": 0, "max_test_per_class": 4},
    "cells": {"nested": {}, "matched adapter": {"ffn_adapter_type": "adaptmlp", "ffn_num": 8}},
    "baseline": "matched adapter",
}
WAITS_TO_BE_STOPPED = """  # run by Python as it starts: training waits at its tenth step until it is stopped
import pathlib, sys, time
sys.path.insert(0, "{root}")
from models.base import Learner

calls, stopping = [], Learner.stopping

def wait(learner):
    calls.append(1)
    if len(calls) == 10:
        pathlib.Path("{reached}").touch()
        while not learner._stop_requested():
            time.sleep(0.01)
    return stopping(learner)

Learner.stopping = wait
"""
RESULTS = {
    "metrics": {"final": 12.5},
    "curve": [12.5],
    "parameters": {},
    "weights": {},
    "cost": {"seconds": 30.0},
}
RUNS = [("nested", 1), ("matched-adapter", 1), ("nested", 2), ("matched-adapter", 2)]


class Command:
    """A sweep's command line in a folder of its own, and what came of calling it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.path = folder / "table.json"
        self.settings = [f"logs_root={folder / 'logs'}", f"cache_root={folder / 'cache'}"]
        self.folder = folder / "logs/sweeps/table"
        self.write(**changes)

    def write(self, **changes: Any) -> None:
        self.path.write_text(json.dumps({**TABLE, **changes}))

    @property
    def line(self) -> list[str]:
        return [
            "--sweep",
            str(self.path),
            *(part for setting in self.settings for part in ("--set", setting)),
        ]

    def __call__(self, *options: str) -> int:
        return main.main([*self.line, *options])

    def run_folder(self, slug: str, seed: int) -> Path:
        return self.folder / f"runs/sema/synthetic/0/2/{slug}_{seed}_test_vit"

    def config(self, slug: str, seed: int) -> Path:
        return self.folder / f"cells/{slug}_{seed}.json"


def anew(config: Path) -> tuple[str, ...]:
    """The arguments of a run that is started, not resumed."""
    return ("--config", str(config), "--overwrite")


class Started(list):
    """An engine that runs every job at once in this process; the list of their arguments."""

    jobs = 1

    def __init__(self, work: Callable[[Job], Outcome]) -> None:
        self.work = work

    def submit(self, job: Job) -> Future:
        self.append(job.arguments)
        future: Future = Future()
        future.set_result(self.work(job))
        return future

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def train(job: Job) -> Outcome:
    return Outcome(main.main(list(job.arguments)), "the last line")


def pretend(job: Job, **made_with: Any) -> Outcome:
    """A run folder with a result, and nothing trained."""
    assert job.arguments[0] == "--config"
    values = json.loads(Path(job.arguments[1]).read_text())
    folder = folder_of(load_config(job.arguments[1], [], SCHEMAS).config, values["seed"][0])
    folder.mkdir(parents=True)
    record(folder, values, **made_with)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"finished": "2026-11-28T15:30:00+00:00"}))
    (folder / FIGURES).mkdir()
    (folder / RESULT).write_text(json.dumps(RESULTS))
    return Outcome(0, "")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What runs were started, in place of processes; by default they are only pretended."""
    engine = Started(pretend)
    monkeypatch.setitem(ENGINES, "local", lambda needs: engine)
    return engine


@pytest.fixture(autouse=True)
def reports(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The calls of `write_report`, in place of its work."""
    calls: list[SimpleNamespace] = []

    def write_report(folder: Path, title: str, description: str, runs: Any, **named: Any) -> list[Path]:
        calls.append(SimpleNamespace(folder=folder, title=title, description=description, runs=runs, **named))
        return [folder / "summary.md"]

    monkeypatch.setitem(sys.modules, "utils.reports.report", SimpleNamespace(write_report=write_report))
    return calls


@pytest.fixture
def sweep(tmp_path: Path) -> Command:
    return Command(tmp_path)


def refused(sweep: Command, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Exit code 2, one sentence, no traceback."""
    capsys.readouterr()
    assert sweep(*options) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and len(message.strip().splitlines()) == 1
    return message


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# What is run, and what it leaves behind


def test_runs_go_seed_by_seed_from_configs_that_stand_alone(sweep: Command, started: Started) -> None:
    assert sweep() == 0
    assert started == [anew(sweep.config(*run)) for run in RUNS]
    for slug, seed in RUNS:
        config = json.loads(sweep.config(slug, seed).read_text())
        assert (config["prefix"], config["seed"]) == (slug, [seed])
        assert sweep.run_folder(slug, seed).is_dir()
    table = json.loads((sweep.folder / "sweep.json").read_text())
    assert [(cell["name"], cell["slug"]) for cell in table["cells"]] == [
        ("nested", "nested"),
        ("matched adapter", "matched-adapter"),
    ]
    assert (table["seeds"], table["baseline"], table["description"]) == (
        [1, 2],
        "matched adapter",
        "what it is for",
    )
    assert table["cells"][1]["config"]["ffn_num"] == 8


def test_keys_of_a_cell_without_effect_are_named(
    sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    named = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert (
        len(named) == len(TABLE["cells"])
        and "matched adapter: " in named[1]
        and "nested_lora_rank" in named[1]
    )


def test_a_jobs_needs_and_places(sweep: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.write(threads=3, memory_gb=7)
    seen: list[Any] = []
    engine = Started(lambda job: seen.append(job) or pretend(job))
    monkeypatch.setitem(ENGINES, "local", lambda needs: seen.append(needs) or engine)
    assert sweep("--jobs", "5") == 0
    needs, job = seen[:2]
    assert needs == Needs(threads=3, memory_gb=7.0, jobs=5, gpu=False, address=None)
    assert (job.threads, job.gpu, job.working_folder) == (3, False, Path.cwd())
    assert (job.output, job.stop) == (sweep.folder / "logs/nested_1.txt", sweep.folder / "stop")


@pytest.mark.parametrize(("device", "gpu"), [("auto", True), ("cpu", False), (["0"], False)])
def test_a_gpu_is_asked_for_where_any_will_do(
    device: Any, gpu: bool, sweep: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.write(set={**TABLE["set"], "device": device})
    seen: list[Any] = []
    engine = Started(lambda job: seen.append(job) or pretend(job))
    monkeypatch.setitem(ENGINES, "local", lambda needs: seen.append(needs) or engine)
    assert sweep() == 0
    assert {item.gpu for item in seen} == {gpu}


def test_the_summary_is_given_every_finished_run(
    sweep: Command, started: Started, reports: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    (report,) = reports
    assert (report.folder, report.title, report.description) == (sweep.folder, "table", "what it is for")
    assert list(report.runs) == ["nested", "matched adapter"] and report.baseline == "matched adapter"
    assert {name: list(seeds) for name, seeds in report.runs.items()} == {
        "nested": [1, 2],
        "matched adapter": [1, 2],
    }
    assert report.runs["nested"][1]["metrics"] == {"final": 12.5}
    repeats = f"python main.py --config {sweep.config('nested', 1)} --set 'seed=[1,2]'"
    assert report.commands["nested"] == repeats and report.unfinished == {}
    shown = capsys.readouterr().out
    assert "nested, seed 1: A_N 12.50, 0.5 min (1 of 4)" in shown and "4 of 4 runs are finished" in shown


def test_a_run_of_the_table_is_repeated_by_its_command(sweep: Command, started: Started) -> None:
    sweep.write(cells={"nested": {}}, baseline=None, seeds=[1])
    started.work = train
    assert sweep() == 0
    assert main.main(["--config", str(sweep.config("nested", 1))]) == 0
    folder = sweep.run_folder("nested", 1)
    assert outcome(folder.with_name(folder.name + "_2")) == outcome(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def test_what_is_finished_is_skipped(
    sweep: Command, started: Started, reports: list[SimpleNamespace]
) -> None:
    assert sweep() == 0
    shutil.rmtree(sweep.run_folder("nested", 2))
    started.clear()
    assert sweep() == 0
    assert started == [anew(sweep.config("nested", 2))]
    started.clear()
    assert sweep() == 0
    assert started == [] and len(reports) == 3


def test_new_cells_and_seeds_are_run_beside_the_finished(sweep: Command, started: Started) -> None:
    sweep.write(seeds=[1], cells={"nested": {}}, baseline=None)
    assert sweep() == 0
    started.clear()
    sweep.write()
    assert sweep() == 0
    assert started == [anew(sweep.config(*run)) for run in RUNS[1:]]


def test_a_broken_run_is_resumed_to_the_same_end(sweep: Command, started: Started) -> None:
    sweep.write(seeds=[1], cells={"nested": {}}, baseline=None)
    started.work = train
    assert sweep() == 0
    folder = sweep.run_folder("nested", 1)
    whole = outcome(folder)
    (folder / RESULT).unlink()
    shutil.rmtree(folder / "checkpoints/task_01")
    started.clear()
    assert sweep() == 0
    assert started == [("--resume", str(folder))]
    assert outcome(folder) == whole and not folder.with_name(folder.name + "_2").exists()


def test_what_should_follow_a_result_is_made_before_a_sweep_is_finished(
    sweep: Command, started: Started
) -> None:
    """Figures do not fit the disk after a result: a failure, old results stay, the next time makes them."""
    sweep.write(seeds=[1], cells={"nested": {}}, baseline=None)
    assert sweep() == 0
    before = {path.relative_to(sweep.folder): content for path, content in files(sweep.folder).items()}

    def without_figures(job: Job) -> Outcome:
        pretend(job)
        (sweep.run_folder("nested", 1) / FIGURES).rmdir()
        return Outcome(2, "No space left on device")

    def completed(job: Job) -> Outcome:
        (sweep.run_folder("nested", 1) / FIGURES).mkdir()
        return Outcome(0, "")

    started.work = without_figures
    assert sweep("--overwrite") == 1
    kept = {path.relative_to(replaced(sweep)): content for path, content in files(replaced(sweep)).items()}
    assert kept == before
    started.clear()
    started.work = completed
    assert sweep() == 0
    assert started == [("--resume", str(sweep.run_folder("nested", 1)))]
    assert not replaced(sweep).exists()


def test_a_run_killed_before_it_wrote_its_config_is_started_again_in_its_place(
    sweep: Command, started: Started
) -> None:
    folder = sweep.run_folder("nested", 1)
    (folder / "tb").mkdir(parents=True)
    folder.with_name(folder.name + ".log").write_text("torn")
    started.work = train
    sweep.write(seeds=[1], cells={"nested": {}}, baseline=None)
    assert sweep() == 0
    assert [path.name for path in sorted(folder.parent.glob("n*"))] == [
        "nested_1_test_vit",
        "nested_1_test_vit.log",
    ]
    assert "torn" not in folder.with_name(folder.name + ".log").read_text()


def test_a_changed_cell_is_refused_and_nothing_is_touched(
    sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    started.clear()
    before = files(sweep.folder)
    changed = {**TABLE["cells"], "nested": {"nested_lora_rank": 2}}
    sweep.write(cells=changed, seeds=[1, 2, 3])
    folder = sweep.run_folder("nested", 1)
    for options in ((), ("--report",)):
        message = refused(sweep, capsys, *options)
        assert "cell 'nested', seed 1" in message and "nested_lora_rank = 2 instead of 4" in message
        assert message.endswith(f"rename the cell, or remove the folder {folder}\n")
    assert files(sweep.folder) == before and started == []

    shutil.rmtree(folder)
    shutil.rmtree(sweep.run_folder("nested", 2))
    assert sweep() == 0 and len(started) == 4


def test_a_cell_that_is_renamed_leaves_its_runs(
    sweep: Command, started: Started, reports: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    sweep.write(
        cells={"small": {"nested_lora_rank": 2}, "matched adapter": TABLE["cells"]["matched adapter"]}
    )
    capsys.readouterr()
    assert sweep() == 0
    assert f"No longer in the table, their runs stay in {sweep.folder}: nested\n" in capsys.readouterr().out
    assert sweep.run_folder("nested", 1).is_dir() and list(reports[-1].runs) == ["small", "matched adapter"]


def test_a_sweep_that_goes_on_with_other_code_says_so(
    sweep: Command, started: Started, reports: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first run, from what is installed now; and in the report, from what all runs recorded."""
    sweep.write(seeds=[1])
    assert sweep() == 0
    assert "changed" not in capsys.readouterr().out and reports[-1].outdated == {}
    started.work = lambda job: pretend(job, code_sha256="0" * 64)
    sweep.write()
    assert sweep() == 0
    shown = capsys.readouterr().out
    begins, told = "The code changed between runs: ", "runs that differ in it"
    before, after = shown.split("nested, seed 2: A_N")
    for part in (before, after):
        (line,) = [line for line in part.splitlines() if begins in line]
        assert "nested, seed 1; matched adapter, seed 1," in line and told in line
    again = {slug: f"python main.py --config {sweep.config(slug, 1)} --overwrite" for slug, _ in RUNS}
    assert reports[-1].outdated == {
        "nested, seed 1": ("code", again["nested"]),
        "matched adapter, seed 1": ("code", again["matched-adapter"]),
    }
    assert {
        seed: origin.values["code"]["sha256"][0] for seed, origin in reports[-1].origins["nested"].items()
    } == {
        1: "c",
        2: "0",
    }


@pytest.mark.parametrize(
    "recorded",
    [{"description": "other words"}, {"precision": "fp32"}],
    ids=["description", "no bf16 on the device"],
)
def test_differences_that_are_none(sweep: Command, started: Started, recorded: dict[str, str]) -> None:
    sweep.write(set={**TABLE["set"], "precision": "bf16"})
    assert sweep() == 0
    path = sweep.run_folder("nested", 1) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | recorded))
    started.clear()
    assert sweep() == 0 and started == []


@pytest.mark.parametrize("content", ["{", '{"model_name": "unknown"}'])
def test_a_run_folder_that_cannot_be_compared_is_refused(
    content: str, sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    path = sweep.run_folder("nested", 1) / "config.json"
    path.write_text(content)
    assert str(path) in refused(sweep, capsys)


def test_overwrite_begins_anew(sweep: Command, started: Started) -> None:
    assert sweep() == 0
    (sweep.folder / "summary.md").write_text("old")
    started.clear()
    assert sweep("--overwrite") == 0
    assert len(started) == 4 and not (sweep.folder / "summary.md").exists()
    assert not replaced(sweep).exists()


def replaced(sweep: Command) -> Path:
    """Where the results are that a sweep replaces and has not finished replacing."""
    return sweep.folder.with_name("table.replaced")


def test_old_results_wait_until_the_new_sweep_is_finished(
    sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run of the new sweep fails, is tried again, and then all of it is there."""
    assert sweep() == 0
    (sweep.folder / "summary.md").write_text("old")
    before = {path.relative_to(sweep.folder): content for path, content in files(sweep.folder).items()}
    started.work = lambda job: Outcome(1, "failed") if "nested_2" in job.arguments[1] else pretend(job)
    assert sweep("--overwrite") == 1
    kept = {path.relative_to(replaced(sweep)): content for path, content in files(replaced(sweep)).items()}
    assert kept == before and not (sweep.folder / "summary.md").exists()
    assert str(replaced(sweep)) in capsys.readouterr().out
    assert sweep() == 1 and replaced(sweep).is_dir() and str(replaced(sweep)) in capsys.readouterr().out
    started.work = pretend
    assert (
        sweep() == 0
        and not replaced(sweep).exists()
        and str(replaced(sweep)) not in capsys.readouterr().out[-200:]
    )


def test_a_refusal_leaves_old_results_where_they_were(
    sweep: Command, started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine that cannot be had; a disk that is full as the new table is written."""
    assert sweep() == 0
    before = files(sweep.folder)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "requirements-ray.txt" in refused(sweep, capsys, "--overwrite", "--engine", "ray")
    assert files(sweep.folder) == before

    def full(path: Path, values: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(utils.sweeps.folder, "write_json", full)
    started.clear()
    message = refused(sweep, capsys, "--overwrite")
    assert "No space left" in message and "python main.py --sweep" in message
    assert files(sweep.folder) == before and not replaced(sweep).exists() and started == []


def test_results_set_aside_by_a_process_that_was_killed_come_back(sweep: Command, started: Started) -> None:
    assert sweep() == 0
    before = files(sweep.folder)
    sweep.folder.rename(replaced(sweep))
    started.clear()
    assert sweep() == 0 and started == []
    assert files(sweep.folder) == before and not replaced(sweep).exists()


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize("moment", ["mkdir", "replace"])
def test_a_sweep_killed_while_it_made_its_folder_is_taken_over(
    options: list[str], moment: str, sweep: Command, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first folder in it, or its first file that follows: the next command finds a sweep's folder or none."""
    assert sweep() == 0

    class Killed(BaseException):
        pass

    def die(*arguments: Any, **_: Any) -> None:
        if "cells" in str(arguments[0]):
            raise Killed

    owner = {"mkdir": Path, "replace": os}[moment]
    original = getattr(owner, moment)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, moment, lambda *a, **k: die(*a) or original(*a, **k))
        sweep("--overwrite")
    started.clear()
    assert sweep(*options) == 0 and len(started) == 4
    assert not replaced(sweep).exists()


def test_one_process_runs_a_sweep(
    sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    def while_it_runs(job: Job) -> Outcome:
        with pytest.raises(UserError, match=f"table is being written by process {os.getpid()}"):
            FolderLock(sweep.folder).acquire()
        return pretend(job)

    started.work = while_it_runs
    assert sweep() == 0
    started.clear()
    for options in ((), ("--overwrite",)):
        with FolderLock(sweep.folder):
            assert f"process {os.getpid()}" in refused(sweep, capsys, *options)
    assert started == [] and sweep("--report") == 0


DEEP = b'{"cells":' + b"[" * 100_000


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"\xff{}", b'{"metrics": 3, "cells": [4], "versions": 1}', DEEP, None]
)
@pytest.mark.parametrize("name", ["sweep.json", RESULT, "manifest.json"])
def test_a_damaged_file_of_a_sweep_is_named(
    name: str, content: bytes | None, sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a folder in its place. Nothing is started, nothing is written."""
    sweep.write(seeds=[1])
    assert sweep() == 0
    sweep.write()
    started.clear()
    path = (sweep.folder if name == "sweep.json" else sweep.run_folder("nested", 1)) / name
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    before = files(sweep.folder)
    for options in ((), ("--report",)):
        assert str(path) in refused(sweep, capsys, *options)
    assert files(sweep.folder) == before and started == []


def test_overwrite_removes_no_folder_of_another_kind(
    sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "thesis.txt").write_text("dear")
    assert "is not overwritten" in refused(sweep, capsys, "--overwrite")
    assert [path.name for path in sweep.folder.iterdir()] == ["thesis.txt"] and started == []


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_sweep_whose_runs_still_go_on_is_left_alone(
    options: tuple[str, ...], sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    shutil.rmtree(sweep.run_folder("nested", 1))
    started.clear()
    folder = sweep.run_folder("nested", 1)
    with FolderLock(folder):
        message = refused(sweep, capsys, *options)
    assert str(folder) in message and f"process {os.getpid()}" in message
    assert started == [] and sweep.run_folder("nested", 2).is_dir()
    assert sweep(*options) == 0 and started


def test_an_engine_that_cannot_be_had_leaves_nothing(
    sweep: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "requirements-ray.txt" in refused(sweep, capsys, "--engine", "ray")
    assert not sweep.folder.exists()


def test_a_folder_that_cannot_be_made(
    sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.folder.parent.parent.write_text("a file")
    message = refused(sweep, capsys)
    assert str(sweep.folder.parent.parent) in message and "a file stands where a folder is needed" in message


@pytest.mark.parametrize("part", ["cells", "logs", "stop"])
def test_something_else_where_a_sweep_writes(
    part: str, sweep: Command, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    shutil.rmtree(sweep.folder / part, ignore_errors=True)
    (sweep.folder / part).mkdir() if part == "stop" else (sweep.folder / part).write_text("a file")
    shutil.rmtree(sweep.run_folder("nested", 1))
    started.clear()
    message = refused(sweep, capsys)
    assert str(sweep.folder / part) in message and "where a" in message and started == []


# ---------------------------------------------------------------------------------------------------------------------
# The summary alone


def test_report_writes_the_summary_and_starts_nothing(
    sweep: Command, started: Started, reports: list[SimpleNamespace]
) -> None:
    assert sweep() == 0
    (sweep.run_folder("nested", 1) / RESULT).unlink()
    shutil.rmtree(sweep.run_folder("nested", 2))
    before = files(sweep.folder)
    started.clear()
    assert sweep("--report") == 0
    assert started == [] and files(sweep.folder) == before
    assert reports[-1].unfinished == {"nested, seed 1": "not finished", "nested, seed 2": "not started"}
    assert reports[-1].runs["nested"] == {} and list(reports[-1].runs["matched adapter"]) == [1, 2]


def test_report_of_nothing(
    sweep: Command, reports: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no finished run to report on" in refused(sweep, capsys, "--report")
    assert reports == [] and not sweep.folder.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Failures and interruptions


def test_one_failure_does_not_stop_the_rest(
    sweep: Command, started: Started, reports: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = sweep.path.with_name("weights.pth")
    weights.write_bytes(b"garbage")
    sweep.write(seeds=[1], cells={"broken": {"weights": str(weights)}, "nested": {}}, baseline=None)
    started.work = train
    assert sweep() == 1
    assert [arguments[1] for arguments in started] == [
        str(sweep.config("broken", 1)),
        str(sweep.config("nested", 1)),
    ]
    (report,) = reports
    assert list(report.runs["nested"]) == [1] and report.runs["broken"] == {}
    assert report.unfinished == {"broken, seed 1": "exit code 2: the last line"}
    shown = capsys.readouterr().out
    again = f"1 failed, 1 of 2 runs are finished. To try again: python main.py {' '.join(sweep.line)}"
    assert f"{again}\n  broken, seed 1: exit code 2: the last line\n" in shown

    started.clear()
    assert sweep() == 1
    assert [arguments[1] for arguments in started] == [str(sweep.config("broken", 1))]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (0, "exit code 0: the last line"),
        (1, "exit code 1: the last line"),
        (130, "stopped"),
        (-signal.SIGTERM, "stopped"),
        (-signal.SIGKILL, "signal 9 (Killed): the last line"),
    ],
)
def test_how_a_run_ended_without_a_result(
    code: int, told: str, sweep: Command, started: Started, reports: list[SimpleNamespace]
) -> None:
    started.work = lambda job: (
        pretend(job) if "matched" in job.arguments[1] else Outcome(code, "the last line")
    )
    assert sweep() == 1
    assert reports[0].unfinished == {"nested, seed 1": told, "nested, seed 2": told}


def test_a_machine_that_is_lost_is_a_failure_of_its_run(
    sweep: Command, started: Started, reports: list[SimpleNamespace]
) -> None:
    def submit(job: Job) -> Future:
        future: Future = Future()
        if "nested" in job.output.name:
            future.set_exception(RuntimeError("the node\nis gone"))
        else:
            future.set_result(pretend(job))
        return future

    started.submit = submit
    assert sweep() == 1
    assert reports[0].unfinished["nested, seed 1"] == "RuntimeError: the node is gone"


def test_a_run_that_failed_on_a_full_disk_says_so(
    sweep: Command, started: Started, reports: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last words may be lost: they go to the same disk. Or its output cannot be opened at all."""

    def submit(job: Job) -> Future:
        future: Future = Future()
        if job.output.name == "nested_2.txt":
            future.set_result(pretend(job))
        elif "nested" in job.output.name:
            future.set_exception(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(job.output)))
        else:
            future.set_result(Outcome(120, "it printed nothing"))
        return future

    started.submit = submit
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert sweep() == 1
    (report,) = reports
    refusal = report.unfinished["nested, seed 1"]
    assert "nested_1.txt: No space left" in refusal and "free some space" in refusal
    assert "exit code 120" in report.unfinished["matched adapter, seed 1"]
    assert "is full" in report.unfinished["matched adapter, seed 1"]


def test_a_report_that_cannot_be_written_does_not_hide_what_ran(
    sweep: Command, started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("cannot write the report")

    monkeypatch.setitem(sys.modules, "utils.reports.report", SimpleNamespace(write_report=refuse))
    started.work = lambda job: Outcome(1, "failed") if "nested_2" in job.arguments[1] else pretend(job)
    assert sweep() == 2
    shown = capsys.readouterr()
    assert shown.err.endswith("cannot write the report\n")
    assert "1 failed, 3 of 4 runs are finished" in shown.out and "nested, seed 2: exit code 1" in shown.out


def test_without_a_finished_run_there_is_no_summary(
    sweep: Command, started: Started, reports: list[SimpleNamespace]
) -> None:
    started.work = lambda job: Outcome(1, "")
    assert sweep() == 1 and reports == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_stopped_no_further_run_is_started(
    number: int,
    sweep: Command,
    started: Started,
    reports: list[SimpleNamespace],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second run sees one request more for each signal; the first one's result is reported."""

    def work(job: Job) -> Outcome:
        if len(started) == 1:
            return pretend(job)
        for sent in (1, 2):
            os.kill(os.getpid(), number)
            assert job.stop.stat().st_size == sent
        return Outcome(130, "")

    started.work = work
    handler = signal.getsignal(number)
    assert sweep("--jobs", "1") == 130
    assert len(started) == 2 and signal.getsignal(number) is handler and not (sweep.folder / "stop").exists()
    assert reports[0].unfinished == {
        "matched adapter, seed 1": "stopped",
        "nested, seed 2": "not started",
        "matched adapter, seed 2": "not started",
    }
    again = (
        f"Stopped, 1 of 4 runs are finished. Continue with: python main.py {' '.join(sweep.line)} --jobs 1\n"
    )
    assert again in capsys.readouterr().out


def test_a_lost_terminal_stops_a_sweep_once(sweep: Command, started: Started) -> None:
    """Terminal and shell may both tell of it; the run that is stopped saves all the same."""

    def work(job: Job) -> Outcome:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert job.stop.stat().st_size == 1
        return Outcome(130, "")

    started.work = work
    assert sweep() == 130 and len(started) == 1 and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        started.work = lambda job: os.kill(os.getpid(), signal.SIGHUP) or pretend(job)
        assert sweep() == 0 and len(started) == 5
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_of_ours_stops_the_runs_before_it_is_told(sweep: Command, started: Started) -> None:
    """The first run ends with a torn result while the second is at work."""
    second: Future = Future()

    def until_asked(stop: Path) -> None:
        while not stop.stat().st_size:
            time.sleep(0.01)
        second.set_result(Outcome(130, ""))

    def submit(job: Job) -> Future:
        if "nested" not in job.output.name:
            threading.Thread(target=until_asked, args=(job.stop,), daemon=True).start()
            return second
        pretend(job)
        (sweep.run_folder("nested", 1) / RESULT).write_text("{")
        first: Future = Future()
        first.set_result(Outcome(0, ""))
        return first

    started.submit, started.jobs = submit, 2
    assert sweep() == 2
    assert second.done() and not (sweep.folder / "stop").exists()


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_end(tmp_path: Path, started: Started) -> None:
    """Real processes: SIGINT to the sweep alone while its first run trains; the second is not begun."""
    cells = {"first": {"func_epoch": 4}, "second": {"func_epoch": 2}}
    sweep = Command(tmp_path, seeds=[1], set={**TABLE["set"], "max_tasks": 1}, cells=cells, baseline=None)
    (tmp_path / "sitecustomize.py").write_text(
        WAITS_TO_BE_STOPPED.format(root=ROOT, reached=tmp_path / "reached")
    )
    folder = sweep.run_folder("first", 1)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *sweep.line, "--jobs", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
    )
    while process.poll() is None and not (tmp_path / "reached").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown = process.communicate()[0].decode()
    assert process.returncode == 130
    assert f"Continue with: python main.py {' '.join(sweep.line)} --jobs 1" in shown
    assert "Stopped and saved" in (sweep.folder / "logs/first_1.txt").read_text()
    assert list((folder / "checkpoints").iterdir()) and not sweep.run_folder("second", 1).exists()

    started.work = lambda job: train(job) if "--resume" in job.arguments else pretend(job)
    assert sweep() == 0
    assert started == [("--resume", str(folder)), anew(sweep.config("second", 1))]
    assert main.main(["--config", str(sweep.config("first", 1)), "--set", f"logs_root={tmp_path}/whole"]) == 0
    assert outcome(folder) == outcome(tmp_path / "whole" / folder.relative_to(sweep.folder / "runs"))


def test_ray_gives_what_this_machine_gives(
    tmp_path: Path, started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two cells on a Ray started for the sweep: the same results in the same places, and Ray is gone afterwards."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv(
        "RAY_worker_niceness", "0"
    )  # else Ray's workers give way to all else that the machine does
    changes = {"seeds": [1], "set": {**TABLE["set"], "max_tasks": 1}}
    (tmp_path / "ray").mkdir()
    (tmp_path / "local").mkdir()
    there, here = Command(tmp_path / "ray", **changes), Command(tmp_path / "local", **changes)
    assert there("--engine", "ray") == 0
    assert not ray.is_initialized()
    started.work = train
    assert here() == 0
    for slug in ("nested", "matched-adapter"):
        assert outcome(there.run_folder(slug, 1)) == outcome(here.run_folder(slug, 1))
        assert "everything is in" in (there.folder / f"logs/{slug}_1.txt").read_text()
