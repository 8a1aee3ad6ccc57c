"""Loader of batches of views in a given order, with worker processes that may die or hang."""

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

from utils.data.image_sets import ImageSet
from utils.data.transforms import ViewSpec, views_of
from utils.errors import Interrupted, UserError
from utils.training.device import dead_worker_advice
from utils.training.random import Key

logger = logging.getLogger("nested_lora")

CPU = torch.device("cpu")
SHARED_MEMORY = Path("/dev/shm")  # what workers pass batches through; 64 MB in a container unless told
PREFETCHED = 2  # batches that each worker makes ahead
IN_USE = 2  # batches that no worker has any longer: the last one and the next
LOOK_EVERY = 1.0  # seconds of waiting for workers between two looks at whether to go on waiting
LAST_WAIT = 5.0  # seconds that a killed worker is given to end
PATIENCE = 300.0  # seconds without a batch after which workers are taken to hang


class BatchDataset(TorchDataset):
    """Map-style data set whose items are whole batches: (views (B, 3, S, S), labels (B,) int64).

    Args:
        images, labels: of all stored positions.
        batches: stored positions of each batch.
        spec, view: what `views_of` takes.
    """

    def __init__(
        self,
        images: ImageSet,
        labels: np.ndarray,
        batches: list[np.ndarray],
        spec: ViewSpec,
        view: Key | None,
    ) -> None:
        self.images, self.labels, self.batches, self.spec, self.view = images, labels, batches, spec, view

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | UserError:
        """Batch `number`, or the error of an unreadable image: raised in a worker it would be a traceback."""
        indices = self.batches[number]
        try:
            return stored_views(self.images, self.spec, self.view, indices), torch.from_numpy(
                self.labels[indices]
            )
        except UserError as error:
            return error


class Batches:
    """Iterable over the batches from number `start` on; iterating again gives the same batches.

    Raises:
        ValueError: `start` is out of range.
        UserError: while iterating, for an image that cannot be read, or workers that were killed or hang.
        Interrupted: while iterating, when a stop was requested during a wait for workers.
    """

    def __init__(
        self, dataset: BatchDataset, start: int, num_workers: int, stop_requested: Callable[[], bool]
    ) -> None:
        if not 0 <= start <= len(dataset):
            raise ValueError(f"start={start}: there are {len(dataset)} batches")
        self._stop_requested = stop_requested
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
                    f"no data worker has given a batch for {silent:.0f} s: they hang, for lack of shared "
                    f"memory ({SHARED_MEMORY}) or because images cannot be read; set num_workers to 0"
                )


def stored_views(
    images: ImageSet, spec: ViewSpec, view: Key | None, indices: np.ndarray, device: torch.device = CPU
) -> Tensor:
    """Views of stored images, all at once when they are of one size: float32 (B, 3, S, S)."""
    pixels = images.batch(indices)
    if isinstance(pixels, Tensor):
        return views_of(pixels, spec, view, indices).to(device)
    single = (views_of(image[None], spec, view, indices[i : i + 1]) for i, image in enumerate(pixels))
    return torch.cat([torch.empty(0, 3, spec.image_size, spec.image_size), *single]).to(device)


def workers_that_fit(workers: int, batch_bytes: int, processes: int) -> tuple[int, str]:
    """Number of workers that shared memory has room for, and a warning or ""."""
    if not workers or not SHARED_MEMORY.is_dir():
        return workers, ""
    free = shutil.disk_usage(SHARED_MEMORY).free // processes
    fitting = max(0, (free // batch_bytes - IN_USE) // PREFETCHED)
    if fitting >= workers:
        return workers, ""
    needed = (PREFETCHED * workers + IN_USE) * batch_bytes
    return fitting, (
        f"num_workers = {workers}: {fitting} used, as {SHARED_MEMORY} has {free / 1e6:.0f} MB free for each "
        f"process and {workers} workers may need {needed / 1e6:.0f}; enlarge it (docker run --shm-size)"
    )


def _unchanged(batch: object) -> object:
    return batch


def _kill(workers: list[BaseProcess]) -> None:
    """End workers that may hang, without the error that PyTorch raises when one is killed."""
    for worker in workers:
        with suppress(RuntimeError):
            worker.kill()
            worker.join(LAST_WAIT)


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Workers ignore a stop request, which a terminal sends to all processes: the main process honours it.

    The first SIGTERM is taken for such a request; a second one ends the worker.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
