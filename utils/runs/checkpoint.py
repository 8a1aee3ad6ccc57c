"""Checkpoints, complete whenever a process is killed: safetensors for tensors, JSON for the rest, no pickle.

    save_checkpoint(run / "checkpoints" / checkpoint_name(3), tensors, state)         # at the end of task 3
    save_checkpoint(run / "checkpoints" / checkpoint_name(3, 120), tensors, state)    # after its step 120
    tensors, state = load_checkpoint(latest_checkpoint(run / "checkpoints"))

A checkpoint is a folder with `tensors.safetensors` and `state.json`, which records the format's version and
the hashes of both parts. It is written under a hidden name (`.tmp-...`), forced to disk and renamed, so a
visible folder is always complete. A folder that is replaced is first set aside as `.old-...` and removed
last: until the new one stands, the old one is still found by `latest_checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors_torch

from utils.errors import UserError
from utils.files import damaged, read_json, sync_folder, write_synced

FORMAT = "nested-lora checkpoint"
VERSION = 1
TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
WAY_OUT = "remove this checkpoint to go on from the one before it"  # advice for a damaged one
TEMPORARY = ".tmp-"  # unfinished or to be removed: never read
SET_ASIDE = ".old-"  # complete, while its replacement is moved into place
_NAME = re.compile(r"task_(\d+)(?:_step_(\d+))?")


def checkpoint_name(task: int, step: int | None = None) -> str:
    """Folder name of a checkpoint: `task_03` at the end of task 3, `task_03_step_000120` inside it."""
    return f"task_{task:02d}" if step is None else f"task_{task:02d}_step_{step:06d}"


def save_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint, replacing an existing one; at every moment the visible folder is complete.

    Args:
        folder: the checkpoint's; its parent is created.
        tensors: aliases and views are stored as separate copies.
        state: what JSON can hold, with text keys. Tuples come back as lists; numbers come back exactly.

    Raises:
        TypeError: JSON would change the state or cannot hold it.
        OSError: it cannot be written; an existing checkpoint is unchanged.
    """
    _require_text_keys(state)
    # A fresh contiguous CPU copy of each: safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    payload = safetensors_torch.save(copies)
    content = _state_file(state, hashlib.sha256(payload).hexdigest())
    folder.parent.mkdir(parents=True, exist_ok=True)
    _tidy(folder.parent)
    temporary = folder.with_name(TEMPORARY + folder.name)
    try:
        temporary.mkdir()
        write_synced(temporary / TENSORS_FILE, payload)
        write_synced(temporary / STATE_FILE, content)
        sync_folder(temporary)
        if folder.exists():
            os.rename(folder, folder.with_name(SET_ASIDE + folder.name))
        os.rename(temporary, folder)
    except OSError:  # a full disk, say
        with suppress(OSError):
            _tidy(folder.parent)
        raise
    sync_folder(folder.parent)
    _tidy(folder.parent)


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint back: (tensors on the CPU, state), after checking version and hashes.

    Raises UserError when the folder is missing, foreign, truncated, damaged or of a newer format.
    """
    if not folder.is_dir():
        kept = sorted(path.name for path in folder.parent.glob("task_*"))
        which = f"kept are {', '.join(kept[-3:])}" if kept else "give one like checkpoints/task_00"
        raise UserError(f"{folder} is not a checkpoint: there is no such folder; {which}")
    for name in (STATE_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a checkpoint: it holds no {name}")
    header = _read_header(folder)
    payload = (folder / TENSORS_FILE).read_bytes()
    with damaged(folder, WAY_OUT):
        if hashlib.sha256(payload).hexdigest() != header["tensors_sha256"]:
            raise ValueError(f"{TENSORS_FILE} does not have the recorded SHA-256")
    return safetensors_torch.load(payload), header["state"]


def copy_checkpoint(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Copy a checkpoint with changes to its state; tensors are hard-linked where the disk allows.

    UserError: the source is no checkpoint, or its state is damaged.
    """
    header = _read_header(source)
    content = _state_file(header["state"] | changes, header["tensors_sha256"])
    target.mkdir(parents=True)
    try:
        os.link(source / TENSORS_FILE, target / TENSORS_FILE)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source / TENSORS_FILE, target / TENSORS_FILE)
    write_synced(target / STATE_FILE, content)


def latest_checkpoint(checkpoints: Path, whole_tasks: bool = False) -> Path | None:
    """The last checkpoint of the run by task and step, or None.

    The end of a task comes after its steps; with `whole_tasks` steps are ignored. So are unfinished
    checkpoints, but not damaged ones: `load_checkpoint` refuses these, so that no run silently goes on from
    an older one. UserError: a file stands in the folder's place.
    """
    if not checkpoints.is_dir():
        if os.path.lexists(checkpoints):
            raise UserError(f"{checkpoints} is no folder of checkpoints: restore the folder that was there")
        return None
    found: dict[tuple[int, float], Path] = {}
    for folder in checkpoints.iterdir():
        visible = folder.with_name(folder.name.removeprefix(SET_ASIDE))
        position = _NAME.fullmatch(visible.name)
        superseded = folder != visible and visible.exists()
        complete = (folder / STATE_FILE).is_file() and (folder / TENSORS_FILE).is_file()
        if position and complete and not superseded:
            task, step = position.groups()
            if step is None or not whole_tasks:
                found[int(task), math.inf if step is None else int(step)] = folder
    return found[max(found)] if found else None


def _tidy(checkpoints: Path) -> None:
    """Remove what a save has replaced or left unfinished; restore what it has set aside but not replaced.

    A folder that is only half removed lacks a file: it is never taken for a checkpoint.
    """
    for aside in checkpoints.glob(f"{SET_ASIDE}*"):
        visible = aside.with_name(aside.name.removeprefix(SET_ASIDE))
        if visible.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, visible)
    for leftover in checkpoints.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


def _read_header(folder: Path) -> dict[str, Any]:
    header = read_json(folder / STATE_FILE, WAY_OUT)
    if header.get("format") != FORMAT:
        raise UserError(
            f"{folder} is not a checkpoint of this program: its {STATE_FILE} does not say '{FORMAT}'"
        )
    with damaged(folder / STATE_FILE, WAY_OUT):
        if header["version"] > VERSION:
            raise UserError(
                f"{folder} has checkpoint format {header['version']}, this program reads up to {VERSION}: "
                "update it"
            )
        if _state_sha256(header["state"]) != header["state_sha256"]:
            raise ValueError("its state does not have the recorded SHA-256")
    return header


def _state_file(state: Mapping[str, Any], tensors_sha256: str) -> bytes:
    hashes = {"tensors_sha256": tensors_sha256, "state_sha256": _state_sha256(state)}
    header = {"format": FORMAT, "version": VERSION, **hashes, "state": state}
    return json.dumps(header, indent=1).encode()


def _state_sha256(state: Mapping[str, Any]) -> str:
    """SHA-256 of the state as canonical JSON, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _require_text_keys(value: Any) -> None:
    """TypeError for a key that is no text: JSON would silently turn 9 into "9"."""
    if isinstance(value, Mapping):
        if others := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"a state has the keys {others}: only text keys come back as they were")
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _require_text_keys(item)
