"""Tests of `utils.sweeps.run` and `utils.sweeps.folder`: order, skipping, resuming, failures, stops, Ray.

Most pretend their runs; Ctrl-C and Ray are tried with real ones. The report is a stub but in the test of Ray.
"""

import errno
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import main
import utils.sweeps.folder
from tests.conftest import ROOT, TINY, TINY_SDLORA
from tests.crash import outcome
from tests.utils.runs.test_manifest import record
from utils.errors import UserError
from utils.reports.results import Results
from utils.runs.folder import CONFIG, FIGURES, RESULT, FolderLock
from utils.runs.manifest import MANIFEST
from utils.sweeps.executors import (
    EXECUTORS,
    Job,
    LocalExecutor,
    Outcome,
    Resources,
    run_process,
    stop_requests,
)

TABLE = {
    "description": "what it is for",
    "base": str(ROOT / "exps/smoke.json"),
    "seeds": [1, 2],
    "set": {**TINY, "max_tasks": 2, "rd_epoch": 0, "max_test_per_class": 4},
    "cells": {"nested": {}, "matched adapter": {"ffn_adapter_type": "adaptmlp", "ffn_num": 8}},
    "baseline": "matched adapter",
}
SINGLE = {"seeds": [1], "cells": {"nested": {}}, "baseline": None}
NUMBERS = {"metrics": {"final": 12.5}, "curve": [12.5], "cost": {"seconds": 30.0}}
RESULTS = {"seed": 1, "parameters": {}, "weights": {}, **NUMBERS}
RUNS = [("nested", 1), ("matched-adapter", 1), ("nested", 2), ("matched-adapter", 2)]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


