"""Test images by true and predicted class: the files `per_class.csv` and `confusion.csv` of a run.

    counts = confusion_counts(targets, predicted, 20)       # (20, 20): row true class, column predicted class
    tables = class_tables(counts, names, tasks, correct_when_learned)       # file name -> table
    per_class, counts, images = read_classes(run_folder)

Classes stand in the order in which tasks bring them; counts are of the newest evaluation. Of validation
images the files are `validation_per_class.csv` and `validation_confusion.csv`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from utils.files import damaged
from utils.metric_catalogue import keyed

PER_CLASS, CONFUSION = "per_class.csv", "confusion.csv"


def confusion_counts(targets: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Exact number of images of each true class (row) taken for each class (column), int64 (C, C)."""
    cells = np.bincount(targets * classes + predicted, minlength=classes**2)
    return cells.reshape(classes, classes)


def class_tables(
    counts: np.ndarray, names: Sequence[str], tasks: Sequence[int], correct_when_learned: Sequence[int | None]
) -> dict[str, pd.DataFrame]:
    """Tables of both files, by file name.

    Args:
        counts: of `confusion_counts`, over the classes seen, (C, C).
        names, tasks: of each class: its name, and the task that brought it.
        correct_when_learned: correct images of each class just after its own task; None where not recorded.
    """
    images, correct = counts.sum(axis=1), counts.diagonal()
    per_class = pd.DataFrame(
        {
            "class": range(len(counts)),
            "name": names,
            "task": tasks,
            "images": images,
            "correct": correct,
            "accuracy": 100.0 * correct / images,
            "accuracy_when_learned": 100.0 * np.array(correct_when_learned, float) / images,
        }
    )
    confusion = pd.DataFrame(counts, columns=list(names))
    confusion.insert(0, "true class \\ predicted", list(names), allow_duplicates=True)
    return {PER_CLASS: per_class, CONFUSION: confusion}


class Classes(NamedTuple):
    """Table per class, counts (C, C) by true and predicted class, of "test" or "validation" images."""

    per_class: pd.DataFrame
    counts: np.ndarray
    images: str


def read_classes(folder: Path) -> Classes | None:
    """The classes of a run; None where it has none, or is between the two files. UserError: damaged."""
    images = "validation" if (folder / keyed("validation", PER_CLASS)).is_file() else "test"
    path, other = (folder / keyed(images, name) for name in (PER_CLASS, CONFUSION))
    if not path.is_file() or not other.is_file():
        return None
    with damaged(f"{path} or {other.name}", "restore both"):
        numbers = {"na_values": {"accuracy_when_learned": [""]}, "keep_default_na": False}
        per_class = pd.read_csv(path, dtype={"name": str}, **numbers)  # also a class called "NA" or "7"
        counts = pd.read_csv(other, keep_default_na=False).iloc[:, 1:].to_numpy(np.int64)
        per_class = per_class.astype({"task": int, "images": int, "correct": int, "accuracy": float})
    whole = len(per_class) == len(counts) == counts.shape[1]
    return Classes(per_class, counts, images) if whole else None
