"""Data sets in an .npz: right content, and one sentence for everything that is none."""

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.data.datasets import class_count, dataset_slug, load_dataset
from utils.errors import UserError


def arrays(classes: int = 3, each: int = 2, side: int = 8, **changed) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    images = rng.integers(0, 256, (2, len(labels), side, side, 3), dtype=np.uint8)
    content = {"x_train": images[0], "y_train": labels, "x_test": images[1], "y_test": labels}
    content["class_names"] = np.array([f"class{i}" for i in range(classes)])
    return {key: value for key, value in (content | changed).items() if value is not None}


def test_npz_by_path_and_inside_data_root(tmp_path):
    content = arrays()
    np.savez(tmp_path / "mine.npz", **content)
    by_path = load_dataset(str(tmp_path / "mine.npz"), "nowhere")
    inside = load_dataset("mine.npz", tmp_path)
    assert by_path.name == "mine" and by_path.class_names == ["class0", "class1", "class2"]
    assert by_path.sha256 == inside.sha256 and len(by_path.train) == 6
    assert by_path.train.labels.dtype == np.int64 and by_path.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    image = by_path.test[3]
    assert image.dtype == torch.uint8 and np.array_equal(image, content["x_test"][3].transpose(2, 0, 1))
    assert class_count("mine.npz", tmp_path) == 3 and class_count("absent.npz", tmp_path) is None
    for changed in (0, 1):
        content["x_test"][0, 0, 0, 0] ^= changed
        np.savez(tmp_path / "other.npz", **content)
        assert (load_dataset("other.npz", tmp_path).sha256 == inside.sha256) == (not changed)


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
        ({"x_train": np.zeros((6, 8, 8, 3), np.float32)}, r"x_train is float32 .*expected uint8"),
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
            content, descr = io.BytesIO(), np.lib.format.dtype_to_descr(array.dtype)
            claimed = shape if key == member else array.shape
            header = {"descr": descr, "fortran_order": False, "shape": claimed}
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


def test_the_suffix_may_be_in_upper_case(tmp_path):
    with open(tmp_path / "MINE.NPZ", "wb") as file:
        np.savez(file, **arrays())
    assert load_dataset("MINE.NPZ", tmp_path).name == "MINE" == dataset_slug("x/MINE.NPZ")
    assert class_count("MINE.NPZ", tmp_path) == 3 and class_count("absent.NPZ", tmp_path) is None


@pytest.mark.parametrize("name", ["mine.npz", "cifar100"])
@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a link to nothing"])
def test_what_is_no_file_in_the_place_of_an_npz_is_named(tmp_path, name, kind):
    path = (tmp_path / name).with_suffix(".npz")
    make = {"a folder": os.mkdir, "a FIFO": os.mkfifo, "a link to nothing": lambda p: os.symlink("gone", p)}
    make[kind](path)
    for read in (load_dataset, class_count):
        with pytest.raises(UserError, match=f"{path.name} cannot be read.* {kind}"):
            read(name, tmp_path)


def test_test_arrays_are_not_read_until_they_are_asked_for(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(x_test=np.zeros(3), y_test=np.zeros(3)))
    only = load_dataset("mine.npz", tmp_path, splits=("train",))
    assert only.test is None and len(only.train) == 6
    with pytest.raises(UserError, match="x_test"):
        load_dataset("mine.npz", tmp_path)
    np.savez(tmp_path / "mine.npz", **arrays())
    assert load_dataset("mine.npz", tmp_path, splits=("train",)).sha256 == only.sha256
