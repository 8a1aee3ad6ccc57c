"""The command that lists and empties a cache touches only what the cache made."""

import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.utils.cache.test_tensor_cache import fill, groups, numbers, stored_file
from utils.cache.__main__ import main
from utils.cache.file_memo import IMAGES, FileMemo
from utils.cache.tensor_cache import TensorCache


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache", 1)


def run(root: Path, capsys, *options: str) -> list[str]:
    assert main(["--root", str(root), *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_listing(cache, capsys):
    fill(cache.root, ["oldest", "newest"])
    cache.get("newest", "second", lambda: torch.zeros(500_000))
    cache.describe("newest", {"depth": 3, "what": "x" * 200})
    os.utime(cache.root / "newest", (2_000_000_000, 2_000_000_000))
    head, first, second, total = run(cache.root, capsys)
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(2_000_000_000))
    assert first.split()[:3] == ["newest", "2.0", "2"] and day in first and '"depth": 3' in first
    assert second.split()[:3] == ["oldest", "0.0", "1"] and len(first) < 130
    assert "2.1 MB in 2 groups" in total and "last used" in head


def test_records_of_image_files_are_listed_and_removed(cache, capsys):
    """Also where nothing else made the folder a cache; foreign files beside them stay."""
    path = cache.root.parent / "image.png"
    memo = FileMemo(cache.root / IMAGES, path.parent, "rule")
    memo.add({path: ("state", "0" * 64)})
    (cache.root / IMAGES / "photo.png").write_text("not ours")
    assert "checked image files" in run(cache.root, capsys)[1]
    assert "1 group removed" in run(cache.root, capsys, "--clear")[0]
    assert [path.name for path in (cache.root / IMAGES).iterdir()] == ["photo.png"]


def test_clear_says_what_it_freed_and_keeps_other_folders(cache, capsys):
    fill(cache.root, ["one", "two"])
    cache.describe("one", {"depth": 3})
    size = sum(path.stat().st_size for path in cache.root.glob("*/*"))
    (cache.root / "photos").mkdir()
    (cache.root / "photos" / "photo.safetensors").write_text("not ours")
    elsewhere = cache.root.parent / "elsewhere"
    fill(elsewhere, ["one"])
    (cache.root / "linked").symlink_to(elsewhere / "one")
    assert f"{size} bytes" in run(cache.root, capsys, "--clear")[0]
    assert groups(cache.root) == ["linked", "photos"] and any((cache.root / "photos").iterdir())
    assert stored_file(elsewhere, "one").exists()
    assert "nothing" in run(cache.root, capsys, "--clear")[0]
    assert torch.equal(cache.get("one", "key", numbers), numbers())


def test_files_of_others_with_names_like_those_of_a_cache_stay(cache, capsys):
    for path in (cache.root / "site" / "about.json", cache.root / IMAGES / "person_keypoints_val2017.json"):
        path.parent.mkdir(parents=True)
        path.write_text("not ours")
    assert main(["--root", str(cache.root), "--clear"]) == 2
    assert "not a cache" in capsys.readouterr().err
    fill(cache.root, ["one"])
    assert run(cache.root, capsys)[-1].endswith("in 1 group")
    assert "1 group removed" in run(cache.root, capsys, "--clear")[0]
    assert len([*cache.root.glob("*/*.json")]) == 2


def test_what_cannot_be_removed_is_told(cache, capsys, monkeypatch):
    fill(cache.root, ["one", "two"])
    with monkeypatch.context() as context:
        context.setattr(Path, "unlink", Mock(side_effect=PermissionError(13, "Permission denied")))
        assert main(["--root", str(cache.root), "--clear"]) == 2
    shown = capsys.readouterr()
    assert "2 groups" in shown.err and shown.out == "" and groups(cache.root) == ["one", "two"]


def test_clear_removes_what_a_killed_process_has_left(cache, capsys):
    fill(cache.root, ["one"])
    run(cache.root, capsys, "--clear")
    (cache.root / ".writing").write_bytes(b"x" * 50)
    assert "50 bytes freed" in run(cache.root, capsys, "--clear")[0]
    assert "nothing" in run(cache.root, capsys, "--clear")[0]


def test_clear_refuses_a_folder_that_is_no_cache(cache, capsys):
    fill(cache.root, ["one"])
    (cache.root / "CACHE").unlink()
    for root in (cache.root, stored_file(cache.root, "one")):
        assert main(["--root", str(root), "--clear"]) == 2
        captured = capsys.readouterr()
        assert "not a cache" in captured.err and not captured.out
    assert stored_file(cache.root, "one").exists()


@pytest.mark.parametrize("clear", [[], ["--clear"]], ids=["list", "clear"])
def test_a_missing_or_empty_root_holds_nothing(tmp_path, capsys, clear: list[str]):
    for root in (tmp_path / "absent", tmp_path):
        assert "nothing" in run(root, capsys, *clear)[0]
    assert not any(tmp_path.iterdir())
