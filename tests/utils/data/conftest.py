"""Shared by the tests of image folders."""

from pathlib import Path

import pytest

from tests.image_folders import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images."""
    for split in ("train", "test"):
        write_folder(tmp_path / "set", split, ["ant", "bee"])
    return tmp_path / "set"
