"""Run folder: its place, its lock, and how it is claimed, replaced and abandoned.

    claim = claim_folder(folder_of(config, seed=1993), {"config.json": text.encode()}, overwrite=False)
    claim.folder                 # the first free one of folder, folder_2, ...: locked, with its config.json
    claim.abandon()              # removed if nothing was recorded; what it was to replace is restored
    remove_replaced(folder)      # once the new run is finished

The folder of a sweep is locked and replaced by the same functions.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from utils.config.schema import RunConfig
from utils.errors import AGAIN, UserError, os_error_sentence
from utils.files import read_json, sync_folder, write_json, write_synced
from utils.wording import as_typed

logger = logging.getLogger("nested_lora")

CONFIG = "config.json"
MANIFEST = "manifest.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
TABLE = "metrics.csv"
ACCURACY = "accuracy.csv"
TEST_RESULT = "test_result.json"  # test accuracy of a run on validation images, from `eval.py --test`
TENSORBOARD = "tb"
FIGURES = "figures"
SWEEP = "sweep.json"  # in the folder of a sweep
UNBEGUN = {CONFIG, MANIFEST, METRICS, TENSORBOARD, TABLE}  # files that a run may hold before its first event

Fill = Callable[[Path], None]
REPLACED = ".replaced"  # suffix of a folder while its replacement is unfinished
ORPHANS = 10.0  # seconds that data workers may outlive a killed process, whose lock they hold


def resume_command(folder: Path) -> str:
    """The command that goes on with the run in a folder, as one types it."""
    return as_typed("main.py", "--resume", folder)


def folder_of(config: RunConfig, seed: int) -> Path:
    """Folder of one seed of a configuration: its `folder_names` below `logs_root`.

    Slashes inside a name become dashes: every name is one level.
    """
    names = config.folder_names(seed)
    return Path(config.logs_root).joinpath(*(name.replace("/", "-").replace("\\", "-") for name in names))


def text_log(folder: Path) -> Path:
    """The text log that lies beside a folder: `<folder>.log`."""
    return folder.with_name(f"{folder.name}.log")


# ------------------------------------------------------------------------------------------------------------
# Lock


class FolderInUse(UserError):
    """Another process has the lock of a folder."""


class FolderLock:
    """Lock of a folder for one process at a time; it is released when that ends.

    The lock is a hidden file beside the folder, `.<name>.lock`, which stays; while it is held,
    `.<name>.lock.json` names the process. The folder need not exist, its parent must.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        real = folder.resolve()  # one lock, by whatever name the folder is called
        self.path = real.with_name(f".{real.name}.lock")
        self._lock = FileLock(self.path, thread_local=False)
        self._owner = real.with_name(f".{real.name}.lock.json")

    def acquire(self) -> FolderLock:
        """Take the lock. FolderInUse: another process has it."""
        try:
            self._lock.acquire(timeout=ORPHANS if self._left_by_the_dead() else 0)
        except Timeout:
            raise FolderInUse(
                f"{self.folder} is being written by {self.holder}: wait until it has ended, or stop it, then "
                "give the command again"
            ) from None
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            write_json(self._owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        except BaseException:
            self._lock.release()
            raise
        return self

    def release(self) -> None:
        """Give the lock back; a second time is harmless."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def holder(self) -> str:
        """The process that has the lock, for a sentence."""
        try:
            return "process {pid} on {host} since {since}".format_map(read_json(self._owner))
        except (UserError, KeyError):  # it has only just taken the lock, or the file is damaged
            return "another process"

    def _left_by_the_dead(self) -> bool:
        """Whether the last holder was a process of this machine that has ended."""
        try:
            owner = read_json(self._owner)
            return owner["host"] == socket.gethostname() and not psutil.pid_exists(owner["pid"])
        except (UserError, KeyError, TypeError, OverflowError):  # no owner, or a damaged file
            return False


# ------------------------------------------------------------------------------------------------------------
# A new run's folder


@dataclass(frozen=True)
class Claim:
    """Locked folder of a new run, notes for the log, and the parents made for it, innermost first."""

    folder: Path
    lock: FolderLock
    notes: Sequence[str]
    new_parents: Sequence[Path]

    def abandon(self) -> None:
        """Remove a run that has recorded nothing, and folders made for it; restore what it was to replace."""
        if self.folder.exists():
            metrics = self.folder / METRICS
            names = {path.name for path in self.folder.iterdir()}
            if not names <= UNBEGUN or metrics.exists() and metrics.stat().st_size:
                return
        remove_folder(self.folder)
        if restore_replaced(self.folder) is None and self.new_parents:
            self.lock.path.unlink()
            self.lock.release()
            for parent in self.new_parents:
                with suppress(OSError):  # another process has put something there
                    parent.rmdir()


def claim_folder(
    folder: Path, files: Mapping[str, bytes], overwrite: bool, fill: Fill = lambda prepared: None
) -> Claim:
    """Make the folder of a new run with its first files, and with what `fill` puts into it.

    An existing folder is left alone: the run goes to `<folder>_2` (or `_3`, ...), and the notes say why. With
    `overwrite` the existing folder and its log are set aside until the new run is finished.

    Raises UserError: the folder cannot be created, is being written, or is to be replaced and is no run's.
    """
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock, notes = _lock_first_free(folder, overwrite)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {os_error_sentence(error, AGAIN)}") from error
    claim = Claim(lock.folder, lock, notes, new_parents)
    with ExitStack() as failed:
        failed.callback(lock.release)
        if overwrite:
            if os.path.lexists(folder):
                set_aside(folder, CONFIG)
            text_log(folder).unlink(missing_ok=True)  # of a folder that is gone
            notes += waiting_notes(folder)
        failed.callback(claim.abandon)
        create_folder(claim.folder, files, fill)
        failed.pop_all()
    return claim


def waiting_notes(folder: Path) -> list[str]:
    """A note that names what an unfinished run or sweep replaces; none where it replaces nothing."""
    where = ", ".join(map(str, replaced_folders(folder)))
    return [f"{where}: what {folder.name} replaces, removed when that is finished"] if where else []


def _lock_first_free(folder: Path, overwrite: bool) -> tuple[FolderLock, list[str]]:
    """The lock of the first free of `folder`, `folder_2`, ... and a sentence about each that is taken.

    With `overwrite` always that of `folder`. FolderInUse: another process has that.
    """
    notes: list[str] = []
    for candidate in _numbered(folder):
        try:
            lock = FolderLock(candidate).acquire()
        except FolderInUse:
            if overwrite:
                raise
            notes.append(f"{candidate} is being written by {FolderLock(candidate).holder}")
            continue
        restore_replaced(candidate)
        if overwrite or not (os.path.lexists(candidate) or os.path.lexists(text_log(candidate))):
            return lock, [*notes, f"this run goes to {candidate}"] if notes else []
        lock.release()
        if (candidate / CONFIG).exists() and not (candidate / RESULT).exists():
            notes.append(
                f"{candidate} has no {RESULT}: unfinished. To continue it: {resume_command(candidate)}"
            )
        else:
            notes.append(f"{candidate} is there already (--overwrite replaces it)")
        notes += waiting_notes(candidate)
    raise AssertionError("unreachable: the numbers do not end")


# ------------------------------------------------------------------------------------------------------------
# Creating, replacing, removing; the caller holds the folder's lock


def create_folder(folder: Path, files: Mapping[str, bytes], fill: Fill = lambda prepared: None) -> None:
    """Make a folder and its files at once: prepared as `.<name>.new`, then renamed. OSError: refused.

    fill: puts more into the prepared folder.
    """
    prepared = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(prepared, ignore_errors=True)
    try:
        prepared.mkdir()
        for name, content in files.items():
            write_synced(prepared / name, content)
        fill(prepared)
        sync_folder(prepared)
        os.replace(prepared, folder)
    except BaseException:
        shutil.rmtree(prepared, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def replaced_folders(folder: Path) -> list[Path]:
    """The earlier folders that wait beside one until it is finished, oldest first."""
    pattern = re.compile(re.escape(folder.name + REPLACED) + r"(?:_(\d+))?")
    names = ((path, pattern.fullmatch(path.name)) for path in folder.parent.glob("*"))
    found = {int(match[1] or 1): path for path, match in names if match and path.is_dir()}
    return [found[number] for number in sorted(found)]


def set_aside(folder: Path, marker: str) -> Path:
    """Move a folder and its text log to `<folder>.replaced` (or `_2`, ...), and return that.

    UserError: it does not hold the file that marks folders of its kind.
    """
    if not (folder / marker).is_file():
        raise UserError(f"{folder} holds no {marker}, so it is not overwritten: move it away")
    free = _numbered(folder.with_name(folder.name + REPLACED))
    aside = next(path for path in free if not os.path.lexists(path) and not os.path.lexists(text_log(path)))
    _move(folder, aside)
    return aside


def restore_replaced(folder: Path) -> Path | None:
    """Move the newest folder that was set aside back, unless its replacement exists; returns its old path."""
    aside = replaced_folders(folder)
    if not aside or os.path.lexists(folder):
        return None
    _move(aside[-1], folder)
    logger.warning(f"{folder} is back from {aside[-1].name}: what was to replace it had not begun")
    return aside[-1]


def remove_replaced(folder: Path) -> None:
    """Remove what a finished folder replaces, except, with a warning, folders that another process writes."""
    for aside in replaced_folders(folder):
        try:
            with FolderLock(aside) as lock:
                remove_folder(aside)
                lock.path.unlink()
        except FolderInUse as error:
            logger.warning(f"What {folder} replaces stays: {error}")


def remove_folder(folder: Path) -> None:
    """Remove a folder and its text log."""
    text_log(folder).unlink(missing_ok=True)  # first: a folder without it is found again by what goes on
    if folder.exists():
        shutil.rmtree(folder)


def _numbered(folder: Path) -> Iterator[Path]:
    """`folder`, `folder_2`, `folder_3`, ... without end."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}_{number}")


def _move(source: Path, target: Path) -> None:
    os.rename(source, target)
    if text_log(source).exists():
        os.replace(text_log(source), text_log(target))
    sync_folder(target.parent)
