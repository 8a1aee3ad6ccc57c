"""utils.files and utils.errors: files whole or not at all, one sentence for a refused call."""

import errno
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from utils.errors import exit_code
from utils.files import read_json, replace_file, write_json


def test_json_comes_back_in_utf8(tmp_path: Path) -> None:
    values = {"name": "höhe 高", "n": 1.5}
    path = write_json(tmp_path / "x.json", values)
    assert read_json(path) == values == json.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(ValueError):
        write_json(path, {"n": float("nan")})
    assert read_json(path) == values


def test_a_refused_write_leaves_the_old_file_and_nothing_beside(tmp_path: Path, monkeypatch) -> None:
    path = replace_file(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "full", str(path))))
    with pytest.raises(OSError):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_refused_write_names_the_file_and_not_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").touch()
    for path in (tmp_path / "x", tmp_path / "y" / "z", tmp_path / ("n" * 252)):
        with pytest.raises(OSError) as refused:
            replace_file(path, b"new")
        assert refused.value.filename == str(path)


def test_a_refused_call_is_a_sentence_with_a_way_out(capsys) -> None:
    assert exit_code(Mock(side_effect=NotADirectoryError(errno.ENOTDIR, "?", "logs/x"))) == 2
    assert re.fullmatch("logs/x: .*move it away.*--resume.*\n", capsys.readouterr().err)


def test_a_lack_of_memory_is_a_sentence_and_another_fault_a_traceback(capsys) -> None:
    full = (
        "can't allocate memory: 6400000000 bytes",
        "CUDA error: out of memory",
        "MPS backend out of memory",
    )
    for error in (MemoryError(), *map(RuntimeError, full)):
        assert exit_code(Mock(side_effect=error)) == 2
        assert re.fullmatch("out of memory: .*--resume.*\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="shapes"):
        exit_code(Mock(side_effect=RuntimeError("shapes")))
