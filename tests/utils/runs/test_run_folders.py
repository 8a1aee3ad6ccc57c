"""Run folders from the command line: one process writes each, nothing earlier is lost, every end is told."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import eval as evaluation
import main
import trainer
from tests import conftest
from tests.crash import MOMENTS, run, run_together
from utils.errors import UserError
from utils.runs.folder import FolderLock, replaced_folders
from utils.runs.run_log import read_metrics

SMALL = {"max_tasks": 2, "max_train_per_class": 3, "max_test_per_class": 2, "func_epoch": 1, "rd_epoch": 0}
SMALL |= {"batch_size": 3, "figure_format": "png"}


def command(logs: Path, **changes: Any) -> list[str]:
    return conftest.command("smoke.json", logs, **(SMALL | changes))


def folders(logs: Path) -> list[Path]:
    return sorted(path.parent for path in logs.rglob("config.json"))


pytestmark = pytest.mark.usefixtures("quick_pictures")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The logs of a finished run, and the moments it went through."""
    logs = tmp_path_factory.mktemp("made")
    code, moments = run(command(logs))
    assert code == 0
    return logs, moments


@pytest.fixture
def in_second_task(made: tuple[Path, list[str]]) -> int:
    """The moment of the first step of a run's second task."""
    moments = made[1]
    return moments.index("step", moments.index("rename"))


