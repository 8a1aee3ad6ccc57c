"""Data sets by name and path: right content, files decoded once, one sentence for everything that is not a data set."""

import collections
import gzip
import io
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.image_folders import folder_images, write_folder
from utils.cache import decoded_images
from utils.cache.decoded_images import INDEX, PIXELS, DecodedImages
from utils.data import datasets as data
from utils.data.datasets import (
    DATASETS,
    ArrayImages,
    Dataset,
    ImageCache,
    class_count,
    dataset_slug,
    load_dataset,
)
from utils.errors import UserError


def arrays(classes: int = 3, each: int = 2, side: int = 8, **changed) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    images = rng.integers(0, 256, (2, len(labels), side, side, 3), dtype=np.uint8)
    names = np.array([f"class{i}" for i in range(classes)])
    content = {
        "x_train": images[0],
        "y_train": labels,
        "x_test": images[1],
        "y_test": labels,
        "class_names": names,
    }
    return {key: value for key, value in (content | changed).items() if value is not None}


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
    assert image.dtype == torch.uint8 and torch.equal(
        image, torch.from_numpy(content["x_test"][3]).permute(2, 0, 1)
    )
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
        (
            {"x_train": np.zeros((6, 8, 8, 3), np.float32)},
            r"x_train is float32 \(6, 8, 8, 3\); expected uint8",
        ),
        ({"x_train": np.zeros((6, 3, 8, 8), np.uint8)}, r"x_train is uint8 \(6, 3, 8, 8\)"),
        ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, r"x_test is uint8 \(0, 8"),
        ({"y_train": np.arange(5)}, "y_train is .* one for each of 6 images"),
        ({"y_train": np.zeros(6)}, "y_train is float64"),
        ({"y_train": np.full(6, np.nan)}, "y_train is float64"),
        ({"y_train": np.array(["a"] * 6)}, "y_train is <U1"),
        ({"x_train": np.array([[[None]]] * 6)}, "without pickle"),
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


def rewrite_header(path: Path, member: str, shape: tuple[int, ...], beyond: int | None = None) -> None:
    """Let the header of an array in an .npz claim another shape, and the archive another size."""
    with np.load(path) as file:
        stored = {key: file[key] for key in file.files}
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in stored.items():
            content = io.BytesIO()
            descr = np.lib.format.dtype_to_descr(array.dtype)
            header = {
                "descr": descr,
                "fortran_order": False,
                "shape": shape if key == member else array.shape,
            }
            np.lib.format.write_array_header_1_0(content, header)
            archive.writestr(f"{key}.npy", content.getvalue() + array.tobytes())
    if beyond is not None:  # sizes in the archive's directory: compressed, then plain
        raw = bytearray(path.read_bytes())
        place = raw.rindex(f"{member}.npy".encode()) - 46
        raw[place + 20 : place + 28] = struct.pack("<II", beyond, beyond)
        path.write_bytes(raw)


@pytest.mark.parametrize(
    ("shape", "beyond"),
    [((10**6, 8, 8, 3), None), ((10**14, 8, 8, 3), None), ((7, 8, 8, 3), None), ((5, 8, 8, 3), None)]
    + [((10**6, 8, 8, 3), 192 * 10**6 + 128), ((-6, 8, 8, 3), None)],
)
def test_a_header_that_claims_what_the_file_does_not_hold_is_one_sentence(tmp_path, shape, beyond):
    np.savez(tmp_path / "bad.npz", **arrays())
    rewrite_header(tmp_path / "bad.npz", "x_train", shape, beyond)
    with pytest.raises(UserError, match="bad.npz cannot be read.*x_train.npy") as caught:
        load_dataset(str(tmp_path / "bad.npz"), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (np.array(["é".encode(), b"b", b"c"]), ["é", "b", "c"]),
        (np.array(["e\u0301", "b", "c"]), ["é", "b", "c"]),
        (np.array([1, 2, 30]), ["1", "2", "30"]),
        (np.array([b"\xff", b"b", b"c"]), None),
        (np.array(["\udcff", "b", "c"]), None),
    ],
)
def test_class_names_may_be_utf8_bytes(tmp_path, names, expected):
    np.savez(tmp_path / "mine.npz", **arrays(class_names=names))
    if expected is None:
        with pytest.raises(UserError, match="mine.npz: a name in class_names is not UTF-8"):
            load_dataset("mine.npz", tmp_path)
    else:
        assert load_dataset("mine.npz", tmp_path).class_names == expected


