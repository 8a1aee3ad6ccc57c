"""Good files are remembered until they change; a damaged or foreign record counts for nothing."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.cache import file_memo
from utils.cache.file_memo import FileMemo, read_signed


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files count as unchanged for long at once."""
    monkeypatch.setattr(file_memo, "SETTLED", -(10**18))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    return [tmp_path / name for name in "abc"]


def memo(folder: Path, rule: str = "rule") -> FileMemo:
    return FileMemo(folder / "cache", folder, rule)


def remember(folder: Path, paths: list[Path]) -> dict[Path, str]:
    signed = {path: read_signed(path)[1:] for path in paths}
    memo(folder).add(signed)
    return {path: sha256 for path, (_, sha256) in signed.items()}


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, paths):
    remember(tmp_path, paths)
    assert not (tmp_path / "cache").exists()


def overwrite(path: Path) -> None:
    path.write_bytes(b"no record" * 100)


def alter(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-80] + b"0" + content[-79:])


@pytest.mark.parametrize("damage", [overwrite, alter, lambda path: os.truncate(path, 100)])
def test_a_damaged_record_counts_for_nothing(
    tmp_path, paths, settled, caplog, damage: Callable[[Path], None]
):
    hashes = remember(tmp_path, paths)
    (record,) = (tmp_path / "cache").glob("*.json")
    damage(record)
    assert memo(tmp_path).known(paths) == {} and "damaged" in caplog.text
    assert remember(tmp_path, paths) == hashes == memo(tmp_path).known(paths)


def test_one_process_at_a_time_holds_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Value("i")

    def work() -> None:
        with memo(tmp_path).lock():
            alone = held.value == 0
            held.value = 1
            time.sleep(0.05)
            held.value = 0
        os._exit(0 if alone else 1)

    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
