"""Tensors computed once and kept on disk: small files named by their content, shared by runs and processes.

    cache = TensorCache("cache", limit_gb=20)
    tokens = cache.get(group, key, build=lambda: network(images))    # read back, or built and stored

A file is `<root>/<group>/<key>.<dtype>.<checksum>.npy`. A rename makes it appear, complete, and a process compares its
checksum, which covers group, key and dtype too, when it first reads it: a file that is damaged, or was copied from
another key or group, is removed and its tensor built again. A group is removed as a whole, by
`drop` or, where room is needed, when others were used since; its folder's modification time is its last use. Nothing
but files named like these is ever removed.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("nested_lora")

IN_MEMORY = 8 * 2**20  # bytes; a larger tensor is memory-mapped
HEADER = 128  # bytes that precede a tensor's in a file; a multiple of 64, more than this for long shapes
RESERVE = 2 * 10**9  # bytes of the disk that are left free
EVERY = 60.0  # seconds between two looks at what other processes store, and two notes of a group's last use
STALE = 3600.0  # seconds after which a temporary file is what a killed process left
MARKER = "CACHE"  # file that says that a folder is a cache
ABOUT = "about.json"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_OURS = re.compile(r"[A-Za-z0-9_-]+\.[a-z0-9_]+\.[0-9a-f]{32}\.npy|about\.json|\.tmp-\d+-[0-9a-f]{8}")


class TensorCache:
    """Tensors by group and key in files below one folder, which is created when something is stored.

    Args:
        root: the folder; several processes may use it at once.
        limit_gb: size in GB (10^9 bytes) that all groups together may reach; 0 stores and reads nothing.
    """

    def __init__(self, root: str | Path, limit_gb: float) -> None:
        self.root, self.limit_gb = Path(root), limit_gb
        self._names: dict[str, dict[str, str]] = {}  # group -> key -> file, as last seen
        self._mapped: dict[str, dict[str, Tensor]] = {}  # group -> key -> open memory map
        self._verified: dict[Path, tuple[int, ...]] = {}  # file -> its `_version` when its checksum was right
        self._sizes: dict[str, int] = {}  # group -> bytes, as last measured and with what was written since
        self._measured = -math.inf
        self._touched: dict[str, float] = {}
        self._warned: set[str] = set()

    @property
    def enabled(self) -> bool:
        """Whether anything is stored or read."""
        return self.limit_gb > 0

    def get(self, group: str, key: str, build: Callable[[], Tensor]) -> Tensor:
        """The stored tensor on the CPU, not to be written to; where there is none it is built, and stored if it fits.

        A tensor above `IN_MEMORY` bytes is memory-mapped, and its map kept until the group is removed.

        Args:
            group, key: letters, digits, `-` and `_` (else ValueError); together they stand for one content.
            build: makes the tensor, of any dtype and shape on any device.
        """
        _require_names(group, key)
        if not self.enabled:
            return _on_cpu(build())
        tensor = self._read(group, key)
        if tensor is None:
            built = _on_cpu(build())
            tensor = self._read(group, key)  # another process may have stored it meanwhile
            if tensor is None:
                tensor = self._store(group, key, built)
        self._touch(group)
        return tensor

    def has(self, group: str, key: str) -> bool:
        """Whether a file is there for the tensor; its content is not looked at."""
        _require_names(group, key)
        return self.enabled and self._locate(group, key) is not None

    def make_room(self, group: str, bytes_needed: int) -> bool:
        """Whether so many more bytes fit within the limit and within the free disk less `RESERVE`.

        Groups that this instance has not used are removed for them, the one not used for the longest first; none where
        even all would not do.
        """
        _require_names(group)
        if not self.enabled or bytes_needed <= 0:
            return self.enabled
        self._measure(EVERY)
        if self._excess(bytes_needed) > 0:
            self._measure(1.0)
        excess = self._excess(bytes_needed)
        others = sorted(
            set(self._sizes) - {group} - set(self._touched), key=lambda name: last_use(self.root / name)
        )
        if excess > sum(self._sizes[name] for name in others):
            return False
        while excess > 0 and others:
            excess -= self._remove(others.pop(0))
        return excess <= 0

    def describe(self, group: str, about: Mapping[str, Any]) -> None:
        """Write, once, what a group holds: `about.json` in its folder, for a person to read."""
        _require_names(group)
        path = self.root / group / ABOUT
        if self.enabled and not path.exists():
            text = json.dumps(dict(about), indent=1, ensure_ascii=False)
            try:
                self._write(path, text.encode())
            except OSError as error:
                self._warn_once("write", f"The cache cannot write {path}: {error}")

    def drop(self, group: str) -> None:
        """Remove a group and forget its memory maps; one that is not there is no error."""
        _require_names(group)
        self._remove(group)

    def _locate(self, group: str, key: str) -> Path | None:
        """The file of a tensor; of several, which processes wrote at once, every reader takes the same."""
        folder = self.root / group
        name = self._names.get(group, {}).get(key)
        if name is None or not (folder / name).exists():
            names = sorted((name for name in _names(folder) if name.endswith(".npy")), reverse=True)
            self._names[group] = {name.split(".")[0]: name for name in names}
            name = self._names[group].get(key)
        return folder / name if name else None

    def _read(self, group: str, key: str) -> Tensor | None:
        """The stored tensor, or None; a damaged file is removed."""
        mapped = self._mapped.get(group, {}).get(key)
        path = self._locate(group, key) if mapped is None else None
        if path is None:
            return mapped
        try:
            return self._load(group, key, path)
        except (OSError, RuntimeError) as error:
            if path.exists():  # else another process removed it since it was located
                self._warn_once(
                    "read", f"The cache cannot read {path}: {error}; its tensor is computed again"
                )
        except ValueError as error:
            logger.warning(
                f"The cached file {path} is damaged ({error}): it is removed and its tensor built again"
            )
            with suppress(OSError):
                path.unlink()
        return None

    def _load(self, group: str, key: str, path: Path) -> Tensor:
        """The tensor in a file. Raises ValueError where that is damaged, OSError or RuntimeError where unreadable."""
        _, dtype, checksum, _ = path.name.split(".")
        status = path.stat()
        mapped = status.st_size > IN_MEMORY + HEADER
        if mapped:  # a private map, which unlike NumPy's keeps no file open
            data = torch.from_file(str(path), shared=False, size=status.st_size, dtype=torch.uint8)
        else:
            data = torch.from_numpy(np.fromfile(path, np.uint8))
        if self._verified.get(path) != _version(status):
            if _checksum(group, key, dtype, data.numpy()) != checksum:
                raise ValueError("content, key and group do not have the checksum in its name")
            self._verified[path] = _version(status)
        shape, start = _parse_header(data)
        tensor = data[start:].view(getattr(torch, dtype)).reshape(shape)
        if mapped:
            self._mapped.setdefault(group, {})[key] = tensor
        return tensor

    def _store(self, group: str, key: str, tensor: Tensor) -> Tensor:
        """Write a tensor if there is room for it; what `get` returns for it."""
        parts = (_header(tensor), tensor.reshape(-1).view(torch.uint8).numpy())
        size = sum(map(len, parts))
        if not self.make_room(group, size):
            self._warn_once("room", self._no_room(group, size))
            return tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        path = self.root / group / f"{key}.{dtype}.{_checksum(group, key, dtype, *parts)}.npy"
        try:
            self._write(path, *parts)
            self._sizes[group] = self._sizes.get(group, 0) + size
            self._verified[path] = _version(path.stat())
            return self._load(group, key, path) if size > IN_MEMORY + HEADER else tensor
        except (OSError, RuntimeError) as error:
            if not isinstance(error, FileNotFoundError):  # else another process removed the group meanwhile
                self._warn_once(
                    "write", f"The cache cannot write {path}: {error}; what is not kept is computed again"
                )
        return tensor

    def _write(self, path: Path, *parts: Any) -> None:
        """Let a file of these bytes or buffers appear at once in a group's folder. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (self.root / MARKER).exists():
            (self.root / MARKER).write_bytes(
                b"python -m utils.cache --root FOLDER --clear empties this cache.\n"
            )
        temporary = path.with_name(f".tmp-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            with open(temporary, "wb") as file:
                file.writelines(parts)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _touch(self, group: str) -> None:
        """Note that a group was used now."""
        if time.monotonic() - self._touched.get(group, -math.inf) >= EVERY:
            self._touched[group] = time.monotonic()
            with suppress(OSError):
                os.utime(self.root / group)

    def _measure(self, max_age: float) -> None:
        """Look at what all processes have stored, unless that was done less than `max_age` seconds ago."""
        if time.monotonic() - self._measured < max_age:
            return
        if self._measured == -math.inf:
            for left in self.root.glob("*/.tmp-*"):
                if _OURS.fullmatch(left.name) and time.time() - last_use(left) > STALE:
                    with suppress(OSError):
                        left.unlink()
        groups = groups_in(self.root)
        self._sizes = {group: sum(files.values()) for group, files in groups.items()}
        self._measured = time.monotonic()
        for group in set(self._mapped) - set(
            groups
        ):  # a map holds the disk space of the file that was removed
            del self._mapped[group]

    def _excess(self, bytes_needed: int) -> float:
        """Bytes by which so many more would be too many."""
        over_limit = sum(self._sizes.values()) + bytes_needed - self.limit_gb * 1e9
        return max(over_limit, bytes_needed + RESERVE - _free_disk(self.root))

    def _remove(self, group: str) -> int:
        """Remove a group; the bytes freed."""
        for known in (self._mapped, self._names, self._sizes, self._touched):
            known.pop(group, None)
        return remove_group(self.root / group)

    def _no_room(self, group: str, size: int) -> str:
        used, free = sum(self._sizes.values()) / 1e9, _free_disk(self.root) / 1e9
        return (
            f"The cache {self.root} has no room for {size / 1e6:.1f} MB of group {group}: {used:.2f} of "
            f"{self.limit_gb:g} GB are used, {free:.1f} GB of the disk are free, {RESERVE / 1e9:g} of them left alone; "
            "what is not kept is computed at every use: set cache_gb higher or free disk space"
        )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


def _require_names(*names: str) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a group or a key: only letters, digits, - and _ can")


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _header(tensor: Tensor) -> bytes:
    """What precedes the bytes in a .npy file, a multiple of 64 long; NumPy has no bfloat16: it sees uint16."""
    try:
        stored = tensor.numpy().dtype
    except TypeError:
        stored = np.dtype(f"u{tensor.itemsize}")
    header = io.BytesIO()
    content = {"descr": stored.str, "fortran_order": False, "shape": tuple(tensor.shape)}
    np.lib.format.write_array_header_1_0(header, content)
    return header.getvalue()


def _parse_header(data: Tensor) -> tuple[tuple[int, ...], int]:
    """Shape in the header of a file's bytes (n,), and the header's length. Raises ValueError."""
    header = io.BytesIO(data[:4096].numpy().tobytes())
    np.lib.format.read_magic(header)
    return np.lib.format.read_array_header_1_0(header)[0], header.tell()


def _checksum(group: str, key: str, dtype: str, *parts: Any) -> str:
    """Checksum of a file's bytes, which tell the shape too, and of what the file is for."""
    digest = hashlib.sha256(f"{group}/{key}.{dtype}\n".encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Size, modification time and inode: what changes when a file is written or another takes its place."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def last_use(path: Path) -> float:
    """Seconds since 1970; 0 for what is not there."""
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _free_disk(root: Path) -> int:
    """Free bytes of the disk on which `root` is, or would be."""
    root = root.absolute()
    return shutil.disk_usage(next(folder for folder in [root, *root.parents] if folder.exists())).free


def groups_in(root: Path) -> dict[str, dict[str, int]]:
    """Group -> name -> bytes of the cache's own files; a folder that has none is no group."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    found = {
        path.name: _files(path) for path in folders if _NAME.fullmatch(path.name) and not path.is_symlink()
    }
    return {group: files for group, files in found.items() if files}


def _names(folder: Path) -> list[str]:
    """The cache's own files in a group's folder, unfinished ones too; none where there is no such folder."""
    with suppress(OSError), os.scandir(folder) as entries:
        return [e.name for e in entries if _OURS.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
    return []


def _files(folder: Path) -> dict[str, int]:
    """Name -> bytes of the same."""
    found = {}
    for name in _names(folder):
        with suppress(FileNotFoundError):
            found[name] = (folder / name).stat().st_size
    return found


def remove_group(folder: Path) -> int:
    """Remove the cache's own files in a group's folder, and the folder when that leaves it empty; the bytes freed."""
    freed = 0
    for name, size in _files(folder).items():
        with suppress(OSError):
            (folder / name).unlink()
            freed += size
    with suppress(OSError):
        folder.rmdir()
    return freed
