"""Manifest of a run, `manifest.json`: code, libraries, data and command, compared between runs.

    {"command": {"id": ..., "seeds": [1, 2, 3], "overwrite": false},
     "sessions": [{"started": ..., "commit": ..., "versions": {...}, "device": ..., "threads": 2, ...}, ...],
     "finished": "2026-11-28T15:30:00+00:00",
     "seed": 2, "class_order": [...], ...}

    origin = read_provenance(run_folder)          # the code, libraries, data and weights behind its numbers
    origin.unlike(read_provenance(other_folder))  # ["libraries"]: the two are not paired
    changes({"nested, seed 1": origin, ...})      # a sentence for each kind that changed from run to run

A session is one process (or one group of them under torchrun) that worked on the run; each resume adds one.
Every seed is a run of its own, and the runs of one command share its id. `finished` is written last of all.
"""

import hashlib
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy
import PIL
import safetensors
import timm
import torch
import torchvision
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from utils.errors import UserError
from utils.files import damaged, read_json
from utils.runs.folder import CONFIG, FIGURES, MANIFEST, RESULT, replaced_folders
from utils.wording import as_typed, some

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (torch, torchvision, timm, numpy, PIL)  # another version may give other numbers
CODE = ("*.py", "backbone/**/*.py", "models/**/*.py", "utils/**/*.py")  # files that a run can execute
# kind -> keys of a configuration that choose what is hashed: hashes are compared only where these are equal
SOURCES = {
    "data": ("dataset", "data_root", "extra_data"),
    "weights": ("backbone_type", "weights", "weights_root", "image_size"),
}
PLUS = " + "  # between what differs from session to session of a run
SHOWN = 12  # characters of a hash


class Strict(BaseModel):
    """A part of a manifest: values have the types they were written with."""

    model_config = ConfigDict(strict=True)


class Command(Strict):
    """The command that started a run: its seeds, each a run, and whether earlier runs are replaced."""

    id: str
    seeds: Annotated[list[int], Field(min_length=1)]
    overwrite: bool


class Session(Strict):
    """One process that works on a run, and what its numbers may depend on besides the configuration."""

    started: str
    commit: str | None
    code_sha256: str
    versions: dict[str, str]
    device: str
    precision: str
    threads: int
    processes: int

    def differences(self, earlier: "Session") -> list[str]:
        """Differences from an earlier session: `["torch 2.11.0 -> 2.12.0", "threads 1 -> 2"]`."""
        skipped = {"started", "versions"}
        before, now = (one.model_dump(exclude=skipped) | one.versions for one in (earlier, self))
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        return [f"{key} {before.get(key)} -> {now.get(key)}" for key in changed]


class Manifest(Strict, extra="allow"):
    """The content of a manifest; what the method adds is kept as it is."""

    command: Command
    sessions: Annotated[list[Session], Field(min_length=1)]
    finished: str | None = None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder. UserError: it is absent or damaged."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise UserError(
            f"{path} is damaged, or an earlier version of this program wrote it ({some(faults)}): "
            f"restore it, or run it again with {as_typed('main.py', '--config', folder / CONFIG)}"
        ) from error


def is_complete(folder: Path) -> bool:
    """Whether nothing of a run is missing: its result, its figures, and the end of what it replaces.

    Raises UserError when its manifest is damaged.
    """
    if not (folder / RESULT).exists() or not (folder / FIGURES).is_dir() or replaced_folders(folder):
        return False
    return read_manifest(folder).finished is not None


# ------------------------------------------------------------------------------------------------------------
# The session that begins now