@pytest.fixture
def finished(made: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the finished run, in logs of its own."""
    shutil.copytree(made[0], tmp_path / "logs")
    return folders(tmp_path / "logs")[0]


@pytest.fixture
def stopped(in_second_task: int, tmp_path: Path) -> Path:
    """A run that was stopped in its second task, in logs of its own."""
    assert run(command(tmp_path / "logs"), die_at=in_second_task, how=signal.SIGINT)[0] == 130
    return folders(tmp_path / "logs")[0]


def content(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not be lost."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | {"log": folder.with_name(folder.name + ".log").read_bytes()}


# --- one process a folder ---


def test_a_folder_that_is_being_written_is_left_to_its_process(
    stopped: Path, told: Callable[..., str]
) -> None:
    """Resumed twice, overwritten: refused, and nothing changes. A plain run goes beside it; eval.py reads."""
    logs = stopped.parents[4]
    with FolderLock(stopped):
        before = content(stopped)
        assert f"process {os.getpid()} on" in told(2, main.main, "--resume", str(stopped))
        assert f"process {os.getpid()} on" in told(2, main.main, *command(logs), "--overwrite")
        shown = told(0, evaluation.main, "--run", str(stopped), "--recorded")
        assert "recorded accuracy" in shown and "drew no figures" in shown
        assert content(stopped) == before
        assert "is being written by" in told(0, main.main, *command(logs))
    assert [folder.name for folder in folders(logs)] == [stopped.name, stopped.name + "_2"]
    assert main.main(["--resume", str(stopped)]) == 0
    tasks = [event["task"] for event in read_metrics(stopped) if event["event"] == "task"]
    assert tasks == [0, 1]


def test_every_rank_is_refused(stopped: Path) -> None:
    with FolderLock(stopped):
        assert run_together(["--resume", str(stopped)], 2) == [2, 2]
        assert run_together([*command(stopped.parents[4]), "--overwrite"], 2) == [2, 2]


def test_resume_takes_the_folder_it_stands_in(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    monkeypatch.chdir(stopped)
    assert main.main(["--resume", "."]) == 0
    assert "is finished" in told(2, main.main, "--resume", ".")
    monkeypatch.chdir(stopped / "checkpoints" / "task_00")
    told(0, evaluation.main, "--checkpoint", ".")
    shown = told(0, evaluation.main, "--run", "../..", "--recorded")
    assert "recorded accuracy" in shown and "class-incremental" not in shown  # nothing is tested
    assert "is not a run folder" in told(2, main.main, "--resume", ".")


def test_the_text_log_of_a_run_is_named_as_that(finished: Path, told: Callable[..., str]) -> None:
    log = finished.with_name(finished.name + ".log")
    assert f"give its folder, {finished}" in told(2, evaluation.main, "--run", str(finished), str(log))
    assert f"{log} is a file" in told(2, evaluation.main, "--compare", str(finished), str(log))


# --- what is replaced ---


def test_overwriting_waits_for_the_end_of_the_new_run(
    finished: Path, in_second_task: int, told: Callable[..., str]
) -> None:
    """Killed: the old run waits beside, every command says where, and a resume that finishes removes it."""
    before, logs = content(finished), finished.parents[4]
    assert run([*command(logs), "--overwrite"], die_at=in_second_task)[0] == -signal.SIGKILL
    (aside,) = replaced_folders(finished)
    assert content(aside) == before
    assert str(aside) in told(0, main.main, *command(logs))  # a plain run, beside both
    assert evaluation.main(["--run", str(aside), "--recorded"]) == 0
    assert str(aside) in told(0, main.main, "--resume", str(finished))
    assert not list(finished.parent.glob("*replaced*")) and (finished / "result.json").exists()


def failing(monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException) -> None:
    """Let a moment of the run raise an error."""
    monkeypatch.setattr(*MOMENTS[moment], Mock(side_effect=error))


@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["beside", "overwrite"])
def test_what_is_refused_before_its_first_step_leaves_no_trace(
    option: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    """Refused by the data, or in the first step: the old run is where it was."""
    before, logs = content(finished), finished.parents[4]
    told(2, main.main, *command(logs, dataset="nowhere.npz"), *option)
    full = OSError(errno.ENOSPC, "No space left on device", "somewhere")
    for error, code in ((UserError("not this"), 2), (full, 2), (KeyboardInterrupt(), 130)):
        with monkeypatch.context() as patch:
            failing(patch, "step", error)
            told(code, main.main, *command(logs), *option)
        visible = {path.name for path in finished.parent.iterdir() if not path.name.startswith(".")}
        assert content(finished) == before and visible == {finished.name, finished.name + ".log"}


def test_a_new_place_for_logs_is_gone_again_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    failing(monkeypatch, "step", UserError("not this"))
    told(2, main.main, *command(tmp_path / "new" / "logs", cache_root=str(tmp_path / "cache")))
    assert not (tmp_path / "new").exists()


def test_a_failure_in_training_says_where_the_old_run_is(
    finished: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    before, logs = content(finished), finished.parents[4]
    failing(monkeypatch, "test", UserError("no more"))
    shown = told(2, main.main, *command(logs), "--overwrite")
    (aside,) = replaced_folders(finished)
    assert str(aside) in shown and content(aside) == before


# --- every end ---


def test_what_should_follow_the_result_is_made_by_a_resume(
    made: tuple[Path, list[str]], tmp_path: Path, told: Callable[..., str]
) -> None:
    """Killed when the first figure is written, and before the last note: what is missing is made, once."""
    moments = made[1]
    for number, point in enumerate((len(moments) - 5, len(moments) - 1)):
        logs = tmp_path / str(number)
        assert run(command(logs), die_at=point)[0] == -signal.SIGKILL
        (folder,) = folders(logs)
        result = (folder / "result.json").read_bytes()
        assert "what should have followed" in told(0, main.main, "--resume", str(folder))
        assert len(list((folder / "figures").glob("*.png"))) == 5
        assert (folder / "result.json").read_bytes() == result
        assert "is finished" in told(2, main.main, "--resume", str(folder))


# --- other configurations, machines, seeds ---


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


MIXING = {"init_lr": 0.5, "func_epoch": 2, "optimizer": "adam", "max_train_per_class": 2, "batch_size": 2}


def test_edited_keys_that_shape_numbers_are_named_and_refused(
    stopped: Path, told: Callable[..., str]
) -> None:
    before = content(stopped)
    was = json.loads((stopped / "config.json").read_text())
    edit(stopped, **MIXING)
    edited = content(stopped)
    shown = told(2, main.main, "--resume", str(stopped))
    for key, value in MIXING.items():
        assert f"{key} was {json.dumps(was[key])}, is {json.dumps(value)}" in shown
    assert content(stopped) == edited
    newest = sorted((stopped / "checkpoints").iterdir())[-1]
    assert "init_lr" in told(2, evaluation.main, "--checkpoint", str(newest))
    (stopped / "config.json").write_bytes(before["config.json"])
    assert main.main(["--resume", str(stopped)]) == 0


def test_other_edits_and_another_machine_are_told_and_recorded(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    edit(stopped, description="again", num_workers=0, cache_gb=1.0)
    monkeypatch.setattr("timm.__version__", "0.0.1")
    shown = told(0, main.main, "--resume", str(stopped))
    assert "description was" in shown and "cache_gb was 20.0, is 1.0" in shown and "-> 0.0.1" in shown
    first, second = json.loads((stopped / "manifest.json").read_text())["sessions"]
    assert second["versions"]["timm"] == "0.0.1" != first["versions"]["timm"]
    assert first["started"] <= second["started"]


@pytest.fixture(scope="module")
def two_seeds_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs without gradients: the first of three seeds is finished, the second was killed after a task.

    A run of another command has the third seed: it is not taken for that of this one.
    """
    folder = tmp_path_factory.mktemp("seeds")
    values = {"model_name": "simplecil", "prefix": "some", "dataset": "synthetic", "cache_gb": 0.0}
    values |= {"init_cls": 4, "increment": 4, "max_train_per_class": 2, "max_test_per_class": 2, "seed": [1]}
    values |= {"backbone_type": "test_vit", "weights": "random", "image_size": 32, "device": "cpu"}
    (folder / "config.json").write_text(json.dumps(values))
    words = ["--config", str(folder / "config.json"), "--set"]
    _, moments = run([*words, f"logs_root={folder / 'one'}"])
    last_save = len(moments) - 1 - moments[::-1].index("rename")
    assert run([*words, f"logs_root={folder / 'logs'}", "--set", "seed=3"])[0] == 0
    seeds = ["--set", "seed=[1,2,3]"]
    code, _ = run([*words, f"logs_root={folder / 'logs'}", *seeds], die_at=len(moments) + last_save)
    assert code == -signal.SIGKILL
    return folder / "logs"


@pytest.fixture
def seeds_left(two_seeds_of_three: Path, tmp_path: Path) -> list[Path]:
    """The folders of seed 1, finished, and of seed 2, unfinished; seed 3 is not started."""
    shutil.copytree(two_seeds_of_three, tmp_path / "moved")
    return folders(tmp_path / "moved")


@pytest.mark.parametrize("edited", [{}, {"prefix": "other"}, {"logs_root": "elsewhere"}])
@pytest.mark.parametrize("resumed", [0, 1])
def test_seeds_that_are_left_are_run_beside_the_others(
    resumed: int, edited: dict[str, str], seeds_left: list[Path], told: Callable[..., str]
) -> None:
    """Also where the folders were moved, and whatever the places in the configuration say now."""
    edit(seeds_left[resumed], **edited)
    for code, state in ((0, "3 to be started"), (2, "is finished")):
        shown = told(code, main.main, "--resume", str(seeds_left[resumed]))
        assert "over seeds 1, 2, 3" in shown and state in shown
        found = folders(seeds_left[0].parent)
        seeds = [json.loads((folder / "config.json").read_text())["seed"] for folder in found]
        assert sorted(seeds) == [1, 2, 3, 3]


@pytest.mark.parametrize(("since", "kept"), [(-1, False), (1, True)])
def test_a_resumed_overwrite_keeps_what_other_commands_made_since_it_began(
    since: int, kept: bool, seeds_left: list[Path], told: Callable[..., str]
) -> None:
    other = next(folder for folder in folders(seeds_left[0].parent) if folder not in seeds_left[:2])
    now = datetime.now().astimezone()
    for folder, started in (
        *((folder, now) for folder in seeds_left[:2]),
        (other, now + timedelta(hours=since)),
    ):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sessions"][0]["started"] = started.isoformat(timespec="seconds")
        manifest["command"]["overwrite"] = folder != other
        (folder / "manifest.json").write_text(json.dumps(manifest))
    before = content(other)
    shown = told(0, main.main, "--resume", str(seeds_left[1]))
    assert "over seeds 1, 2, 3" in shown and (f"{other} is there already" in shown) == kept
    assert (content(other) == before) == kept
    assert len(folders(seeds_left[0].parent)) == 3 + kept


def test_a_link_to_a_run_is_that_run(
    seeds_left: list[Path], tmp_path: Path, told: Callable[..., str]
) -> None:
    """The seeds beside it are found, and nothing is written beside the link."""
    link = tmp_path / "last"
    link.symlink_to(seeds_left[1])
    assert "1 finished" in told(0, main.main, "--resume", link)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "moved"]


