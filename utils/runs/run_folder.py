"""The folder of a run: where it lies, how it is claimed and given up, and how far its run is.

    lock, notes = claim(folder_of(config, seed=1993), overwrite=False)      # the first free of folder, folder_2, ...
    make_way(lock.folder)                       # to overwrite: what is there is set aside
    give_up(lock, new_parents=[])               # nothing was recorded: the new run goes, what was set aside is back
    is_complete(folder)

What lies in it is written by `utils/runs/run_log.py`; locks and replaced folders are those of `utils/runs/folders.py`.
"""

import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.runs.folders import (
    FolderLock,
    Held,
    numbered,
    remove_folder,
    replaced_folders,
    restore_replaced,
    set_aside,
    text_log,
)
from utils.runs.manifest import MANIFEST, read_manifest

logger = logging.getLogger("nested_lora")

CONFIG = "config.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
ACCURACY = "accuracy.csv"
TENSORBOARD = "tb"
FIGURES = "figures"
TABLE = "metrics.csv"


def folder_of(config: RunConfig, seed: int) -> Path:
    """Where one seed of a configuration is recorded: its `folder_names` below `logs_root`.

    Slashes inside a name become dashes: every name is one level.
    """
    names = config.folder_names(seed)
    return Path(config.logs_root).joinpath(*(name.replace("/", "-").replace("\\", "-") for name in names))


def is_complete(folder: Path) -> bool:
    """Whether nothing of a run is missing: its result, its figures, and the end of what it replaces.

    Raises UserError when its manifest is damaged.
    """
    if not (folder / RESULT).exists() or not (folder / FIGURES).is_dir() or replaced_folders(folder):
        return False
    return read_manifest(folder).finished is not None


def claim(folder: Path, overwrite: bool) -> tuple[FolderLock, list[str]]:
    """The lock of the first free of `folder`, `folder_2`, ...; what to say of those that are taken.

    With `overwrite` that of `folder` itself; UserError when another process has it.
    """
    notes: list[str] = []
    for candidate in numbered(folder):
        lock = FolderLock(candidate)
        try:
            lock.acquire()
        except Held:
            if overwrite:
                raise
            notes.append(f"{candidate} is being written by {lock.holder}")
            continue
        restore_replaced(candidate)
        if _half_made(candidate):
            remove_folder(candidate)
        if overwrite or not (os.path.lexists(candidate) or os.path.lexists(text_log(candidate))):
            return lock, [*notes, f"this run goes to {candidate}"] if notes else []
        lock.release()
        notes += _taken_notes(candidate)
    raise AssertionError("unreachable: the numbers do not end")


def _taken_notes(folder: Path) -> list[str]:
    """What to say of a folder that a new run leaves alone."""
    if (folder / CONFIG).exists() and not (folder / RESULT).exists():
        command = f"python main.py --resume {shlex.quote(str(folder))}"
        return [f"{folder} has no {RESULT}: unfinished. To continue it: {command}", *waiting_notes(folder)]
    return [f"{folder} is there already (--overwrite replaces it)", *waiting_notes(folder)]


def waiting_notes(folder: Path) -> list[str]:
    """Where the runs are that a run replaces, until it is finished; nothing where it replaces none."""
    where = ", ".join(map(str, replaced_folders(folder)))
    return [f"{where}: the run that {folder.name} replaces, removed when that is finished"] if where else []


def make_way(folder: Path) -> list[str]:
    """Set a run's folder and text log aside; refuses a folder that holds other things than a run."""
    if os.path.lexists(folder) and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds no {CONFIG}, so it is not a run folder: move it away, it is not overwritten"
        )
    if folder.is_dir():
        set_aside(folder)
    else:
        remove_folder(folder)
    return waiting_notes(folder)


def give_up(lock: FolderLock, new_parents: Sequence[Path]) -> None:
    """Remove a new run that has recorded nothing, and the folders made for it; what it was to replace comes back."""
    if lock.folder.exists() and not _unbegun(lock.folder):
        return
    remove_folder(lock.folder)
    if restore_replaced(lock.folder) is None and new_parents:
        lock.path.unlink()
        lock.release()
        for parent in new_parents:
            with suppress(OSError):  # another process has put something there
                parent.rmdir()


def _half_made(folder: Path) -> bool:
    """Whether a folder is what a process left that was killed before it had written a configuration."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return {path.name for path in folder.iterdir()} <= {METRICS, TENSORBOARD, TABLE, f".{CONFIG}.tmp"}


def _unbegun(folder: Path) -> bool:
    """Whether a run has recorded nothing yet: no event, no checkpoint."""
    at_first = {CONFIG, MANIFEST, METRICS, TENSORBOARD, TABLE}
    empty = not (folder / METRICS).exists() or (folder / METRICS).stat().st_size == 0
    return empty and {path.name for path in folder.iterdir()} <= at_first
