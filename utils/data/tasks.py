"""Classes in their order, cut into tasks, and batches that depend on nothing but their key.

    data = DataManager(dataset, seed=1993, shuffle=True, init_cls=10, increment=10, ...)
    classes = data.task_classes(0)
    for images, targets in data.batches(classes, source="train", mode="train", batch_size=32, key=("functional", 1993, 0)):
        ...

*Incremental labels* number the classes in the order in which tasks bring them: `class_order[i]` is the data set's own
label of incremental class i.
"""

import hashlib
import logging
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from utils.data.image_sets import Dataset, ImageSet
from utils.data.transforms import ViewSpec, views_of
from utils.errors import Interrupted, UserError
from utils.training.device import dead_worker_advice
from utils.training.distributed import DistributedContext
from utils.training.random import Key, numpy_rng

logger = logging.getLogger("nested_lora")

SOURCES = ("train", "test")
CPU = torch.device("cpu")
MODES = ("train", "test")
SHARED_MEMORY = Path("/dev/shm")  # what workers pass batches through; 64 MB in a container unless told
PREFETCHED = 2  # batches that each worker makes ahead
LOOK_EVERY = 1.0  # seconds of waiting for workers between two looks at whether to go on waiting
LAST_WAIT = 5.0  # seconds that a killed worker is given to end
PATIENCE = 300.0  # seconds without a batch after which workers are taken to hang