def test_npz_in_upper_case(tmp_path):
    with open(tmp_path / "MINE.NPZ", "wb") as file:
        np.savez(file, **arrays())
    assert load_dataset("MINE.NPZ", tmp_path).name == "MINE" == dataset_slug("x/MINE.NPZ")
    assert class_count("MINE.NPZ", tmp_path) == 3 and class_count("absent.NPZ", tmp_path) is None


@pytest.mark.parametrize("name", ["mine.npz", "cifar100"])
@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a link to nothing"])
def test_what_is_no_file_in_the_place_of_an_npz_is_named(tmp_path, name, kind):
    path = tmp_path / ("mine.npz" if name == "mine.npz" else "cifar100.npz")
    {"a folder": os.mkdir, "a FIFO": os.mkfifo, "a link to nothing": lambda p: os.symlink("gone", p)}[kind](
        path
    )
    for read in (load_dataset, class_count):
        with pytest.raises(UserError, match=f"{path.name} cannot be read.* {kind}"):
            read(name, tmp_path)


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


def write_domainnet(root: Path, domains=data.DOMAINS) -> None:
    """Three classes, one training and one test image of each in every domain, and the lists of these domains."""
    for d, domain in enumerate(data.DOMAINS):
        for split in ("train", "test"):
            lines = []
            for label, name in ((0, "zebra"), (1, "Ant"), (2, "ant")):
                file = root / domain / name / f"{domain}_{label:03}_{split}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4, 3), 10 * label + d, np.uint8)).save(file)
                lines.append(f"{file.relative_to(root)} {label}\n")
            if domain in domains:
                (root / f"{domain}_{split}.txt").write_text("".join(lines))


def test_domainnet_is_its_published_lists_pooled(tmp_path):
    """Classes have the numbers of the lists, whatever order their names have."""
    assert class_count("domainnet", tmp_path) == 345
    write_domainnet(tmp_path / "domainnet")
    dataset = load_dataset("domainnet", tmp_path)
    assert dataset.class_names == ["zebra", "Ant", "ant"] and len(dataset.train) == len(dataset.test) == 18
    assert dataset.train.labels.tolist() == [0, 1, 2] * 6
    assert [int(dataset.test[i][0, 0, 0]) for i in range(18)] == [
        base + d for d in range(6) for base in (0, 10, 20)
    ]
    decoded = load_dataset("domainnet", tmp_path, ImageCache(tmp_path / "decoded", 1))
    decoded.train.prepare(np.arange(18))
    assert decoded.sha256 == dataset.sha256 and same_images(decoded.train, dataset.train)


def test_names_in_lists_are_one_class_in_either_form_of_their_accents(tmp_path):
    root = tmp_path / "domainnet"
    write_domainnet(root)
    for number, domain in enumerate(data.DOMAINS):
        name = ("caf\u00e9", "cafe\u0301")[number % 2]
        (root / domain / "ant").rename(root / domain / name)
        for split in ("train", "test"):
            file = root / f"{domain}_{split}.txt"
            file.write_text(file.read_text().replace("/ant/", f"/{name}/"), encoding="utf-8")
    dataset = load_dataset("domainnet", tmp_path)
    assert (
        dataset.class_names == ["zebra", "Ant", "caf\u00e9"]
        and dataset.train.labels.tolist() == [0, 1, 2] * 6
    )


