"""Data sets of image files, in folders `train/<class>/*` and `test/<class>/*` or named by published lists.

dataset = from_folder("mine", Path("mine"), Path("cache/images"))       # checked files are remembered there
dataset = from_lists("domainnet", root, {"train": [...], "test": [...]}, None)
"""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.cache.file_memo import FileMemo
from utils.data.image_files import DECODER, check_images, is_utf8, printable, why_bad
from utils.data.image_sets import Dataset, FolderImages, require_images
from utils.errors import UserError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)


class FolderScan:
    """Scan of a data set's folders: which real folders it has met, and what it leaves out.

    `str(scan)` is what it leaves out, counted by reason, with examples of each.
    """

    def __init__(self) -> None:
        self.met: set[tuple[int, int]] = set()  # device and inode
        self._left_out: dict[str, list[str]] = defaultdict(list)

    def __str__(self) -> str:
        return ", ".join(
            f"{len(names):,} {reason} ({', '.join(sorted(set(names))[:3])})"
            for reason, names in sorted(self._left_out.items())
        )

    def leave_out(self, reason: str, path: str | Path) -> None:
        """Count a path as not read."""
        self._left_out[reason].append(printable(os.path.basename(path)))

    def visible(self, names: list[str]) -> list[str]:
        """Names that are not hidden, in sorted order."""
        hidden = [name for name in names if name.startswith(".") or name == "__MACOSX"]
        for name in hidden:
            self.leave_out("hidden", name)
        return sorted(set(names).difference(hidden))

    def is_new(self, folder: Path) -> bool:
        """Whether a folder can be read and is met for the first time, whatever links lead to it."""
        try:
            status = folder.stat()
        except OSError as error:
            self._unreadable(error)
            return False
        inode = status.st_dev, status.st_ino
        new = inode not in self.met
        self.met.add(inode)
        if not new:
            self.leave_out("links to folders that are read already", folder)
        return new

    def images(self, folder: Path) -> list[Path]:
        """Image files below a folder, in sorted order, its own before those of the folders in it.

        Unlike torchvision's `make_dataset` it reads a folder once and passes over hidden ones.
        """
        found = []
        for place, below, names in os.walk(folder, onerror=self._unreadable, followlinks=True):
            below[:] = [name for name in self.visible(below) if self.is_new(Path(place, name))]
            for name in self.visible(names):
                if name.lower().endswith(SUFFIXES):
                    found.append(Path(place, name))
                else:
                    self.leave_out(f"with the suffix {os.path.splitext(name)[1] or 'none'!r}", name)
        return found

    def _unreadable(self, error: OSError) -> None:
        self.leave_out(f"unreadable folders, {error.strerror}", error.filename)


def class_folders(split: Path, scan: FolderScan) -> dict[str, list[Path]]:
    """Class name -> its folders in train/ or test/, sorted by name.

    Names are normalised to NFC: folders whose names differ in the form of their accents are one class.

    Raises:
        UserError: the folder cannot be listed, or a name is not UTF-8.
    """
    try:
        names = scan.visible(os.listdir(split))
    except OSError as error:
        raise UserError(
            f"The folder {split} cannot be listed ({error.strerror}); mend its permissions."
        ) from error
    found = defaultdict(list)
    for name in names:
        if not os.path.isdir(split / name):
            scan.leave_out("outside the class folders", name)
        elif not is_utf8(name):
            raise UserError(
                f"{split}: the name of the class folder {printable(name)} is not UTF-8; rename it."
            )
        else:
            found[unicodedata.normalize("NFC", name)].append(split / name)
    return dict(sorted(found.items()))