class Command:
    """Command line of a sweep in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "table.json"
        settings = (f"logs_root={folder / 'logs'}", f"cache_root={folder / 'cache'}")
        self.line = ["--sweep", str(self.path), *(part for text in settings for part in ("--set", text))]
        self.folder = folder / "logs/sweeps/table"
        self.replaced = folder / "logs/sweeps/table.replaced"  # results that are being replaced
        self.executor = FakeExecutor()
        self.reports: list[SimpleNamespace] = []  # calls of `write_report`
        self.write()

    def write(self, **changes: Any) -> None:
        self.path.write_text(json.dumps({**TABLE, **changes}))

    def __call__(self, *options: str) -> int:
        self.executor.started.clear()
        return main.main([*self.line, *options])

    def run_folder(self, slug: str, seed: int) -> Path:
        return self.folder / f"runs/sema/synthetic/0/2/{slug}_{seed}_test_vit"

    def config(self, slug: str, seed: int) -> Path:
        return self.folder / f"cells/{slug}_{seed}.json"

    def anew(self, slug: str, seed: int) -> tuple[str, ...]:
        """The arguments of a run that is started, not resumed."""
        return ("--config", str(self.config(slug, seed)), "--overwrite")

    def refused(self, capsys: Capture, *options: str) -> str:
        """The message of exit code 2: one sentence, no traceback."""
        capsys.readouterr()
        assert self(*options) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message and len(message.strip().splitlines()) == 1
        return message


class FakeExecutor(AbstractContextManager):
    """Executor that calls `work` for every job, one at a time; `started` lists the arguments of `main.py`."""

    def __init__(self) -> None:
        self.work: Callable[[Job], Outcome] = pretend
        self.jobs = 1
        self.started: list[tuple[str, ...]] = []
        self.given: list[Any] = []

    def __call__(
        self, resources: Resources, jobs: int | None, address: str | None, imports: Sequence[str]
    ) -> "FakeExecutor":
        self.given = [resources, jobs, address, bool(imports)]
        return self

    def run(self, job: Job) -> Outcome | None:
        if stop_requests(job.stop):
            return None
        self.started.append(job.command[2:])
        return self.work(job)

    def __exit__(self, *_: object) -> None:
        pass


def pretend(job: Job, **made_with: Any) -> Outcome:
    """A run folder with a result, and nothing trained."""
    option, config = job.command[2:4]
    assert option == "--config"
    values = json.loads(Path(config).read_text())
    folder = Path(values["logs_root"]) / f"sema/synthetic/0/2/{Path(config).stem}_test_vit"
    folder.mkdir(parents=True)
    record(folder, values, **made_with)
    (folder / FIGURES).mkdir()
    (folder / RESULT).write_text(json.dumps(RESULTS))
    return Outcome(0, "")


def failing(*names: str) -> Callable[[Job], Outcome]:
    """Work that fails for runs with one of these texts in their names."""
    return lambda job: Outcome(1, "no") if any(name in job.output.name for name in names) else pretend(job)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: Patch) -> Command:
    """Sweep whose runs are pretended, unless `executor.work` says else; its report is a stub."""
    command = Command(tmp_path)

    def write_report(
        folder: Path, title: str, description: str, results: Results, **named: Any
    ) -> list[Path]:
        command.reports.append(SimpleNamespace(titles=(title, description), results=results, **named))
        return [folder / "summary.md"]

    monkeypatch.setitem(EXECUTORS, "local", command.executor)
    monkeypatch.setattr(utils.sweeps.folder, "write_report", write_report)
    return command


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------
# What is run, and what it leaves behind


def test_runs_go_seed_by_seed_from_configs_that_stand_alone_and_all_are_reported(
    sweep: Command, capsys: Capture
) -> None:
    assert sweep() == 0
    assert sweep.executor.started == [sweep.anew(*run) for run in RUNS]
    for slug, seed in RUNS:
        config = json.loads(sweep.config(slug, seed).read_text())
        assert (config["prefix"], config["seed"]) == (slug, seed)
        assert sweep.run_folder(slug, seed).is_dir()
    table = json.loads((sweep.folder / "sweep.json").read_text())
    assert all(table[key] == TABLE[key] for key in ("seeds", "baseline", "description"))
    assert [cell["slug"] for cell in table["cells"]] == ["nested", "matched-adapter"]
    assert table["cells"][1]["config"]["ffn_num"] == 8
    shown = capsys.readouterr().out
    _, note = (line for line in shown.splitlines() if "no effect" in line)
    assert "matched adapter: " in note and "nested_lora_rank" in note
    assert "nested, seed 1: A_N 12.50, 30 s (1 of 4)" in shown and "4 of 4 runs are finished" in shown
    (report,) = sweep.reports
    assert report.titles == ("table", "what it is for") and report.unfinished == {}
    assert report.results.baseline == "matched adapter"
    assert list(report.results.runs.index) == [(name, seed) for name in TABLE["cells"] for seed in (1, 2)]
    assert set(report.results.runs["final"]) == {12.5}
    repeats = f"python main.py --config {sweep.config('nested', 1)} --set 'seed=[1,2]'"
    assert report.commands["nested"] == repeats


@pytest.mark.parametrize(
    ("device", "gpu", "forks"), [("auto", True, True), ("cpu", False, True), (["0"], False, False)]
)
def test_resources_and_places_of_a_job(device: Any, gpu: bool, forks: bool, sweep: Command) -> None:
    """A GPU is asked for where any will do; runs that name one are not forked."""
    jobs: list[Job] = []
    sweep.executor.work = lambda job: jobs.append(job) or pretend(job)
    sweep.write(threads=3, memory_gb=7, set={**TABLE["set"], "device": device})
    assert sweep("--jobs", "5") == 0
    resources = Resources(threads=3, memory_gb=7.0, gpu=gpu)
    assert sweep.executor.given == [resources, 5, None, forks]
    assert (jobs[0].resources, jobs[0].working_folder) == (resources, Path.cwd())
    assert (jobs[0].output, jobs[0].stop) == (sweep.folder / "logs/nested_1.txt", sweep.folder / "stop")


def test_what_is_next_can_be_typed_whatever_the_folder(
    sweep: Command, tmp_path: Path, capsys: Capture
) -> None:
    sweep.write(**SINGLE, next={"more": "python main.py --config {folder}/cells/nested_1.json"})
    assert sweep("--set", f"logs_root={tmp_path / 'my logs'}") == 0
    path = shlex.split(capsys.readouterr().out.splitlines()[-1])[-1]
    assert path == f"{tmp_path}/my logs/sweeps/table/cells/nested_1.json"


# ------------------------------------------------------------------------------------------------------------
# Going on


def test_what_is_finished_is_skipped(sweep: Command, capsys: Capture) -> None:
    """Also where new cells and seeds stand beside it; runs that left the table stay and are named."""
    sweep.write(**SINGLE)
    assert sweep() == 0
    sweep.write()
    assert sweep() == 0
    assert sweep.executor.started == [sweep.anew(*run) for run in RUNS[1:]]
    shutil.rmtree(sweep.run_folder("nested", 2))
    assert sweep() == 0
    assert sweep.executor.started == [sweep.anew("nested", 2)]
    assert sweep() == 0
    assert sweep.executor.started == [] and len(sweep.reports) == 4
    sweep.write(seeds=[2])
    capsys.readouterr()
    assert sweep() == 0 and sweep.executor.started == []
    assert f"their runs stay in {sweep.folder}: matched-adapter_1, nested_1\n" in capsys.readouterr().out
    assert json.loads((sweep.folder / "sweep.json").read_text())["seeds"] == [2]
    adapter = TABLE["cells"]["matched adapter"]
    sweep.write(cells={"small": {"nested_lora_rank": 2}, "matched adapter": adapter})
    capsys.readouterr()
    assert sweep() == 0
    assert f"their runs stay in {sweep.folder}: nested_1, nested_2\n" in capsys.readouterr().out
    assert sweep.run_folder("nested", 1).is_dir()
    assert list(sweep.reports[-1].results.cells) == ["small", "matched adapter"]


def test_what_follows_a_result_is_made_before_a_sweep_is_finished(sweep: Command, capsys: Capture) -> None:
    """Figures do not fit the disk after a result: a failure, old results stay, the next time makes them."""
    sweep.write(**SINGLE)
    assert sweep() == 0
    before, figures = files(sweep.folder), sweep.run_folder("nested", 1) / FIGURES
    full = Outcome(2, "No space left on device")
    sweep.executor.work = lambda job: (pretend(job), figures.rmdir()) and full
    assert sweep("--overwrite") == 1
    assert files(sweep.replaced) == before
    shown = capsys.readouterr().out  # the table has the result
    assert "0 of 1 runs are finished (1 more with a result" in shown and len(sweep.reports) == 2
    sweep.executor.work = lambda job: figures.mkdir() or Outcome(0, "")
    assert sweep() == 0
    assert sweep.executor.started == [("--resume", str(figures.parent))] and not sweep.replaced.exists()


def test_a_changed_cell_is_refused_and_nothing_is_touched(sweep: Command, capsys: Capture) -> None:
    assert sweep() == 0
    before, folder = files(sweep.folder), sweep.run_folder("nested", 1)
    sweep.write(cells={**TABLE["cells"], "nested": {"nested_lora_rank": 2}}, seeds=[1, 2, 3])
    for options in ((), ("--report",)):
        message = sweep.refused(capsys, *options)
        told = ["cell 'nested', seed 1", "nested_lora_rank = 2 instead of 4", "rename the cell", str(folder)]
        assert [part for part in told if part not in message] == []
    assert files(sweep.folder) == before and sweep.executor.started == []
    shutil.rmtree(folder)
    shutil.rmtree(sweep.run_folder("nested", 2))
    assert sweep() == 0 and len(sweep.executor.started) == 4


def test_a_sweep_that_goes_on_with_other_code_says_so(sweep: Command, capsys: Capture) -> None:
    """Before the first run, from what is installed now; and in the report, from what all runs recorded."""
    sweep.write(seeds=[1])
    assert sweep() == 0
    assert "changed" not in capsys.readouterr().out and sweep.reports[-1].outdated == {}
    sweep.executor.work = lambda job: pretend(job, code_sha256="0" * 64)
    sweep.write()
    assert sweep() == 0
    for part in capsys.readouterr().out.split("nested, seed 2: A_N"):
        (line,) = [line for line in part.splitlines() if "The code changed between runs: " in line]
        assert "nested, seed 1; matched adapter, seed 1," in line
    assert sweep.reports[-1].outdated == {
        f"{name}, seed 1": ("code", f"python main.py --config {sweep.config(slug, 1)} --overwrite")
        for name, slug in (("nested", "nested"), ("matched adapter", "matched-adapter"))
    }
    assert sweep.reports[-1].results.left_out("nested", "matched adapter") == {1: ["code"]}


@pytest.mark.parametrize(
    ("asked", "recorded"),
    [
        ("bf16", {"description": "other words", "checkpoints": "last"}),
        ("bf16", {"precision": "fp32"}),
        ("auto", {"precision": "bf16"}),
        ("fp32", {"ca_epochs": 9}),
    ],
    ids=str,
)
def test_differences_that_are_none(sweep: Command, asked: str, recorded: dict[str, Any]) -> None:
    """What changes no number; the precision of a device without bf16, or that "auto" chose; an unused key."""
    sweep.write(set={**TABLE["set"], "precision": asked})
    assert sweep() == 0
    path = sweep.run_folder("nested", 1) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | recorded))
    assert sweep() == 0 and sweep.executor.started == []


@pytest.mark.parametrize(("first", "then"), [("fp32", "bf16"), ("fp32", "auto"), ("bf16", "auto")])
def test_runs_of_another_precision_are_not_taken_for_those_asked_for(
    sweep: Command, capsys: Capture, first: str, then: str
) -> None:
    for precision in (first, then):
        sweep.write(set={**TABLE["set"], "precision": precision})
        if precision == first:
            assert sweep() == 0
    assert f'precision = "{then}" instead of "{first}"' in sweep.refused(capsys)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *itertools.product([RESULT, MANIFEST], [b"{}", b"\xff{}", b'{"metrics": 3, "versions": 1}', None]),
        *((CONFIG, content) for content in (b"{", b'{"model_name": "unknown"}')),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    name: str, content: bytes | None, sweep: Command, capsys: Capture
) -> None:
    """Also a folder in its place. Nothing is started, nothing is written."""
    sweep.write(seeds=[1])
    assert sweep() == 0
    sweep.write()
    path = sweep.run_folder("nested", 1) / name
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    before = files(sweep.folder)
    for options in ((), ("--report",)):
        assert str(path) in sweep.refused(capsys, *options)
        assert files(sweep.folder) == before and sweep.executor.started == []


# ------------------------------------------------------------------------------------------------------------
# Overwriting


def test_old_results_wait_until_the_new_sweep_is_finished(sweep: Command, capsys: Capture) -> None:
    """One run of the new sweep fails, is tried again, and then all of it is there."""
    assert sweep() == 0
    (sweep.folder / "summary.md").write_text("old")
    before = files(sweep.folder)
    sweep.executor.work = failing("nested_2")
    assert sweep("--overwrite") == 1
    assert len(sweep.executor.started) == 4 and not (sweep.folder / "summary.md").exists()
    assert files(sweep.replaced) == before and str(sweep.replaced) in capsys.readouterr().out
    assert sweep() == 1 and sweep.replaced.is_dir() and str(sweep.replaced) in capsys.readouterr().out
    sweep.executor.work = pretend
    assert sweep() == 0 and not sweep.replaced.exists()
    assert str(sweep.replaced) not in capsys.readouterr().out[-200:]


def test_a_refusal_leaves_results_as_they_were(sweep: Command, monkeypatch: Patch, capsys: Capture) -> None:
    """Ray that is not installed, before and after there are results; a disk that is full."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with_ray = ("--overwrite", "--engine", "ray")
    assert "requirements-ray.txt" in sweep.refused(capsys, *with_ray) and not sweep.folder.exists()
    assert sweep() == 0
    before = files(sweep.folder)
    assert "requirements-ray.txt" in sweep.refused(capsys, *with_ray) and files(sweep.folder) == before
    mkdir = Path.mkdir

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "cells":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    message = sweep.refused(capsys, "--overwrite")
    assert "No space left" in message and "python main.py --sweep" in message
    assert files(sweep.folder) == before and not sweep.replaced.exists() and sweep.executor.started == []


