"""utils.files and utils.errors: files whole or not at all, one sentence for bad JSON and refused calls."""

import errno
import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from utils.errors import Interrupted, UserError, exit_code
from utils.files import npz_headers, read_json, replace_file, sha256_file, why_no_file, write_json

FAULTS = {
    "absent": (None, "holds no config.json"),
    "a folder": (Path.mkdir, "config.json cannot be read"),
    "not JSON": (b"{", "config.json.*damaged"),
    "no object": (b"[1]", "config.json.*damaged"),
    "not UTF-8": (b'{"a": "\xff"}', "config.json.*damaged"),
    "nested too deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "config.json.*damaged"),
}


@pytest.mark.parametrize(("content", "words"), FAULTS.values(), ids=FAULTS)
def test_json_that_cannot_be_read_is_a_sentence(content: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content(path)
    with pytest.raises(UserError, match=words):
        read_json(path)


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
    with pytest.raises(IsADirectoryError) as refused:
        replace_file(tmp_path / "x", b"new")
    assert refused.value.filename == str(tmp_path / "x")


def test_what_is_no_regular_file_is_told_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    told = {"folder": tmp_path, "FIFO": tmp_path / "fifo", "link to nothing": tmp_path / "link"}
    for kind, path in told.items():
        assert kind in why_no_file(path)
    assert why_no_file(replace_file(tmp_path / "x", b"")) is None


def test_hashes_are_of_contents_and_headers_are_read_without_arrays(tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_file(replace_file(tmp_path / "x", b"")) == empty
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((3, 2), np.uint8), labels=np.arange(3.0))
    assert npz_headers(tmp_path / "a.npz") == {"images": ((3, 2), np.uint8), "labels": ((3,), np.float64)}


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (None, 0, ""),
        (UserError("do this"), 2, "do this"),
        (Interrupted(), 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (NotADirectoryError(errno.ENOTDIR, "?", "logs/x"), 2, "logs/x: .*move it away.*--resume.*"),
    ],
    ids=["done", "mistake", "interrupted", "Ctrl-C", "refused"],
)
def test_exit_codes_and_their_sentence(error: BaseException | None, code: int, told: str, capsys) -> None:
    assert exit_code(Mock(side_effect=error, return_value=None)) == code
    written = capsys.readouterr().err
    assert re.fullmatch(told, written.strip())