def test_domainnet_may_be_split_in_folders(tmp_path):
    for split in ("train", "test"):
        write_folder(tmp_path / "domainnet", split, ["a", "b", "c"])
    assert len(load_dataset("domainnet", tmp_path).class_names) == 3 == class_count("domainnet", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "looked at .*domainnet/train, .*real_test.txt; .*M3SDA"),
        (b"real/ant 2\n", "real_test.txt, line 1 is 'real/ant 2'; expected <domain>/<class>/<file> <number>"),
        (b"real/../x.png 2\n", "expected <domain>"),
        (b"/ant/x.png 2\n", "expected <domain>"),
        (b"real/ant/x.png " + b"9" * 5000, "expected <domain>"),
        (b"real/ant/none.png 2\n", "real/ant/none.png .it is not there"),
        (b"real/emu/x.png 3\n", "no training list has the class emu"),
        (b"real/emu/x.png 7\n", "no class has the number 3, and one has 7"),
        (b"real/emu/x.png 2\n", "the number 2 to ant and emu"),
        (b"real/ant/x.png 1\nreal/Ant/x.png 0\n", "the number 0 to Ant and zebra"),
        (b"real/ant/x.png 3\n", "give ant the numbers 2 and 3"),
        (b"real/\xff/x.png 3\n", "real_test.txt cannot be read"),
    ],
)
def test_lists_that_are_not_whole_are_a_sentence(tmp_path, content, message):
    write_domainnet(tmp_path / "domainnet")
    file = tmp_path / "domainnet" / "real_test.txt"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("domainnet", tmp_path)
    assert "\n" not in str(caught.value)


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
        folder_images([path])[0]


def test_batch_is_one_tensor_or_a_list_where_sizes_differ(tmp_path):
    grey = ArrayImages(np.arange(32, dtype=np.uint8).reshape(2, 4, 4), np.zeros(2))
    batch = grey.batch(np.array([1, 0, 1]))
    assert batch.shape == (3, 3, 4, 4) and torch.equal(batch[1], grey[0])
    assert grey.batch(np.arange(0)).shape == (0, 3, 4, 4)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, side in zip(files, (4, 4, 5), strict=True):
        Image.fromarray(np.full((side, 6, 3), side, np.uint8)).save(file)
    images = folder_images(files)
    assert images.batch(np.array([0, 1])).shape == (2, 3, 4, 6) and images.batch(np.arange(0)) == []
    assert [image.shape for image in images.batch(np.arange(3))] == [(3, 4, 6), (3, 4, 6), (3, 5, 6)]


def test_folder_images_are_shown_as_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4, 4), 9, np.uint8), "RGBA").save(tmp_path / "alpha.png")
    images = folder_images([tmp_path / "grey.png", tmp_path / "alpha.png"])
    assert images[0].tolist() == np.full((3, 4, 4), 7).tolist() and images[1].shape == (3, 4, 4)


# --------------------------------------------------------------------------------------------------- decoded once


@pytest.fixture
def opened(monkeypatch) -> collections.Counter:
    """How often this process read every image file to decode it, after the check."""
    counts, read = collections.Counter(), Path.read_bytes

    def counted(path: Path) -> bytes:
        counts.update([path.name] if path.suffix == ".png" else [])
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    return counts


@pytest.fixture
def warnings(caplog, monkeypatch) -> Callable[[], list[str]]:
    """The warnings logged so far."""
    monkeypatch.setattr(logging.getLogger("nested_lora"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def ragged(root: Path) -> Path:
    """Eleven images of different sizes in the one class of train/, a copy of each in test/."""
    rng = np.random.default_rng(0)
    for i in range(11):
        pixels = rng.integers(0, 256, (5 + i, 20 - i, 3), dtype=np.uint8)
        for split in ("train", "test"):
            (root / split / "ant").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / split / "ant" / f"{i:02}.png")
    return root


def same_images(left, right) -> bool:
    return all(torch.equal(left[i], right[i]) for i in range(len(left)))


@pytest.fixture
def plain(tmp_path) -> Dataset:
    """The ragged data set at tmp_path / "set", decoded at every access."""
    return load_dataset(str(ragged(tmp_path / "set")), tmp_path)


def load(tmp_path: Path) -> Dataset:
    return load_dataset(str(tmp_path / "set"), tmp_path, ImageCache(tmp_path / "decoded", 1))


def stores(tmp_path: Path) -> list[Path]:
    return [path.parent for path in (tmp_path / "decoded").glob(f"*/{PIXELS}")]


def store(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "decoded").iterdir() if path.is_dir())
    return folder


