"""Workers that prepare batches: as many as shared memory has room for, told when they die or hang."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.image_folders import folder_images
from tests.utils.data.test_tasks import manager, same, train_batches
from utils.data import batches as loader
from utils.data.image_sets import ArrayImages, Dataset
from utils.errors import Interrupted, UserError
from utils.training.device import dead_worker_advice
from utils.training.distributed import DistributedContext

needs_folder = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is no folder here")


def with_shared_memory(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


@needs_folder
@pytest.mark.parametrize(("free", "expected"), [(10**9, 2), (6 * 4000, 2), (4 * 4000, 1), (2000, 0)])
def test_workers_are_as_many_as_shared_memory_has_room_for(monkeypatch, caplog, free, expected):
    """A batch of 5 views of 8 x 8 is 5 x (3 x 64 x 4 + 8) = 3880 bytes; up to two a worker and two more."""
    expected_batches = train_batches(manager())
    with_shared_memory(monkeypatch, free)
    data, seen = manager(num_workers=2), []
    for _ in range(2):
        how = {"source": "train", "batch_size": 5, "key": (1993, 0, 1), "view": (1993, 0, 1)}
        batches = data.batches(range(4), **how)
        for number, (batch, wanted) in enumerate(zip(batches, expected_batches, strict=True)):
            assert same([batch], [wanted])
            if number == 0:
                seen.append(len(multiprocessing.active_children()))
    assert seen == [expected, expected]
    told = [message for message in caplog.messages if "num_workers" in message]
    assert len(told) == (expected < 2) and all("/dev/shm" in message for message in told)


@needs_folder
def test_processes_of_one_machine_share_its_shared_memory(monkeypatch, caplog):
    with_shared_memory(monkeypatch, 6 * 4000)
    train_batches(manager(num_workers=2))
    assert not caplog.messages
    train_batches(manager(num_workers=2, distributed=DistributedContext(0, 4)))  # on four machines
    assert not caplog.messages
    train_batches(manager(num_workers=2, distributed=DistributedContext(3, 4, local_size=4)))
    assert "num_workers = 2: 0 used" in caplog.text


class SleepingImages(ArrayImages):
    """The first batch at once, the others never."""

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        if 0 not in indices:
            time.sleep(600)
        return super().batch(indices)


class SlowImages(ArrayImages):
    """Half a second for each batch."""

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        time.sleep(0.5)
        return super().batch(indices)


def sleeping_batches():
    images = SleepingImages(np.zeros((6, 8, 8, 3), np.uint8), np.zeros(6, int))
    data = manager(Dataset("slow", ["a"], images, images, ""), init_cls=1, increment=1, num_workers=2)
    return data, iter(data.batches(range(1), source="test", batch_size=2))


def test_a_killed_worker_is_one_sentence():
    """Whether its batch is waited for, or the process is at work on another one."""
    for waiting in (True, False):
        _, batches = sleeping_batches()
        next(batches)
        with pytest.raises(UserError, match="num_workers") as caught, dead_worker_advice():
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            if waiting:
                next(batches)
            time.sleep(10)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_wait_for_workers_that_hang_ends(monkeypatch, stopped):
    """By itself with a sentence, at once where a stop is requested."""
    monkeypatch.setattr(loader, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(loader, "PATIENCE", 300 if stopped else 0.2)
    data, batches = sleeping_batches()
    next(batches)
    data.stop_requested = lambda: stopped
    with pytest.raises(Interrupted if stopped else UserError, match="" if stopped else "num_workers to 0"):
        next(batches)
    assert not multiprocessing.active_children()


def test_one_of_several_processes_does_not_stop_while_it_waits(monkeypatch):
    """The others would wait for it in an exchange: they stop together, once it has its batch."""
    monkeypatch.setattr(loader, "LOOK_EVERY", 0.05)
    images = SlowImages(np.zeros((6, 8, 8, 3), np.uint8), np.zeros(6, int))
    how = {"init_cls": 1, "increment": 1, "num_workers": 1, "distributed": DistributedContext(0, 2)}
    data = manager(Dataset("slow", ["a"], images, images, ""), **how)
    data.stop_requested = lambda: True
    assert len(list(data.batches(range(1), source="test", batch_size=2))) == 3


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_workers_leave_a_request_to_stop_to_the_process_that_started_them(name):
    """A terminal sends it to all: the batches that were asked for still come."""
    batches = iter(manager(num_workers=2).batches(range(4), source="train", batch_size=2))
    for _ in range(2):  # one of each worker
        next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, getattr(signal, name))
    assert len(list(batches)) == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_sentence_with_any_number_of_workers(tmp_path, workers):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "fine.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "fine.png").read_bytes()[:40])
    images = folder_images([tmp_path / "fine.png", tmp_path / "broken.png"], np.array([0, 1]))
    dataset = Dataset("files", ["a", "b"], images, images, "")
    data = manager(dataset, init_cls=1, increment=1, num_workers=workers)
    with pytest.raises(UserError) as caught:
        list(data.batches(range(2), source="test", batch_size=2))
    assert str(tmp_path / "broken.png") in str(caught.value) and "\n" not in str(caught.value)
