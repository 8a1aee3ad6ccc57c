"""The command that lists and empties a cache touches only what the cache made."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.utils.cache.test_tensor_cache import chunk, files, fill, numbers
from utils.cache.__main__ import main
from utils.cache.decoded_images import DecodedImages
from utils.cache.file_memo import FileMemo
from utils.cache.tensor_cache import TensorCache


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache", 1)


def test_decoded_images_are_listed_and_removed(
    cache: TensorCache, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where nothing else made the folder a cache; foreign files beside them stay."""
    store = cache.root / "images" / "1f2e"
    DecodedImages(store, 2, "").add(np.arange(2), lambda index: np.full((500, 400, 3), index, np.uint8))
    assert main(["--root", str(cache.root)]) == 0
    out = capsys.readouterr().out
    assert "images/1f2e" in out and "1.2  decoded images" in out and "total: 1.2 MB in 1 groups" in out
    (cache.root / "images" / "photo.png").write_text("not ours")
    assert main(["--root", str(cache.root), "--clear"]) == 0
    assert "1 groups removed" in capsys.readouterr().out
    assert not store.exists() and files(cache.root / "images") == ["photo.png"]


def test_what_is_known_of_image_files_is_listed_and_removed(
    cache: TensorCache, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cache.root.parent / "image.png"
    path.write_bytes(b"content")
    FileMemo(cache.root / "images", "rule").add({path: ("state", "0" * 64)})
    assert main(["--root", str(cache.root)]) == 0
    assert "images/files.sqlite" in capsys.readouterr().out
    assert main(["--root", str(cache.root), "--clear"]) == 0
    assert "1 groups removed" in capsys.readouterr().out and files(cache.root / "images") == []


def test_listing(cache: TensorCache, capsys: pytest.CaptureFixture[str]) -> None:
    fill(cache, ["oldest", "newest"])
    cache.get("newest", "second", numbers)
    cache.describe("newest", {"depth": 3, "what": "x" * 200})
    os.utime(cache.root / "newest", (2_000_000_000, 2_000_000_000))
    assert main(["--root", str(cache.root)]) == 0
    head, first, second, total = capsys.readouterr().out.splitlines()
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(2_000_000_000))
    assert (
        first.split()[:2] == ["newest", "0.0"]
        and first.split()[2] == "2"
        and day in first
        and '"depth": 3' in first
    )
    assert second.split()[0] == "oldest" and second.split()[2] == "1" and len(first) < 130
    assert "2 groups" in total and "last used" in head


def test_listing_shows_sizes(cache: TensorCache, capsys: pytest.CaptureFixture[str]) -> None:
    cache.get("a", "key", lambda: numbers(count=500_000))
    cache.get("b", "key", lambda: numbers(count=250_000))
    main(["--root", str(cache.root)])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0]: line.split()[1] for line in lines[1:3]} == {"a": "2.0", "b": "1.0"}
    assert "3.0 MB" in lines[3]


def test_clear_says_what_it_freed_and_keeps_other_folders(
    cache: TensorCache, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(cache, ["one", "two"])
    cache.describe("one", {"depth": 3})
    size = sum(path.stat().st_size for path in cache.root.glob("*/*"))
    (cache.root / "images").mkdir()
    (cache.root / "images" / "photo.npy").write_text("not ours")
    elsewhere = TensorCache(cache.root.parent / "elsewhere", 1)
    fill(elsewhere, ["one"])
    (cache.root / "linked").symlink_to(elsewhere.root / "one")
    assert main(["--root", str(cache.root), "--clear"]) == 0
    assert f"{size} bytes" in capsys.readouterr().out
    assert files(cache.root) == ["CACHE", "images", "linked"] and files(cache.root / "images") == [
        "photo.npy"
    ]
    assert chunk(elsewhere.root, "one").exists()
    assert main(["--root", str(cache.root), "--clear"]) == 0
    assert "nothing" in capsys.readouterr().out


def test_clear_refuses_a_folder_that_is_no_cache(
    cache: TensorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(cache, ["one"])
    (cache.root / "CACHE").unlink()
    assert main(["--root", str(cache.root), "--clear"]) == 2
    captured = capsys.readouterr()
    assert "not a cache" in captured.err and not captured.out and chunk(cache.root, "one").exists()
    assert main(["--root", str(chunk(cache.root, "one")), "--clear"]) == 2  # a file


@pytest.mark.parametrize("clear", [[], ["--clear"]], ids=["list", "clear"])
def test_a_missing_or_empty_root_holds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clear: list[str]
) -> None:
    for root in (tmp_path / "absent", tmp_path):
        assert main(["--root", str(root), *clear]) == 0
        assert "nothing" in capsys.readouterr().out
    assert files(tmp_path) == []