def test_runs_that_will_not_fit_are_warned_of_when_the_first_is_there(
    sweep: Command, monkeypatch: Patch, capsys: Capture
) -> None:
    """Judged by the size of the first; the others run all the same."""
    monkeypatch.setitem(RESULTS, "more", "x" * 2 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**6))
    assert sweep() == 0 and len(sweep.executor.started) == 4
    shown = capsys.readouterr().out
    assert shown.count("Disk:") == 1 and "run takes 2 MB" in shown and "6 MB; 5 MB are free" in shown


def test_space_is_for_the_runs_that_are_still_to_be_tried(
    sweep: Command, monkeypatch: Patch, capsys: Capture
) -> None:
    """The first has failed when the second is there; two follow."""
    monkeypatch.setitem(RESULTS, "more", "x" * 2 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**6))
    sweep.executor.work = failing("nested")
    assert sweep() == 1
    assert "4 MB; 5 MB are free" in capsys.readouterr().out


def test_a_begun_run_keeps_its_own_settings_and_that_is_said(sweep: Command, capsys: Capture) -> None:
    sweep.write(**SINGLE)
    assert sweep() == 0
    (sweep.run_folder("nested", 1) / RESULT).unlink()
    sweep.executor.work = failing("nested")
    for option in ("checkpoints=all", "checkpoints=last"):
        capsys.readouterr()
        assert sweep("--set", option) == 1
        kept = 'nested, seed 1 keeps its own checkpoints = "all"' in capsys.readouterr().out
        assert kept == (option == "checkpoints=last")


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize("left", [[], [".table.new/sweep.json"], ["table/sweep.json"]], ids=str)
def test_a_sweep_killed_while_it_replaced_results_is_taken_over(
    left: list[str], options: list[str], sweep: Command
) -> None:
    """Results that were set aside come back where nothing had begun in their place."""
    assert sweep() == 0
    before = files(sweep.folder)
    sweep.folder.rename(sweep.replaced)
    for name in left:
        path = sweep.folder.parent / name
        path.parent.mkdir()
        path.write_bytes(before["sweep.json"])
    back = not options and left != ["table/sweep.json"]
    assert sweep(*options) == 0 and len(sweep.executor.started) == (0 if back else 4)
    assert not sweep.replaced.exists() and files(sweep.folder).keys() == before.keys()


