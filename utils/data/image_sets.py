"""Images with labels, and the forms in which a data set lies on disk: one `.npz`, or image files in folders or lists.

    dataset = from_npz("mine", Path("mine.npz"))            # x_train, y_train, x_test, y_test, class_names
    dataset = from_folder("mine", Path("mine"))             # train/<class>/* and test/<class>/*
    dataset = from_folder("mine", Path("mine"), ImageCache(Path("cache/images"), limit_gb=20))  # read and decoded once
    dataset = from_lists("domainnet", root, {"train": [...], "test": [...]})  # image files named in published lists
    image = dataset.train[0]                                # (3, H, W) uint8
    images = dataset.train.batch(indices)                   # (B, 3, H, W), or a list where sizes differ
    dataset.train.content_sha256(indices)                   # names the content of these images

`utils.data.datasets` finds them by name. Every error is one sentence that names the file.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.cache.decoded_images import DecodedImages
from utils.cache.file_memo import FileMemo
from utils.data.image_files import (
    DECODER,
    LeftOut,
    check_images,
    class_folders,
    decode,
    first_visits,
    image_files,
    why_bad,
)
from utils.errors import UserError
from utils.files import npz_headers, why_no_file

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test", "class_names")
HASHED = 1024  # images hashed at a time


class ImageSet:
    """Images with labels: `labels` is int64 (N,), `self[i]` a new uint8 tensor (3, H, W)."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        raise NotImplementedError

    def batch(self, indices: np.ndarray) -> Tensor | list[Tensor]:
        """Several images: uint8 (B, 3, H, W), or a list of (3, H, W) where their sizes differ or there are none."""
        images = [self[index] for index in indices]
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images

    def content_sha256(self, indices: np.ndarray) -> str:
        """SHA-256 that names the content of these images, in this order."""
        raise NotImplementedError

    def prepare(self, indices: np.ndarray) -> None:
        """Do once what makes these images quick to read, before several processes read them."""


class ArrayImages(ImageSet):
    """Images of one uint8 array (N, H, W, 3), (N, H, W, 1) or (N, H, W); grey ones get three equal channels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(labels)
        self.images = images if images.ndim == 4 else images[..., None]

    def __getitem__(self, index: int) -> Tensor:
        return self.batch(np.array([index]))[0]

    def batch(self, indices: np.ndarray) -> Tensor:
        """Several images, uint8 (B, 3, H, W)."""
        images = self.images[indices]
        images = images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def content_sha256(self, indices: np.ndarray) -> str:
        digest = hashlib.sha256(f"{self.images.shape[1:]}".encode())
        for start in range(0, len(indices), HASHED):
            digest.update(np.ascontiguousarray(self.images[indices[start : start + HASHED]]))
        return digest.hexdigest()


class FolderImages(ImageSet):
    """Image files, all decoded to RGB.

    Args:
        paths: the files.
        labels: one each.
        hashes: SHA-256 of the content of each, from `check_images`.
        memo: where the hashes are remembered; forgets that of a file whose bytes are others when it is read.
        decoded: where `prepare` puts decoded images, from which they are then read; None decodes at every access.

    Raises:
        UserError: from `self[i]`, `batch` and `prepare`, naming a file that cannot be read or is no longer the same.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: np.ndarray,
        hashes: Sequence[str],
        memo: FileMemo,
        decoded: DecodedImages | None = None,
    ) -> None:
        super().__init__(labels)
        self.paths, self.hashes, self.memo, self.decoded = paths, hashes, memo, decoded

    def __getitem__(self, index: int) -> Tensor:
        pixels = None if self.decoded is None else self.decoded.read(index)
        return torch.from_numpy(self._decode(index) if pixels is None else pixels).permute(2, 0, 1)

    def prepare(self, indices: np.ndarray) -> None:
        """Decode those of these images that never were."""
        if self.decoded is not None:
            self.decoded.add(indices, self._decode)

    def content_sha256(self, indices: np.ndarray) -> str:
        return hashlib.sha256("".join(self.hashes[index] for index in indices).encode()).hexdigest()

    def _decode(self, index: int) -> np.ndarray:
        path = self.paths[index]
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == self.hashes[index]:
                return decode(content)
        except Exception as error:  # decoders raise errors of many kinds on bad bytes
            raise UserError(
                f"The image {path} cannot be read ({why_bad(error)}); replace or remove it."
            ) from error
        self.memo.forget(path)
        raise UserError(
            f"The image {path} is not the one that was there when its content was hashed: it was replaced meanwhile. "
            "Run the command again, or go on with --resume: its content is then hashed anew."
        )


