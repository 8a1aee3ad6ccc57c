"""utils.runs.manifest: what a run was made with, what changed, and which runs are outdated by that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.errors import UserError
from utils.runs.manifest import (
    Provenance,
    changes,
    code_sha256,
    commit,
    outdated,
    present,
    read_provenance,
    this_session,
)

CONFIG = {"dataset": "cifar224", "data_root": "data", "backbone_type": "vit", "weights": None, "seed": [1]}
SESSION = {
    "started": "2026-01-01T12:00:00+00:00",
    "commit": "0123456789abcdef0123+changes",
    "code_sha256": "c" * 64,
    "versions": {"python": "3.12.1", "torch": "2.12.0", "numpy": "2.4.0"},
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
    "processes": 1,
}
MANIFEST = {
    "command": {"id": "1", "seeds": [1], "overwrite": False},
    "sessions": [SESSION],
    "finished": "2026-01-01T13:00:00+00:00",
    "seed": 1,
    "data": {"name": "cifar224", "sha256": "d" * 64},
    "weights": {"tag": "vit.in21k", "sha256": "e" * 64, "note": ""},
}


def record(folder: Path, config: dict[str, Any] | None = None, **changed: Any) -> Path:
    """A run folder with config.json and manifest.json; changed: keys of the manifest or of its session."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    session = SESSION | {key: value for key, value in changed.items() if key in SESSION}
    others = {key: value for key, value in changed.items() if key not in SESSION}
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"sessions": [session]} | others))
    return folder


def origins(folder: Path, *runs: dict[str, Any]) -> dict[str, Provenance]:
    """Runs with these changes of the manifest, by "run 0", "run 1", ..."""
    return {f"run {n}": read_provenance(record(folder / str(n), **changed)) for n, changed in enumerate(runs)}


CHANGES = [
    ("code", {"code_sha256": "f" * 64, "commit": None}),
    ("libraries", {"versions": SESSION["versions"] | {"numpy": "2.5.0"}}),
    ("libraries", {"versions": {"python": "3.12.1"}}),
    ("data", {"data": {"name": "cifar224", "sha256": "f" * 64}}),
    ("weights", {"weights": {"tag": "vit.in21k", "sha256": "f" * 64}}),
]


@pytest.mark.parametrize(("kind", "changed"), CHANGES)
def test_every_kind_of_change_is_seen_and_told_in_a_line(
    tmp_path: Path, kind: str, changed: dict[str, Any]
) -> None:
    found = origins(tmp_path, {}, {}, changed)
    first, same, other = found.values()
    assert first.unlike(same) == [] and first.unlike(other) == other.unlike(first) == [kind]
    (sentence,) = changes(found)
    assert sentence.startswith(f"The {kind} changed between runs: ") and sentence.endswith(" in run 2")
    assert "in run 0; run 1," in sentence and "None" not in sentence
    assert outdated(found) == {"run 0": [kind], "run 1": [kind]}


def test_nothing_changed(tmp_path: Path) -> None:
    """A device, a commit that touches no code, and runs of other kinds are no change."""
    found = origins(tmp_path, {}, {"device": "NVIDIA H200", "commit": "another"})
    grids = {key: value for key, value in MANIFEST.items() if key not in ("data", "weights")}
    (tmp_path / "0" / "manifest.json").write_text(json.dumps(grids))
    found["grids"] = read_provenance(tmp_path / "0")
    assert changes(found) == [] and outdated(found) == {}


def test_a_run_that_other_code_went_on_with_is_of_neither(tmp_path: Path) -> None:
    other = SESSION | {"code_sha256": "f" * 64, "versions": SESSION["versions"] | {"numpy": "2.5.0"}}
    first, second, both = origins(
        tmp_path, {}, {"sessions": [other]}, {"sessions": [SESSION, other, SESSION]}
    ).values()
    assert both.unlike(first) == both.unlike(second) == ["code", "libraries"]
    code, libraries = changes({"a": first, "b": both})
    assert "cccccccccccc + ffffffffffff (" in code
    assert "numpy 2.4.0 + 2.5.0 in b" in libraries and "torch" not in libraries


def test_other_data_and_weights_are_no_change_where_they_were_asked_for(tmp_path: Path) -> None:
    first = read_provenance(record(tmp_path / "a"))
    other = {"data": {"sha256": "1"}, "weights": {"sha256": "2"}}
    asked = read_provenance(record(tmp_path / "b", {"dataset": "inr", "image_size": 84}, **other))
    assert first.unlike(asked) == [] and changes({"a": first, "b": asked}) == []
    assert first.unlike(read_provenance(record(tmp_path / "c", **other))) == ["data", "weights"]


DAMAGED = [
    json.dumps({"versions": SESSION["versions"], "commit": "1" * 40}),  # of an early version of the program
    json.dumps(MANIFEST | {"sessions": []}),
    json.dumps(MANIFEST | {"data": "cifar224"}),
    json.dumps(MANIFEST | {"weights": {}}),
    json.dumps(MANIFEST | {"sessions": [SESSION | {"versions": ["torch"]}]}),
    json.dumps(MANIFEST | {"sessions": [{"versions": SESSION["versions"]}]}),
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_manifest_is_a_sentence_with_its_path(tmp_path: Path, content: str) -> None:
    path = record(tmp_path / "run") / "manifest.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_provenance(path.parent)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_records_what_is_present(tmp_path: Path) -> None:
    session = this_session(torch.device("cpu"), "fp32", 1).model_dump()
    assert read_provenance(record(tmp_path / "run", sessions=[session])).unlike(present()) == []


def test_the_commit_is_that_of_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hash of the code: a run that is forked an hour later computes with the code of the start."""
    first = commit()
    monkeypatch.setenv("PATH", "")  # no git any more
    assert commit() == first


def test_the_code_is_what_its_files_hold(tmp_path: Path) -> None:
    hashes = []
    files = {"main.py": "1", "utils/a.py": "1"}
    for change in ({}, {"utils/a.py": "2"}, {"tests/b.py": "", "notes.md": ""}):
        files |= change
        root = tmp_path / str(len(hashes))
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        hashes.append(code_sha256(root))
    assert hashes[0] != hashes[1] == hashes[2]
