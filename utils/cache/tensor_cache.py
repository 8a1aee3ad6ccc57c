"""Disk cache of tensors: safetensors files in groups, shared by processes; least recently used ones go first.

    cache = TensorCache("cache", limit_gb=20)
    tokens = cache.get(group, key, build=lambda: network(images))    # read back, or built and stored

A tensor lies in `<root>/<group>/<key>.cached.safetensors` with a SHA-256 over its bytes, dtype, shape, group
and key, which a process compares when it opens the file: a damaged or misplaced file is removed, its tensor
built again. Files are written atomically. Groups (`utils.cache.groups`) are removed as a whole, by `drop` or
to make room.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.cache.groups import ABOUT, MARKER, SUFFIX, UNFINISHED, groups_in, last_use, remove_group

logger = logging.getLogger("nested_lora")

LARGE = 8 * 2**20  # bytes above which a tensor stays open
RESERVE = 2 * 10**9  # bytes of the disk that are left free
LOCK = ".lock"  # held by the process that writes


class TensorCache:
    """Tensors by group and key below one folder, which is created when something is stored.

    Group and key must be valid in a file name; together they identify the content.

    limit_gb: size in GB (10^9 bytes) that all groups together may reach; 0 stores and reads nothing.
    """

    def __init__(self, root: str | Path, limit_gb: float) -> None:
        self.root, self.limit_gb = Path(root), limit_gb
        self._open: dict[str, dict[str, Tensor]] = {}  # used group -> file name -> memory map of a large file
        self._verified: dict[Path, tuple[int, int, int]] = {}  # file -> its state when its checksum was right
        self._room = ("", 0)  # group and bytes that `make_room` found room for, not written yet
        self._warned: set[str] = set()

    @property
    def enabled(self) -> bool:
        """Whether anything is stored or read."""
        return self.limit_gb > 0

    def get(self, group: str, key: str, build: Callable[[], Tensor]) -> Tensor:
        """The stored tensor on the CPU, not to be written to; an absent one is built, and stored if it fits.

        Stored tensors are memory-mapped; the maps of large ones are kept until the group is removed.
        """
        path = self._path(group, key)
        if (stored := self._read(path)) is not None:
            return stored
        built = build().detach().cpu().contiguous()
        if (stored := self._read(path)) is not None:  # another process has stored it meanwhile
            return stored
        return self._store(path, built) if self.enabled else built

    def has(self, group: str, key: str) -> bool:
        """Whether a file is there for the tensor; its content is not looked at."""
        return self._path(group, key).is_file() and self.enabled

    def make_room(self, group: str, bytes_needed: int) -> bool:
        """Whether so many more bytes fit within the limit and within the free disk less `RESERVE`.

        Groups that this instance has not used are removed for them, the least recently used first; none if
        even all would not suffice. Later `get` calls use this room without scanning the folder again.
        """
        if not self.enabled or bytes_needed <= 0:
            return self.enabled
        sizes = {name: sum(files.values()) for name, files in groups_in(self.root).items()}
        self._open = {name: maps for name, maps in self._open.items() if name in sizes}
        over_limit = sum(sizes.values()) + bytes_needed - self.limit_gb * 1e9
        excess = max(over_limit, bytes_needed + RESERVE - self._free_bytes())
        unused = sorted(
            sizes.keys() - self._open.keys() - {group}, key=lambda name: last_use(self.root / name)
        )
        if excess > sum(sizes[name] for name in unused):
            return False
        for name in unused:
            if excess > 0:
                excess -= remove_group(self.root / name)
        self._room = group, bytes_needed if excess <= 0 else 0
        return excess <= 0

    def describe(self, group: str, about: Mapping[str, Any]) -> None:
        """Write a description of a group for people, once: `about.json` in its folder."""
        path = self.root / group / ABOUT
        if self.enabled and not path.exists():
            self._write(path, json.dumps(dict(about), indent=1, ensure_ascii=False).encode())

    def drop(self, group: str) -> None:
        """Remove a group; one that is not there is no error."""
        remove_group(self.root / group)
        self._open.pop(group, None)

    def _path(self, group: str, key: str) -> Path:
        return self.root / group / f"{key}{SUFFIX}"

    def _read(self, path: Path) -> Tensor | None:
        """The stored tensor, or None; a damaged file is removed."""
        maps = self._open.get(path.parent.name, {})
        if path.name in maps or not self.enabled or not path.is_file():
            return maps.get(path.name)
        try:
            return self._map(path)
        except (SafetensorError, ValueError) as error:
            logger.warning(f"The cached file {path} is damaged ({error}): its tensor is built again")
            with suppress(OSError):
                path.unlink()
        except (OSError, RuntimeError) as error:
            if path.exists():  # else another process has removed it meanwhile
                self._warn_once(f"The cache cannot read {path}: {error}; its tensor is built again")
        return None

    def _map(self, path: Path, verify: bool = True) -> Tensor:
        """Open a file. Raises ValueError or SafetensorError where it is damaged, OSError where unreadable."""
        status = path.stat()
        state = status.st_size, status.st_mtime_ns, status.st_ino
        with safe_open(path, framework="pt") as file:
            if list(file.keys()) != ["tensor"]:
                raise ValueError("it does not hold one tensor")
            tensor, metadata = file.get_tensor("tensor"), file.metadata()
        if verify and self._verified.get(path) != state and metadata != {"sha256": _checksum(path, tensor)}:
            raise ValueError("content, key and group do not have the checksum in it")
        self._verified[path] = state
        with suppress(OSError):
            os.utime(path.parent)
        maps = self._open.setdefault(path.parent.name, {})
        if tensor.nbytes > LARGE:
            maps[path.name] = tensor
        return tensor

    def _free_bytes(self) -> int:
        disk = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        return shutil.disk_usage(disk).free

    def _has_room(self, group: str, size: int) -> bool:
        """Whether so many bytes fit, in the room that was made for the group or else made now."""
        made = self._room[1] if self._room[0] == group else 0
        if (made < size or self._free_bytes() < size + RESERVE) and not self.make_room(group, size):
            return False
        self._room = group, self._room[1] - size
        return True

    def _store(self, path: Path, tensor: Tensor) -> Tensor:
        """The tensor as `get` returns it, written if there is room for it."""
        if not self._has_room(path.parent.name, tensor.nbytes):
            self._warn_once(
                f"No room in the cache {self.root} for {tensor.nbytes / 1e6:.1f} MB within {self.limit_gb:g} "
                f"GB and with {RESERVE / 1e9:g} GB of the disk left free: what is not kept is computed at "
                "every use; set cache_gb higher or free disk space"
            )
            return tensor
        content = save({"tensor": tensor}, {"sha256": _checksum(path, tensor)})
        return self._map(path, verify=False) if self._write(path, content) else tensor

    def _write(self, path: Path, content: bytes) -> bool:
        """Atomic write of a file in a group's folder; False, after a warning, where the disk refuses."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / LOCK):
                (self.root / MARKER).touch()
                (self.root / UNFINISHED).write_bytes(content)
                os.replace(self.root / UNFINISHED, path)
            return True
        except (OSError, NotImplementedError) as error:
            if not isinstance(error, FileNotFoundError):  # else another process has removed the group
                self._warn_once(f"The cache cannot write {path}: {error}; what is not kept is computed again")
            with suppress(OSError):
                (self.root / UNFINISHED).unlink(missing_ok=True)
            return False

    def _warn_once(self, message: str) -> None:
        """Log a warning, but only the first of an instance that begins like this."""
        kind = message[:20]
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


def _checksum(path: Path, tensor: Tensor) -> str:
    """SHA-256 over group, file name, dtype, shape and bytes of a tensor."""
    digest = hashlib.sha256(f"{path.parent.name}/{path.name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
