"""Class-incremental task sequence of a data set: class order, tasks, and batches whose order a key decides.

    split = TaskSplit(seed=1993, shuffle=True, init_cls=10, increment=10)
    data = DataManager(dataset, split, train_view=..., test_view=...)
    key = ("functional", 1993, 0)
    for images, targets in data.batches(range(10), source="train", batch_size=32, key=key, view=key):
        ...

*Incremental labels* number the classes in the order of the tasks: `class_order[i]` is the data set's own
label of incremental class i. Images have a source: "train", "test" or, with a `validation_share`,
"validation": held-out training images.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.data.batches import BatchDataset, load_batches, stored_views, workers_that_fit
from utils.data.image_sets import SPLITS, Dataset, ImageSet
from utils.data.splits import tasks_of
from utils.data.transforms import ViewSpec
from utils.errors import UserError
from utils.training.distributed import DistributedContext
from utils.training.random import Key, numpy_rng
from utils.wording import counted

logger = logging.getLogger("nested_lora")

NO_IMAGES = "absent"  # in place of the hash where images are missing


@dataclass(frozen=True)
class TaskSplit:
    """Split of classes into tasks, with limits on the images per class.

    Attributes:
        seed: draws the class order, and the images kept by `max_*_per_class`.
        shuffle: class order is numpy's `RandomState(seed).permutation(C)`, as published; else 0 .. C-1.
        init_cls, increment: classes of the first and of every further task; the last task may be shorter.
        max_tasks: cut the sequence after so many tasks; those of added data sets follow.
        max_train_per_class, max_test_per_class: keep k images of every class: the first k of a permutation
            drawn from (seed, split, class), so a smaller k keeps a subset of a larger one; they stay in
            stored order.
        validation_share: share of every class's training images, rounded, at least one, that is held out
            before `max_train_per_class` applies, the same for every seed; `max_test_per_class` limits them.
    """

    seed: int
    shuffle: bool
    init_cls: int
    increment: int
    max_tasks: int | None = None
    max_train_per_class: int | None = None
    max_test_per_class: int | None = None
    validation_share: float = 0.0

    def class_order(self, classes: int) -> list[int]:
        """Data set label of every incremental class."""
        if not self.shuffle:
            return list(range(classes))
        return np.random.RandomState(self.seed).permutation(classes).tolist()

    def incremental_labels(self, original: np.ndarray, source: str, class_order: list[int]) -> np.ndarray:
        """Incremental label of every stored image, int64 (N,); -1 for those that are not of the source."""
        labels = np.full(len(original), -1)
        for incremental, label in enumerate(class_order):
            labels[self._chosen(np.flatnonzero(original == label), source, label)] = incremental
        return labels

    def _chosen(self, members: np.ndarray, source: str, label: int) -> np.ndarray:
        """The stored positions of a class that belong to a source."""
        if source != "test":
            drawn = numpy_rng("validation images", label).permutation(members)
            held = max(1, round(self.validation_share * len(drawn))) if self.validation_share else 0
            if source == "validation":
                return drawn[:held][: self.max_test_per_class]
            members = np.sort(drawn[held:])
        limit = self.max_train_per_class if source == "train" else self.max_test_per_class
        if limit is None:
            return members
        rng = np.random.default_rng([self.seed, SPLITS.index(source), label])
        return rng.permutation(members)[:limit]


class DataManager:
    """A data set as a sequence of tasks.

    Args:
        dataset: with a `validation_share` it needs no test images.
        num_workers: processes that prepare batches, fewer where shared memory has no room; changes no result.
        pinned: batches lie in page-locked memory, for asynchronous copies to a GPU.
        distributed: of several processes each gets its shard of every batch.
        load_whole: loads the data set with test images that `dataset` lacks, when they are asked for.

    Attributes:
        evaluated: source of the images that a run is measured on: "test", or "validation".
        class_order: data set label of every incremental class: those of the data set's own tasks, those of
            each added data set in stored order as one task, then those of no task.
        nb_classes: classes of the data set and of what was added to it, also those of no task.
        stop_requested: called while one process alone waits for workers; True raises `Interrupted`. Several
            stop together, at their next `RunContext.check_stop`, which one that has left would never reach.

    Raises UserError: too few classes, or a class with one training image, of which none can be held out.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: TaskSplit,
        *,
        train_view: ViewSpec,
        test_view: ViewSpec,
        num_workers: int = 0,
        pinned: bool = False,
        distributed: DistributedContext = DistributedContext(),  # noqa: B008 - immutable
        load_whole: Callable[[], Dataset] | None = None,
    ) -> None:
        self.dataset, self.train_view, self.test_view = dataset, train_view, test_view
        self._split, self._load_whole, self._whole = split, load_whole, None
        self.evaluated = "validation" if split.validation_share else "test"
        self.nb_classes = len(dataset.class_names)
        own = self.nb_classes - sum(dataset.added)
        later = split.increment if split.init_cls != own else 0  # of no effect where there is one task
        for key, value in (("init_cls", split.init_cls), ("increment", later)):
            if value > own:
                raise UserError(f"{key} = {value}: {dataset.name!r} has {own} classes; lower it.")
        self._tasks = tasks_of(own, split.init_cls, split.increment, split.max_tasks, dataset.added)
        self.nb_tasks = len(self._tasks)
        order, taught = split.class_order(own), self._tasks[-1].stop - sum(dataset.added)
        self.class_order = [*order[:taught], *range(own, self.nb_classes), *order[taught:]]
        self.class_names = [dataset.class_names[label] for label in self.class_order]
        self._labels: dict[str, np.ndarray] = {}
        if split.validation_share:
            held, left = (self.images_per_class(source) for source in ("validation", "train"))
            if single := [self.class_names[i] for i in self.seen_classes() if held[i] and not left[i]]:
                raise UserError(
                    f"validation_share = {split.validation_share:g}: {dataset.name!r} has one training image "
                    f"of {', '.join(single[:5])}, and two are needed, one to hold out; add images, or set it "
                    "to 0."
                )
        self._hashes: dict[tuple[int, str], str] = {}
        self._num_workers, self._pinned, self._distributed = num_workers, pinned, distributed
        self.stop_requested: Callable[[], bool] = lambda: False
        self._warned = False

    def task_classes(self, task: int) -> range:
        """Incremental labels of a task, 0 to nb_tasks - 1."""
        return self._tasks[task]

    @property
    def sources(self) -> tuple[str, str]:
        """Sources of the images that a run reads: to learn from, and to be measured on."""
        return "train", self.evaluated

    def seen_classes(self, tasks: int | None = None) -> range:
        """Incremental labels of the first tasks, or of all."""
        return range(self._tasks[-1 if tasks is None else tasks - 1].stop)

    def seen_indices(self, tasks: int, source: str) -> np.ndarray:
        """Stored positions of the images of the first tasks, task after task."""
        return np.concatenate([self.indices(self.task_classes(task), source) for task in range(tasks)])

    def images(self, source: str) -> ImageSet:
        """The stored images of a source. UserError: test images were left unread, and cannot be had."""
        return self._with(source).test if source == "test" else self.dataset.train

    def data_sha256(self, source: str) -> str:
        """SHA-256 of the content of the data set, without test images where the run reads none."""
        return self._with(source).sha256

    def count(self, classes: range, source: str) -> int:
        """Number of a source's images of these incremental classes."""
        return len(self.indices(classes, source))

    def images_per_class(self, source: str) -> list[int]:
        """Number of a source's images of each incremental class of the tasks."""
        return [self.count(range(label, label + 1), source) for label in self.seen_classes()]

    def indices(self, classes: range, source: str) -> np.ndarray:
        """Stored positions of the images of a range of incremental labels, ascending, int64 (n,)."""
        labels = self._labels_of(source)
        return np.flatnonzero((labels >= classes.start) & (labels < classes.stop))

    def order(self, classes: range, source: str, key: Key) -> np.ndarray:
        """The same positions in an order drawn from a key of names and integers."""
        return numpy_rng("order", *key).permutation(self.indices(classes, source))

    def targets(self, indices: np.ndarray, source: str) -> Tensor:
        """Incremental labels of stored images, int64 (n,)."""
        return torch.from_numpy(self._labels_of(source)[indices])

    def require_training_images(self, first_task: int) -> None:
        """Raise UserError where a class of this task or of a later one has no training image."""
        images = self.images_per_class("train")
        classes = range(self._tasks[min(first_task, self.nb_tasks - 1)].start, len(images))
        if absent := [self.class_names[label] for label in classes if not images[label]]:
            raise UserError(
                f"Data set {self.dataset.name!r}: {len(absent)} classes that are still to be learned have no "
                f"training image, such as {', '.join(absent[:3])}; put their images back."
            )

    def content_sha256(self, task: int, source: str) -> str:
        """SHA-256 of a task's images of one source and their labels; other images are no part of it.

        `NO_IMAGES` where a class has none: the training images of a task that was learned may be gone.
        """
        if (task, source) not in self._hashes:
            classes = self.task_classes(task)
            indices = self.indices(classes, source)
            labels = self._labels_of(source)[indices].tolist()
            content = f"{','.join(map(str, labels))} {self.images(source).content_sha256(indices)}"
            whole = len(set(labels)) == len(classes)
            self._hashes[task, source] = hashlib.sha256(content.encode()).hexdigest() if whole else NO_IMAGES
        return self._hashes[task, source]

    def describe(self) -> str:
        """Line for the log: number of images of the tasks' classes, and which files are left out."""
        classes, parts = self.seen_classes(), []
        for source in self.sources:
            each = self.images_per_class(source)
            span = " to ".join(f"{count:,}" for count in sorted({min(each), max(each)}))
            parts.append(f"{source} {counted(sum(each), 'image')}, {span} per class")
        if self.dataset.test is None:
            parts.append("test images are not read")
        elif self.dataset.test_origin:
            parts[-1] += f" ({self.dataset.test_origin})"
        if self.dataset.left_out:
            parts.append(f"left out: {self.dataset.left_out}")
        named = f"Data {self.dataset.name}, {counted(len(classes), 'class', 'classes')}"
        return f"{named}: {'; '.join(parts)}"

    def views(
        self, indices: np.ndarray, source: str, view: Key | None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Network inputs of stored images, float32 (n, 3, S, S): the view drawn by a key, or the test view.

        Raises UserError: an image cannot be read.
        """
        return stored_views(self.images(source), self._spec(view), view, indices).to(device)

    def batches(
        self,
        classes: range,
        *,
        source: str,
        batch_size: int,
        key: Key | None = None,
        start: int = 0,
        view: Key | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images (B, 3, S, S) float32, incremental labels (B,) int64) of some classes.

        Of several processes each gets its shard of every batch, which may be empty. While iterating the
        errors of `load_batches` are raised.

        Args:
            batch_size: B, over all processes; the last batch may be smaller.
            key: None for stored order; else it alone decides the order, whatever the number of workers and
                processes. The global random states are neither read nor changed.
            start: number of batches to skip without computing them.
            view: as in `views`; the view depends on it and on the image's stored position alone.
        """
        order = self.indices(classes, source) if key is None else self.order(classes, source, key)
        whole = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        if not 0 <= start <= len(whole):
            raise ValueError(f"start={start}: there are {len(whole)} batches")
        mine = [batch[self._distributed.shard(len(batch))] for batch in whole[start:]]
        return self.load(mine, source, view)

    def load(
        self, batches: Sequence[np.ndarray], source: str, view: Key | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and incremental labels of stored images, batch by batch, as in `batches`.

        batches: stored positions of the images of each.
        """
        spec, largest = self._spec(view), max(map(len, batches), default=0)
        batch_bytes = max(1, largest) * (3 * spec.image_size**2 * torch.float32.itemsize + 8)
        wanted = min(self._num_workers, len(batches))
        workers, warning = workers_that_fit(wanted, batch_bytes, self._distributed.local_size)
        if warning and not self._warned:
            self._warned = True
            logger.warning(warning)
        dataset = BatchDataset(self.images(source), self._labels_of(source), batches, spec, view)
        alone = self._distributed.size == 1
        return load_batches(dataset, workers, lambda: alone and self.stop_requested(), self._pinned)

    def _with(self, source: str) -> Dataset:
        """The data set that has the images of a source."""
        if source != "test" or self.dataset.test is not None:
            return self.dataset
        if self._whole is None:
            self._whole = self._load_whole()
        return self._whole

    def _labels_of(self, source: str) -> np.ndarray:
        """Incremental label of every stored image of a source, -1 for those it does not have."""
        if source not in self._labels:
            labels = self.images(source).labels
            self._labels[source] = self._split.incremental_labels(labels, source, self.class_order)
        return self._labels[source]

    def _spec(self, view: Key | None) -> ViewSpec:
        return self.test_view if view is None else self.train_view
