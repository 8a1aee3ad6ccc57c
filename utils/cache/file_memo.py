"""Record of files that were found good, with the SHA-256 of their bytes, so that they are checked once.

    memo = FileMemo(folder, Path("mine"), rule="Pillow 13.0.0, format 1")
    content, state, sha256 = read_signed(path)
    memo.add({path: (state, sha256)})
    memo.known(paths)                           # {path: sha256} of those that have not changed since

A file counts as unchanged while its size, modification time, inode change time and inode are. No program can
set the change time: an edit that puts the modification time back is seen, one under a clock that was turned
back is not.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from utils.files import excluding, replace_file

logger = logging.getLogger("nested_lora")

IMAGES = "images"  # folder in a cache for the records of image files
SETTLED = 2 * 10**9  # nanoseconds: some disks keep times so coarsely that a younger file might change unseen


class FileMemo:
    """Good files below `root`, in a JSON file that several processes may use.

    Its first line is the SHA-256 of the rest; a damaged one is read as empty.

    Args:
        folder: where the JSON file is, created when there is something to write; None remembers nothing.
        rule: what "good" means; records made under another rule are ignored.
    """

    def __init__(self, folder: Path | None, root: Path, rule: str) -> None:
        name = hashlib.sha256(os.path.abspath(root).encode(errors="surrogateescape")).hexdigest()[:24]
        self.path, self.rule = folder and folder / f"{name}.json", rule

    def known(self, paths: Iterable[Path]) -> dict[Path, str]:
        """SHA-256 of those files that were found good and have not changed since."""
        held, found = self._read(), {}
        for path in paths:
            state, sha256 = held.get(os.path.abspath(path), ("", ""))
            with suppress(OSError):
                if state and state == _state(path.stat()):
                    found[path] = sha256
        return found

    def add(self, files: Mapping[Path, tuple[str, str]]) -> None:
        """Remember good files: path -> state and SHA-256, from `read_signed`; none with an empty state."""
        new = {os.path.abspath(path): values for path, values in files.items() if values[0]}
        if new:
            self._write(self._read() | new)

    def forget(self, path: Path) -> None:
        """Forget a file, which is then read anew."""
        with self.lock():
            held = self._read()
            if held.pop(os.path.abspath(path), None):
                self._write(held)

    def lock(self) -> AbstractContextManager[None]:
        """Context that excludes other processes, where the disk has locks."""
        return nullcontext() if self.path is None else excluding(self.path.with_suffix(".lock"))

    def _read(self) -> dict[str, tuple[str, str]]:
        if self.path is None:
            return {}
        with suppress(OSError):
            digest, _, body = self.path.read_bytes().partition(b"\n")
            if digest != _digest(body):
                logger.warning(f"{self.path} is damaged: its files are read again")
                return {}
            content = json.loads(body)
            return content["files"] if content["rule"] == self.rule else {}
        return {}

    def _write(self, files: Mapping[str, tuple[str, str]]) -> None:
        if self.path is None:
            return
        body = json.dumps({"rule": self.rule, "files": files}).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, _digest(body) + b"\n" + body)
        except OSError as error:
            warning = f"The record of checked files cannot be written ({error}): they are read every run"
            logger.warning(warning)


def read_signed(path: Path) -> tuple[bytes, str, str]:
    """A file's bytes, its state and the bytes' SHA-256; the state is "" where the file has just changed.

    Raises OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        status, now = os.fstat(file.fileno()), time.time_ns()
        content = file.read()
    settled = now - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED
    return content, _state(status) if settled else "", hashlib.sha256(content).hexdigest()


def memo_files(folder: Path) -> dict[Path, int]:
    """The records in a folder, with their locks -> bytes."""
    name = "[0-9a-f]" * 24
    found = [*folder.glob(f"{name}.json"), *folder.glob(f"{name}.lock")]
    return {path: path.stat().st_size for path in found}


def _state(status: os.stat_result) -> str:
    return f"{status.st_size} bytes, {status.st_mtime_ns}, {status.st_ctime_ns}, inode {status.st_ino}"


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
