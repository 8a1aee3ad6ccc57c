"""Files: atomic writes, JSON, headers of .npz files, locks, hashes.

replace_file(folder / "summary.md", text.encode())
write_json(folder / "config.json", values)
values = read_json(folder / "config.json")   # UserError: absent, not UTF-8, not JSON, no object
with damaged(folder / "config.json"):
    seed = values["seed"]                    # UserError instead of KeyError
headers = npz_headers(path)                  # shape and type of its arrays; ValueError: they do not fit it
"""

import hashlib
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from utils.errors import UserError, in_one_line

DEFLATE_LIMIT = 1100  # a little more than the largest compression ratio of deflate
IRREGULAR = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file atomically, by way of a hidden temporary file beside it; returns its path.

    The folder must exist. OSError, naming the file: the disk does not take it; the old one stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # not the temporary one
        with suppress(OSError):  # where there is no temporary one, for whatever reason
            temporary.unlink()
        raise
    sync_folder(path.parent)
    return path


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a JSON object as a whole or not at all; raises ValueError for NaN and infinities."""
    return replace_file(path, json_bytes(values))


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """The content of a JSON file for people: indented, UTF-8; raises ValueError for NaN and infinities."""
    return (json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context in which an OSError that names no file, such as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def damaged(what: Path | str, way_out: str = "restore it") -> Iterator[None]:
    """Context that turns errors from unexpected content of a file into a UserError that names the file.

    Args:
        what: the file, or a place in it.
        way_out: advice in the error.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else in_one_line(error)
        raise UserError(f"{what} is damaged ({reason}): {way_out}") from error


def read_json(path: Path, way_out: str = "restore it") -> dict[str, Any]:
    """The JSON object in a file.

    Raises UserError: the file is absent, unreadable, not UTF-8, not JSON, nested too deep, or no object.
    way_out: advice in the error.
    """
    try:
        with damaged(path, way_out):
            values = json.loads(path.read_bytes().decode("utf-8-sig"))
            if not isinstance(values, dict):
                raise ValueError("it holds no JSON object")
            return values
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} holds no {path.name}: it is another folder than expected, or the file was removed"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {way_out}") from error


def npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array in an .npz, from the headers alone: checked before memory is taken.

    Raises:
        ValueError: a header is invalid, or asks for another number of bytes than follow it, or for more than
            the file can hold.
        OSError, zipfile.BadZipFile: the file cannot be read, or is no archive.
    """
    headers, most = {}, DEFLATE_LIMIT * path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                first = np.lib.format.read_magic(file) == (1, 0)
                read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                held = member.file_size - file.tell()
            if not dtype.hasobject and math.prod(shape) * dtype.itemsize != held or held > most:
                raise ValueError(
                    f"{member.filename} is {dtype} {shape} by its header, and holds {held:,} bytes"
                )
            headers[member.filename.removesuffix(".npy")] = (shape, dtype)
    return headers


@contextmanager
def excluding(lock: Path) -> Iterator[None]:
    """Context that one process at a time is in, by a lock file, which stays; where the disk has locks."""
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock))
        yield


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises OSError when it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_no_file(path: Path) -> str | None:
    """The reason why a path cannot be read as a file, such as "it is a FIFO"; None for a regular file.

    Nothing is opened: opening a FIFO would wait for ever.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "it is a link to nothing" if path.is_symlink() else "it is not there"
    except (OSError, ValueError) as error:
        return f"the system refuses it: {getattr(error, 'strerror', None) or error}"
    return None if stat.S_ISREG(mode) else f"it is {IRREGULAR.get(stat.S_IFMT(mode), 'no regular file')}"


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with naming(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries, such as a rename in it (Windows has no such call)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