@pytest.mark.parametrize(("edited", "lost"), [(0, False), (1, True)])
@pytest.mark.parametrize("resumed", [0, 1])
def test_seeds_of_edited_configurations_are_not_mixed(
    resumed: int, edited: int, lost: bool, seeds_left: list[Path], told: Callable[..., str]
) -> None:
    """Neither where the edited run is finished, nor where it would begin anew without its checkpoints."""
    edit(seeds_left[edited], max_tasks=1)
    if lost:
        shutil.rmtree(seeds_left[edited] / "checkpoints")
    before = [content(folder) for folder in seeds_left]
    assert "max_tasks" in told(2, main.main, "--resume", str(seeds_left[resumed]))
    assert [content(folder) for folder in folders(seeds_left[0].parent)] == before


@pytest.mark.parametrize("auto", [False, True])
def test_seeds_with_other_data_have_no_mean(
    auto: bool, seeds_left: list[Path], told: Callable[..., str]
) -> None:
    manifest = json.loads((seeds_left[0] / "manifest.json").read_text())
    manifest["data"]["sha256"] = "0" * 64
    (seeds_left[0] / "manifest.json").write_text(json.dumps(manifest))
    words = ["--resume", seeds_left[1]]
    if auto:
        own = ["--set", "seed=[1,2]", "--set", f"logs_root={seeds_left[0].parents[4]}"]
        words = ["--resume", "auto", "--config", seeds_left[1] / "config.json", *own]
    shown = told(0, main.main, *words)
    assert "data" in shown and "over seeds" not in shown and str(seeds_left[0]) in shown


