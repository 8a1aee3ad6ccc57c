"""Data sets by name and path: right content, right transforms, one sentence for everything that is not a data set."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as classic
from PIL import Image

from utils import data
from utils.data import (
    DATASETS,
    ArrayImages,
    Dataset,
    FolderImages,
    class_count,
    dataset_slug,
    load_dataset,
    train_transform,
)
from utils.errors import UserError

view = data.test_transform  # pytest would collect the name as a test


def arrays(classes: int = 3, each: int = 2, side: int = 8, **changed) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    images = rng.integers(0, 256, (2, len(labels), side, side, 3), dtype=np.uint8)
    names = np.array([f"class{i}" for i in range(classes)])
    content = {"x_train": images[0], "y_train": labels, "x_test": images[1], "y_test": labels, "class_names": names}
    return {key: value for key, value in (content | changed).items() if value is not None}


def write_folder(root: Path, split: str, names: list[str], suffix: str = ".png") -> None:
    for label, name in enumerate(names):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(2):
            pixels = np.full((6, 5, 3), 40 * label + i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}{suffix}")


# ---------------------------------------------------------------------------------------------------------- .npz


def test_npz_by_path_and_inside_data_root(tmp_path):
    content = arrays()
    np.savez(tmp_path / "mine.npz", **content)
    by_path = load_dataset(str(tmp_path / "mine.npz"), "nowhere")
    inside = load_dataset("mine.npz", tmp_path)
    assert by_path.name == "mine" and by_path.class_names == ["class0", "class1", "class2"]
    assert by_path.sha256 == inside.sha256 and len(by_path.train) == 6
    assert by_path.train.labels.dtype == np.int64 and by_path.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    image = by_path.test[3]
    assert image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(content["x_test"][3]).permute(2, 0, 1))
    assert class_count("mine.npz", tmp_path) == 3 and class_count("absent.npz", tmp_path) is None


def test_hash_is_of_the_content(tmp_path):
    def digest(name: str, **changed) -> str:
        np.savez(tmp_path / name, **arrays(**changed))
        return load_dataset(str(tmp_path / name), tmp_path).sha256

    images = arrays()["x_test"].copy()
    images[0, 0, 0, 0] ^= 1
    assert digest("a.npz") == digest("b.npz") and digest("a.npz") != digest("c.npz", x_test=images)


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 8, 1)])
def test_grey_images_get_three_equal_channels(tmp_path, shape):
    grey = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.savez(tmp_path / "grey.npz", **arrays(x_train=grey))
    image = load_dataset(str(tmp_path / "grey.npz"), tmp_path).train[1]
    assert image.shape == (3, 8, 8) and torch.equal(image[0], image[2])
    assert torch.equal(image[1], torch.from_numpy(grey[1].reshape(8, 8)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_test": None, "class_names": None}, "lacks y_test, class_names"),
        ({"x_train": np.zeros((6, 8, 8, 3), np.float32)}, r"x_train is float32 \(6, 8, 8, 3\); expected uint8"),
        ({"x_train": np.zeros((6, 3, 8, 8), np.uint8)}, r"x_train is uint8 \(6, 3, 8, 8\)"),
        ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, r"x_test is uint8 \(0, 8"),
        ({"y_train": np.arange(5)}, "y_train is .* one for each of 6 images"),
        ({"y_train": np.zeros(6)}, "y_train is float64"),
        ({"y_test": np.array([0, 0, 1, 1, 2, 3])}, "y_test has labels from 0 to 3; expected 0 to 2"),
        ({"y_test": np.array([0, 0, 1, 1, 2, -1])}, "y_test has labels from -1 to 2"),
        ({"y_test": np.array([0, 0, 1, 1, 1, 1])}, "1 classes have no test image, such as class2"),
        ({"class_names": np.array(["a", "b", "c"], dtype=object)}, "without pickle"),
        ({"class_names": np.array([["a", "b", "c"]])}, r"class_names has shape \(1, 3\)"),
    ],
)
def test_bad_npz_is_one_sentence_naming_the_file(tmp_path, changed, message):
    np.savez(tmp_path / "bad.npz", **arrays(**changed))
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(str(tmp_path / "bad.npz"), tmp_path)
    assert "bad" in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_and_foreign_npz(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", **arrays())
    content = (tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    cases = {"cut.npz": content[: len(content) // 2], "text.npz": b"hello", "empty.npz": b""}
    cases["array.npz"] = (tmp_path / "array.npy").read_bytes()
    cases["flipped.npz"] = content[:200] + bytes(byte ^ 255 for byte in content[200:230]) + content[230:]
    for name, raw in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(UserError, match=name):
            load_dataset(str(tmp_path / name), tmp_path)


# -------------------------------------------------------------------------------------------------------- folders


def test_image_folder_in_sorted_order(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path, split, ["ant", "bee"])
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    dataset = load_dataset(str(tmp_path), "nowhere")
    assert dataset.class_names == ["ant", "bee"] and dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert [int(dataset.train[i][0, 0, 0]) for i in range(4)] == [0, 1, 40, 41]
    assert dataset.train[0].shape == (3, 6, 5) and class_count(str(tmp_path), "nowhere") == 2
    assert load_dataset(tmp_path.name, tmp_path.parent).sha256 == dataset.sha256


@pytest.mark.parametrize("folder", ["imagenet-r", "imagenetr"])
def test_named_folder_data_sets(tmp_path, folder):
    for split in ("train", "test"):
        write_folder(tmp_path / folder, split, ["a", "b", "c"])
    dataset = load_dataset("imagenetr", tmp_path)
    assert dataset.name == "imagenetr" and len(dataset.class_names) == 3
    assert class_count("imagenetr", tmp_path) == 3  # what is there, not what was published


def test_train_and_test_classes_must_agree(tmp_path):
    write_folder(tmp_path, "train", ["ant", "bee"])
    write_folder(tmp_path, "test", ["ant", "cat"])
    with pytest.raises(UserError, match="only in train: bee; only in test: cat"):
        load_dataset(str(tmp_path), tmp_path)


def test_class_folder_without_images(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path, split, ["ant", "bee"])
    for file in (tmp_path / "test" / "bee").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="1 classes have no test image, such as bee"):
        load_dataset(str(tmp_path), tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_truncated_image_is_named_and_never_filled(tmp_path, suffix, kept, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # as some libraries leave it
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {".jpg": "JPEG", ".png": "PNG"}[suffix])
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(buffer.getvalue()[: int(kept * len(buffer.getvalue()))])
    with pytest.raises(UserError, match=f"{path}.*replace or remove"):
        FolderImages([path], np.array([0]))[0]


def test_folder_images_are_shown_as_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4, 4), 9, np.uint8), "RGBA").save(tmp_path / "alpha.png")
    images = FolderImages([tmp_path / "grey.png", tmp_path / "alpha.png"], np.zeros(2))
    assert images[0].tolist() == np.full((3, 4, 4), 7).tolist() and images[1].shape == (3, 4, 4)


# ---------------------------------------------------------------------------------------------------------- names


def test_class_counts_of_named_data_sets(tmp_path):
    expected = {"mnist_5k": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100, "cifar224": 100}
    expected |= {"imagenetr": 200, "imageneta": 200, "vtab": 50, "cub": 200, "objectnet": 200, "omnibenchmark": 300}
    expected |= {"synthetic": 8}
    assert {name: class_count(name, tmp_path) for name in DATASETS} == expected


def test_cifar224_reads_cifar100_from_data_root_without_download(tmp_path, monkeypatch):
    monkeypatch.setattr(data.torchvision.datasets, "CIFAR100", lambda *_, **__: pytest.fail("a download was started"))
    np.savez(tmp_path / "cifar100.npz", **arrays(classes=4))
    dataset = load_dataset("cifar224", tmp_path)
    assert dataset.name == "cifar224" and len(dataset.class_names) == 4 and class_count("cifar224", tmp_path) == 4
    assert load_dataset("cifar100", tmp_path).sha256 == dataset.sha256


def test_torchvision_data_set_is_taken_over(tmp_path, monkeypatch):
    class Fake:
        classes = ["zero", "one"]

        def __init__(self, root, train, download):
            assert root == tmp_path and download
            self.data = torch.full((4, 5, 5), 1 if train else 2, dtype=torch.uint8)
            self.targets = torch.tensor([0, 1, 1, 0])

    monkeypatch.setattr(data.torchvision.datasets, "MNIST", Fake)
    dataset = load_dataset("mnist", tmp_path)
    assert dataset.class_names == ["zero", "one"] and dataset.test.labels.tolist() == [0, 1, 1, 0]
    assert dataset.train[0].unique().tolist() == [1] and dataset.test[0].unique().tolist() == [2]


def test_mnist_5k_takes_400_and_100_of_every_digit(tmp_path, monkeypatch):
    table = np.zeros((5000, 785), dtype=np.uint8)
    table[:, -1] = np.tile(np.arange(10), 500)  # digits interleaved: the split must count within a digit
    table[:, 0] = np.repeat(np.arange(500) % 256, 10)
    table[:, 1] = np.repeat(np.arange(500) // 256, 10)
    with gzip.open(tmp_path / "mnist.csv.gz", "wt") as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")
    monkeypatch.setattr(data, "fetch_asset", lambda name, root: tmp_path / "mnist.csv.gz")
    dataset = load_dataset("mnist_5k", tmp_path)
    assert np.bincount(dataset.train.labels).tolist() == [400] * 10
    assert np.bincount(dataset.test.labels).tolist() == [100] * 10
    first_test = dataset.test[0]
    assert first_test.shape == (3, 28, 28) and int(first_test[0, 0, 0]) + 256 * int(first_test[0, 0, 1]) == 400


def test_missing_data_set_says_where_how_and_what_needs_none(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(data.torchvision.datasets, "CIFAR100", offline)
    for name, looked in [("cifar224", "cifar100.npz"), ("imageneta", "imagenet-a"), ("sub/mine.npz", "sub/mine.npz")]:
        with pytest.raises(UserError) as caught:
            load_dataset(name, tmp_path)
        text = str(caught.value)
        assert str(tmp_path / looked) in text and "data_root" in text and "exps/quickstart.json" in text
    with pytest.raises(UserError, match="no route to host"):
        load_dataset("cifar224", tmp_path)


def test_unknown_name_and_folder_without_splits(tmp_path):
    with pytest.raises(UserError, match="nearest: cifar100"):
        class_count("cifar_100", tmp_path)
    with pytest.raises(UserError, match="has no train/ and test/"):
        load_dataset(str(tmp_path), tmp_path)


def test_slugs():
    assert dataset_slug("cifar224") == "cifar224" and dataset_slug("/data/v1.2/my_set.npz") == "my_set"
    assert dataset_slug("/data/imagenet.v2/") == "imagenet.v2"


def test_synthetic_is_the_same_every_time_and_shifts_between_pairs(tmp_path):
    first, second = load_dataset("synthetic", tmp_path), load_dataset("synthetic", tmp_path)
    assert first.sha256 == second.sha256 and first.class_names == second.class_names
    assert (len(first.class_names), len(first.train), len(first.test)) == (8, 320, 160)
    assert first.train[0].shape == (3, 32, 32) and not torch.equal(first.train[0], first.test[0])
    pixels = np.stack([first.train[i].numpy() for i in range(320)]).astype(float)
    contrast = pixels.std(axis=(1, 2, 3)).reshape(4, -1).mean(1)
    brightness = pixels.mean(axis=(1, 2, 3)).reshape(4, -1).mean(1)
    statistics = np.stack([contrast, brightness], 1)
    distances = np.linalg.norm(statistics[:, None] - statistics[None], axis=-1)[~np.eye(4, dtype=bool)]
    assert distances.min() > 30  # grey levels: far more than images of one pair differ


def test_dataset_gives_copies():
    images = ArrayImages(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1))
    images[0].fill_(9)
    assert images[0].sum() == 0
    assert Dataset("x", ["a"], images, images, "").class_names == ["a"]


# ------------------------------------------------------------------------------------------------------ transforms


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8))
    return torch.from_numpy(np.array(small.resize((100, 80), Image.BICUBIC))).permute(2, 0, 1)


def test_test_transform_is_the_published_one(photo):
    image = Image.fromarray(photo.permute(1, 2, 0).numpy())
    published = classic.Compose(
        [
            classic.Resize(256, interpolation=classic.InterpolationMode.BICUBIC),
            classic.CenterCrop(224),
            classic.ToTensor(),
        ]
    )
    ours = view(224)(photo)
    assert ours.shape == (3, 224, 224) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, published(image), atol=1.01 / 255, rtol=0)


def test_normalisation_is_applied_when_given(photo):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    plain = view(32)(photo)
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(view(32, mean, std)(photo), expected)
    torch.manual_seed(3)
    seen = train_transform(32, "crop_flip", mean, std)(photo)
    torch.manual_seed(3)
    expected = (train_transform(32)(photo) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(seen, expected)


def test_augmentations(photo):
    assert torch.equal(train_transform(32, "none")(photo), view(32)(photo))
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 64, 64)  # brightness grows to the right

    def mirrored(augmentation: str) -> list[bool]:
        transform = train_transform(16, augmentation)
        views = [transform(ramp) for _ in range(60)]
        assert all(v.shape == (3, 16, 16) and v.min() >= 0 and v.max() <= 1 for v in views)
        return [bool(v[0, 0, 0] > v[0, 0, -1]) for v in views]

    torch.manual_seed(0)
    assert 10 < sum(mirrored("crop_flip")) < 50 and sum(mirrored("crop")) == 0
    with pytest.raises(UserError, match="allowed: crop_flip, crop, none"):
        train_transform(16, "flip")


def test_crop_covers_the_published_range_of_areas():
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    torch.manual_seed(0)
    transform = train_transform(50, "crop")
    spans = []
    for _ in range(200):
        seen = transform(image) * 255
        spans.append(((seen[0].max() - seen[0].min() + 1) * (seen[1].max() - seen[1].min() + 1)).item() / 1e4)
    assert 0.03 < min(spans) < 0.12 and max(spans) > 0.85