class DataManager:
    """A data set as a sequence of tasks.

    Args:
        dataset: from `utils.data.datasets.load_dataset`.
        seed: draws the class order and the images kept by `max_*_per_class`.
        shuffle: class order is numpy's `RandomState(seed).permutation(C)`, as published; else 0 .. C-1.
        init_cls, increment: classes of the first and of every further task; the last task may be shorter.
        max_tasks: cut the sequence after so many tasks.
        max_train_per_class, max_test_per_class: keep k images of every class: the first k of a permutation drawn from
            (seed, split, class), so a smaller k keeps a subset of a larger one; they stay in stored order.
        train_view, test_view: what the network sees of an image.
        num_workers: processes that prepare batches, fewer where shared memory is too small for what they pass on;
            0 for none. Changes no result.
        rank, world_size: which of several processes this is, as `batches` gives each a share of every batch.

    Attributes:
        class_order: data set label of every incremental class.
        class_names: name of every incremental class.
        nb_classes: classes of the data set.
        nb_tasks: number of tasks.
        stop_requested: asked while workers are waited for; True raises `Interrupted`.

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
        train_view: ViewSpec,
        test_view: ViewSpec,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.nb_classes = len(dataset.class_names)
        for key, value in (("init_cls", init_cls), ("increment", increment)):
            if not 1 <= value <= self.nb_classes:
                raise UserError(
                    f"{key} = {value}: {dataset.name!r} has {self.nb_classes} classes; allowed: 1 to that."
                )
        order = (
            np.random.RandomState(seed).permutation(self.nb_classes)
            if shuffle
            else np.arange(self.nb_classes)
        )
        self.class_order = order.tolist()
        self.class_names = [dataset.class_names[label] for label in self.class_order]
        self._tasks = tasks_of(self.nb_classes, init_cls, increment, max_tasks)
        self.nb_tasks = len(self._tasks)
        limits = {"train": max_train_per_class, "test": max_test_per_class}
        self._labels = {source: self._incremental_labels(source, limits[source], seed) for source in SOURCES}
        self._hashes: dict[tuple[int, str], str] = {}
        self.train_view, self.test_view = train_view, test_view
        self._num_workers, self._world = num_workers, DistributedContext(rank, world_size)
        self.stop_requested: Callable[[], bool] = lambda: False
        self._told_of_shared_memory = False

    def task_classes(self, task: int) -> range:
        """Incremental labels of a task. Raises IndexError outside 0 .. nb_tasks - 1."""
        if not 0 <= task < self.nb_tasks:
            raise IndexError(f"task {task}: there are tasks 0 to {self.nb_tasks - 1}")
        return self._tasks[task]

    def count(self, classes: range, source: str) -> int:
        """Number of images of these incremental classes in "train" or "test"."""
        return len(self.indices(classes, source))

    def indices(self, classes: range, source: str) -> np.ndarray:
        """Stored positions of the images of a range of incremental labels, ascending, int64 (n,)."""
        inside = 0 <= classes.start <= classes.stop <= self.nb_classes and classes.step == 1
        if source not in SOURCES or not inside:
            raise ValueError(
                f'source={source!r}, {classes}: "train" or "test", and a range up to {self.nb_classes}'
            )
        labels = self._labels[source]
        return np.flatnonzero((labels >= classes.start) & (labels < classes.stop))

    def order(self, classes: range, source: str, key: Key) -> np.ndarray:
        """The same positions in the order that a key of names and integers names."""
        return numpy_rng("order", *key).permutation(self.indices(classes, source))

    def targets(self, indices: np.ndarray, source: str) -> Tensor:
        """Incremental labels of stored images, int64 (n,)."""
        return torch.from_numpy(self._labels[source][indices])

    def content_sha256(self, task: int, source: str) -> str:
        """SHA-256 that names a task's "train" or "test" images and their labels; other images are no part of it."""
        if (task, source) not in self._hashes:
            indices = self.indices(self.task_classes(task), source)
            labels = ",".join(map(str, self._labels[source][indices]))
            content = getattr(self.dataset, source).content_sha256(indices)
            self._hashes[task, source] = hashlib.sha256(f"{labels} {content}".encode()).hexdigest()
        return self._hashes[task, source]

    def describe(self) -> str:
        """How many images the tasks' classes have, and what of the data set is left out, in a line for the log."""
        told, classes = [], range(self._tasks[-1].stop)
        for source in SOURCES:
            each = np.bincount(self._labels[source][self.indices(classes, source)], minlength=len(classes))
            span = f"{each.min():,}" if each.min() == each.max() else f"{each.min():,} to {each.max():,}"
            told.append(f"{source} {each.sum():,} images, {span} per class")
        left_out = f"; left out: {self.dataset.left_out}" if self.dataset.left_out else ""
        return f"Data {self.dataset.name}, {len(classes)} classes: {'; '.join(told)}{left_out}"

    def views(
        self,
        indices: np.ndarray,
        source: str,
        mode: str,
        view: Key | None,
        device: torch.device = CPU,
    ) -> Tensor:
        """What the network sees of stored images, float32 (n, 3, S, S), made on the device from their uint8 pixels.

        Args:
            indices: stored positions, (n,).
            source: "train" or "test", which images.
            mode: "train" for the random view that the key `view` names, "test" for the test view (`view` is None).

        Raises:
            UserError: an image cannot be read.
        """
        spec = self._spec(mode, view)
        images = getattr(self.dataset, source)
        images.prepare(indices)
        return _views(images, spec, view, indices, device)

    def batches(
        self,
        classes: range,
        *,
        source: str,
        mode: str,
        batch_size: int,
        key: Key | None = None,
        start: int = 0,
        view: Key | None = None,
    ) -> "Batches":
        """Batches (images (B, 3, S, S) float32, incremental labels (B,) int64) of some classes.

        Of several processes each gets its share of every batch (`DistributedContext.shard`), which may be empty.

        Args:
            classes: a range of incremental labels.
            source: "train" or "test", which images.
            mode: "train" for random views, "test" for the test view.
            batch_size: B, over all processes; the last batch may be smaller.
            key: None for stored order; else names and integers, which alone decide the order, the same for every number of
                workers and processes and whatever ran before. The global random states are neither read nor changed.
            start: skip so many batches without computing them; the rest is the same as without skipping.
            view: names and integers that name the random views, of which each depends on them and on the image's stored
                position alone; None takes `key`.

        Raises:
            ValueError: mode "train" without a key, or an argument out of range.
            UserError: while iterating, for an image that cannot be read, or workers that were killed or hang.
            Interrupted: while iterating, when a stop was requested during a wait for workers.
        """
        named = None if mode == "test" else key if view is None else view
        spec = self._spec(mode, named)
        order = self.indices(classes, source) if key is None else self.order(classes, source, key)
        batches = _BatchDataset(
            getattr(self.dataset, source),
            self._labels[source],
            [order[first : first + batch_size] for first in range(0, len(order), batch_size)],
            self._world.shard,
            spec,
            named,
        )
        largest_share = max(1, -(-min(batch_size, len(order)) // self._world.size))
        workers = self._workers_that_fit(
            largest_share * (3 * spec.image_size**2 * torch.float32.itemsize + 8)
        )
        return Batches(batches, start, workers, lambda: self.stop_requested())

    def _workers_that_fit(self, batch_bytes: int) -> int:
        """How many of the workers shared memory has room for, with the batches that they make ahead."""
        workers = self._num_workers
        if not workers or not SHARED_MEMORY.is_dir():
            return workers
        free = shutil.disk_usage(SHARED_MEMORY).free // self._world.size
        in_use = 2  # batches that no worker has any longer: the last one and the next
        fitting = max(0, (free // batch_bytes - in_use) // PREFETCHED)
        if fitting < workers and not self._told_of_shared_memory:
            self._told_of_shared_memory = True
            needed = (PREFETCHED * workers + in_use) * batch_bytes
            logger.warning(
                f"num_workers = {workers}: {fitting} used, as {SHARED_MEMORY} has {free / 1e6:.0f} MB free for each "
                f"process and {workers} workers may need {needed / 1e6:.0f}; enlarge it (docker run --shm-size) for all"
            )
        return min(workers, fitting)

    def _spec(self, mode: str, view: Key | None) -> ViewSpec:
        if mode not in MODES or (mode == "train") == (view is None):
            raise ValueError(
                f'mode={mode!r}, key={view}: mode is "train" or "test", and only "train" has a key'
            )
        return self.train_view if mode == "train" else self.test_view

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


def tasks_of(classes: int, init_cls: int, increment: int, max_tasks: int | None) -> list[range]:
    """The incremental labels of every task of a sequence; the last task may be shorter."""
    starts = [0, *range(init_cls, classes, increment)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], classes], strict=True)][:max_tasks]


class Batches:
    """An iterable over batches with a length; iterating again gives the same batches."""

    def __init__(
        self, dataset: "_BatchDataset", start: int, num_workers: int, stop_requested: Callable[[], bool]
    ) -> None:
        if not 0 <= start <= len(dataset):
            raise ValueError(f"start={start}: there are {len(dataset)} batches")
        self._dataset, self._start, self._stop_requested = dataset, start, stop_requested
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start, len(dataset)),
            num_workers=num_workers,
            prefetch_factor=PREFETCHED if num_workers else None,
            timeout=LOOK_EVERY if num_workers else 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # otherwise the loader draws a seed from the global state
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._dataset.prepare(self._start)
        others = multiprocessing.active_children()
        batches = iter(self._loader)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        while (batch := self._next(batches, workers)) is not None:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _next(self, batches: Iterator[object], workers: list[BaseProcess]) -> object:
        """What comes next, or None at the end; workers that are no longer waited for are killed."""
        silent = 0.0
        while True:
            try:
                with dead_worker_advice():
                    return next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            silent += LOOK_EVERY
            if self._stop_requested():
                _kill(workers)
                raise Interrupted
            if silent >= PATIENCE:
                _kill(workers)
                raise UserError(
                    f"no data worker has given a batch for {silent:.0f} s: they hang, for lack of shared memory "
                    f"({SHARED_MEMORY}) or because images cannot be read; set num_workers to 0"
                )


