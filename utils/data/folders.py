"""Data sets of image files, in folders of train/ and test/, in one folder per class, or in published lists.

dataset = from_folder("mine", Path("mine"), Path("cache/images"))       # checked files are remembered there
dataset = from_folder("photos", Path("photos"), None, test_share=0.2)   # photos/<class>/*
dataset = from_lists("domainnet", root, {"train": [...], "test": [...]}, None)
"""

import contextlib
import hashlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.cache.file_memo import FileMemo
from utils.data.image_files import DECODER, check_images, why_bad
from utils.data.image_sets import SPLITS, Dataset, FolderImages, require_images
from utils.errors import UserError
from utils.files import sha256_file, why_no_file
from utils.wording import escaped, is_utf8

TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that is there holds the test images
CONVERT = (".heic", ".heif", ".hif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".jxl")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga"),
)


class FolderScan:
    """Scan of a data set's folders; it remembers the real folders it has met, and what it has left out.

    `str(scan)` lists what it has left out, counted by reason, with examples of each.
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
        self._left_out[reason].append(escaped(os.path.basename(path)))

    def visible(self, names: list[str]) -> list[str]:
        """Names that are not hidden, in sorted order."""
        hidden = [name for name in names if name.startswith(".") or name == "__MACOSX"]
        for name in hidden:
            self.leave_out("hidden", name)
        return sorted(set(names).difference(hidden))

    def leave_out_beside(self, path: Path, places: Iterable[Path]) -> None:
        """Count what lies in a data set's folder beside train/ and test/, where it has them."""
        used = [place.name for place in places if place != path]
        with contextlib.suppress(OSError):
            for name in self.visible(os.listdir(path)) if used else []:
                if name not in used:
                    self.leave_out(f"beside {' and '.join(f'{each}/' for each in used)}", name)

    def leads_nowhere(self, path: Path) -> bool:
        """Whether a path is a link to nothing, such as to a folder on a disk that is not there; counts it."""
        nowhere = os.path.islink(path) and not os.path.exists(path)
        if nowhere:
            self.leave_out("links to nothing", path)
        return nowhere

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
        """Image files below a folder, in sorted order, its own before those of the folders in it."""
        found = []
        for place, below, names in os.walk(folder, onerror=self._unreadable, followlinks=True):
            below[:] = [name for name in self.visible(below) if self.is_new(Path(place, name))]
            for name in self.visible(names):
                if name.lower().endswith(SUFFIXES):  # also a link to nothing, which is a damaged image
                    found.append(Path(place, name))
                elif not self.leads_nowhere(Path(place, name)):
                    suffix = os.path.splitext(name)[1].lower()
                    advice = " to be converted to JPEG" if suffix in CONVERT else ""
                    self.leave_out(f"with the suffix {suffix or 'none'!r}{advice}", name)
        return found

    def _unreadable(self, error: OSError) -> None:
        self.leave_out(f"unreadable folders, {error.strerror}", error.filename)


def split_folders(path: Path) -> dict[str, Path]:
    """The folders of a data set that hold class folders: "train", and "test" where it is there.

    "test" is test/, else val/, valid/ or validation/. "train" is train/; it is the folder itself if there is
    no train/, or if train/ is a class: it holds no folder, and other classes lie beside it.
    """
    train = path / "train"
    if not train.is_dir():
        return {"train": path}
    tests = [path / name for name in TEST_FOLDERS if (path / name).is_dir()]
    if not tests and not _folders_in(train) and _folders_in(path) != ["train"]:
        return {"train": path}
    return {"train": train, **({"test": tests[0]} if tests else {})}