@dataclass(frozen=True)
class Dataset:
    """Training and test images of the same classes.

    Attributes:
        sha256: names the content: over labels and pixels, or for image files over labels and the files' bytes. Names
            of files and classes are no part of it.
        left_out: what lies beside the images and is not read, counted and named, or "".
    """

    name: str
    class_names: list[str]
    train: ImageSet
    test: ImageSet
    sha256: str
    left_out: str = ""

    def __post_init__(self) -> None:
        labels = {"train": self.train.labels, "test": self.test.labels}
        _require_images(self.name, self.class_names, labels, self.left_out)


def _require_images(name: str, class_names: list[str], labels: dict[str, np.ndarray], left_out: str) -> None:
    """Raise UserError where a class has no image in a split."""
    for source, numbers in labels.items():
        absent = np.flatnonzero(np.bincount(numbers, minlength=len(class_names)) == 0)
        if len(absent):
            names = ", ".join(class_names[i] for i in absent[:3])
            also = f" (left out: {left_out})" if left_out else ""
            raise UserError(
                f"Data set {name!r}: {len(absent)} classes have no {source} image, such as {names}{also}."
            )


def from_arrays(name: str, class_names: list[str], arrays: dict[str, np.ndarray]) -> Dataset:
    """A data set of checked arrays `x_train, y_train, x_test, y_test` that are already in memory."""
    digest = hashlib.sha256()
    for key in NPZ_KEYS[:4]:
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    sets = [ArrayImages(arrays[f"x_{source}"], arrays[f"y_{source}"]) for source in ("train", "test")]
    return Dataset(name, class_names, *sets, digest.hexdigest())


def from_npz(name: str, path: Path) -> Dataset:
    """The data set of an .npz with `NPZ_KEYS`. Raises UserError for missing keys, wrong types, shapes or labels."""
    arrays = read_npz(path, NPZ_KEYS)
    class_names = _names(path, arrays.pop("class_names"))
    for source in ("train", "test"):
        _check_split(path, source, arrays[f"x_{source}"], arrays[f"y_{source}"], len(class_names))
        arrays[f"y_{source}"] = arrays[f"y_{source}"].astype(np.int64)
    return from_arrays(name, class_names, arrays)


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `keys` of an .npz, never through pickle. Raises UserError naming the file."""
    reason = why_no_file(path)
    if reason:
        raise UserError(f"{path} cannot be read as an .npz data set: {reason}.")
    try:
        held = npz_headers(path)
        missing = [key for key in keys if key not in held]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; a data set file has {', '.join(NPZ_KEYS)}.")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys}
    except UserError:
        raise
    except Exception as error:  # readers raise errors of many kinds on bad bytes
        raise UserError(
            f"{path} cannot be read as an .npz data set without pickle: {why_bad(error)}."
        ) from error
    names = arrays.get("class_names", np.zeros(0))
    if names.ndim != 1:
        raise UserError(f"{path}: class_names has shape {names.shape}; expected one name a class, (C,).")
    return arrays


def _names(path: Path, names: np.ndarray) -> list[str]:
    """Class names as text; bytes are taken for UTF-8."""
    try:
        texts = [name.decode("utf-8") if isinstance(name, bytes) else str(name) for name in names.tolist()]
        "".join(texts).encode("utf-8")
    except UnicodeError as error:
        raise UserError(
            f"{path}: a name in class_names is not UTF-8 ({error.reason}); write it in UTF-8."
        ) from error
    return [unicodedata.normalize("NFC", text) for text in texts]


def _check_split(path: Path, source: str, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] in (1, 3)
    if images.dtype != np.uint8 or not (grey or colour) or 0 in images.shape:
        raise UserError(
            f"{path}: x_{source} is {images.dtype} {images.shape}; "
            f"expected uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W)."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: y_{source} is {labels.dtype} {labels.shape}; "
            f"expected integers, one for each of {len(images)} images."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{path}: y_{source} has labels from {labels.min()} to {labels.max()}; "
            f"expected 0 to {classes - 1}, as class_names has {classes} entries."
        )


@dataclass(frozen=True)
class ImageCache:
    """Where what is known of image files is kept, for all runs: which are good (`FileMemo`), and decoded pixels.

    Attributes:
        folder: of all data sets together; None keeps nothing.
        limit_gb: size in GB that decoded pixels may reach; 0 keeps none.
    """

    folder: Path | None = None
    limit_gb: float = 0

    @property
    def memo(self) -> FileMemo:
        return FileMemo(self.folder, DECODER)

    def decoded(self, hashes: Sequence[str], label: str) -> DecodedImages | None:
        """The place of decoded images, named by the files' content and by what decodes them."""
        if self.folder is None or not self.limit_gb:
            return None
        name = hashlib.sha256("\n".join([DECODER, *hashes]).encode()).hexdigest()
        return DecodedImages(self.folder / name, len(hashes), label, self.limit_gb)