class _BatchDataset(TorchDataset):
    """A map-style data set whose items are one process's shares of whole batches of stored positions."""

    def __init__(
        self,
        images: ImageSet,
        labels: np.ndarray,
        batches: list[np.ndarray],
        shard: Callable[[int], slice],
        spec: ViewSpec,
        view: Key | None,
    ) -> None:
        self.images, self.labels, self.batches, self.shard = images, labels, batches, shard
        self.spec, self.view = spec, view

    def __len__(self) -> int:
        return len(self.batches)

    def prepare(self, start: int) -> None:
        """Make the images of the batches from `start` on quick to read, in the process that starts the others."""
        if start < len(self):
            self.images.prepare(np.concatenate(self.batches[start:]))

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | UserError:
        """Batch `number`, or the error of an image that cannot be read: raised in a worker it would be a traceback."""
        batch = self.batches[number]
        mine = batch[self.shard(len(batch))]
        try:
            return _views(self.images, self.spec, self.view, mine), torch.from_numpy(self.labels[mine])
        except UserError as error:
            return error


def _views(
    images: ImageSet,
    spec: ViewSpec,
    view: Key | None,
    indices: np.ndarray,
    device: torch.device = CPU,
) -> Tensor:
    """Views of stored images, all at once when they are of one size: float32 (B, 3, S, S)."""
    pixels = images.batch(indices)
    if isinstance(pixels, Tensor):
        return views_of(pixels.to(device), spec, view, indices)
    single = (
        views_of(image[None].to(device), spec, view, indices[i : i + 1]) for i, image in enumerate(pixels)
    )
    return torch.cat([torch.empty(0, 3, spec.image_size, spec.image_size, device=device), *single])


def _unchanged(batch: object) -> object:
    return batch


def _kill(workers: list[BaseProcess]) -> None:
    """End workers that may hang, without the error that PyTorch raises when one is killed."""
    for worker in workers:
        with suppress(RuntimeError):
            worker.kill()
            worker.join(LAST_WAIT)


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A stop request reaches all processes of a terminal or job: the main one honours it, and its workers go on.

    The first SIGTERM is taken for such a request; a second one ends the worker.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
