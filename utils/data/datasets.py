"""Data sets by name or path, held as uint8 images; `utils.data.transforms` turns them into network inputs.

    dataset = load_dataset("cifar224", "data")     # or "my_set.npz", or a folder with train/ and test/
    image = dataset.train[0]                       # (3, H, W) uint8

A data set of your own is an `.npz` with `x_train, y_train, x_test, y_test, class_names` (images uint8,
(N, H, W, 3) or (N, H, W)), or image files `train/<class>/*` and `test/<class>/*` (or val/), or one folder per
class and a share of each for the test.
"""

import difflib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.download import fetch_asset
from utils.data.folders import FolderScan, class_folders, from_folder, from_lists, split_folders
from utils.data.image_sets import SPLITS, Dataset, from_arrays, joined
from utils.data.npz import NPZ_KEYS, from_npz, read_npz
from utils.data.synthetic import CLASS_NAMES, synthetic_arrays
from utils.errors import UserError
from utils.files import excluding

MNIST_5K_TRAIN_PER_DIGIT = 400
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")  # of DomainNet
PATHS = (
    "a path ending in .npz, or a folder with train/<class>/* and test/<class>/*, or one folder per class and "
    "test_share"
)
NO_DATA_NEEDED = (
    "python main.py alone (exps/quickstart.json, package index only) and exps/smoke.json need no data set of "
    "your own"
)


# -------------------------------------------------------------------------------------------- named data sets

Splits = Sequence[str]  # of "train" and "test", which are read


def _synthetic(name: str, data_root: Path, cache: Path | None, splits: Splits) -> Dataset:
    return from_arrays(name, *synthetic_arrays(), splits)