NO_CACHE = ImageCache()


def from_folder(name: str, path: Path, cache: ImageCache = NO_CACHE) -> Dataset:
    """Image files `train/<class>/*` and `test/<class>/*`; classes are numbered in sorted order.

    Hidden files and folders and files with other suffixes are left out, and each real folder of a split is read once.

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
        visited: set[tuple[int, int]] = set()
        first_visits([path, path / "train", path / "test"], LeftOut(), visited)  # no link leads back up
        roots = [first_visits(folders[split][class_name], left_out, visited) for class_name in class_names]
        groups = [
            [file for root in place for file in image_files(root, left_out, visited)] for place in roots
        ]
        labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        files[split] = ([file for group in groups for file in group], labels)
    return from_files(name, path, class_names, files, cache, str(left_out))


def from_files(
    name: str,
    path: Path,
    class_names: list[str],
    files: dict[str, tuple[list[Path], np.ndarray]],
    cache: ImageCache = NO_CACHE,
    left_out: str = "",
) -> Dataset:
    """The data set of image files with labels; `files` has those of "train" and of "test", all below `path`.

    Every file is decoded once, before anything is learned from one; the cache remembers which were good.

    Raises:
        UserError: a class has no image, or files are not there or bad: all of them in one list.
    """
    _require_images(name, class_names, {split: labels for split, (_, labels) in files.items()}, left_out)
    every = [file for paths, _ in files.values() for file in paths]
    hashes, memo, sets = iter(check_images(every, path, cache.memo, name)), cache.memo, []
    digest = hashlib.sha256()
    for split, (paths, labels) in files.items():
        own = [next(hashes) for _ in paths]
        decoded = cache.decoded(own, f"decoding {name} {split}")
        sets.append(FolderImages(paths, labels, own, memo, decoded))
        digest.update(f"{split}\n".encode())
        digest.update(
            "".join(f"{label} {sha256}\n" for label, sha256 in zip(labels, own, strict=True)).encode()
        )
    return Dataset(name, class_names, *sets, digest.hexdigest(), left_out)


def from_lists(name: str, path: Path, lists: dict[str, list[Path]], cache: ImageCache = NO_CACHE) -> Dataset:
    """The data set of published lists of image files, each line `<domain>/<class>/<file> <number>`, relative to `path`.

    All lists of a split are pooled; a class has the number that the lists give it.

    Raises:
        UserError: a line of another form, a class without training images, a class with two numbers or a number with
            two classes, a number that is missing, or as from `from_files`.
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
