"""Files: whole or not at all, JSON answered in one sentence, what the operating system refuses told with its path."""

import errno
import json
import os
from pathlib import Path

import pytest

from utils.errors import UserError, exit_code
from utils.files import read_json, replace_file, write_json

DAMAGED = {
    "not JSON": b"{",
    "no object": b"[1]",
    "not UTF-8": b'{"a": "\xff"}',
    "nested too deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="config.json.*damaged"):
        read_json(path)


def test_no_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no a.json"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(UserError, match="b.json is a folder"):
        read_json(tmp_path / "b.json")


def test_json_comes_back_in_utf8(tmp_path: Path) -> None:
    values = {"name": "höhe 高", "n": 1.5}
    path = write_json(tmp_path / "x.json", values)
    assert read_json(path) == values == json.loads(path.read_text(encoding="utf-8"))


def test_a_refused_write_leaves_the_old_file_and_nothing_beside(tmp_path: Path, monkeypatch) -> None:
    path = replace_file(tmp_path / "x", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_refused_write_names_the_file_and_not_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        replace_file(tmp_path / "x", b"new")
    assert refused.value.filename == str(tmp_path / "x")


def test_a_command_that_the_system_refuses_ends_in_a_sentence(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert exit_code(lambda: (tmp_path / "file" / "folder").mkdir()) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "file") in told and "move it away" in told