def _mnist_5k(name: str, data_root: Path, cache: Path | None, splits: Splits) -> Dataset:
    """500 images per digit in stored order: the first 400 for training, the last 100 for the test."""
    table = np.loadtxt(fetch_asset("mnist_5k", data_root), delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    train = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        train[np.flatnonzero(labels == digit)[:MNIST_5K_TRAIN_PER_DIGIT]] = True
    arrays = {"x_train": images[train], "y_train": labels[train]}
    arrays |= {"x_test": images[~train], "y_test": labels[~train]}
    return from_arrays(name, [str(digit) for digit in range(10)], arrays, splits)


def _torchvision(kind: str, name: str, data_root: Path, cache: Path | None, splits: Splits) -> Dataset:
    """torchvision's data set `kind`: its own files, else downloaded."""
    import torchvision  # here: a config is checked before anything heavy is imported

    arrays, load = {}, getattr(torchvision.datasets, kind)
    try:
        with excluding(data_root / f".{kind}.lock"):  # torchvision writes files in place
            parts = {split: load(data_root, train=split == "train", download=True) for split in splits}
        for split, part in parts.items():
            arrays[f"x_{split}"], arrays[f"y_{split}"] = np.asarray(part.data), np.asarray(part.targets)
    except Exception as error:  # network, disk and archive errors of several libraries
        how = f"downloading it with torchvision failed: {' '.join(str(error).split())}"
        raise _missing(name, _places(name, data_root), how) from error
    return from_arrays(name, list(part.classes), arrays, splits)


def _absent(name: str, data_root: Path, cache: Path | None, splits: Splits) -> Dataset:
    how = "the published train/test split is linked from https://github.com/zhoudw-zdw/RevisitingCIL"
    raise _missing(name, _places(name, data_root), how)


def _domainnet(name: str, data_root: Path, cache: Path | None, splits: Splits) -> Dataset:
    """All domains pooled by class, split by the published `<domain>_train.txt` and `<domain>_test.txt`."""
    (place,) = _places(name, data_root)
    lists = {split: [place / f"{domain}_{split}.txt" for domain in DOMAINS] for split in splits}
    absent = [file for group in lists.values() for file in group if not file.is_file()]
    if absent:
        how = "the six domains and their lists are on http://ai.bu.edu/M3SDA"
        raise _missing(name, [place / "train", *absent], how)
    return from_lists(name, place, lists, cache)


@dataclass(frozen=True)
class DataSource:
    """Source of a named data set.

    classes: number of classes as published.
    load: (name, data_root, cache, splits) -> Dataset, where it is in none of its places.
    places: names under data_root of an .npz, or of a folder with train/ and test/.
    """

    classes: int
    load: Callable[[str, Path, Path | None, Splits], Dataset] = _absent
    places: tuple[str, ...] = ()


DATASETS = {
    "synthetic": DataSource(len(CLASS_NAMES), _synthetic),
    "mnist_5k": DataSource(10, _mnist_5k),
    "mnist": DataSource(10, functools.partial(_torchvision, "MNIST"), ("mnist.npz",)),
    "fashion_mnist": DataSource(10, functools.partial(_torchvision, "FashionMNIST"), ("fashion_mnist.npz",)),
    "cifar10": DataSource(10, functools.partial(_torchvision, "CIFAR10"), ("cifar10.npz",)),
    "cifar100": DataSource(100, functools.partial(_torchvision, "CIFAR100"), ("cifar100.npz",)),
    "cifar224": DataSource(100, functools.partial(_torchvision, "CIFAR100"), ("cifar100.npz",)),
    "imagenetr": DataSource(200, places=("imagenet-r", "imagenetr")),
    "imageneta": DataSource(200, places=("imagenet-a", "imageneta")),
    "vtab": DataSource(50, places=("vtab",)),
    "cub": DataSource(200, places=("cub",)),
    "objectnet": DataSource(200, places=("objectnet",)),
    "omnibenchmark": DataSource(300, places=("omnibenchmark",)),
    "domainnet": DataSource(345, _domainnet, ("domainnet",)),
}


# ----------------------------------------------------------------------------------------- by name or by path


def load_dataset(
    name: str,
    data_root: str | Path,
    cache: Path | None = None,
    *,
    splits: Splits = SPLITS,
    test_share: float | None = None,
    added: Sequence[str] = (),
    partial: bool = False,
) -> Dataset:
    """A data set by name (a key of `DATASETS`) or path (an .npz or a folder, as given or inside `data_root`).

    Args:
        cache: folder for records of checked image files; None keeps none.
        splits: ("train",) leaves test images unread.
        test_share: of each class's images, for a folder with one folder per class.
        added: names or paths of data sets whose classes follow.
        partial: classes of image folders may lack training images.

    Raises UserError: unknown name, missing data (with the places searched and how to get it), a file or
    folder that is no data set, bad image files (all), or a class that is added twice.
    """
    if added:
        how = {"splits": splits, "test_share": test_share, "partial": partial}
        return joined([load_dataset(part, data_root, cache, **how) for part in (name, *added)])
    data_root = Path(data_root)
    path = _find(name, data_root, test_share)
    if path is None and name in DATASETS:
        return DATASETS[name].load(name, data_root, cache, splits)
    if path is None:
        raise _missing(name, _places(name, data_root), "check the path")
    slug = dataset_slug(name)
    if _is_npz(path):
        return from_npz(slug, path, splits)
    return from_folder(slug, path, cache, splits, test_share=test_share, partial=partial)


def require_dataset(
    name: str, data_root: str | Path, cache: Path | None = None, test_share: float | None = None
) -> None:
    """Download a data set if it is missing. UserError: it is not available."""
    if _find(name, Path(data_root), test_share) is None:
        load_dataset(name, data_root, cache, test_share=test_share)


def class_count(name: str, data_root: str | Path, test_share: float | None = None) -> int | None:
    """Number of classes without reading images; None when the path does not exist. Raises UserError."""
    path = _find(name, Path(data_root), test_share)
    if path is None:
        return DATASETS[name].classes if name in DATASETS else None
    if _is_npz(path):
        return len(read_npz(path, ("class_names",))["class_names"])
    places = split_folders(path).values()
    return len({name for place in places for name in class_folders(place, FolderScan())})


def splits_itself(name: str, data_root: str | Path) -> bool:
    """Whether a data set defines its test images itself: all do except folders with one folder per class."""
    if name in DATASETS or _is_npz(Path(name)):
        return True
    place = _first_there(_places(name, data_root))
    return place is not None and _holds_data(place)


def dataset_slug(name: str) -> str:
    """Short name for log paths: a named data set's own, else the stem of the path."""
    path = Path(os.path.abspath(name))
    return name if name in DATASETS else path.stem if _is_npz(path) else path.name


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _places(name: str, data_root: str | Path) -> list[Path]:
    """Where a data set is looked for."""
    if name in DATASETS:
        return [Path(data_root, place) for place in DATASETS[name].places]
    return [Path(name).expanduser(), Path(data_root, name)]


def _holds_data(path: Path) -> bool:
    return os.path.lexists(path) if _is_npz(path) else "test" in split_folders(path)


def _first_there(places: Sequence[Path]) -> Path | None:
    """The first place with an .npz or any folder, which is a data set where a `test_share` is given."""
    return next((place for place in places if _holds_data(place) or place.is_dir()), None)


def _find(name: str, data_root: Path, test_share: float | None = None) -> Path | None:
    """Place of a data set, or None where it is absent. UserError: the name is neither known nor a path."""
    places = _places(name, data_root)
    there, is_known = _first_there(places), name in DATASETS
    takes_any = test_share is not None and not is_known
    found = there if takes_any else next(filter(_holds_data, places), None)
    if found or is_known:
        return found
    if there:
        raise UserError(
            f"dataset {name!r}: the folder {there} has no train/ and test/ (or val/) with class folders; "
            "for one folder per class say which share of the images is for the test: --set test_share=0.2"
        )
    if file := next(filter(os.path.isfile, places), None):
        raise UserError(f"dataset {name!r}: {file} is a file, but no .npz; allowed: {PATHS}.")
    if _is_npz(Path(name)) or "/" in name or os.sep in name:
        return None
    near = difflib.get_close_matches(name.lower(), DATASETS, n=3, cutoff=0.5)
    raise UserError(
        f"dataset {name!r} is not known; "
        + (f"nearest: {', '.join(near)}; " if near else "")
        + f"allowed: {', '.join(DATASETS)}, {PATHS}."
    )


def _missing(name: str, places: Sequence[Path], how: str) -> UserError:
    looked = ", ".join(dict.fromkeys(map(str, places)))
    return UserError(
        f"Data set {name!r} was not found: looked at {looked}; {how}. "
        f"A data set is an .npz with {', '.join(NPZ_KEYS)}, or a folder with train/<class>/* and "
        "test/<class>/*, or one folder per class and test_share; put it there, or set data_root or dataset "
        f"to where it is. {NO_DATA_NEEDED}."
    )
