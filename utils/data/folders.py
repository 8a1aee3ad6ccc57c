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


class LeftOut:
    """The files and folders of a data set that are not read, counted by reason, with an example of each."""

    def __init__(self) -> None:
        self._paths: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, path: str | Path) -> None:
        """Count a path."""
        self._paths[reason].append(os.path.basename(path))

    def __str__(self) -> str:
        return ", ".join(
            f"{len(names):,} {reason} ({', '.join(printable(name) for name in sorted(set(names))[:3])})"
            for reason, names in sorted(self._paths.items())
        )


def class_folders(split: Path, left_out: LeftOut | None = None) -> dict[str, list[Path]]:
    """Class name -> its folders in train/ or test/, sorted by name.

    Names are normalised to NFC, so that folders whose names differ in the form of their accents are one
    class.

    Raises:
        UserError: the folder cannot be listed, or a name is not UTF-8.
    """
    left_out, found = left_out or LeftOut(), defaultdict(list)
    try:
        entries = sorted(os.scandir(split), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"The folder {split} cannot be listed ({error.strerror}); mend its permissions."
        ) from error
    for entry in entries:
        if _is_hidden(entry.name, left_out):
            continue
        if not _is_folder(entry):
            left_out.add("outside the class folders", entry.path)
        elif not is_utf8(entry.name):
            raise UserError(
                f"{split}: the name of the class folder {printable(entry.name)} is not UTF-8; rename it."
            )
        else:
            found[unicodedata.normalize("NFC", entry.name)].append(Path(entry.path))
    return dict(sorted(found.items()))


def image_files(folders: list[Path], left_out: LeftOut, visited: set[tuple[int, int]]) -> list[Path]:
    """Image files below folders, in sorted order, those of a folder before those of the folders in it.

    Unlike torchvision's `make_dataset` it reads a folder once whatever links lead to it, and passes over
    hidden ones.

    Args:
        left_out: gains what is not read.
        visited: device and inode of the folders met so far; gains these.
    """

    def refused(error: OSError) -> None:
        left_out.add(f"unreadable folders, {error.strerror}", error.filename)

    found = []
    for top in folders:
        for place, below, names in os.walk(top, onerror=refused, followlinks=True):
            seen = [name for name in sorted(below) if not _is_hidden(name, left_out)]
            below[:] = [name for name in seen if _is_new(Path(place, name), left_out, visited)]
            for name in (name for name in sorted(names) if not _is_hidden(name, left_out)):
                if name.lower().endswith(SUFFIXES):
                    found.append(Path(place, name))
                else:
                    left_out.add(f"with the suffix {os.path.splitext(name)[1] or 'none'!r}", name)
    return found


def _is_new(folder: Path, left_out: LeftOut, visited: set[tuple[int, int]]) -> bool:
    """Whether a folder is met for the first time, by whatever links; counts it as left out where not."""
    try:
        status = folder.stat()
    except OSError as error:
        left_out.add(f"unreadable folders, {error.strerror}", folder)
        return False
    inode = status.st_dev, status.st_ino
    if inode in visited:
        left_out.add("links to folders that are read already", folder)
        return False
    visited.add(inode)
    return True


def _is_hidden(name: str, left_out: LeftOut) -> bool:
    hidden = name.startswith(".") or name == "__MACOSX"
    if hidden:
        left_out.add("hidden", name)
    return hidden


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def from_folder(name: str, path: Path, cache: Path | None) -> Dataset:
    """Image files `train/<class>/*` and `test/<class>/*`; classes are numbered in sorted order.

    Hidden files and folders and files with other suffixes are left out, and each real folder of a split is
    read once.

    Raises:
        UserError: train/ and test/ differ in their classes, a class has no image, or image files are bad.
    """
    left_out = LeftOut()
    folders = {split: class_folders(path / split, left_out) for split in ("train", "test")}
    class_names, test_names = list(folders["train"]), list(folders["test"])
    if class_names != test_names or not class_names:
        only = {"train": set(class_names) - set(test_names), "test": set(test_names) - set(class_names)}
        told = [f"only in {split}: {', '.join(sorted(names)[:5])}" for split, names in only.items() if names]
        raise UserError(
            f"{path}: train/ and test/ need the same class folders ({'; '.join(told) or 'there are none'})."
        )
    files = {}
    for split in ("train", "test"):
        above = [os.stat(folder) for folder in (path, path / "train", path / "test")]  # no link leads back up
        visited = {(status.st_dev, status.st_ino) for status in above}
        roots = [
            [folder for folder in folders[split][class_name] if _is_new(folder, left_out, visited)]
            for class_name in class_names
        ]
        groups = [image_files(own, left_out, visited) for own in roots]
        labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        files[split] = ([file for group in groups for file in group], labels)
    return from_files(name, path, class_names, files, cache, str(left_out))


