"""Image files for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.cache.file_memo import FileMemo
from utils.data.datasets import load_dataset
from utils.data.image_sets import Dataset, FolderImages
from utils.files import sha256_file


def write_folder(
    root: Path, split: str, names: list[str], suffix: str = ".png", each: int = 2, colour: int = 0
) -> None:
    """Images of one colour, `colour` for the first: 40 more for each class, one more for each image of it."""
    for label, name in enumerate(names):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(each):
            pixels = np.full((6, 5, 3), colour + 40 * label + i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}{suffix}")


def folder_images(paths: list[Path], labels: np.ndarray | None = None) -> FolderImages:
    """Image files that nobody has checked."""
    labels = np.zeros(len(paths)) if labels is None else labels
    return FolderImages(
        paths, labels, {path: sha256_file(path) for path in paths}, FileMemo(None, Path(), "")
    )


def load(folder: Path, **more: object) -> Dataset:
    """The data set in a folder, with a memory of checked files beside it."""
    return load_dataset(str(folder), folder, folder.parent / "cache", **more)
