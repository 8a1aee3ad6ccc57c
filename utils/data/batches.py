"""Batches of views in a given order, prepared by worker processes, with errors where these die or hang."""

import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
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

SHARED_MEMORY = Path("/dev/shm")  # through which workers pass batches; 64 MB in a container by default
PREFETCHED = 2  # batches that each worker makes ahead
IN_USE = 2  # batches that have left the workers: the current one and the next
LOOK_EVERY = 1.0  # seconds of waiting for workers between two checks of whether to go on waiting
LAST_WAIT = 5.0  # seconds that a killed worker has to end
PATIENCE = 300.0  # seconds without a batch after which workers are taken to hang


@dataclass(frozen=True)
class BatchDataset(TorchDataset):
    """Map-style data set whose items are whole batches: (views (B, 3, S, S), labels (B,) int64)."""

    images: ImageSet
    labels: np.ndarray  # of all stored images
    batches: Sequence[np.ndarray]  # stored positions of the images of each
    spec: ViewSpec
    view: Key | None  # as in `views_of`

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | UserError:
        """Batch `number`, or the error of an unreadable image: raised in a worker it would be a traceback."""
        indices = self.batches[number]
        try:
            views = stored_views(self.images, self.spec, self.view, indices)
            return views, torch.from_numpy(self.labels[indices])
        except UserError as error:
            return error


def load_batches(
    dataset: BatchDataset,
    num_workers: int,
    stop_requested: Callable[[], bool],
    pinned: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches in their order, made ahead by workers.

    pinned: whether they lie in page-locked memory, for asynchronous copies to a GPU.

    Raises:
        UserError: an image cannot be read, or workers were killed or hang.
        Interrupted: a stop was requested during a wait for workers.
    """
    others = multiprocessing.active_children()
    batches = iter(
        DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=PREFETCHED if num_workers else None,
            timeout=LOOK_EVERY if num_workers else 0,
            pin_memory=pinned,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # otherwise the loader draws a seed from the global state
        )
    )
    workers = [process for process in multiprocessing.active_children() if process not in others]
    silent = 0.0
    while True:
        try:
            with dead_worker_advice():
                batch = next(batches, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            silent += LOOK_EVERY
            stopped = stop_requested()
            if not stopped and silent < PATIENCE:
                continue
            for worker in workers:
                with suppress(RuntimeError):  # PyTorch raises it when a worker is killed
                    worker.kill()
                    worker.join(LAST_WAIT)
            if stopped:
                raise Interrupted from error
            raise UserError(
                f"no data worker has given a batch for {silent:.0f} s: they hang, for lack of shared "
                f"memory ({SHARED_MEMORY}) or because images cannot be read; set num_workers to 0"
            ) from error
        if batch is None:
            return
        if isinstance(batch, UserError):
            raise batch
        silent = 0.0
        yield tuple(batch)


def stored_views(images: ImageSet, spec: ViewSpec, view: Key | None, indices: np.ndarray) -> Tensor:
    """Views of stored images, all at once where they are of one size: float32 (B, 3, S, S)."""
    pixels = images.batch(indices)
    if isinstance(pixels, Tensor):
        return views_of(pixels, spec, view, indices)
    single = (views_of(image[None], spec, view, indices[i : i + 1]) for i, image in enumerate(pixels))
    return torch.cat([torch.empty(0, 3, spec.image_size, spec.image_size), *single])


def workers_that_fit(workers: int, batch_bytes: int, processes: int) -> tuple[int, str]:
    """Number of workers, at most `workers`, that shared memory has room for, and a warning or ""."""
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


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Workers ignore a stop request, which a terminal sends to all processes: the main process honours it.

    The first SIGTERM is taken for such a request; a second one ends the worker.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
