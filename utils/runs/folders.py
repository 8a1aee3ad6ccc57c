"""Folders that one process at a time writes, and that are replaced without being lost.

    with FolderLock(folder):            # UserError naming the process that writes it
        restore_replaced(folder)        # what a killed process had moved aside and not yet replaced
        set_aside(folder)               # folder -> folder.replaced, the text log beside it too
        create_folder(folder, {"config.json": text.encode()})
        ...
        remove_replaced(folder)         # the new one is finished

Those of runs are claimed by `utils/runs/run_folder.py`, that of a sweep by `utils/sweeps/folder.py`.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.files import read_json, sync_folder, write_json, write_synced

logger = logging.getLogger("nested_lora")

REPLACED = ".replaced"  # what is added to the name of a folder while its replacement is unfinished
ORPHANS = 10.0  # seconds that data workers may outlive a killed process, whose lock they hold


class Held(UserError):
    """Another process has the lock of a folder."""


class FolderLock:
    """The right to write in a folder, held by one process at a time and lost when it ends, however it ends.

    The lock is a hidden file beside the folder, `.<name>.lock`, which stays; while it is held, `.<name>.lock.json` says
    by whom. The folder itself need not exist, its parent must.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        real = folder.resolve()  # one lock, by whatever name the folder is called
        self.path = real.with_name(f".{real.name}.lock")
        self._lock = FileLock(self.path, thread_local=False)
        self._owner = real.with_name(f".{real.name}.lock.json")

    def acquire(self) -> FolderLock:
        """Take the lock; `Held`, a UserError that names the process that has it, where another does."""
        try:
            self._lock.acquire(timeout=ORPHANS if self._left_by_the_dead() else 0)
        except Timeout:
            raise Held(
                f"{self.folder} is being written by {self.holder}: wait until it has ended, or stop it, then give the "
                "command again"
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
            owner = read_json(self._owner)
        except UserError:  # it has only just taken the lock
            return "another process"
        return "process {pid} on {host} since {since}".format_map(
            {"pid": "?", "host": "?", "since": "?"} | owner
        )

    def _left_by_the_dead(self) -> bool:
        """Whether the last holder was a process of this machine that is no more."""
        try:
            owner = read_json(self._owner)
            if owner.get("host") != socket.gethostname():
                return False
            os.kill(int(owner["pid"]), 0)
        except ProcessLookupError:
            return True
        except (UserError, OSError, KeyError, TypeError, ValueError, OverflowError):
            pass
        return False


def text_log(folder: Path) -> Path:
    """The text log that lies beside a folder: `<folder>.log`."""
    return folder.with_name(f"{folder.name}.log")


def numbered(folder: Path) -> Iterator[Path]:
    """`folder`, `folder_2`, `folder_3`, ... without end."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}_{number}")


def create_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder that holds files from the first moment on; the caller holds its lock. OSError: it cannot be made.

    It is prepared as `.<name>.new` and renamed, so that no moment shows it without them; what a killed process left
    under that name is removed.
    """
    prepared = folder.with_name(f".{folder.name}.new")
    if prepared.exists():
        shutil.rmtree(prepared)
    try:
        prepared.mkdir()
        for name, content in files.items():
            write_synced(prepared / name, content)
        sync_folder(prepared)
        os.replace(prepared, folder)
    except OSError:
        shutil.rmtree(prepared, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def replaced_folders(folder: Path) -> list[Path]:
    """The earlier folders that wait beside one until it is finished, oldest first."""
    pattern = re.compile(re.escape(folder.name + REPLACED) + r"(?:_(\d+))?")
    found = {}
    if folder.parent.is_dir():
        for path in folder.parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match and path.is_dir():
                found[int(match[1] or 1)] = path
    return [found[number] for number in sorted(found)]


def set_aside(folder: Path) -> Path:
    """Move a folder and its text log to `<folder>.replaced` (or `_2`, ...), and return that; its lock is held."""
    free = numbered(folder.with_name(folder.name + REPLACED))
    aside = next(path for path in free if not os.path.lexists(path) and not os.path.lexists(text_log(path)))
    _move(folder, aside)
    return aside


def restore_replaced(folder: Path) -> Path | None:
    """Move the newest folder that was set aside back where none stands in its place; returns where it had been.

    That is so after a process was killed between the two moves, and when its replacement was given up.
    """
    aside = replaced_folders(folder)
    if not aside or os.path.lexists(folder):
        return None
    _move(aside[-1], folder)
    logger.warning(f"{folder} is back from {aside[-1].name}: what was to replace it had not begun")
    return aside[-1]


def remove_replaced(folder: Path) -> None:
    """Remove what a folder replaces, now that it is finished; one that another process writes is left and named."""
    for aside in replaced_folders(folder):
        try:
            with FolderLock(aside) as lock:
                remove_folder(aside)
                lock.path.unlink()
        except Held as error:
            logger.warning(f"What {folder} replaces stays: {error}")


def remove_folder(folder: Path) -> None:
    """Remove a folder and its text log."""
    text_log(folder).unlink(missing_ok=True)  # first: a folder without it is found again by what goes on
    if folder.exists():
        shutil.rmtree(folder)


def _move(source: Path, target: Path) -> None:
    os.rename(source, target)
    if text_log(source).exists():
        os.replace(text_log(source), text_log(target))
    sync_folder(target.parent)
