"""Images with labels, and the forms in which a data set lies on disk: one `.npz`, or image files in folders or lists.

    dataset = from_npz("mine", Path("mine.npz"))            # x_train, y_train, x_test, y_test, class_names
    dataset = from_folder("mine", Path("mine"))             # train/<class>/* and test/<class>/*
    dataset = from_folder("mine", Path("mine"), Path("cache/images"))       # the same, every file decoded only once
    dataset = from_lists("domainnet", root, {"train": [...], "test": [...]})  # image files named in published lists
    image = dataset.train[0]                                # (3, H, W) uint8
    images = dataset.train.batch(indices)                   # (B, 3, H, W), or a list where sizes differ

`utils.data` finds them by name. Every error is one sentence that names the file.
"""

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from utils.decoded_images import DecodedImages
from utils.errors import UserError

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test", "class_names")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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


class FolderImages(ImageSet):
    """Image files, all decoded to RGB.

    Args:
        paths: the files.
        labels: one each.
        decoded: where `prepare` puts decoded images, from which they are then read; None decodes at every access.

    Raises:
        UserError: from `self[i]`, `batch` and `prepare`, naming a file that is corrupt or truncated.
    """

    def __init__(self, paths: Sequence[Path], labels: np.ndarray, decoded: DecodedImages | None = None) -> None:
        super().__init__(labels)
        self.paths, self.decoded = paths, decoded

    def __getitem__(self, index: int) -> Tensor:
        pixels = None if self.decoded is None else self.decoded.read(index)
        return torch.from_numpy(self._decode(index) if pixels is None else pixels).permute(2, 0, 1)

    def prepare(self, indices: np.ndarray) -> None:
        """Decode those of these images that never were."""
        if self.decoded is not None:
            self.decoded.add(indices, self._decode)

    def _decode(self, index: int) -> np.ndarray:
        path = self.paths[index]
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # some libraries switch it on; a half grey image must not pass
        try:
            with Image.open(path) as image:
                return np.array(image.convert("RGB"))
        except Exception as error:  # decoders raise errors of many kinds on bad bytes
            raise UserError(f"The image {path} cannot be read ({error}); replace or remove it.") from error


@dataclass(frozen=True)
class Dataset:
    """Training and test images of the same classes; `sha256` names the content.

    The hash is over the arrays' shapes and bytes, or for folders over the files' relative paths and sizes.
    """

    name: str
    class_names: list[str]
    train: ImageSet
    test: ImageSet
    sha256: str

    def __post_init__(self) -> None:
        for source, images in (("train", self.train), ("test", self.test)):
            absent = np.flatnonzero(np.bincount(images.labels, minlength=len(self.class_names)) == 0)
            if len(absent):
                names = ", ".join(self.class_names[i] for i in absent[:3])
                raise UserError(
                    f"Data set {self.name!r}: {len(absent)} classes have no {source} image, such as {names}."
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
    class_names = [str(text) for text in arrays.pop("class_names").astype(str)]
    for source in ("train", "test"):
        _check_split(path, source, arrays[f"x_{source}"], arrays[f"y_{source}"], len(class_names))
        arrays[f"y_{source}"] = arrays[f"y_{source}"].astype(np.int64)
    return from_arrays(name, class_names, arrays)


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `keys` of an .npz, never through pickle. Raises UserError naming the file."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}; a data set file has {', '.join(NPZ_KEYS)}.")
            arrays = {key: file[key] for key in keys}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an .npz data set without pickle: {error}.") from error
    if arrays.get("class_names", np.zeros(0)).ndim != 1:
        raise UserError(
            f"{path}: class_names has shape {arrays['class_names'].shape}; expected one name a class, (C,)."
        )
    return arrays


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