@pytest.mark.parametrize(
    ("part", "options", "told"),
    [("thesis.txt", ["--overwrite"], "is not overwritten")]
    + [(part, [], "where a") for part in ("..", "cells", "logs", "stop")],
)
def test_something_else_where_a_sweep_writes(
    part: str, options: list[str], told: str, sweep: Command, capsys: Capture
) -> None:
    path = (sweep.folder / part).resolve()
    path.parent.mkdir(parents=True)
    path.mkdir() if part == "stop" else path.write_text("dear")
    message = sweep.refused(capsys, *options)
    assert told in message and str(path.parent if options else path) in message
    assert sweep.executor.started == [] and (part == "stop" or path.read_text() == "dear")


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_one_process_runs_a_sweep(options: tuple[str, ...], sweep: Command, capsys: Capture) -> None:
    """Neither the sweep nor a run of a killed sweep may be at work; a report may be written."""

    def while_it_runs(job: Job) -> Outcome:
        with pytest.raises(UserError, match=f"table is being written by process {os.getpid()}"):
            FolderLock(sweep.folder).acquire()
        return pretend(job)

    sweep.executor.work = while_it_runs
    assert sweep() == 0
    run = sweep.run_folder("nested", 1)
    shutil.rmtree(run)
    for folder in (sweep.folder, run):
        with FolderLock(folder):
            message = sweep.refused(capsys, *options)
            assert str(folder) in message and f"process {os.getpid()}" in message
            assert sweep("--report") == 0
    assert sweep.executor.started == [] and sweep.run_folder("nested", 2).is_dir()
    assert sweep(*options) == 0 and sweep.executor.started