def test_the_mean_of_seeds_looks_at_the_runs_that_it_is_of(
    seeds_left: list[Path], told: Callable[..., str]
) -> None:
    """Not at a finished repetition with other data, beside a run that was unfinished."""
    first = seeds_left[0]
    repeated = shutil.copytree(first, first.with_name(first.name + "_2"))
    manifest = json.loads((repeated / "manifest.json").read_text())
    manifest["data"]["sha256"] = "0" * 64
    (repeated / "manifest.json").write_text(json.dumps(manifest))
    (first / "result.json").unlink()
    own = ["--set", "seed=[1,2]", "--set", f"logs_root={first.parents[4]}"]
    shown = told(0, main.main, "--resume", "auto", "--config", first / "config.json", *own)
    assert "over seeds 1, 2" in shown


def test_a_seed_that_another_process_has_run_meanwhile_is_not_run_again(
    seeds_left: list[Path], monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    """Each seed is looked for when its turn comes: the fourth is run while the second is resumed."""
    words = ["--config", str(seeds_left[1] / "config.json"), "--set", f"logs_root={seeds_left[0].parents[4]}"]
    resume = trainer.resume

    def beside(*arguments: Any) -> dict[str, Any]:
        assert run([*words, "--set", "seed=4"])[0] == 0
        return resume(*arguments)

    monkeypatch.setattr(trainer, "resume", beside)
    assert "over seeds 1, 2, 4" in told(0, main.main, "--resume", "auto", *words, "--set", "seed=[1,2,4]")
    seeds = [
        json.loads((folder / "config.json").read_text())["seed"] for folder in folders(seeds_left[0].parent)
    ]
    assert sorted(seeds) == [1, 2, 3, 4]


# --- what the operating system refuses ---


@pytest.fixture
def file_size() -> Iterator[Callable[[int], None]]:
    """Sets the size in bytes from which on files cannot be written, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 300, 3000, 10_000, 30_000])
def test_a_disk_that_is_full_ends_in_a_sentence(
    size: int, finished: Path, file_size: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever file does not fit: exit code 2, the path, and the old run is where it was, or said where."""
    before, logs = content(finished), finished.parents[4]
    capsys.readouterr()
    file_size(size)
    code = main.main([*command(logs, cache_gb=0), "--overwrite"])
    file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    out, error = capsys.readouterr()
    assert code == 2 and "Traceback" not in error and str(logs) in error, error
    kept = [path for path in (*replaced_folders(finished), finished) if path.exists()]
    assert content(kept[0]) == before
    assert not [path for path in logs.rglob("*") if ".tmp" in path.name]
    if len(kept) == 2:
        assert str(kept[0]) in out
        assert main.main(["--resume", str(finished)]) == 0
    assert not list(finished.parent.glob("*.replaced"))


def test_a_folder_that_cannot_be_written_is_shown_as_far_as_it_goes(
    finished: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., str]
) -> None:
    """As on a read-only disk: what was recorded, then a sentence that speaks of no resuming."""
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), str(finished))
    monkeypatch.setattr(FolderLock, "acquire", Mock(side_effect=error))
    shown = told(2, evaluation.main, "--run", str(finished), "--recorded")
    assert "recorded accuracy" in shown and "Read-only" in shown and "--resume" not in shown
