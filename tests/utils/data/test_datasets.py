"""Data sets by name and path, and one sentence for what is not there."""

import gzip
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision

from tests.utils.data.test_npz import arrays
from utils.data import datasets
from utils.data.datasets import DATASETS, class_count, dataset_slug, load_dataset
from utils.data.synthetic import synthetic_arrays
from utils.errors import UserError


def test_class_counts_of_named_data_sets(tmp_path):
    expected = dict.fromkeys(["mnist_5k", "mnist", "fashion_mnist", "cifar10"], 10)
    expected |= dict.fromkeys(["cifar100", "cifar224"], 100) | {"synthetic": 8, "domainnet": 345, "vtab": 50}
    expected |= dict.fromkeys(["imagenetr", "imageneta", "cub", "objectnet"], 200) | {"omnibenchmark": 300}
    assert {name: class_count(name, tmp_path) for name in DATASETS} == expected


def test_cifar224_reads_cifar100_from_data_root_without_download(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda *_, **__: pytest.fail("a download"))
    np.savez(tmp_path / "cifar100.npz", **arrays(classes=4))
    dataset = load_dataset("cifar224", tmp_path)
    assert dataset.name == "cifar224" and len(dataset.class_names) == 4 == class_count("cifar224", tmp_path)
    assert load_dataset("cifar100", tmp_path).sha256 == dataset.sha256


def test_torchvision_data_set_is_taken_over(tmp_path, monkeypatch):
    class Fake:
        classes = ["zero", "one"]

        def __init__(self, root, train, download):
            assert root == tmp_path and download
            self.data = torch.full((4, 5, 5), 1 if train else 2, dtype=torch.uint8)
            self.targets = torch.tensor([0, 1, 1, 0])

    monkeypatch.setattr(torchvision.datasets, "MNIST", Fake)
    dataset = load_dataset("mnist", tmp_path)
    assert dataset.class_names == ["zero", "one"] and dataset.test.labels.tolist() == [0, 1, 1, 0]
    assert dataset.train[0].unique().tolist() == [1] and dataset.test[0].unique().tolist() == [2]


def test_two_runs_do_not_download_at_the_same_time(tmp_path, monkeypatch):
    inside = threading.Lock()

    class Fake:
        classes = ["one"]

        def __init__(self, root, train, download):
            assert inside.acquire(blocking=False)
            time.sleep(0.2)
            inside.release()
            self.data, self.targets = torch.zeros((1, 5, 5), dtype=torch.uint8), torch.zeros(1, dtype=int)

    monkeypatch.setattr(torchvision.datasets, "MNIST", Fake)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: load_dataset("mnist", tmp_path / "new"), range(2)))
    assert [len(dataset.train) for dataset in found] == [1, 1]


def test_mnist_5k_takes_400_and_100_of_every_digit(tmp_path, monkeypatch):
    table = np.zeros((5000, 785), dtype=np.uint8)
    table[:, -1] = np.tile(np.arange(10), 500)  # digits interleaved: the split must count within a digit
    table[:, 0] = np.repeat(np.arange(500) % 256, 10)
    table[:, 1] = np.repeat(np.arange(500) // 256, 10)
    with gzip.open(tmp_path / "mnist.csv.gz", "wt") as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")
    monkeypatch.setattr(datasets, "fetch_asset", lambda name, root: tmp_path / "mnist.csv.gz")
    dataset = load_dataset("mnist_5k", tmp_path)
    assert np.bincount(dataset.train.labels).tolist() == [400] * 10
    assert np.bincount(dataset.test.labels).tolist() == [100] * 10
    first = dataset.test[0]
    assert first.shape == (3, 28, 28) and int(first[0, 0, 0]) + 256 * int(first[0, 0, 1]) == 400


def test_missing_data_set_says_where_how_and_what_needs_none(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    places = {"cifar224": "cifar100.npz.*no route", "imageneta": "imagenet-a", "sub/mine.npz": "sub/mine.npz"}
    for name, looked in places.items():
        with pytest.raises(UserError, match=f"{tmp_path}/{looked}.*data_root.*exps/quickstart.json"):
            load_dataset(name, tmp_path)


def test_unknown_name_and_folder_without_splits(tmp_path):
    for name in ("cifar_100", "CIFAR-100"):
        with pytest.raises(UserError, match="nearest: cifar100"):
            class_count(name, tmp_path)
    with pytest.raises(UserError, match="has no train/ and test/"):
        load_dataset(str(tmp_path), tmp_path)


def test_a_file_of_another_kind_is_there_but_no_data_set(tmp_path):
    (tmp_path / "photos.zip").touch()
    for name in ("photos.zip", str(tmp_path / "photos.zip")):
        for share in (None, 0.2):
            with pytest.raises(UserError, match="photos.zip is a file, but no .npz; allowed: .*folder"):
                load_dataset(name, tmp_path, test_share=share)


def test_slugs():
    assert dataset_slug("cifar224") == "cifar224" and dataset_slug("/data/v1.2/my_set.npz") == "my_set"
    assert dataset_slug("/data/imagenet.v2/") == "imagenet.v2"


def test_synthetic_is_the_same_every_time_and_shifts_between_pairs(tmp_path):
    first = load_dataset("synthetic", tmp_path)
    synthetic_arrays()[1]["x_train"].fill(0)  # what is handed out is the caller's own
    second = load_dataset("synthetic", tmp_path)
    assert first.sha256 == second.sha256 and first.class_names == second.class_names
    assert first.sha256.startswith("c57bb0f80f8b")
    assert (len(first.class_names), len(first.train), len(first.test)) == (8, 320, 160)
    assert first.train[0].shape == (3, 32, 32) and not torch.equal(first.train[0], first.test[0])
    pixels = np.stack([first.train[i].numpy() for i in range(320)]).astype(float)
    contrast = pixels.std(axis=(1, 2, 3)).reshape(4, -1).mean(1)
    brightness = pixels.mean(axis=(1, 2, 3)).reshape(4, -1).mean(1)
    statistics = np.stack([contrast, brightness], 1)
    distances = np.linalg.norm(statistics[:, None] - statistics[None], axis=-1)[~np.eye(4, dtype=bool)]
    assert distances.min() > 30  # grey levels: far more than images of one pair differ