def test_every_file_is_decoded_once_by_all_runs(tmp_path, plain, opened):
    first = load(tmp_path)
    assert not stores(tmp_path) and first.sha256 == plain.sha256
    for chosen in ([3, 1, 3], [1, 2], range(11), range(11)):
        first.train.prepare(np.array(chosen))
        first.train.batch(np.array(chosen))
    assert opened == {f"{i:02}.png": 1 for i in range(11)}
    again = load(tmp_path)
    again.train.prepare(np.arange(11))
    assert same_images(again.train, pickle.loads(pickle.dumps(first)).train)
    assert opened.total() == 11 and same_images(again.train, plain.train)
    assert len(pickle.dumps(again.train.decoded)) < 1000 < again.train.decoded._pixels.size
    assert (store(tmp_path) / PIXELS).stat().st_size == sum(image.numel() for image in plain.train)


def test_named_folder_data_sets_are_decoded_once_too(tmp_path, opened):
    ragged(tmp_path / "imagenet-r")
    for _ in range(2):
        dataset = load_dataset("imagenetr", tmp_path, ImageCache(tmp_path / "decoded", 1))
        for images in (dataset.train, dataset.test):
            images.prepare(np.arange(11))
            images.batch(np.arange(11))
    assert (
        opened == {f"{i:02}.png": 1 for i in range(11)} and len(stores(tmp_path)) == 1
    )  # both splits are the same


def test_unprepared_images_are_right_and_written_by_nobody(tmp_path, plain, opened):
    images = load(tmp_path).train
    assert same_images(images, plain.train) and opened["03.png"] == 2 and not stores(tmp_path)


def test_changed_file_is_another_data_set(tmp_path, plain):
    path = tmp_path / "set" / "train" / "ant" / "00.png"
    for value in (9, 8):
        Image.fromarray(np.full((5, 20, 3), value, np.uint8)).save(path, "BMP")  # of the same size in bytes
        os.utime(path, ns=(10**18, 10**18))
        images = load(tmp_path).train
        images.prepare(np.arange(11))
        assert images[0].unique().tolist() == [value]
    assert len(stores(tmp_path)) == 2


