"""Groups of a tensor cache on disk: folders of files with names of their own, and the time of their last use.

    groups_in(Path("cache"))        # {"a1b2": {"about.json": 310, "c3.cached.safetensors": 4096}}

The modification time of a group's folder is its last use. Only files with these names are ever removed.
"""

import os
from contextlib import suppress
from pathlib import Path

MARKER = "CACHE"  # file that says that a folder is a cache
ABOUT = "about.json"  # what a group holds, for people
SUFFIX = ".cached.safetensors"
UNFINISHED = ".writing"  # beside the groups: what a process writes, before its rename into one


def last_use(group: Path) -> float:
    """Time of a group's last use in seconds since 1970; 0 if it does not exist."""
    with suppress(OSError):
        return group.stat().st_mtime
    return 0.0


def groups_in(root: Path) -> dict[str, dict[str, int]]:
    """Group -> name -> bytes of the cache's own files; a folder without tensors is no group, but anyone's."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    found = {path.name: _files(path) for path in folders if not path.is_symlink()}
    return {group: files for group, files in found.items() if files.keys() - {ABOUT}}


def _files(group: Path) -> dict[str, int]:
    """Name -> bytes of the cache's own files in a group's folder."""
    found = {}
    with suppress(OSError), os.scandir(group) as entries:
        for entry in entries:
            ours = entry.name == ABOUT or entry.name.endswith(SUFFIX)
            with suppress(FileNotFoundError):
                if ours and entry.is_file(follow_symlinks=False):
                    found[entry.name] = entry.stat().st_size
    return found


def remove_group(group: Path) -> int:
    """Remove the cache's own files of a group, and its folder when that leaves it empty; the bytes freed."""
    freed = 0
    for name, size in _files(group).items():
        with suppress(OSError):
            (group / name).unlink()
            freed += size
    with suppress(OSError):
        group.rmdir()
    return freed
