"""The `manifest.json` of a run: what it was made with, by which command, and in which sessions.

    {"command": {"id": ..., "seeds": [1, 2, 3], "overwrite": false},
     "sessions": [{"started": ..., "commit": ..., "versions": {...}, "device": ..., "threads": 2, ...}, ...],
     "finished": "2026-11-28T15:30:00+00:00",
     "seed": 2, "class_order": [...], ...}

A session is one process (or one group of them under torchrun) that worked on the run; each resume adds one. Every seed
is a run of its own, and the runs of one command share its id. `finished` is written last of all.
"""

import hashlib
import platform
import subprocess
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy
import PIL
import safetensors
import timm
import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from utils.errors import UserError
from utils.files import read_json

MANIFEST = "manifest.json"
LIBRARIES = (
    torch,
    torchvision,
    timm,
    numpy,
    PIL,
)  # another version of one may make other numbers of the same files
CODE = ("*.py", "backbone/**/*.py", "models/**/*.py", "utils/**/*.py")  # what a run can execute


class Command(BaseModel):
    """What was asked for when a run was started: its seeds, each a run, and whether earlier runs are replaced."""

    model_config = ConfigDict(strict=True)

    id: str
    seeds: Annotated[list[int], Field(min_length=1)]
    overwrite: bool


class Session(BaseModel):
    """One process that works on a run, and what its numbers may depend on beside the configuration."""

    model_config = ConfigDict(strict=True)

    started: str
    commit: str | None
    code_sha256: str
    versions: dict[str, str]
    device: str
    precision: str
    threads: int
    processes: int

    def differences(self, earlier: "Session") -> list[str]:
        """What is not as it was in an earlier session: `["torch 2.11.0 -> 2.12.0", "threads 1 -> 2"]`."""
        before, now = (
            one.model_dump(exclude={"started", "versions"}) | one.versions for one in (earlier, self)
        )
        return [
            f"{key} {before.get(key)} -> {now.get(key)}"
            for key in before | now
            if before.get(key) != now.get(key)
        ]


class Manifest(BaseModel):
    """The content of a manifest; what the kind of experiment adds is kept as it is."""

    model_config = ConfigDict(strict=True, extra="allow")

    command: Command
    sessions: Annotated[list[Session], Field(min_length=1)]
    finished: str | None = None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder. UserError: it is absent or damaged."""
    path = folder / MANIFEST
    values = read_json(path)
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(map(str, detail["loc"]))
        raise UserError(
            f"{path} is damaged or of another version of this program: {where}: {detail['msg']}; restore the file"
        ) from error


def this_session(device: torch.device, precision: str, processes: int) -> Session:
    """The session that begins now."""
    return Session(
        started=timestamp(),
        commit=commit(),
        code_sha256=code_sha256(),
        versions=versions(),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        precision=precision,
        threads=torch.get_num_threads(),
        processes=processes,
    )


def versions() -> dict[str, str]:
    """Python's version, and those of the libraries that a run uses."""
    return {"python": platform.python_version(), **library_versions(), "safetensors": safetensors.__version__}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape numbers."""
    return {module.__name__: str(module.__version__) for module in LIBRARIES}


@cache
def code_sha256() -> str:
    """SHA-256 over names and contents of the program's Python files, as they are when it is first asked for.

    Unlike a commit it sees changes that were not committed, and does not change with a commit that touches no code.
    """
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def timestamp() -> str:
    """The time now, to the second, with its offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def commit() -> str | None:
    """Commit of the code, with "+changes" where the working tree differs; None outside a git checkout."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