def test_report_starts_nothing(sweep: Command, capsys: Capture) -> None:
    assert "holds no finished run to report on" in sweep.refused(capsys, "--report")
    assert sweep.reports == [] and not sweep.folder.exists()
    assert sweep() == 0
    (sweep.run_folder("nested", 1) / RESULT).unlink()
    shutil.rmtree(sweep.run_folder("nested", 2))
    before = files(sweep.folder)
    assert sweep("--report") == 0
    assert sweep.executor.started == [] and files(sweep.folder) == before
    assert sweep.reports[-1].unfinished == {"nested, seed 1": "not finished", "nested, seed 2": "not started"}
    assert not sweep.reports[-1].results.cells["nested"]


# ------------------------------------------------------------------------------------------------------------
# Some of the runs, and their commands


def test_chosen_cells_and_seeds_are_run_and_the_table_stays_whole(
    sweep: Command, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    assert sweep("--only", "nestd", "--seeds", "-1") == 2
    told = capsys.readouterr().err
    assert 'did you mean "nested"' in told and "--seeds" in told and "-1" in told
    assert not sweep.folder.exists()
    assert sweep("--only", "matched-adapter", "--seeds", "2", "3") == 0
    assert sweep.executor.started == [sweep.anew("matched-adapter", 2), sweep.anew("matched-adapter", 3)]
    assert len(sweep.reports[-1].unfinished) == 4  # of two cells and seeds 1, 2, 3
    told = caplog.text
    assert "(1 of 6)" in told and "(2 of 6)" in told and "2 of 6 runs are finished" in told
    assert sweep("--only", "nested", "--only", "matched adapter", "--seeds", "1") == 0
    assert sweep.executor.started == [sweep.anew("nested", 1), sweep.anew("matched-adapter", 1)]
    assert list(sweep.reports[-1].results.cells["matched adapter"]) == [1, 2]
    assert sweep("--report", "--seeds", "3") == 0
    assert list(sweep.reports[-1].results.cells["matched adapter"]) == [1, 2, 3]


def test_printed_commands_leave_what_the_sweep_would(
    sweep: Command, capsys: Capture, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Real processes of two methods: called from elsewhere, and in a sweep, which forks one after the other.

    Bit for bit, also where the CPU kernels change from run to run; what is forked has nearly all it imports.
    The first sweep then has nothing to do.
    """
    base = tmp_path / "sdlora.json"
    base.write_text(json.dumps(TINY_SDLORA))
    nested = TABLE["set"] | {"max_tasks": 1, "cpu_kernels": "avx2"}
    cells = {"nested": nested, "sd-lora": {"base": str(base), "max_tasks": 1}}
    table = {"set": {}, "cells": cells, "baseline": None}
    sweep.write(**table)
    assert sweep("--dry-run", "--seeds", "2") == 0 and sweep.executor.started == []
    lines = capsys.readouterr().out.splitlines()
    for line in lines:
        subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, capture_output=True)
        assert main.main(shlex.split(line)[-4:]) == 0  # a job that is put back in line repeats it
    capsys.readouterr()
    assert sweep("--dry-run", "--seeds", "2") == 0 and capsys.readouterr().out == ""

    monkeypatch.setitem(EXECUTORS, "local", LocalExecutor)
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # a line for every module that a process imports
    (tmp_path / "forked").mkdir()
    forked = Command(tmp_path / "forked")
    forked.write(**table)
    assert forked("--jobs", "1") == 0
    printed = [path.read_text() for path in (forked.folder / "logs").iterdir()]
    assert len(printed) == 4 and max(text.count("import time:") for text in printed) < 100
    own = sorted(path.parent for path in (sweep.folder / "runs").rglob(RESULT))
    assert [folder.name for folder in own] == ["sd-lora_2_test_vit", "nested_2_test_vit"]
    for folder in own:
        other = forked.folder / folder.relative_to(sweep.folder)
        assert outcome(folder) == outcome(other)
        for path in (folder / "checkpoints").rglob("*.safetensors"):
            assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes()

    monkeypatch.setitem(EXECUTORS, "local", sweep.executor)
    assert sweep("--seeds", "2") == 0
    assert sweep.executor.started == [] and list(sweep.reports[-1].results.cells["nested"]) == [2]


# ------------------------------------------------------------------------------------------------------------
# Failures


def test_one_failure_does_not_stop_the_rest(sweep: Command, capsys: Capture) -> None:
    sweep.executor.work = failing("nested")
    assert sweep() == 1
    assert sweep.executor.started == [sweep.anew(*run) for run in RUNS]
    (report,) = sweep.reports
    assert list(report.results.cells) == list(TABLE["cells"])
    assert list(report.results.runs.index) == [("matched adapter", 1), ("matched adapter", 2)]
    failed = {f"nested, seed {seed}": "exit code 1: no" for seed in (1, 2)}
    assert report.unfinished == failed
    shown = capsys.readouterr().out
    assert f"nested, seed 1: exit code 1: no; its output is in {sweep.folder}/logs/nested_1.txt\n" in shown
    again = f"2 failed, 2 of 4 runs are finished. To try again: python main.py {' '.join(sweep.line)}"
    assert "\n  ".join([again, *(f"{label}: {reason}" for label, reason in failed.items())]) in shown
    assert sweep() == 1 and sweep.executor.started == [sweep.anew("nested", 1), sweep.anew("nested", 2)]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "logs/nested_1.txt")


@pytest.mark.parametrize(
    ("end", "free", "reason"),
    [
        (Outcome(0, "last line"), 10**9, "exit code 0: last line"),
        (Outcome(1, "last line"), 10**9, "exit code 1: last line"),
        (Outcome(130, "last line"), 10**9, "stopped"),
        (Outcome(-signal.SIGTERM, "last line"), 10**9, "stopped"),
        (Outcome(-signal.SIGKILL, "last line"), 10**9, "signal 9 (Killed): last line"),
        (RuntimeError("the node\nis gone"), 10**9, "RuntimeError: the node is gone"),
        (Outcome(120, "it printed nothing"), 100, "exit code 120: it printed nothing; the disk of "),
        (FULL, 100, "logs/nested_1.txt: No space left on device; free some space"),
    ],
    ids=str,
)
def test_reasons_of_failures(
    end: Outcome | Exception, free: int, reason: str, sweep: Command, monkeypatch: Patch, capsys: Capture
) -> None:
    """Of a process without a result, a machine that was lost, a full disk (no last words)."""

    def work(job: Job) -> Outcome:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        if isinstance(end, Exception):
            raise end
        return end

    sweep.write(**SINGLE)
    sweep.executor.work = work
    assert sweep() == 1 and sweep.reports == []
    assert f"nested, seed 1: {reason}" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_does_not_hide_what_ran(
    sweep: Command, monkeypatch: Patch, capsys: Capture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("cannot write the report")

    monkeypatch.setattr(utils.sweeps.folder, "write_report", refuse)
    sweep.executor.work = failing("nested_2")
    assert sweep() == 2
    shown = capsys.readouterr()
    assert shown.err.endswith("cannot write the report\n")
    assert "1 failed, 3 of 4 runs are finished" in shown.out and "nested, seed 2: exit code 1" in shown.out


# ------------------------------------------------------------------------------------------------------------
# Stops


def wait_until(reached: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_stopped_no_further_run_is_started(number: int, sweep: Command, capsys: Capture) -> None:
    """The second run sees one request more for each signal; the first one's result is reported."""

    def work(job: Job) -> Outcome:
        if len(sweep.executor.started) == 1:
            return pretend(job)
        for sent in (1, 2):
            os.kill(os.getpid(), number)
            wait_until(lambda sent=sent: stop_requests(job.stop) == sent)
        return Outcome(130, "")

    sweep.executor.work = work
    handler = signal.getsignal(number)
    assert sweep("--jobs", "1") == 130
    assert len(sweep.executor.started) == 2 and not (sweep.folder / "stop").exists()
    assert signal.getsignal(number) is handler
    assert sweep.reports[0].unfinished == {
        "matched adapter, seed 1": "stopped",
        "nested, seed 2": "not started",
        "matched adapter, seed 2": "not started",
    }
    again = f"Continue with: python main.py {' '.join(sweep.line)} --jobs 1\n"
    assert f"Stopped, 1 of 4 runs are finished. {again}" in capsys.readouterr().out


def test_a_lost_terminal_stops_a_sweep_once(sweep: Command) -> None:
    """Terminal and shell may both tell of it; the run that is stopped saves all the same."""

    def work(job: Job) -> Outcome:
        os.kill(os.getpid(), signal.SIGHUP)
        wait_until(lambda: stop_requests(job.stop) == 1)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        assert stop_requests(job.stop) == 1
        return Outcome(130, "")

    sweep.executor.work = work
    assert sweep() == 130 and len(sweep.executor.started) == 1
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        sweep.executor.work = lambda job: os.kill(os.getpid(), signal.SIGHUP) or pretend(job)
        assert sweep() == 0 and len(sweep.executor.started) == 4
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_of_ours_stops_the_runs_before_it_is_told(sweep: Command) -> None:
    """The first run ends with a torn result while the second is at work; the last is not started any more."""
    ended: list[str] = []

    def work(job: Job) -> Outcome:
        if job.output.name != "nested_1.txt":
            wait_until(lambda: stop_requests(job.stop) > 0)
            ended.append(job.output.name)
            return Outcome(130, "")
        wait_until(lambda: len(sweep.executor.started) == 2)
        pretend(job)
        (sweep.run_folder("nested", 1) / RESULT).write_text("{")
        return Outcome(0, "")

    sweep.executor.work, sweep.executor.jobs = work, 2
    assert sweep() == 2
    assert "matched-adapter_1.txt" in ended and "matched-adapter_2.txt" not in ended
    assert not (sweep.folder / "stop").exists()


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_end(sweep: Command) -> None:
    """Real processes: SIGINT to the sweep alone while its first run trains; its command repeats it."""
    cells = {"first": {"func_epoch": 30}, "second": {"func_epoch": 2}}
    sweep.write(seeds=[1], set={**TABLE["set"], "max_tasks": 1}, cells=cells, baseline=None)
    folder = sweep.run_folder("first", 1)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *sweep.line, "--jobs", "1"], cwd=ROOT, stdout=subprocess.PIPE
    )
    events = folder / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or events.exists() and "epoch" in events.read_text())
    process.send_signal(signal.SIGINT)
    shown = process.communicate()[0].decode()
    assert process.returncode == 130
    assert f"Continue with: python main.py {' '.join(sweep.line)} --jobs 1" in shown
    assert "Stopped and saved" in (sweep.folder / "logs/first_1.txt").read_text()
    assert list((folder / "checkpoints").iterdir()) and not sweep.run_folder("second", 1).exists()

    sweep.executor.work = lambda job: run_process(job) if "--resume" in job.command else pretend(job)
    assert sweep() == 0
    assert sweep.executor.started == [("--resume", str(folder)), sweep.anew("second", 1)]
    assert {path.name for path in folder.parent.glob("first*")} == {folder.name, f"{folder.name}.log"}
    assert main.main(["--config", str(sweep.config("first", 1))]) == 0
    assert outcome(folder) == outcome(folder.with_name(f"{folder.name}_2"))


