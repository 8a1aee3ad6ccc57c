"""A run's folder from the command line: one process writes it, nothing of an earlier run is lost, every end is told."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import eval as evaluation
import main
import trainer
from models import SCHEMAS
from tests.crash import run, run_together
from tests.test_main import arguments, folders
from utils.config.loading import config_from_dict
from utils.errors import UserError
from utils.runs.folder import FolderLock, replaced_folders, set_aside
from utils.runs.run_log import read_metrics

SMALL = {"max_train_per_class": 3, "max_test_per_class": 2, "func_epoch": 1, "rd_epoch": 0, "batch_size": 3}


def command(logs: Path, **changes: Any) -> list[str]:
    return arguments(logs, **(SMALL | changes))


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.runs.figures.png", lambda figure: b"picture")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The logs of a finished run, and the moments it went through."""
    logs = tmp_path_factory.mktemp("made")
    code, moments = run(command(logs))
    assert code == 0
    return logs, moments


@pytest.fixture
def finished(made: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the finished run, in logs of its own."""
    shutil.copytree(made[0], tmp_path / "logs")
    return folders(tmp_path / "logs")[0]


@pytest.fixture
def stopped(made: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A run that was stopped in its second task, in logs of its own."""
    moments = made[1]
    second = moments.index("step", moments.index("rename"))
    assert run(command(tmp_path / "logs"), die_at=second, how=signal.SIGINT)[0] == 130
    return folders(tmp_path / "logs")[0]


def told(
    capsys: pytest.CaptureFixture[str], code: int, program: Callable[[list[str]], int], *words: str
) -> str:
    """What a command prints that ends with the code, no traceback among it."""
    capsys.readouterr()
    assert program(list(words)) == code
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    return out + error


def content(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not be lost."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files | {"log": folder.with_name(folder.name + ".log").read_bytes()}


# --- one process a folder ---------------------------------------------------------------------------------------------


def test_a_folder_that_is_being_written_is_left_to_its_process(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed twice, overwritten: refused, and nothing changes. A plain run goes beside it; eval.py reads."""
    logs = stopped.parents[4]
    with FolderLock(stopped):
        before = content(stopped)
        assert f"process {os.getpid()} on" in told(capsys, 2, main.main, "--resume", str(stopped))
        assert f"process {os.getpid()} on" in told(capsys, 2, main.main, *command(logs), "--overwrite")
        shown = told(capsys, 0, evaluation.main, "--run", str(stopped), "--recorded")
        assert "recorded accuracy" in shown and "drew no figures" in shown
        assert content(stopped) == before
        assert "is being written by" in told(capsys, 0, main.main, *command(logs))
    assert [folder.name for folder in folders(logs)] == [stopped.name, stopped.name + "_2"]
    assert main.main(["--resume", str(stopped)]) == 0
    tasks = [event["task"] for event in read_metrics(stopped) if event["event"] == "task"]
    assert tasks == [0, 1]


def test_every_rank_is_refused(stopped: Path) -> None:
    with FolderLock(stopped):
        assert run_together(["--resume", str(stopped)], 2) == [2, 2]
        assert run_together([*command(stopped.parents[4]), "--overwrite"], 2) == [2, 2]


def test_resume_takes_the_folder_it_stands_in(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stopped)
    assert main.main(["--resume", "."]) == 0
    assert "is finished" in told(capsys, 2, main.main, "--resume", ".")
    monkeypatch.chdir(stopped / "checkpoints" / "task_00")
    told(capsys, 0, evaluation.main, "--checkpoint", ".")
    told(capsys, 0, evaluation.main, "--run", "../..", "--recorded")
    assert "is not a run folder" in told(capsys, 2, main.main, "--resume", ".")


# --- what is replaced -------------------------------------------------------------------------------------------------


def test_overwriting_waits_for_the_end_of_the_new_run(
    finished: Path, made: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed: the old run waits beside, every command says where, and a resume that finishes removes it."""
    before, logs = content(finished), finished.parents[4]
    second = made[1].index("step", made[1].index("rename"))
    assert run([*command(logs), "--overwrite"], die_at=second)[0] == -signal.SIGKILL
    (aside,) = replaced_folders(finished)
    assert content(aside) == before
    assert str(aside) in told(capsys, 0, main.main, *command(logs))  # a plain run, beside both
    assert evaluation.main(["--run", str(aside), "--recorded"]) == 0
    assert str(aside) in told(capsys, 0, main.main, "--resume", str(finished))
    assert not replaced_folders(finished) and not list(finished.parent.glob("*replaced*"))
    assert (finished / "result.json").exists()


def test_overwriting_again_keeps_both_until_the_end(finished: Path, made: tuple[Path, list[str]]) -> None:
    before, logs = content(finished), finished.parents[4]
    second = made[1].index("step", made[1].index("rename"))
    for count in (1, 2):
        assert run([*command(logs), "--overwrite"], die_at=second)[0] == -signal.SIGKILL
        assert len(replaced_folders(finished)) == count
    assert content(replaced_folders(finished)[0]) == before
    assert main.main([*command(logs), "--overwrite"]) == 0
    visible = {path.name for path in finished.parent.iterdir() if not path.name.startswith(".")}
    assert visible == {finished.name, finished.name + ".log"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_refused_before_training_leaves_no_trace(
    overwrite: bool, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by the data, when the learner is made, or in the first step: the old run is where it was."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_learner", lambda *_, **__: (_ for _ in ()).throw(UserError("not this")))
        told(capsys, 2, main.main, *command(finished.parents[5] / "new"))
    assert not (finished.parents[5] / "new").exists()
    before, logs = content(finished), finished.parents[4]
    option = ["--overwrite"] if overwrite else []
    told(capsys, 2, main.main, *command(logs, dataset="nowhere.npz"), *option)
    for error in (
        UserError("not this"),
        OSError(28, "No space left on device", "somewhere"),
        KeyboardInterrupt(),
    ):
        for owner, name in ((trainer, "make_learner"), (trainer.Learner, "take_step")):

            def refuse(*_: object, error: BaseException = error, **__: object) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, refuse)
                told(
                    capsys,
                    130 if isinstance(error, KeyboardInterrupt) else 2,
                    main.main,
                    *command(logs),
                    *option,
                )
            assert content(finished) == before
            visible = {path.name for path in finished.parent.iterdir() if not path.name.startswith(".")}
            assert visible == {finished.name, finished.name + ".log"}


def test_a_failure_in_training_says_where_the_old_run_is(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, logs = content(finished), finished.parents[4]
    monkeypatch.setattr(
        trainer.Learner, "fingerprint", lambda self: (_ for _ in ()).throw(UserError("no more"))
    )
    shown = told(capsys, 2, main.main, *command(logs), "--overwrite")
    (aside,) = replaced_folders(finished)
    assert str(aside) in shown and content(aside) == before


def test_killed_between_two_moves_the_old_run_is_found(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, logs = content(finished), finished.parents[4]
    aside = set_aside(finished)
    assert str(aside) in told(capsys, 2, main.main, "--resume", str(finished))
    assert "is back" in told(capsys, 0, main.main, *command(logs))
    assert content(finished) == before and len(folders(logs)) == 2


# --- every end --------------------------------------------------------------------------------------------------------


def test_what_should_follow_the_result_is_made_by_a_resume(
    made: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed when the first figure is written, and before the last note: what is missing is made, once."""
    moments = made[1]
    for number, point in enumerate((len(moments) - 5, len(moments) - 1)):
        logs = tmp_path / str(number)
        assert run(command(logs), die_at=point)[0] == -signal.SIGKILL
        (folder,) = folders(logs)
        result = (folder / "result.json").read_bytes()
        assert "what should have followed" in told(capsys, 0, main.main, "--resume", str(folder))
        assert len(list((folder / "figures").glob("*.png"))) == 4
        assert (folder / "result.json").read_bytes() == result
        assert "is finished" in told(capsys, 2, main.main, "--resume", str(folder))


def test_a_lost_terminal_that_is_ignored_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with trainer.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# --- other configurations, machines, seeds ----------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


MIXING = {
    "init_lr": 0.5,
    "func_epoch": 2,
    "optimizer": "adam",
    "max_train_per_class": 2,
    "max_tasks": 3,
    "batch_size": 2,
}


def test_edited_keys_that_shape_numbers_are_named_and_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(stopped)
    was = json.loads((stopped / "config.json").read_text())
    edit(stopped, **MIXING)
    edited = content(stopped)
    shown = told(capsys, 2, main.main, "--resume", str(stopped))
    for key, value in MIXING.items():
        assert f"{key} was {json.dumps(was[key])}, is {json.dumps(value)}" in shown
    assert content(stopped) == edited
    newest = sorted((stopped / "checkpoints").iterdir())[-1]
    assert "init_lr" in told(capsys, 2, evaluation.main, "--checkpoint", str(newest))
    (stopped / "config.json").write_bytes(before["config.json"])
    assert main.main(["--resume", str(stopped)]) == 0


def test_other_edits_and_another_machine_are_told_and_recorded(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(stopped, description="again", num_workers=0, cache_gb=1.0)
    monkeypatch.setattr("timm.__version__", "0.0.1")
    shown = told(capsys, 0, main.main, "--resume", str(stopped))
    assert "description was" in shown and "cache_gb was 20.0, is 1.0" in shown and "-> 0.0.1" in shown
    first, second = json.loads((stopped / "manifest.json").read_text())["sessions"]
    assert second["versions"]["timm"] == "0.0.1" != first["versions"]["timm"]
    assert first["started"] <= second["started"]


def test_a_resume_goes_on_with_the_seeds_of_its_command(
    made: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the second of three seeds: that one, then the third, then the mean over all."""
    logs, once = tmp_path / "logs", len(made[1])
    second = once + made[1].index("step", made[1].index("rename"))
    assert main.main(command(logs, seed=[3])) == 0  # another command's: not taken for the third seed's
    assert run(command(logs, seed=[1, 2, 3]), die_at=second, how=signal.SIGINT)[0] == 130
    names = [folder.name for folder in folders(logs)]
    assert names == ["smoke_1_test_vit", "smoke_2_test_vit", "smoke_3_test_vit"]
    shown = told(capsys, 0, main.main, "--resume", str(folders(logs)[1]))
    assert "1 finished, 3 to be started" in shown and "over seeds 1, 2, 3" in shown
    assert [folder.name for folder in folders(logs)] == [*names, "smoke_3_test_vit_2"]
    for folder in folders(logs)[:2]:
        shown = told(capsys, 2, main.main, "--resume", str(folder))
        assert "is finished" in shown and "over seeds 1, 2, 3" in shown


@pytest.fixture(scope="module")
def two_seeds_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that learn nothing by gradient: the first of three seeds finished, the second stopped after a task."""
    logs = tmp_path_factory.mktemp("seeds") / "logs"
    values = {
        "model_name": "simplecil",
        "dataset": "synthetic",
        "init_cls": 4,
        "increment": 4,
        "seed": [1, 2, 3],
    }
    values |= {
        "backbone_type": "test_vit",
        "weights": "random",
        "image_size": 32,
        "device": "cpu",
        "prefix": "some",
    }
    values |= {"max_train_per_class": 2, "max_test_per_class": 2, "logs_root": str(logs), "cache_gb": 0.0}
    config = config_from_dict(values, SCHEMAS, "test").config
    saved: list[str] = []

    def save(run: trainer.Run, name: str) -> Path:
        folder = original(run, name)
        saved.append(name)
        if len(saved) == 3:
            raise KeyboardInterrupt
        return folder

    original = trainer.Run.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Run, "save", save)
        trainer.train(config)
    return logs


@pytest.fixture
def seeds_left(two_seeds_of_three: Path, tmp_path: Path) -> list[Path]:
    """The folders of seed 1, finished, and of seed 2, unfinished; seed 3 is not started."""
    shutil.copytree(two_seeds_of_three, tmp_path / "moved")
    return folders(tmp_path / "moved")


@pytest.mark.parametrize("edited", [{}, {"prefix": "other"}, {"logs_root": "elsewhere"}])
@pytest.mark.parametrize("resumed", [0, 1])
def test_seeds_that_are_left_are_run_beside_the_others(
    resumed: int, edited: dict[str, str], seeds_left: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the folders were moved, and whatever the places in the configuration say now."""
    edit(seeds_left[resumed], **edited)
    for code in (0, 2):
        shown = told(capsys, code, main.main, "--resume", str(seeds_left[resumed]))
        assert "over seeds 1, 2, 3" in shown
        found = folders(seeds_left[0].parent)
        assert sorted(json.loads((folder / "config.json").read_text())["seed"][0] for folder in found) == [
            1,
            2,
            3,
        ]


@pytest.mark.parametrize(("edited", "lost"), [(0, False), (1, True)])
@pytest.mark.parametrize("resumed", [0, 1])
def test_seeds_of_edited_configurations_are_not_mixed(
    resumed: int, edited: int, lost: bool, seeds_left: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither where the edited run is finished, nor where it would begin anew without its checkpoints."""
    edit(seeds_left[edited], max_tasks=1)
    if lost:
        shutil.rmtree(seeds_left[edited] / "checkpoints")
    before = [content(folder) for folder in seeds_left]
    assert "max_tasks" in told(capsys, 2, main.main, "--resume", str(seeds_left[resumed]))
    assert [content(folder) for folder in folders(seeds_left[0].parent)] == before


def test_seeds_with_other_data_have_no_mean(
    seeds_left: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((seeds_left[0] / "manifest.json").read_text())
    manifest["data"]["sha256"] = "0" * 64
    (seeds_left[0] / "manifest.json").write_text(json.dumps(manifest))
    shown = told(capsys, 0, main.main, "--resume", str(seeds_left[1]))
    assert "data" in shown and "over seeds" not in shown and str(seeds_left[0]) in shown


# --- what the operating system refuses --------------------------------------------------------------------------------


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
    """Whatever file it is that does not fit: exit code 2, the path, and the old run is where it was, or said where."""
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
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a read-only disk: what was recorded, then a sentence that speaks of no resuming."""

    def refuse(self: FolderLock) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.path))

    monkeypatch.setattr(FolderLock, "acquire", refuse)
    shown = told(capsys, 2, evaluation.main, "--run", str(finished), "--recorded")
    assert "recorded accuracy" in shown and "Read-only" in shown and "--resume" not in shown


@pytest.mark.parametrize("name", ["figures", "checkpoints", "tb", "metrics.csv", "metrics.jsonl"])
def test_a_file_where_a_folder_should_be_and_the_reverse(
    name: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped / name
    if path.is_dir() or not path.exists():
        shutil.rmtree(path, ignore_errors=True)
        path.touch()
    else:
        path.unlink()
        path.mkdir()
    assert name in told(capsys, 2, main.main, "--resume", str(stopped))
