"""Damaged run folders: --resume and eval.py answer in a sentence that names the file."""

import copy
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

import eval as evaluation
import main
from tests.conftest import command, folder_of
from tests.crash import run
from utils.runs.checkpoint import load_checkpoint, save_checkpoint

SMALL = {"max_tasks": 2, "max_train_per_class": 3, "max_test_per_class": 2, "func_epoch": 1, "rd_epoch": 1}
SMALL |= {"batch_size": 3, "figure_format": "none"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("finished")
    assert main.main(command("smoke.json", logs, **SMALL)) == 0
    return folder_of(logs)


@pytest.fixture(scope="module")
def of_another_seed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound run that the finished one can be averaged with."""
    logs = tmp_path_factory.mktemp("other")
    assert main.main(command("smoke.json", logs, **SMALL, seed=[2])) == 0
    return folder_of(logs)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the second of two tasks: the newest checkpoint is inside it."""
    logs = tmp_path_factory.mktemp("unfinished")
    _, moments = run(command("smoke.json", logs / "whole", **SMALL))
    second = moments.index("step", moments.index("rename"))
    assert run(command("smoke.json", logs / "cut", **SMALL), die_at=second, how=signal.SIGINT)[0] == 130
    return folder_of(logs / "cut")


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: None,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to(path.parent / "gone" / "away"),
    "empty": holding(b""),
    "no object": holding(b"[1]\n"),
    "an object without keys": holding(b"{}\n"),
    "other keys": holding(b'{"event": "task", "task": 0, "format": 1, "seed": null}\n'),
    "half": holding(b'{"event": "ta\n'),
    "not UTF-8": holding(b'{"event": "\xff\xfe"}\n'),
    "too deep": holding(b"[" * 100_000 + b"\n"),
}
CHECKPOINT = ["checkpoints", "state", "tensors"]
TABLES = ["accuracy.csv", "per_class.csv", "confusion.csv"]
JSON = ["config.json", "manifest.json", "result.json", "metrics.jsonl", *TABLES]
VIEWS = [*TABLES, "metrics.csv", "tb"]  # written anew by a resumed run


def places(folder: Path, name: str) -> Path:
    """A file of the run by name; of the newest checkpoint for "state" and "tensors"."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    return {"state": newest / "state.json", "tensors": newest / "tensors.safetensors"}.get(
        name, folder / name
    )


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path, str, str], Path]:
    """Makes a copy of a run in which a file is damaged."""

    def make(folder: Path, name: str, damage: str) -> Path:
        copy = tmp_path / damage.replace(" ", "_") / folder.name
        shutil.copytree(folder, copy)
        path = places(copy, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        DAMAGES[damage](path)
        return copy

    return make


@pytest.fixture
def answered(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Success, or exit code 2 with a sentence that names the file, or the checkpoint it is in."""

    def check(name: str, program: Callable[[list[str]], int], *command: str) -> None:
        capsys.readouterr()
        code = program(list(command))
        told = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in told
        named = {"state": "task_01", "tensors": "task_01", "checkpoints": "checkpoint"}.get(name, name)
        assert code == 0 or named in told or ("--resume" in command and "is finished" in told), told

    return check


@pytest.mark.parametrize("name", JSON + CHECKPOINT)
def test_a_finished_run(name: str, finished: Path, of_another_seed: Path, damaged, answered) -> None:
    for damage in DAMAGES:
        folder = damaged(finished, name, damage)
        answered(name, main.main, "--resume", str(folder))
        answered(name, evaluation.main, "--run", str(folder), str(of_another_seed))
        if name in CHECKPOINT:
            answered(name, evaluation.main, "--checkpoint", str(folder / "checkpoints" / "task_01"))
            answered(name, evaluation.main, "--run", str(folder), "--analyse", "grassmann")
        else:
            answered(name, evaluation.main, "--run", str(folder), "--recorded")


@pytest.mark.parametrize(
    ("name", "damages"),
    [(name, DAMAGES) for name in ("config.json", "manifest.json", "metrics.jsonl", *CHECKPOINT)]
    + [(name, ("a folder", "a link to nothing", "not UTF-8")) for name in VIEWS],
)
def test_an_unfinished_run(name: str, damages: Iterable[str], unfinished: Path, damaged, answered) -> None:
    for damage in damages:
        answered(name, main.main, "--resume", str(damaged(unfinished, name, damage)))


def keys_of(state: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of nested objects, three deep."""
    for key, value in state.items():
        yield (*path, key)
        if isinstance(value, dict) and len(path) < 2:
            yield from keys_of(value, (*path, key))


@pytest.fixture
def newest(unfinished: Path, tmp_path: Path) -> Path:
    """The newest checkpoint of a copy of the unfinished run."""
    copy = shutil.copytree(unfinished, tmp_path / unfinished.name)
    return sorted((copy / "checkpoints").iterdir())[-1]


def test_a_state_that_lacks_a_key(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its hashes are right and a key is gone: refused, naming the checkpoint, unless nobody reads the key."""
    tensors, state = load_checkpoint(newest)
    missing = [path for path in keys_of(state) if path[0] != "config" or len(path) == 1]
    accepted = []
    for path in missing:
        changed = copy.deepcopy(state)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        save_checkpoint(newest, tensors, changed)
        code = evaluation.main(["--checkpoint", str(newest)])
        told = capsys.readouterr().err
        assert code == 0 or (code == 2 and newest.name in told), (path, told)
        if code == 0:
            accepted.append(path)
    assert len(missing) > 20 and len(accepted) < 6 and all(len(path) > 1 for path in accepted), accepted


@pytest.mark.parametrize("size", [0, 10, 5055])
def test_a_random_state_of_the_wrong_size(
    size: int, newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, state = load_checkpoint(newest)
    save_checkpoint(newest, tensors | {"rng.cpu": torch.zeros(size, dtype=torch.uint8)}, state)
    assert main.main(["--resume", str(newest.parents[1])]) == 2
    assert newest.name in capsys.readouterr().err
