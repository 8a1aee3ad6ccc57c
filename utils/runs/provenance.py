"""Provenance of a run: the code, library versions, data and weights that its numbers come from.

    origin = read_provenance(run_folder)                 # from its config.json and manifest.json
    origin.unlike(read_provenance(other_folder))         # ["libraries"]: the two are not paired
    changes({"nested, seed 1": origin, ...})             # a sentence for each kind that changed from run to run

Configuration and seed are not part of it. Where the provenance of two runs differs, their numbers may differ by that
alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json
from utils.runs.manifest import MANIFEST, code_sha256, versions
from utils.runs.run_folder import CONFIG

# kind -> keys of a configuration that say what is hashed: where they differ, another hash is what was asked for
SOURCES = {
    "data": ("dataset", "data_root"),
    "weights": ("backbone_type", "weights", "weights_root", "image_size"),
}
PLUS = " + "  # between what differs from session to session of a run
SHOWN = 12  # characters of a hash
MOST_NAMED = 4  # runs in a sentence


@dataclass(frozen=True)
class Provenance:
    """Kind ("code", "libraries", "data", "weights") -> what it was: name -> hash or version.

    A kind that the run has none of is absent. `sources`: kind -> the values of its `SOURCES`; `commit` is for readers.
    """

    values: Mapping[str, Mapping[str, str]]
    sources: Mapping[str, tuple[Any, ...]]
    commit: str | None = None

    def unlike(self, other: "Provenance") -> list[str]:
        """The kinds in which two runs differ although their configurations ask for the same."""
        return [
            kind
            for kind, value in self.values.items()
            if kind in other.values
            and other.values[kind] != value
            and other.sources.get(kind) == self.sources.get(kind)
        ]


def read_provenance(folder: Path) -> Provenance:
    """The provenance of the run in a folder, also of one that an earlier version of this program made.

    Where several sessions worked on the run, code and versions are those of all of them: `1.2 + 1.3`.

    Raises:
        UserError: its `config.json` or `manifest.json` is absent or damaged.
    """
    config, manifest = read_json(folder / CONFIG), read_json(folder / MANIFEST)
    sessions = manifest.get("sessions", [manifest])  # earlier versions had no sessions
    try:
        if not sessions:
            raise KeyError("sessions")
        names = dict.fromkeys(name for session in sessions for name in session["versions"])
        values = {
            "code": {
                "sha256": _joined(session.get("code_sha256", session["commit"]) for session in sessions)
            },
            "libraries": {
                name: _joined(session["versions"].get(name) for session in sessions) for name in names
            },
            **{kind: {"sha256": str(manifest[kind]["sha256"])} for kind in SOURCES if kind in manifest},
        }
        commit = _joined(str(session["commit"])[:SHOWN] for session in sessions)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / MANIFEST} lacks what a run records in it ({error}): the file is damaged, restore it"
        ) from error
    sources = {kind: tuple(str(config.get(key)) for key in keys) for kind, keys in SOURCES.items()}
    return Provenance(values, sources, commit)


def present() -> Provenance:
    """The provenance of a run that starts now, as far as nothing needs to be read for it: code and libraries."""
    return Provenance({"code": {"sha256": code_sha256()}, "libraries": versions()}, {})


def changes(origins: Mapping[str, Provenance]) -> list[str]:
    """A sentence for each kind that is not the same in all runs that ask for the same; origins: by the runs' labels."""
    groups: dict[tuple[str, Any], dict[Any, list[str]]] = {}  # (kind, source) -> value -> labels
    for label, origin in origins.items():
        for kind, value in origin.values.items():
            group = groups.setdefault((kind, origin.sources.get(kind)), {})
            group.setdefault(tuple(sorted(value.items())), []).append(label)
    parts: dict[str, list[str]] = {}
    for (kind, source), group in groups.items():
        common = set.intersection(*map(set, group))  # of versions: those that did not change
        for value, labels in group.items() if len(group) > 1 else ():
            name = source[0] if source else origins[labels[0]].commit if kind == "code" else None
            parts.setdefault(kind, []).append(f"{_shown(dict(value), common, name)} in {_named(labels)}")
    return [f"The {kind} changed between runs: {', '.join(texts)}" for kind, texts in parts.items()]


def outdated(origins: Mapping[str, Provenance]) -> dict[str, list[str]]:
    """Label -> the kinds in which a run differs from the last one that asks for the same; runs without any are absent.

    origins: by the runs' labels, in the order in which they ended.
    """
    last: dict[tuple[str, Any], Mapping[str, str]] = {}
    for origin in origins.values():
        last |= {(kind, origin.sources.get(kind)): value for kind, value in origin.values.items()}
    found = {
        label: [
            kind for kind, value in origin.values.items() if value != last[kind, origin.sources.get(kind)]
        ]
        for label, origin in origins.items()
    }
    return {label: kinds for label, kinds in found.items() if kinds}


def _shown(value: Mapping[str, str], common: set[tuple[str, str]], name: str | None) -> str:
    """One value of a kind for a reader: versions that differ from another's, or the beginning of a hash."""
    if "sha256" not in value:
        return ", ".join(f"{name} {found}" for name, found in value.items() if (name, found) not in common)
    sha256 = _joined(part[:SHOWN] for part in value["sha256"].split(PLUS))
    return f"{sha256} ({name})" if name else sha256


def _joined(texts: Iterable[Any]) -> str:
    return PLUS.join(dict.fromkeys(map(str, texts)))


def _named(labels: Sequence[str]) -> str:
    more = len(labels) - MOST_NAMED
    return " and ".join(["; ".join(labels[:MOST_NAMED]), *([f"{more} more runs"] if more > 0 else [])])
