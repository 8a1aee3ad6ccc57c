"""Data sets in one .npz file: `x_train, y_train, x_test, y_test, class_names`.

    dataset = from_npz("mine", Path("mine.npz"))

Images are uint8, (N, H, W, 3), (N, H, W, 1) or (N, H, W). Every error is one sentence that names the file.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.data.image_files import why_bad
from utils.data.image_sets import SPLITS, Dataset, from_arrays
from utils.errors import UserError
from utils.files import npz_headers, why_no_file

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test", "class_names")


def from_npz(name: str, path: Path, splits: Sequence[str] = SPLITS) -> Dataset:
    """Data set of an .npz, of which the arrays of other splits are not read; names in bytes are UTF-8.

    Raises UserError for missing keys, wrong types, shapes or labels.
    """
    arrays = read_npz(path, [key for key in NPZ_KEYS if key.partition("_")[2] in (*splits, "names")])
    names = arrays.pop("class_names").tolist()
    try:
        texts = [each.decode("utf-8") if isinstance(each, bytes) else str(each) for each in names]
        "".join(texts).encode("utf-8")
    except UnicodeError as error:
        raise UserError(
            f"{path}: a name in class_names is not UTF-8 ({error.reason}); write it in UTF-8."
        ) from error
    for source in splits:
        _check_split(path, source, arrays[f"x_{source}"], arrays[f"y_{source}"], len(names))
    return from_arrays(name, [unicodedata.normalize("NFC", text) for text in texts], arrays, splits)


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `keys` of an .npz, never through pickle. Raises UserError naming the file."""
    try:
        if reason := why_no_file(path):
            raise ValueError(reason)
        missing = sorted(set(keys) - npz_headers(path).keys(), key=NPZ_KEYS.index)
        if not missing:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in keys}
    except Exception as error:  # readers raise errors of many kinds on bad bytes
        raise UserError(
            f"{path} cannot be read as an .npz data set without pickle: {why_bad(error)}."
        ) from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; a data set file has {', '.join(NPZ_KEYS)}.")
    names = arrays.get("class_names", np.zeros(0))
    if names.ndim != 1:
        raise UserError(f"{path}: class_names has shape {names.shape}; expected one name per class, (C,).")
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