def from_folder(name: str, path: Path, cache: Path | None, partial: bool = False) -> Dataset:
    """Image files `train/<class>/*` and `test/<class>/*`; classes are numbered in sorted order.

    Hidden files and folders and files with other suffixes are left out, and each real folder of a split is
    read once.

    Args:
        partial: classes may lack training images.

    Raises:
        UserError: train/ and test/ differ in their classes, a class has no image, or image files are bad.
    """
    scan = FolderScan()
    folders = {split: class_folders(path / split, scan) for split in ("train", "test")}
    train, test = (set(names) for names in folders.values())
    if train - test or not test or (test - train and not partial):
        only = {"train": train - test, "test": test - train}
        told = [f"only in {split}: {', '.join(sorted(names)[:5])}" for split, names in only.items() if names]
        raise UserError(
            f"{path}: train/ and test/ need the same class folders ({'; '.join(told) or 'there are none'})."
        )
    files = {}
    for split, classes in folders.items():
        above = [os.stat(folder) for folder in (path, path / "train", path / "test")]  # no link leads back up
        scan.met = {(status.st_dev, status.st_ino) for status in above}
        owned = [classes.get(name, []) for name in folders["test"]]
        roots = [list(filter(scan.is_new, own)) for own in owned]  # all before what they hold
        groups = [[file for root in own for file in scan.images(root)] for own in roots]
        labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        files[split] = ([file for group in groups for file in group], labels)
    return from_files(name, path, list(folders["test"]), files, cache, str(scan), partial)


def from_files(
    name: str,
    path: Path,
    class_names: list[str],
    files: dict[str, tuple[list[Path], np.ndarray]],
    cache: Path | None,
    left_out: str = "",
    partial: bool = False,
) -> Dataset:
    """The data set of image files with labels; `files` has those of "train" and of "test", all below `path`.

    Every file is decoded once, before anything is learned from one; the cache remembers which were good.

    Raises:
        UserError: a class has no image (of "test", if `partial`), or files are not there or bad: all of them
            in one list.
    """
    needed = {split: labels for split, (_, labels) in files.items() if split == "test" or not partial}
    require_images(name, class_names, needed, left_out)
    memo = FileMemo(cache, path, DECODER)
    hashes = iter(check_images([file for paths, _ in files.values() for file in paths], memo, name))
    sets, digest = [], hashlib.sha256()
    for split, (paths, labels) in files.items():
        sets.append(FolderImages(paths, labels, [next(hashes) for _ in paths], memo))
        lines = (f"{label} {sha256}\n" for label, sha256 in zip(labels, sets[-1].hashes, strict=True))
        digest.update(f"{split}\n{''.join(lines)}".encode())
    return Dataset(name, class_names, *sets, digest.hexdigest(), left_out)


def from_lists(name: str, path: Path, lists: dict[str, list[Path]], cache: Path | None) -> Dataset:
    """Data set of published lists, with lines `<domain>/<class>/<file> <number>`, relative to `path`.

    All lists of a split are pooled; a class has the number that the lists give it.

    Raises:
        UserError: a line of another form, classes that are not numbered one to one from 0 to C - 1, or as
            from `from_files`.
    """
    import pandas as pd  # here: class names are listed before anything heavy is imported

    rows = pd.DataFrame(
        [(split, *row) for split, group in lists.items() for file in group for row in _listed(file)],
        columns=["split", "file", "class", "number"],
    )
    pairs = rows[["class", "number"]].drop_duplicates().sort_values(["number", "class"])
    repeated = pairs["class"].duplicated(False) | pairs["number"].duplicated(False)
    wrong = pairs[repeated | (pairs["number"] != np.arange(len(pairs)))]
    if len(wrong) or pairs.empty:
        told = ", ".join(f"{row['class']} {row['number']}" for _, row in wrong.head(5).iterrows())
        raise UserError(
            f"{path}: the lists do not number the classes one to one from 0 on "
            f"({told or 'they are empty'}); get the published ones."
        )
    files = {
        split: ([path / file for file in own["file"]], own["number"].to_numpy(np.int64))
        for split in lists
        for own in [rows[rows["split"] == split]]
    }
    return from_files(name, path, pairs["class"].tolist(), files, cache)


def _listed(file: Path) -> Iterator[tuple[str, str, int]]:
    """Relative path, class and number of every line of a list."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"The list {file} cannot be read ({why_bad(error)}); get the published one."
        ) from error
    for place, line in enumerate(lines, start=1):
        relative, _, label = line.strip().rpartition(" ")
        folders = relative.split("/")
        numbered = label.isdecimal() and label.isascii() and len(label) < 10
        if len(folders) != 3 or not all(folders) or ".." in folders or not numbered:
            raise UserError(f"{file}, line {place} is {line!r}; expected <domain>/<class>/<file> <number>.")
        yield relative, unicodedata.normalize("NFC", folders[1]), int(label)
