"""Classes in their order, cut into tasks, and batches that depend on nothing but their key.

    data = DataManager(dataset, seed=1993, shuffle=True, init_cls=10, increment=10, ...)
    classes = data.task_classes(0)
    for images, targets in data.batches(classes, source="train", mode="train", batch_size=32, key=(1993, 0, 0)):
        ...

*Incremental labels* number the classes in the order in which tasks bring them: `class_order[i]` is the data set's own
label of incremental class i.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from utils.data import Transform
from utils.errors import UserError
from utils.image_sets import Dataset, ImageSet

SOURCES = ("train", "test")


class DataManager:
    """A data set as a sequence of tasks.

    Args:
        dataset: from `utils.data.load_dataset`.
        seed: draws the class order and the images kept by `max_*_per_class`.
        shuffle: class order is numpy's `RandomState(seed).permutation(C)`, as published; else 0 .. C-1.
        init_cls, increment: classes of the first and of every further task; the last task may be shorter.
        max_tasks: cut the sequence after so many tasks.
        max_train_per_class, max_test_per_class: keep k images of every class: the first k of a permutation drawn from
            (seed, split, class), so a smaller k keeps a subset of a larger one; they stay in stored order.
        train_transform, test_transform: uint8 (3, H, W) -> float32 (3, S, S), as `utils.data` makes them.
        num_workers: processes that prepare batches; 0 for none. Changes no result.

    Attributes:
        class_order: data set label of every incremental class.
        class_names: name of every incremental class.
        nb_classes: classes of the data set.
        nb_tasks: number of tasks.

    Raises:
        UserError: init_cls or increment is larger than the number of classes.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        shuffle: bool,
        init_cls: int,
        increment: int,
        max_tasks: int | None = None,
        max_train_per_class: int | None = None,
        max_test_per_class: int | None = None,
        train_transform: Transform,
        test_transform: Transform,
        num_workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self.nb_classes = len(dataset.class_names)
        for key, value in (("init_cls", init_cls), ("increment", increment)):
            if not 1 <= value <= self.nb_classes:
                raise UserError(f"{key} = {value}: {dataset.name!r} has {self.nb_classes} classes; allowed: 1 to that.")
        order = np.random.RandomState(seed).permutation(self.nb_classes) if shuffle else np.arange(self.nb_classes)
        self.class_order = order.tolist()
        self.class_names = [dataset.class_names[label] for label in self.class_order]
        starts = [0, *range(init_cls, self.nb_classes, increment)]
        self._tasks = [range(a, b) for a, b in zip(starts, [*starts[1:], self.nb_classes], strict=True)][:max_tasks]
        self.nb_tasks = len(self._tasks)
        limits = {"train": max_train_per_class, "test": max_test_per_class}
        self._labels = {source: self._incremental_labels(source, limits[source], seed) for source in SOURCES}
        self._transforms = {"train": train_transform, "test": test_transform}
        self._num_workers = num_workers

    def task_classes(self, task: int) -> range:
        """Incremental labels of a task. Raises IndexError outside 0 .. nb_tasks - 1."""
        if not 0 <= task < self.nb_tasks:
            raise IndexError(f"task {task}: there are tasks 0 to {self.nb_tasks - 1}")
        return self._tasks[task]

    def count(self, classes: range, source: str) -> int:
        """Number of images of these incremental classes in "train" or "test"."""
        return len(self._indices(classes, source))

    def batches(
        self,
        classes: range,
        *,
        source: str,
        mode: str,
        batch_size: int,
        key: tuple[int, ...] | None = None,
        start: int = 0,
    ) -> "Batches":
        """Batches (images (B, 3, S, S) float32, incremental labels (B,) int64) of some classes.

        Args:
            classes: a range of incremental labels.
            source: "train" or "test", which images.
            mode: "train" or "test", which transform.
            batch_size: B; the last batch may be smaller.
            key: None for stored order; else any integers, which alone decide order and augmentation, the same for every
                number of workers and whatever ran before. The global random states are neither read nor changed.
            start: skip so many batches without computing them; the rest is the same as without skipping.

        Raises:
            ValueError: mode "train" without a key, or an argument out of range.
            UserError: while iterating, for an image that cannot be read.
        """
        if mode not in self._transforms or (mode == "train" and key is None):
            raise ValueError(f'mode={mode!r}, key={key}: mode is "train" or "test", and "train" needs a key')
        indices = self._indices(classes, source)
        if key is not None:
            indices = np.random.default_rng(_seed_sequence(key)).permutation(indices)
        images, labels = getattr(self.dataset, source), self._labels[source]
        batches = _BatchDataset(images, labels, indices, batch_size, self._transforms[mode], key)
        return Batches(batches, start, self._num_workers)

    def _indices(self, classes: range, source: str) -> np.ndarray:
        """Stored positions of the images of a range of incremental labels."""
        inside = 0 <= classes.start <= classes.stop <= self.nb_classes and classes.step == 1
        if source not in SOURCES or not inside:
            raise ValueError(f'source={source!r}, {classes}: "train" or "test", and a range up to {self.nb_classes}')
        labels = self._labels[source]
        return np.flatnonzero((labels >= classes.start) & (labels < classes.stop))

    def _incremental_labels(self, source: str, limit: int | None, seed: int) -> np.ndarray:
        """Incremental label of every stored image, int64 (N,); -1 for images left out by the limit."""
        original = getattr(self.dataset, source).labels
        labels = np.argsort(self.class_order)[original]
        if limit is not None:
            for label in range(self.nb_classes):
                members = np.flatnonzero(original == label)
                rng = np.random.default_rng([seed, SOURCES.index(source), label])
                labels[rng.permutation(members)[limit:]] = -1
        return labels


class Batches:
    """An iterable over batches with a length; iterating again gives the same batches."""

    def __init__(self, dataset: "_BatchDataset", start: int, num_workers: int) -> None:
        if not 0 <= start <= len(dataset):
            raise ValueError(f"start={start}: there are {len(dataset)} batches")
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start, len(dataset)),
            num_workers=num_workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # otherwise the loader draws a seed from the global state
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _BatchDataset(TorchDataset):
    """A map-style data set whose items are whole batches, so that one seed serves one batch."""

    def __init__(
        self,
        images: ImageSet,
        labels: np.ndarray,
        order: np.ndarray,
        batch_size: int,
        transform: Transform,
        key: tuple[int, ...] | None,
    ) -> None:
        self.images, self.labels, self.order, self.batch_size = images, labels, order, batch_size
        self.transform, self.key = transform, key

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | UserError:
        """Batch `number`, or the error of an image that cannot be read: raised in a worker it would be a traceback."""
        chosen = self.order[number * self.batch_size : (number + 1) * self.batch_size]
        try:
            with torch.random.fork_rng(devices=[]):
                if self.key is not None:
                    seed = _seed_sequence(self.key, number).generate_state(1, np.uint64)[0]
                    torch.random.default_generator.manual_seed(int(seed >> 1))
                views = torch.stack([self.transform(self.images[index]) for index in chosen])
        except UserError as error:
            return error
        return views, torch.from_numpy(self.labels[chosen])


def _seed_sequence(key: tuple[int, ...], *spawn: int) -> np.random.SeedSequence:
    """Randomness of a key of any integers; the length is part of it, since SeedSequence pads short keys with zeros."""
    return np.random.SeedSequence([len(key), *(value % 2**64 for value in key)], spawn_key=spawn)


def _unchanged(batch: object) -> object:
    return batch