def class_folders(split: Path) -> list[str]:
    """Names of the class folders of train/ or test/, sorted."""
    return sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> Iterator[Path]:
    """Image files below a folder in sorted order."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (Path(place, file) for file in sorted(files) if file.lower().endswith(IMAGE_SUFFIXES))


def from_folder(name: str, path: Path, decode_to: Path | None = None, decode_gb: float = math.inf) -> Dataset:
    """Image files `train/<class>/*` and `test/<class>/*`; classes are numbered in sorted order.

    Args:
        decode_to: folder for decoded images (`DecodedImages`): each split gets a folder in it that is named by the
            hash over its files' relative paths, sizes and modification times. None decodes files at every access.
        decode_gb: size in GB that all that is in `decode_to` may reach.

    Raises:
        UserError: train/ and test/ differ in their classes or a class has no image.
    """
    class_names, test_names = class_folders(path / "train"), class_folders(path / "test")
    if class_names != test_names or not class_names:
        only = {"train": set(class_names) - set(test_names), "test": set(test_names) - set(class_names)}
        told = [f"only in {split}: {', '.join(sorted(names)[:5])}" for split, names in only.items() if names]
        raise UserError(
            f"{path}: train/ and test/ need the same class folders ({'; '.join(told) or 'there are none'})."
        )
    files = {}
    for split in ("train", "test"):
        groups = [list(_image_files(path / split / class_name)) for class_name in class_names]
        labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        files[split] = ([file for group in groups for file in group], labels)
    return from_files(name, path, class_names, files, decode_to, decode_gb)


def from_files(
    name: str,
    path: Path,
    class_names: list[str],
    files: dict[str, tuple[list[Path], np.ndarray]],
    decode_to: Path | None = None,
    decode_gb: float = math.inf,
) -> Dataset:
    """The data set of image files with labels; `files` has those of "train" and of "test", all below `path`.

    Raises:
        UserError: a file is not there, or a class has no image.
    """
    digest, sets = hashlib.sha256(), []
    for split, (paths, labels) in files.items():
        versions = hashlib.sha256()
        for file in paths:
            relative = file.relative_to(path).as_posix()
            try:
                status = file.stat()
            except FileNotFoundError as error:
                raise UserError(f"Data set {name!r}: the image {file} is listed and is not there.") from error
            digest.update(f"{relative} {status.st_size}\n".encode())
            versions.update(f"{relative} {status.st_size} {status.st_mtime_ns}\n".encode())
        decoded = None
        if decode_to is not None:
            folder = Path(decode_to) / versions.hexdigest()
            decoded = DecodedImages(folder, len(paths), f"decoding {name} {split}", decode_gb)
        sets.append(FolderImages(paths, labels, decoded))
    return Dataset(name, class_names, *sets, digest.hexdigest())


def from_lists(
    name: str,
    path: Path,
    lists: dict[str, list[Path]],
    decode_to: Path | None = None,
    decode_gb: float = math.inf,
) -> Dataset:
    """The data set of published lists of image files, each line `<domain>/<class>/<file> <number>`, relative to `path`.

    All lists of a split are pooled; classes are those of the training lists' folders, numbered in sorted order.

    Raises:
        UserError: a line of another form, an unknown class, or as from `from_files`.
    """
    rows = {split: [row for file in group for row in _listed(file)] for split, group in lists.items()}
    class_names = sorted({class_name for _, class_name in rows["train"]})
    numbers = {class_name: number for number, class_name in enumerate(class_names)}
    strange = sorted({class_name for _, class_name in rows["test"]} - numbers.keys())
    if strange:
        raise UserError(f"{path}: no training list has the class {strange[0]} of a test list.")
    files = {
        split: ([path / relative for relative, _ in pairs], np.array([numbers[c] for _, c in pairs], dtype=np.int64))
        for split, pairs in rows.items()
    }
    return from_files(name, path, class_names, files, decode_to, decode_gb)


def _listed(file: Path) -> Iterator[tuple[str, str]]:
    """Relative path and class of every line of a list."""
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        relative, _, label = line.strip().rpartition(" ")
        folders = relative.split("/")
        if len(folders) != 3 or not label.isdigit() or ".." in folders:
            raise UserError(f"{file}, line {number} is {line!r}; expected <domain>/<class>/<file> <number>.")
        yield relative, folders[1]
