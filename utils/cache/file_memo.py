"""Memory of which files were read and found good, and the SHA-256 of their bytes, so that they are read only once.

    memo = FileMemo(Path("cache/images"), rule="Pillow 13.0.0, format 1")
    content, state, sha256 = read_signed(path)
    memo.add({path: (state, sha256)})
    memo.known(root, paths)                     # {path: sha256} of those that have not changed since

A file counts as unchanged while its size, modification time, inode change time and inode are. The system moves the
change time at every write and lets no program set it: an edit that puts the modification time back is seen too. What
is not seen is a change under a clock that was turned back, or by writing to the disk past the file system.
"""

import hashlib
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger("nested_lora")

DATABASE, LOCK = "files.sqlite", "files.lock"
SETTLED = 2 * 10**9  # nanoseconds: some disks tell times so coarsely that a younger file might change unseen
TABLE = "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, state TEXT, sha256 TEXT, checksum INTEGER)"


class FileMemo:
    """What is known of good files, in a database that several processes may use; without it nothing is remembered.

    A row has a checksum, and a damaged database is removed: what is found wrong is read again.

    Args:
        folder: where the database is, created when there is something to write; None remembers nothing.
        rule: what "good" means; rows that were written under another rule do not count.
    """

    def __init__(self, folder: Path | None, rule: str) -> None:
        self.folder, self.rule = folder, rule

    def known(self, root: Path, paths: Sequence[Path]) -> dict[Path, str]:
        """SHA-256 of those files below `root` that were found good and have not changed since."""
        if self.folder is None or not paths or not (self.folder / DATABASE).exists():
            return {}
        first = os.path.abspath(root)
        query = "SELECT * FROM files WHERE path BETWEEN ? AND ?"
        rows = self._transaction(
            lambda database: database.execute(query, (first, first + "\U0010ffff")).fetchall()
        )
        sound = {
            path: (state, sha) for path, state, sha, check in rows if check == _checksum(path, state, sha)
        }
        found = {}
        for path in paths:
            state, sha256 = sound.get(os.path.abspath(path), ("", ""))
            with suppress(OSError):
                if state == f"{self.rule}; {_state(path.stat())}":
                    found[path] = sha256
        return found

    def add(self, files: Mapping[Path, tuple[str, str]]) -> None:
        """Remember good files: path -> state and SHA-256, from `read_signed`; those that have just changed are not."""
        rows = [
            (os.path.abspath(path), f"{self.rule}; {state}", sha)
            for path, (state, sha) in files.items()
            if state
        ]
        if self.folder is None or not rows:
            return

        def write(database: sqlite3.Connection) -> list[tuple]:
            database.execute(TABLE)
            checked = [(*row, _checksum(*row)) for row in rows]
            return database.executemany("REPLACE INTO files VALUES (?, ?, ?, ?)", checked).fetchall()

        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._transaction(write)

    def forget(self, path: Path) -> None:
        """Forget a file, which is then read anew."""
        if self.folder is not None and (self.folder / DATABASE).exists():
            key = (os.path.abspath(path),)
            self._transaction(
                lambda database: database.execute("DELETE FROM files WHERE path = ?", key).fetchall()
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """While open, other processes wait here, where the disk has locks."""
        with ExitStack() as stack:
            if self.folder is not None:
                with suppress(OSError, NotImplementedError):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(FileLock(self.folder / LOCK))
            yield

    def _transaction(self, work: Callable[[sqlite3.Connection], list[tuple]]) -> list[tuple]:
        """Rows that some work on the database gives; after an error, which is a warning, none."""
        path = self.folder / DATABASE
        try:
            with closing(sqlite3.connect(path, timeout=60)) as database, database:
                return work(database)
        except sqlite3.Error as error:
            told = f"What is known of image files cannot be kept in {path} ({error}): they are read again in every run"
            if type(error) is sqlite3.DatabaseError:  # its subclasses are refusals of the system
                told = f"{path} is damaged ({error}): it is removed, and the image files are read again"
                with suppress(OSError):
                    path.unlink()
            logger.warning(told)
            return []


def read_signed(path: Path) -> tuple[bytes, str, str]:
    """A file's bytes, its state and the bytes' SHA-256; the state is "" where the file has just changed.

    Raises OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        status, now = os.fstat(file.fileno()), time.time_ns()
        content = file.read()
    settled = now - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED
    return content, _state(status) if settled else "", hashlib.sha256(content).hexdigest()


def remove_memo(folder: Path) -> int:
    """Remove the database of a folder and its lock; the bytes freed."""
    freed = memo_bytes(folder)
    for name in (DATABASE, f"{DATABASE}-journal", LOCK):
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    return freed


def memo_bytes(folder: Path) -> int:
    """Size of a folder's database; 0 where there is none."""
    with suppress(OSError):
        return (folder / DATABASE).stat().st_size
    return 0


def _state(status: os.stat_result) -> str:
    return f"{status.st_size} bytes, {status.st_mtime_ns}, {status.st_ctime_ns}, inode {status.st_ino}"


def _checksum(*texts: str) -> int:
    return zlib.crc32("\n".join(map(str, texts)).encode())