def _folders_in(path: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones aside; none where it cannot be listed."""
    with contextlib.suppress(OSError):
        return [name for name in FolderScan().visible(os.listdir(path)) if (path / name).is_dir()]
    return []


def class_folders(split: Path, scan: FolderScan) -> dict[str, list[Path]]:
    """Class name in Unicode's form NFC -> its folders in train/ or test/, sorted by name.

    Raises UserError: the folder cannot be listed, or a name is not UTF-8.
    """
    try:
        names = scan.visible(os.listdir(split))
    except OSError as error:
        raise UserError(
            f"The folder {split} cannot be listed ({error.strerror}); mend its permissions."
        ) from error
    found = defaultdict(list)
    for name in names:
        if scan.leads_nowhere(split / name):
            continue
        if not os.path.isdir(split / name):
            scan.leave_out("outside the class folders", name)
        elif not is_utf8(name):
            raise UserError(f"{split}: the name of the class folder {escaped(name)} is not UTF-8; rename it.")
        else:
            found[unicodedata.normalize("NFC", name)].append(split / name)
    return dict(sorted(found.items()))


def from_folder(
    name: str,
    path: Path,
    cache: Path | None,
    splits: Sequence[str] = SPLITS,
    *,
    test_share: float | None = None,
    partial: bool = False,
) -> Dataset:
    """Image files in the class folders of `split_folders`; classes are numbered in sorted order.

    Hidden files and folders and files with other suffixes are left out, and each real folder of a split is
    read once. Files of other splits are not decoded, and not listed where they have a folder of their own.

    Args:
        test_share: of each class's images, where no folder holds the test images.
        partial: classes may lack training images.

    Raises UserError: train/ and test/ differ in their classes, a class has no image, or image files are bad.
    """
    scan, places, origin, memo = FolderScan(), split_folders(path), "", FileMemo(cache, path, DECODER)
    classes = {split: class_folders(place, scan) for split, place in places.items()}
    _require_same_classes(path, places, classes, partial)
    names = list(classes.get("test", classes["train"]))
    scan.leave_out_beside(path, places.values())
    groups = {}
    for split in [split for split in splits if split in places]:
        above = [os.stat(folder) for folder in (path, *places.values())]  # no link leads back up
        scan.met = {(status.st_dev, status.st_ino) for status in above}
        owned = [classes[split].get(class_name, []) for class_name in names]
        roots = [list(filter(scan.is_new, own)) for own in owned]  # all before what they hold
        groups[split] = [[file for root in own for file in scan.images(root)] for own in roots]
    if "test" not in places:
        by_class = dict(zip(names, groups["train"], strict=True))
        groups = _split_by_content(path, by_class, test_share, memo)
        origin = f"test_share = {test_share:g} of each class, chosen by the files' content"
    elif places["test"].name != "test":
        origin = f"the images in {places['test'].name}/"
    files = {
        split: [(file, label) for label, group in enumerate(groups[split]) for file in group]
        for split in splits
    }
    return replace(from_files(name, names, files, memo, str(scan), partial), test_origin=origin)


def _require_same_classes(
    path: Path, places: Mapping[str, Path], classes: Mapping[str, Mapping], partial: bool
) -> None:
    """Raise UserError where there is no class, or train/ and test/ differ; partial: train/ may lack some."""
    train, test = classes["train"].keys(), classes.get("test", classes["train"]).keys()
    if test and not train - test and (partial or not test - train):
        return
    if len(places) == 1:
        raise UserError(f"{path} holds no class folder; expected <class>/<image files>.")
    only = {places["train"].name: train - test, places["test"].name: test - train}
    gaps = [f"only in {place}: {', '.join(sorted(names)[:5])}" for place, names in only.items() if names]
    where = " and ".join(f"{place.name}/" for place in places.values())
    raise UserError(f"{path}: {where} need the same class folders ({'; '.join(gaps) or 'there are none'}).")


def _split_by_content(
    path: Path, groups: Mapping[str, list[Path]], test_share: float, memo: FileMemo
) -> dict[str, list[list[Path]]]:
    """Training and test images of each class; test images are those with the smallest SHA-256.

    They are `test_share` of the class's different images, rounded, at least one and not all; copies of an
    image stay together. Neither names nor other classes matter. Files are hashed, not decoded; those that the
    memo knows are not read.
    """
    known = memo.known(file for group in groups.values() for file in group)
    split, few = {"train": [], "test": []}, []
    for name, group in groups.items():
        hashes = [known.get(file) or _content_sha256(file) for file in group]
        different = sorted({*hashes} - {""})
        if len(different) == 1:
            few.append(name)
        count = min(max(1, round(test_share * len(different))), len(different) - 1)
        chosen = set(different[:count])
        for side, inside in (("train", False), ("test", True)):
            pairs = zip(group, hashes, strict=True)
            split[side].append([file for file, sha256 in pairs if (sha256 in chosen) == inside])
    if few:
        raise UserError(
            f"{path}: test_share needs two different images of each class, one for the test; there is one of "
            f"{', '.join(few[:5])}; add images, or move the folder away."
        )
    return split


def _content_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes; "" where it cannot be read, which `check_images` will tell."""
    try:
        return "" if why_no_file(file) else sha256_file(file)
    except OSError:
        return ""


def from_files(
    name: str,
    class_names: list[str],
    files: dict[str, list[tuple[Path, int]]],
    memo: FileMemo,
    left_out: str = "",
    partial: bool = False,
) -> Dataset:
    """The data set of labelled image files: (file, label) of each split, all below the memo's root.

    Every file is decoded once, before any training; the memo remembers which were good.

    Raises UserError: a class has no image (of "test", if `partial`), or files are absent or bad, all in one
    list.
    """
    labels = {split: np.array([label for _, label in own], np.int64) for split, own in files.items()}
    needed = {split: own for split, own in labels.items() if split == "test" or not partial}
    require_images(name, class_names, needed, left_out)
    hashes = check_images([file for own in files.values() for file, _ in own], memo, name)
    sets, digest = {}, hashlib.sha256()
    for split, own in files.items():
        sets[split] = FolderImages([file for file, _ in own], labels[split], hashes, memo)
        lines = [split, *(f"{label} {hashes[file]}" for file, label in own), ""]
        digest.update("\n".join(lines).encode())
    return Dataset(name, class_names, sets["train"], sets.get("test"), digest.hexdigest(), left_out)


def from_lists(name: str, path: Path, lists: dict[str, list[Path]], cache: Path | None) -> Dataset:
    """Data set from published lists, with lines `<domain>/<class>/<file> <number>`, relative to `path`.

    All lists of a split are pooled; the lists number the classes.

    Raises UserError: a line of another form, classes not numbered one to one from 0 on, or as `from_files`.
    """
    rows = {split: [row for file in group for row in _listed(file)] for split, group in lists.items()}
    pairs = sorted({(number, name) for own in rows.values() for _, name, number in own})
    same_number, same_name = Counter(number for number, _ in pairs), Counter(name for _, name in pairs)
    wrong = [
        f"{name} {number}"
        for place, (number, name) in enumerate(pairs)
        if number != place or same_number[number] > 1 or same_name[name] > 1
    ]
    if wrong or not pairs:
        raise UserError(
            f"{path}: the lists do not number the classes one to one from 0 on "
            f"({', '.join(wrong[:5]) or 'they are empty'}); get the published ones."
        )
    files = {split: [(path / file, number) for file, _, number in own] for split, own in rows.items()}
    return from_files(name, [name for _, name in pairs], files, FileMemo(cache, path, DECODER))


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