def in_another_process(work: Callable[[], None]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize("die_at", [0, 1, 5, 10])
def test_killed_decoding_goes_on_where_it_was(tmp_path, plain, opened, monkeypatch, die_at):
    monkeypatch.setattr(decoded_images, "BLOCK", 2)
    monkeypatch.setattr(decoded_images, "SAVE_EVERY", -1.0)
    images = load(tmp_path).train

    def die() -> None:
        decode = images._decode
        images._decode = lambda index: (
            os.kill(os.getpid(), signal.SIGKILL) if index == die_at else decode(index)
        )
        images.prepare(np.arange(11))

    process = in_another_process(die)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with open(store(tmp_path) / PIXELS, "ab") as file:
        file.write(b"half an image")
    images.prepare(np.arange(11))
    assert sorted(opened) == [f"{i:02}.png" for i in range(die_at // 2 * 2, 11)] and set(opened.values()) == {
        1
    }
    assert same_images(images, plain.train) and same_images(load(tmp_path).train, plain.train)


def test_several_processes_decode_each_image_once_between_them(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(decoded_images, "BLOCK", 2)
    images = load(tmp_path).train

    assert images.decoded._missing(np.arange(11)).size == 11
    context = multiprocessing.get_context("fork")
    decode, together, decoded = images._decode, context.Barrier(4), context.Value("i")

    def slow(index: int) -> np.ndarray:
        time.sleep(0.02)
        with decoded:
            decoded.value += 1
        return decode(index)

    def work() -> None:
        images._decode = slow
        together.wait()
        images.prepare(np.arange(11))
        assert same_images(images, plain.train)

    processes = [in_another_process(work) for _ in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and decoded.value == 11
    assert (store(tmp_path) / PIXELS).stat().st_size == sum(image.numel() for image in plain.train)


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


DAMAGES = {
    "cut pixels": lambda folder: os.truncate(folder / PIXELS, 100),
    "no pixels": lambda folder: (folder / PIXELS).unlink(),
    "changed pixels": lambda folder: flip_byte(folder / PIXELS, 700),
    "cut index": lambda folder: os.truncate(folder / INDEX, 200),
    "empty index": lambda folder: os.truncate(folder / INDEX, 0),
    "changed index": lambda folder: flip_byte(folder / INDEX, 300),
    "no index": lambda folder: (folder / INDEX).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_store_is_decoded_again(tmp_path, plain, opened, damage, warnings):
    load(tmp_path).train.prepare(np.arange(11))
    DAMAGES[damage](store(tmp_path))
    for _ in range(
        2
    ):  # changed pixels are noticed when they are read: from the next run on they are right again
        images = load(tmp_path).train
        images.prepare(np.arange(11))
        opened.clear()
        again = torch.cat([image.flatten() for image in images])
        assert not opened or damage == "changed pixels"
        assert torch.equal(again, torch.cat([image.flatten() for image in plain.train]))
    told = [text for text in warnings() if "decoded again" in text and str(store(tmp_path)) in text]
    assert bool(told) == damage.startswith(("cut", "changed", "empty"))
    opened.clear()
    images = load(tmp_path).train
    images.prepare(np.arange(11))
    images.batch(np.arange(11))
    assert not opened


def test_the_store_of_other_images_is_not_taken_for_this_one(tmp_path, plain):
    load(tmp_path).train.prepare(np.arange(11))
    ours, before = store(tmp_path), list(plain.train)
    for path in (tmp_path / "set" / "train" / "ant").iterdir():
        pixels = 255 - np.asarray(Image.open(path))
        Image.fromarray(pixels).save(path)
    images = load(tmp_path).train
    shutil.copytree(ours, images.decoded.folder)
    images.prepare(np.arange(11))
    assert all(torch.equal(new, 255 - old) for new, old in zip(images, before, strict=True))


def test_reading_goes_on_while_a_damaged_store_is_replaced(tmp_path, plain):
    reader = load(tmp_path).train
    reader.prepare(np.arange(11))
    (store(tmp_path) / INDEX).unlink()
    writer = load(tmp_path).train
    writer.prepare(np.array([7]))
    assert same_images(reader, plain.train) and same_images(writer, plain.train)


@pytest.mark.parametrize("which", [0, 6, 10])
def test_corrupt_image_is_named_and_keeps_the_others(tmp_path, plain, opened, monkeypatch, which):
    monkeypatch.setattr(decoded_images, "BLOCK", 2)
    path = tmp_path / "set" / "train" / "ant" / f"{which:02}.png"
    whole, images = path.read_bytes(), load(tmp_path).train
    path.write_bytes(whole[:50])
    for _ in range(2):
        with pytest.raises(UserError, match=f"{path}.*replaced meanwhile") as caught:
            images.prepare(np.arange(11))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"{path}"):
        images[which]
    path.write_bytes(whole)
    images.prepare(np.arange(11))
    assert same_images(images, plain.train)


def test_full_disk_and_unwritable_folder_cost_time_only(tmp_path, plain, monkeypatch, warnings):
    full = collections.namedtuple("usage", "total used free")(10, 5, decoded_images.RESERVE + 500)
    monkeypatch.setattr(decoded_images.shutil, "disk_usage", lambda path: full)
    images = load(tmp_path).train
    for _ in range(2):
        images.prepare(np.arange(11))
        assert same_images(images, plain.train)
    assert len(warnings()) == 1 and "2 GB of the disk" in warnings()[0]
    (tmp_path / "file").write_text("")
    images = load_dataset(str(tmp_path / "set"), tmp_path, ImageCache(tmp_path / "file" / "below", 1)).train
    images.prepare(np.arange(11))
    assert same_images(images, plain.train) and len(warnings()) == 2


def test_decoded_images_keep_to_their_limit(tmp_path, plain, monkeypatch, warnings):
    monkeypatch.setattr(decoded_images, "BLOCK", 1)
    sizes = [image.numel() for image in plain.train]
    gigabytes = (sum(sizes) + sizes[0] + sizes[1] + 1) / 1e9
    Image.fromarray(np.zeros((5, 20, 3), np.uint8)).save(tmp_path / "set" / "test" / "ant" / "00.png")
    plain = load_dataset(str(tmp_path / "set"), tmp_path)
    dataset = load_dataset(str(tmp_path / "set"), tmp_path, ImageCache(tmp_path / "decoded", gigabytes))
    for images in (dataset.train, dataset.test, dataset.test):
        images.prepare(np.arange(11))
        assert same_images(images, plain.train if images is dataset.train else plain.test)
    held = sorted(path.stat().st_size for path in (tmp_path / "decoded").glob(f"*/{PIXELS}"))
    assert held == [sizes[0] + sizes[1], sum(sizes)] and len(warnings()) == 1 and "may hold" in warnings()[0]


def test_without_file_locks_nothing_is_kept(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(decoded_images, "fcntl", None)
    images = load(tmp_path).train
    images.prepare(np.arange(11))
    assert same_images(images, plain.train) and not stores(tmp_path)


def test_reading_checks_the_bytes(tmp_path):
    decoded = DecodedImages(tmp_path / "store", 2, "")
    decoded.add(np.array([1]), lambda index: np.full((2, 3, 3), index, np.uint8))
    assert decoded.read(0) is None and decoded.read(1).tolist() == np.full((2, 3, 3), 1).tolist()
    assert decoded._known()[1].tolist() == [0, 2, 3, zlib.crc32(bytes([1] * 18))]


# ---------------------------------------------------------------------------------------------------------- names


def test_class_counts_of_named_data_sets(tmp_path):
    expected = {
        "mnist_5k": 10,
        "mnist": 10,
        "fashion_mnist": 10,
        "cifar10": 10,
        "cifar100": 100,
        "cifar224": 100,
    }
    expected |= {
        "imagenetr": 200,
        "imageneta": 200,
        "vtab": 50,
        "cub": 200,
        "objectnet": 200,
        "omnibenchmark": 300,
    }
    expected |= {"synthetic": 8, "domainnet": 345}
    assert {name: class_count(name, tmp_path) for name in DATASETS} == expected


def test_cifar224_reads_cifar100_from_data_root_without_download(tmp_path, monkeypatch):
    monkeypatch.setattr(
        data.torchvision.datasets, "CIFAR100", lambda *_, **__: pytest.fail("a download was started")
    )
    np.savez(tmp_path / "cifar100.npz", **arrays(classes=4))
    dataset = load_dataset("cifar224", tmp_path)
    assert (
        dataset.name == "cifar224"
        and len(dataset.class_names) == 4
        and class_count("cifar224", tmp_path) == 4
    )
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
    assert (
        first_test.shape == (3, 28, 28) and int(first_test[0, 0, 0]) + 256 * int(first_test[0, 0, 1]) == 400
    )


def test_missing_data_set_says_where_how_and_what_needs_none(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(data.torchvision.datasets, "CIFAR100", offline)
    for name, looked in [
        ("cifar224", "cifar100.npz"),
        ("imageneta", "imagenet-a"),
        ("sub/mine.npz", "sub/mine.npz"),
    ]:
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