def this_session(device: torch.device, precision: str, processes: int) -> Session:
    """The session of this process."""
    on_gpu = device.type == "cuda"
    return Session(
        started=timestamp(),
        commit=commit(),
        code_sha256=code_sha256(),
        versions=versions(),
        device=torch.cuda.get_device_name(device) if on_gpu else f"{device.type} ({platform.machine()})",
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
def code_sha256(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the program's Python files at the first call, committed or not."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def timestamp() -> str:
    """The time now, to the second, with its offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


@cache
def commit() -> str | None:
    """Commit of the code at the first call, "+changes" where the working tree differs; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------------------
# Provenance


@dataclass(frozen=True)
class Provenance:
    """The code, libraries, data and weights that a run's numbers come from, beside configuration and seed.

    Attributes:
        values: (kind, source) -> name -> hash or version. The kinds are "code", "libraries", "data" and
            "weights"; the source holds the values of the kind's `SOURCES`.
        commit: of the code, for readers.
    """

    values: Mapping[tuple[str, tuple[str, ...]], Mapping[str, str]]
    commit: str | None = field(default=None, compare=False)

    def unlike(self, other: "Provenance") -> list[str]:
        """The kinds in which two runs differ although their configurations are alike in `SOURCES`."""
        return [key[0] for key, value in self.values.items() if other.values.get(key, value) != value]

    @property
    def hashes(self) -> dict[str, Mapping[str, str]]:
        """Hashes of data and weights, whatever their sources."""
        return {kind: value for (kind, _), value in self.values.items() if kind in SOURCES}


def read_provenance(folder: Path) -> Provenance:
    """The provenance of the run in a folder. UserError: `config.json` or `manifest.json` is damaged.

    Where several sessions worked on the run, code and versions are those of all of them: `1.2 + 1.3`.
    """
    config, manifest = read_json(folder / CONFIG), read_manifest(folder)
    sessions, more = manifest.sessions, manifest.model_extra or {}
    names = dict.fromkeys(name for session in sessions for name in session.versions)
    values = {
        ("code", ()): {"sha256": _joined(session.code_sha256 for session in sessions)},
        ("libraries", ()): {
            name: _joined(session.versions.get(name) for session in sessions) for name in names
        },
    }
    with damaged(folder / MANIFEST):
        for kind, keys in SOURCES.items():
            if kind in more:
                source = tuple(str(config.get(key)) for key in keys)
                values[kind, source] = {"sha256": str(more[kind]["sha256"])}
    commits = [session.commit[:SHOWN] for session in sessions if session.commit]
    return Provenance(values, _joined(commits) or None)


def present() -> Provenance:
    """The provenance of a run that starts now, without data and weights."""
    return Provenance({("code", ()): {"sha256": code_sha256()}, ("libraries", ()): versions()})


def changes(origins: Mapping[str, Provenance]) -> list[str]:
    """A sentence for each kind that differs between runs with equal sources; origins: by run labels."""
    groups: dict[Any, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for label, origin in origins.items():
        for key, value in origin.values.items():
            groups[key][tuple(sorted(value.items()))].append(label)
    parts: dict[str, list[str]] = defaultdict(list)
    for (kind, source), group in groups.items():
        common = set.intersection(*map(set, group))  # of versions: those that did not change
        for value, labels in group.items() if len(group) > 1 else ():
            name = source[0] if source else origins[labels[0]].commit if kind == "code" else None
            parts[kind].append(f"{_shown(dict(value), common, name)} in {some(labels, '; ')}")
    return [f"The {kind} changed between runs: {', '.join(texts)}" for kind, texts in parts.items()]


def outdated(origins: Mapping[str, Provenance]) -> dict[str, list[str]]:
    """Label -> the kinds in which a run differs from the last one with equal sources; without any, absent.

    origins: by the runs' labels, in the order in which the runs ended.
    """
    last = Provenance({key: value for origin in origins.values() for key, value in origin.values.items()})
    return {label: kinds for label, origin in origins.items() if (kinds := origin.unlike(last))}


def _shown(value: Mapping[str, str], common: set[tuple[str, str]], name: str | None) -> str:
    """Text for one value of a kind: versions that differ from another's, or the beginning of a hash."""
    if "sha256" not in value:
        return ", ".join(f"{name} {found}" for name, found in value.items() if (name, found) not in common)
    sha256 = _joined(part[:SHOWN] for part in value["sha256"].split(PLUS))
    return f"{sha256} ({name})" if name else sha256


def _joined(texts: Iterable[Any]) -> str:
    return PLUS.join(dict.fromkeys(map(str, texts)))