def test_ray_gives_what_the_command_line_gives(tmp_path: Path, monkeypatch: Patch) -> None:
    """Two cells on a Ray started for the sweep, with the report; Ray is gone afterwards."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else Ray's workers give way to all other processes
    sweep = Command(tmp_path)
    sweep.write(seeds=[1], set={**TABLE["set"], "max_tasks": 1})
    assert sweep("--engine", "ray") == 0
    assert not ray.is_initialized()
    assert "matched adapter" in (sweep.folder / "summary.md").read_text()
    for slug in ("nested", "matched-adapter"):
        assert "everything is in" in (sweep.folder / f"logs/{slug}_1.txt").read_text()
        whole, folder = tmp_path / "whole", sweep.run_folder(slug, 1)
        assert main.main(["--config", str(sweep.config(slug, 1)), "--set", f"logs_root={whole}"]) == 0
        assert outcome(folder) == outcome(whole / folder.relative_to(sweep.folder / "runs"))


def test_what_the_runs_need_is_looked_for_before_the_first(
    sweep: Command, capsys: Capture, monkeypatch: Patch, tmp_path: Path
) -> None:
    """All that is missing is told at once, each thing once; nothing is started and nothing written."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    weights = {"backbone_type": "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "weights": None}
    places = {"data_root": str(tmp_path / "data"), "weights_root": str(tmp_path / "weights")}
    cells = {
        "there": {},
        "no data": {"dataset": "imagenetr"},
        "no weights": weights,
        "neither": weights | {"dataset": "vtab", "batch_size": 4},
    }
    for cell in cells.values():
        cell["image_size"] = 32
    sweep.write(cells=cells, set=TABLE["set"] | places, baseline=None)
    assert sweep() == 2
    told = capsys.readouterr().err
    missing = ["'imagenetr' was not found", "'vtab' was not found", "nor could be downloaded"]
    assert [told.count(words) for words in missing] == [1, 1, 1]
    assert str(tmp_path / "weights") in told and "Traceback" not in told
    assert sweep.executor.started == [] and not sweep.folder.exists()
