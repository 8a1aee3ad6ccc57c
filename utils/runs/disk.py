"""Disk space that runs will need, logged and compared with free space before they start.

    logger.info(disk_use(configs))      # UserError: the checkpoints do not fit

Checkpoints are estimated (`RunConfig.checkpoint_bytes`). The cache is not: it takes up to `cache_gb`, and
leaves `RESERVE` on its disk.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from utils.cache.tensor_cache import RESERVE
from utils.config.schema import RunConfig
from utils.errors import UserError

GB = 1e9


def disk_use(configs: Sequence[RunConfig], place: Path | None = None, learned: int = 0) -> str:
    """Sentence about the disk space that new runs will need, with a warning where it is tight.

    Args:
        configs: one per run; all write below the same `logs_root`.
        place: the folder that they write to, where it is not below `logs_root`.
        learned: number of first tasks whose checkpoints are there already.

    Raises UserError: the disk has less room than their checkpoints take.
    """
    logs = place or Path(configs[0].logs_root)
    free = shutil.disk_usage(_place(logs)).free
    sizes = [config.checkpoint_bytes()[learned:] for config in configs]
    kept = (getattr(config, "checkpoints", "all") for config in configs)
    need = sum(map(kept_bytes, sizes, kept))
    runs = "the run's checkpoints" if len(configs) == 1 else f"the checkpoints of {len(configs)} runs"
    sentence = f"{runs} take about {_gb(need)} of {_gb(free)} free in {logs}"
    if need > free:
        least = sum(kept_bytes(each, "last") for each in sizes)
        fewer = f"keep the last task's alone (--set checkpoints=last: {_gb(least)}), " if least < need else ""
        raise UserError(f"{sentence}: {fewer}free some space, or choose another disk with logs_root")
    caches = {config.cache_root: config.cache_gb for config in configs if hasattr(config, "cache_root")}
    for root, limit in caches.items():
        sentence += f"; the cache up to {limit:g} GB in {root}"
        if on_one_disk(root, logs) and need > RESERVE and need + limit * GB > free:
            room = int(max(0, free - need) / GB)
            sentence += f", which may leave too little for the checkpoints: set cache_gb to {room} at most"
    return f"Disk: {sentence}"


def kept_bytes(sizes: Sequence[int], checkpoints: str) -> int:
    """Largest space of a run's checkpoints at any time, from their sizes; "last" briefly keeps two."""
    return sum(sizes if checkpoints == "all" else sorted(sizes)[-2:])


def _place(path: str | Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())


def on_one_disk(*paths: str | Path) -> bool:
    """Whether paths lie on one disk, or will when they are made."""
    return len({os.stat(_place(path)).st_dev for path in paths}) == 1


def _gb(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{max(count, 1e6) / 1e6:.0f} MB"