def from_files(
    name: str,
    path: Path,
    class_names: list[str],
    files: dict[str, tuple[list[Path], np.ndarray]],
    cache: Path | None,
    left_out: str = "",
) -> Dataset:
    """The data set of image files with labels; `files` has those of "train" and of "test", all below `path`.

    Every file is decoded once, before anything is learned from one; the cache remembers which were good.

    Raises:
        UserError: a class has no image, or files are not there or bad: all of them in one list.
    """
    require_images(name, class_names, {split: labels for split, (_, labels) in files.items()}, left_out)
    every, memo = [file for paths, _ in files.values() for file in paths], FileMemo(cache, path, DECODER)
    hashes, sets = iter(check_images(every, memo, name)), []
    digest = hashlib.sha256()
    for split, (paths, labels) in files.items():
        own = [next(hashes) for _ in paths]
        sets.append(FolderImages(paths, labels, own, memo))
        digest.update(f"{split}\n".encode())
        digest.update(
            "".join(f"{label} {sha256}\n" for label, sha256 in zip(labels, own, strict=True)).encode()
        )
    return Dataset(name, class_names, *sets, digest.hexdigest(), left_out)


def from_lists(name: str, path: Path, lists: dict[str, list[Path]], cache: Path | None) -> Dataset:
    """Data set of published lists, with lines `<domain>/<class>/<file> <number>`, relative to `path`.

    All lists of a split are pooled; a class has the number that the lists give it.

    Raises:
        UserError: a line of another form, a class without training images, a class with two numbers or a
            number with two classes, a number that is missing, or as from `from_files`.
    """
    rows = {split: [row for file in group for row in _listed(file)] for split, group in lists.items()}
    names, numbers = defaultdict(set), defaultdict(set)
    for _, class_name, number in (row for split_rows in rows.values() for row in split_rows):
        names[number].add(class_name)
        numbers[class_name].add(number)
    for number, several in sorted(names.items()):
        if len(several) > 1:
            raise UserError(
                f"{path}: the lists give the number {number} to {_in_words(several)}; mend the lists."
            )
    for class_name, several in sorted(numbers.items()):
        if len(several) > 1:
            raise UserError(
                f"{path}: the lists give {class_name} the numbers {_in_words(several)}; mend the lists."
            )
    absent = next((number for number in range(len(names)) if number not in names), None)
    if absent is not None or not names:
        told = (
            "they are empty"
            if absent is None
            else f"no class has the number {absent}, and one has {max(names)}"
        )
        raise UserError(f"{path}: the lists are not whole: {told}; get the published ones.")
    class_names = [next(iter(names[number])) for number in range(len(names))]
    strange = sorted({row[1] for row in rows["test"]} - {row[1] for row in rows["train"]})
    if strange:
        raise UserError(f"{path}: no training list has the class {strange[0]} of a test list.")
    files = {
        split: (
            [path / row[0] for row in split_rows],
            np.array([row[2] for row in split_rows], dtype=np.int64),
        )
        for split, split_rows in rows.items()
    }
    return from_files(name, path, class_names, files, cache)


def _in_words(values: set) -> str:
    return " and ".join(str(value) for value in sorted(values))


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
