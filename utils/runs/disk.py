"""Disk space that is still needed, judged by the size of what has been written, and what is free.

disk = DiskWatch(folder, config)
disk.compare("checkpoint", size_of(checkpoint), left=3)     # after each of them
"""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from utils.config.schema import RunConfig

logger = logging.getLogger("nested_lora")

GB = 1e9


class DiskWatch:
    """Comparison of needed with free space: told once, and warned of once where it does not fit.

    folder: where a run of `config` writes, or a sweep with such runs.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config, self.told = folder, config, 0

    def compare(self, noun: str, size: float, left: int) -> None:
        """Log how `left` more, of about `size` bytes each, compare with the free space."""
        need, free = left * size, shutil.disk_usage(self.folder).free
        level = logging.WARNING if need > free else logging.INFO
        if left and level > self.told:
            self.told = level
            sizes = f"a {noun} takes {_gb(size)}, what is to come about {_gb(need)}"
            way_out = self._way_out() if need > free else ""
            logger.log(level, f"Disk: {sizes}; {_gb(free)} are free in {self.folder}{way_out}")

    def _way_out(self) -> str:
        ways = ["free some space"]
        if getattr(self.config, "checkpoints", "last") == "all":
            ways.append("keep only the last checkpoint (checkpoints=last)")
        cache, limit = Path(getattr(self.config, "cache_root", "")), getattr(self.config, "cache_gb", 0)
        if limit and cache.exists() and cache.stat().st_dev == self.folder.stat().st_dev:
            ways.append(f"let the cache in {cache} be smaller (cache_gb)")
        full = "a run that fills the disk ends, and can be resumed"
        return f": {', '.join(ways)}, or choose another disk (logs_root); {full}"


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and below, without those that go meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.path.getsize(os.path.join(place, name))
    return size


def _gb(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{max(count, 1e6) / 1e6:.0f} MB"
