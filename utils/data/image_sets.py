"""Images with labels, in memory or on disk, and data sets made of a training and a test set of them.

dataset = from_arrays("mine", ["ant", "bee"], arrays)
image = dataset.train[0]                                # (3, H, W) uint8
images = dataset.train.batch(indices)                   # (B, 3, H, W), or a list where sizes differ
dataset.train.content_sha256(indices)                   # hash of the content of these images
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.cache.file_memo import FileMemo
from utils.data.image_files import decode, why_bad
from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor  # imported where tensors are made: a config is checked before PyTorch is there

HASHED = 1024  # images hashed at a time
SPLITS = ("train", "test")  # of a data set


class ImageSet:
    """Images with labels, int64 (N,); `self[i]` is a new uint8 tensor (3, H, W)."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return self.batch(np.array([index]))[0]

    def batch(self, indices: np.ndarray) -> Tensor | list[Tensor]:
        """Several images: uint8 (B, 3, H, W), or a list of (3, H, W) where sizes differ or there are none."""
        raise NotImplementedError

    def content_sha256(self, indices: np.ndarray) -> str:
        """SHA-256 of the content of these images, in this order."""
        raise NotImplementedError


def _stacked(images: list[Tensor]) -> Tensor | list[Tensor]:
    import torch

    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


class ArrayImages(ImageSet):
    """Images of one uint8 array (N, H, W, 3), (N, H, W, 1) or (N, H, W); grey gets three equal channels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(labels)
        self.images = images if images.ndim == 4 else images[..., None]

    def batch(self, indices: np.ndarray) -> Tensor:
        import torch

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
        hashes: SHA-256 of the content of each path, and perhaps of others, from `check_images`.
        memo: record of the hashes; it forgets that of a file whose bytes have changed when it is read.

    Raises UserError: from `batch`, naming a file that cannot be read or is no longer the same.
    """

    def __init__(
        self, paths: Sequence[Path], labels: np.ndarray, hashes: Mapping[Path, str], memo: FileMemo
    ) -> None:
        super().__init__(labels)
        self.paths, self.hashes, self.memo = paths, hashes, memo

    def content_sha256(self, indices: np.ndarray) -> str:
        hashes = (self.hashes[self.paths[index]] for index in indices)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def batch(self, indices: np.ndarray) -> Tensor | list[Tensor]:
        return _stacked([self._read(index) for index in indices])

    def _read(self, index: int) -> Tensor:
        import torch

        path = self.paths[index]
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == self.hashes[path]:
                return torch.from_numpy(decode(content)).permute(2, 0, 1)
        except Exception as error:  # decoders raise errors of many kinds on bad bytes
            raise UserError(
                f"The image {path} cannot be read ({why_bad(error)}); replace or remove it."
            ) from error
        self.memo.forget(path)
        raise UserError(
            f"The image {path} is not the one that was there when its content was hashed: it was replaced "
            "meanwhile. Run the command again, or go on with --resume: its content is then hashed anew."
        )


class JoinedImages(ImageSet):
    """Images of several sets, one after the other, with new labels."""

    def __init__(self, parts: Sequence[ImageSet], labels: np.ndarray) -> None:
        super().__init__(labels)
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])

    def batch(self, indices: np.ndarray) -> Tensor | list[Tensor]:
        batches = [part.batch(own) for part, own in self._split(indices)]
        return batches[0] if len(batches) == 1 else _stacked([image for batch in batches for image in batch])

    def content_sha256(self, indices: np.ndarray) -> str:
        """Images of one part have that part's hash, whatever is added to it."""
        hashes = [part.content_sha256(own) for part, own in self._split(indices)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def _split(self, indices: np.ndarray) -> list[tuple[ImageSet, np.ndarray]]:
        """Runs of consecutive indices of one part: (part, indices in it)."""
        parts = np.searchsorted(self.starts, indices, side="right") - 1
        groups = np.split(np.arange(len(indices)), np.flatnonzero(np.diff(parts)) + 1)
        return [
            (self.parts[parts[group[0]]], indices[group] - self.starts[parts[group[0]]])
            for group in groups
            if len(group)
        ]


@dataclass(frozen=True)
class Dataset:
    """Training and test images of the same classes.

    Attributes:
        test: None where only training images were asked for.
        sha256: over labels and pixels, or for image files over labels and the files' bytes. Names of files
            and classes are no part of it, nor are test images that were not read.
        left_out: files and folders beside the images that are not read, counted and named, or "".
        added: number of classes of each data set that was added; they are the last ones.
        test_origin: origin of the test images, unless it is a folder test/ or a file, or "".
    """

    name: str
    class_names: list[str]
    train: ImageSet
    test: ImageSet | None
    sha256: str
    left_out: str = ""
    added: tuple[int, ...] = ()
    test_origin: str = ""


def joined(parts: Sequence[Dataset]) -> Dataset:
    """Data sets as one: stored images and classes of each follow those before it.

    Raises UserError: a class has the name of an earlier one.
    """
    names: list[str] = []
    for part in parts:
        if known := sorted({*names} & {*part.class_names}):
            raise UserError(
                f"Data set {part.name!r}: {len(known)} of its classes, such as {', '.join(known[:3])}, are "
                f"classes of what it is added to; only new classes can be added, rename or remove those."
            )
        names += part.class_names
    starts = np.cumsum([0, *(len(part.class_names) for part in parts)])
    sets = {"test": None}
    for source in SPLITS if parts[0].test is not None else SPLITS[:1]:
        own = [getattr(part, source) for part in parts]
        labels = [images.labels + start for images, start in zip(own, starts, strict=False)]
        sets[source] = JoinedImages(own, np.concatenate(labels))
    return Dataset(
        " + ".join(part.name for part in parts),
        names,
        **sets,
        sha256=hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest(),
        left_out=", ".join(part.left_out for part in parts if part.left_out),
        added=tuple(len(part.class_names) for part in parts[1:]),
        test_origin="; ".join(dict.fromkeys(part.test_origin for part in parts if part.test_origin)),
    )


def require_images(name: str, class_names: list[str], labels: dict[str, np.ndarray], left_out: str) -> None:
    """Raise UserError where a class has no image in a split."""
    for source, numbers in labels.items():
        absent = np.flatnonzero(np.bincount(numbers, minlength=len(class_names)) == 0)
        if len(absent):
            names = ", ".join(class_names[i] for i in absent[:3])
            also = f" (left out: {left_out})" if left_out else ""
            raise UserError(
                f"Data set {name!r}: {len(absent)} classes have no {source} image, such as {names}{also}."
            )


def from_arrays(
    name: str, class_names: list[str], arrays: dict[str, np.ndarray], splits: Sequence[str] = SPLITS
) -> Dataset:
    """A data set of checked arrays `x_train, y_train, x_test, y_test`, those of other splits left aside."""
    labels = {split: arrays[f"y_{split}"].astype(np.int64) for split in splits}
    require_images(name, class_names, labels, "")
    digest, sets = hashlib.sha256(), {}
    for split in splits:
        sets[split] = ArrayImages(arrays[f"x_{split}"], labels[split])
        for key, array in ((f"x_{split}", arrays[f"x_{split}"]), (f"y_{split}", labels[split])):
            digest.update(f"{key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return Dataset(name, class_names, sets["train"], sets.get("test"), digest.hexdigest())
