"""Image files: every mode scaled right or refused, what a folder holds, bad files in one list, content remembered."""

import collections
import colorsys
import io
import os
import re
import shutil
import socket
import sqlite3
import struct
import time
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from tests.conftest import ROOT, learner_of
from tests.image_folders import write_folder
from trainer import Run, open_log, resume, train
from utils.cache import file_memo
from utils.cache.file_memo import DATABASE
from utils.data import image_files
from utils.data.datasets import ImageCache, load_dataset
from utils.data.image_files import decode, to_rgb
from utils.errors import UserError
from utils.runs.checkpoint import load_checkpoint, save_checkpoint
from utils.runs.manifest import Command

RNG = np.random.default_rng(0)

# -------------------------------------------------------------------------------------------------------------- modes


def levels(*channels: int) -> np.ndarray:
    """Random bytes, (5, 7) or (5, 7, channels)."""
    return RNG.integers(0, 256, (5, 7, *channels), dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, rows: np.ndarray) -> bytes:
    """A PNG file of big-endian rows, written byte by byte as its specification says."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(
    width: int, height: int, data: bytes, bits: int, white_is_zero: bool = False, sample_format: int = 1
) -> bytes:
    """A little-endian grey TIFF file of one strip."""
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: int(not white_is_zero),
        273: 8,
        277: 1,
        278: height,
    }
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return (
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def srgb_of_lab(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (white D50) to sRGB, by the formulas of the two standards, (5, 7, 3) uint8."""
    lightness, a, b = (lab[..., i] for i in range(3))
    y = (lightness / 255 * 100 + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1.0, 0.82521]
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (xyz @ np.array(matrix).T).clip(0, 1)
    return (255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).round()


def modes() -> dict[str, list[tuple[Image.Image | bytes, np.ndarray, int]]]:
    """Mode -> images or files of it, the pixels that they stand for, and by how much rounding may differ."""
    black_white, one, two, three, four = levels() > 127, levels(), levels(2), levels(3), levels(4)
    deep, wide = (
        RNG.integers(0, 2**16, (5, 7), dtype=np.uint16),
        RNG.integers(0, 2**16, (5, 7, 3), dtype=np.uint16),
    )
    palette, entries = levels(3).reshape(-1, 3)[:8], RNG.integers(0, 8, (5, 7), dtype=np.uint8)
    paletted = Image.fromarray(entries)
    paletted.putpalette(palette.tobytes())
    translucent = Image.new("PA", (7, 5))
    translucent.putpalette(palette.tobytes())
    translucent.putdata(list(zip(entries.ravel().tolist(), one.ravel().tolist(), strict=True)))
    near_grey = np.stack([RNG.integers(60, 200, (5, 7)), *RNG.integers(-20, 20, (2, 5, 7))], -1)
    lab = Image.frombytes("LAB", (7, 5), near_grey.astype(np.int8).astype(np.uint8).tobytes())
    luma, blue, red = (three[..., i].astype(float) for i in range(3))
    green = luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128)
    jfif = np.stack([luma + 1.402 * (red - 128), green, luma + 1.772 * (blue - 128)], -1)
    hue = np.array([[colorsys.hsv_to_rgb(*pixel) for pixel in row] for row in three / 255]) * 255
    ink = four.astype(float)
    twelve = RNG.integers(0, 2**12, (5, 8), dtype=np.uint16)
    bits = "".join(f"{value:012b}" for value in twelve.ravel())
    packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    return {
        "1": [(Image.fromarray(black_white), grey(black_white * 255), 0)],
        "L": [
            (file_of(Image.fromarray(one), "PNG"), grey(one), 0),
            (file_of(Image.fromarray(one), "PNG", transparency=int(one[0, 0])), grey(one), 0),
        ],
        "LA": [(file_of(Image.fromarray(two, "LA"), "PNG"), grey(two[..., 0]), 0)],
        "P": [
            (file_of(paletted, "PNG"), palette[entries], 0),
            (file_of(paletted, "PNG", transparency=bytes(range(8))), palette[entries], 0),
            (file_of(paletted, "GIF"), palette[entries], 0),
        ],
        "PA": [(translucent, palette[entries], 0)],
        "RGB": [
            (file_of(Image.fromarray(three), "BMP"), three, 0),
            (file_of(Image.fromarray(three), "PNG", transparency=tuple(three[0, 0].tolist())), three, 0),
            (png(16, 2, wide.astype(">u2")), wide >> 8, 0),
        ],
        "RGBX": [(Image.frombytes("RGBX", (7, 5), four.tobytes()), four[..., :3], 0)],
        "RGBA": [(file_of(Image.fromarray(four), kind), four[..., :3], 0) for kind in ("PNG", "TIFF")],
        "CMYK": [
            (
                Image.frombytes("CMYK", (7, 5), four.tobytes()),
                (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255,
                1,
            )
        ],
        "YCbCr": [(Image.frombytes("YCbCr", (7, 5), three.tobytes()), jfif, 1.5)],
        "HSV": [(Image.frombytes("HSV", (7, 5), three.tobytes()), hue, 3)],
        "LAB": [(lab, srgb_of_lab(near_grey), 3)],
        "I;16": [
            (png(16, 0, deep.astype(">u2")), grey(deep >> 8), 0),
            (file_of(Image.fromarray(deep), "TIFF"), grey(deep >> 8), 0),
            (tiff(7, 5, deep.tobytes(), 16, white_is_zero=True), grey(255 - (deep >> 8)), 0),
            (tiff(8, 5, packed, 12), grey(twelve >> 4), 0),
        ],
        "I;16L": [(Image.frombytes("I;16L", (7, 5), deep.tobytes()), grey(deep >> 8), 0)],
        "I;16B": [(Image.frombytes("I;16B", (7, 5), deep.astype(">u2").tobytes()), grey(deep >> 8), 0)],
        "I;16N": [(Image.frombytes("I;16N", (7, 5), deep.tobytes()), grey(deep >> 8), 0)],
        "I": [(b"P5 7 5 65535\n" + deep.astype(">u2").tobytes(), grey(deep >> 8), 0)],
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_is_scaled_to_the_pixels_that_it_stands_for(mode, recwarn):
    for image, expected, tolerance in modes()[mode]:
        pixels = decode(image) if isinstance(image, bytes) else to_rgb(image)
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        assert opened.mode == mode and pixels.dtype == np.uint8 and pixels.shape == expected.shape
        assert np.abs(pixels.astype(float) - np.clip(expected, 0, 255)).max() <= tolerance
    assert not [warning for warning in recwarn if "ransparency" in str(warning.message)]


REFUSED = {
    "F": [Image.new("F", (7, 5)), b"Pf 7 5\n-1.0\n" + bytes(4 * 35)],
    "I": [
        Image.new("I", (7, 5)),
        tiff(7, 5, bytes(4 * 35), 32),
        tiff(7, 5, bytes(2 * 35), 16, sample_format=2),
    ],
    "La": [Image.new("La", (7, 5))],
    "RGBa": [Image.new("RGBa", (7, 5))],
}


@pytest.mark.parametrize("mode", REFUSED)
def test_a_mode_without_a_fixed_white_is_refused_by_its_name(mode):
    for image in REFUSED[mode]:
        with pytest.raises(ValueError, match=f"mode {mode} "):
            decode(image) if isinstance(image, bytes) else to_rgb(image)


def test_the_table_of_the_documents_names_every_mode():
    table = (ROOT / "docs/data.md").read_text(encoding="utf-8").split("## Image files")[1].split("##")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    told = {row[3].strip() == "refused": set() for row in rows}
    for row in rows:
        told[row[3].strip() == "refused"] |= set(re.findall("`([^`]+)`", row[1]))
    assert told == {False: set(modes()), True: set(REFUSED)}


# -------------------------------------------------------------------------------------------------------------- JPEGs

PHOTO = Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160, 120), Image.BICUBIC)
KINDS = {"baseline": {}, "optimised": {"optimize": True}, "progressive": {"progressive": True}}
KINDS |= {"restarts": {"restart_marker_rows": 1}}


def write_one(path: Path, content: bytes) -> Path:
    """A data set of one class with one training image of this content."""
    for split in ("train", "test"):
        write_folder(path, split, ["a"], each=1)
    (path / "train" / "a" / "photo.jpg").write_bytes(content)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.97])
def test_a_jpeg_whose_picture_ends_early_is_refused_though_it_has_an_end(tmp_path, kind, kept):
    whole = file_of(PHOTO, "JPEG", **KINDS[kind])
    start = whole.index(b"\xff\xda") + 20
    cut = whole[: start + int(kept * (len(whole) - start))] + b"\xff\xd9"
    decode(cut)  # Pillow says nothing
    with pytest.raises(UserError, match="photo.jpg .its JPEG data end before the picture"):
        load_dataset(str(write_one(tmp_path / "set", cut)), tmp_path)


def test_whole_jpegs_of_all_kinds_pass(tmp_path):
    folder = write_one(tmp_path / "set", file_of(PHOTO, "JPEG")) / "train" / "a"
    images = [PHOTO, Image.new("RGB", (3, 900), "white"), Image.new("RGB", (1, 1))]
    for number, image in enumerate(images):
        for kind, options in KINDS.items():
            for mode in ("RGB", "L", "CMYK"):
                content = file_of(image.convert(mode), "JPEG", subsampling=number, **options)
                (folder / f"{number}{kind}{mode}.jpg").write_bytes(content + b"more" * (mode == "L"))
    thumbnail = PHOTO.getexif()
    thumbnail[0x010E] = "\xff\xd9 in the header"
    PHOTO.save(folder / "thumbnail.jfif", "JPEG", exif=thumbnail)
    PHOTO.save(folder / "two.jpg", "MPO", save_all=True, append_images=[PHOTO])
    assert len(load_dataset(str(tmp_path / "set"), tmp_path).train) == 2 + 36 + 2


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of two images."""
    for split in ("train", "test"):
        write_folder(tmp_path / "set", split, ["ant", "bee"])
    return tmp_path / "set"


def load(folder: Path, gigabytes: float = 0):
    return load_dataset(str(folder), folder, ImageCache(folder.parent / "cache", gigabytes))


def test_hidden_and_foreign_things_are_left_out_counted_and_named(folder):
    before = load(folder)
    ant = folder / "train" / "ant"
    (ant / ".ipynb_checkpoints").mkdir()
    (ant / "__MACOSX").mkdir()
    for place in (ant / ".ipynb_checkpoints", ant / "__MACOSX"):
        (place / "0.png").write_bytes((ant / "0.png").read_bytes())
    for name in (".DS_Store", "._0.png", "notes.txt", "more.txt", "README"):
        (ant / name).write_text("")
    (folder / "test" / "list.csv").write_text("")
    (folder / "train" / ".git").mkdir()
    dataset = load(folder)
    assert dataset.sha256 == before.sha256 and len(dataset.train) == 4 and not before.left_out
    for told in (
        "5 hidden",
        ".DS_Store",
        "2 with the suffix '.txt' (more.txt, notes.txt)",
        "README",
        "list.csv",
    ):
        assert told in dataset.left_out


def test_each_real_folder_is_read_once(folder):
    ant, before = folder / "train" / "ant", load(folder)
    (ant / "circle").symlink_to(ant)
    (ant / "up").symlink_to(folder)
    (ant / "other").symlink_to(folder / "train" / "bee")
    (ant / "itself").symlink_to(ant / "itself")
    (ant / "also").mkdir()
    Image.new("RGB", (4, 4)).save(ant / "also" / "x.png")
    (ant / "link").symlink_to(ant / "also")
    dataset = load(folder)
    names = [path.name for path in dataset.train.paths]
    assert names.count("x.png") == 1 and len(names) == 5  # neither the other class nor test/
    assert "links to folders that are read already" in dataset.left_out and dataset.sha256 != before.sha256
    (folder / "train" / "bee").rename(folder.parent / "away")
    (folder / "train" / "bee").symlink_to(ant)
    with pytest.raises(UserError, match="1 classes have no train image, such as bee .*read already"):
        load(folder)


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    (folder / "train" / "ant" / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if Path(path).name in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(image_files.os, "scandir", refusing)
    refused = {"closed"}
    assert "1 unreadable folders, Permission denied (closed)" in load(folder).left_out
    refused = {"ant"}
    with pytest.raises(UserError, match="no train image, such as ant .*Permission denied"):
        load(folder)
    refused = {"test"}
    with pytest.raises(UserError, match="test cannot be listed .Permission denied"):
        load(folder)


def test_names_in_two_forms_of_unicode_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    write_folder(tmp_path / "set", "train", [composed, "bee", decomposed])
    write_folder(tmp_path / "set", "test", [decomposed, "bee"])
    dataset = load(tmp_path / "set")
    assert dataset.class_names == ["bee", composed] and np.bincount(dataset.train.labels).tolist() == [2, 4]


@pytest.mark.parametrize(
    "suffix", [".JPG", ".jfif", ".Jpe", ".PNG", ".TIFF", ".webp", ".gif", ".dib", ".pnm", ".jp2"]
)
def test_suffixes_of_images_are_known_in_any_case(tmp_path, suffix):
    for split in ("train", "test"):
        write_folder(tmp_path / "set", split, ["a"], suffix)
    assert len(load(tmp_path / "set").train) == 2


# ------------------------------------------------------------------------------------------------------ bad in one list


def test_all_bad_files_are_named_in_one_list(folder):
    ant = folder / "train" / "ant"
    (ant / "cut.png").write_bytes((ant / "0.png").read_bytes()[:40])
    (ant / "text.jpg").write_text("hello")
    (ant / "empty.jpg").write_text("")
    Image.new("F", (4, 4)).save(ant / "float.tif")
    os.mkfifo(ant / "pipe.jpg")
    (ant / "nowhere.png").symlink_to(ant / "gone")
    (folder / "test" / "bee" / "dev.png").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(folder / "test" / "bee" / "s.png"))
    server.close()
    open(os.fsencode(ant) + b"/\xff.png", "w").close()
    os.mkdir(os.fsencode(ant) + b"/\xfe")
    open(os.fsencode(ant) + b"/\xfe/in.png", "w").close()
    with pytest.raises(UserError) as caught:
        load(folder)
    text = str(caught.value)
    assert "10 image files" in text and "\n" not in text and text.encode()
    for name, reason in {
        "cut.png": "",
        "text.jpg": "no format",
        "empty.jpg": "no format",
        "float.tif": "mode F",
        "pipe.jpg": "a FIFO",
        "nowhere.png": "link to nothing",
        "dev.png": "a device",
        "s.png": "a socket",
        r"\\udcff.png": "not UTF-8",
        r"\\udcfe/in.png": "not UTF-8",
    }.items():
        assert re.search(rf"{name} \([^;]*{reason}", text), name


def test_a_long_list_is_cut_with_a_count(folder):
    for i in range(30):
        (folder / "train" / "ant" / f"bad{i:02}.png").write_text("")
    with pytest.raises(UserError, match="30 image files.*bad19.png .*and 10 more") as caught:
        load(folder)
    assert "bad20" not in str(caught.value)


def test_a_class_folder_whose_name_is_not_utf8_is_named(folder):
    os.mkdir(os.fsencode(folder / "train") + b"/\xff")
    with pytest.raises(UserError, match="is not UTF-8") as caught:
        load(folder)
    assert str(caught.value).encode()


def simplecil(folder: Path) -> dict[str, object]:
    return {
        "model_name": "simplecil",
        "dataset": str(folder),
        "backbone_type": "test_vit",
        "weights": "random",
        "image_size": 32,
        "device": "cpu",
        "shuffle": False,
        "init_cls": 1,
        "increment": 1,
    }


def test_bad_files_are_told_before_a_run_folder_is_made(folder, tmp_path, capsys):
    (folder / "test" / "bee" / "0.png").write_text("")
    (folder / "train" / "ant" / "1.png").write_text("")
    settings = simplecil(folder) | {
        "logs_root": str(tmp_path / "logs"),
        "cache_root": str(tmp_path / "cache"),
    }
    (tmp_path / "run.json").write_text(str(settings).replace("'", '"').replace("False", "false"))
    assert main.main(["--config", str(tmp_path / "run.json")]) == 2
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1 and "0.png" in told and "1.png" in told
    assert not (tmp_path / "logs").exists()


# -------------------------------------------------------------------------------------------------- content, remembered


@pytest.fixture
def checks(monkeypatch) -> collections.Counter:
    """How often images were decoded to check them; files count as settled at once."""
    monkeypatch.setattr(file_memo, "SETTLED", -(10**18))
    counts, decode_file = collections.Counter(), image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda content: counts.update(["all"]) or decode_file(content))
    return counts


def test_files_are_checked_once_by_all_runs(folder, checks):
    first, again = load(folder), load(folder, gigabytes=1)
    assert checks["all"] == 8 and first.sha256 == again.sha256
    Image.new("RGB", (9, 9)).save(folder / "train" / "ant" / "2.png")
    load(folder)
    assert checks["all"] == 9


def change_in_place(path: Path) -> None:
    """Other pixels in a file of the same size and modification time."""
    before = path.stat()
    time.sleep(0.02)  # the system's clock for files ticks in milliseconds
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    same = ("st_size", "st_mtime_ns", "st_ino")
    assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]


@pytest.mark.parametrize("suffix", [".bmp", ".ppm", ".tif"])
def test_an_image_edited_in_place_is_seen_though_size_and_time_stay(tmp_path, checks, suffix):
    for split in ("train", "test"):
        write_folder(tmp_path / "set", split, ["a"], suffix)
    before = load(tmp_path / "set", gigabytes=1)
    before.train.prepare(np.arange(2))
    change_in_place(tmp_path / "set" / "train" / "a" / f"0{suffix}")
    after = load(tmp_path / "set", gigabytes=1)
    after.train.prepare(np.arange(2))
    assert after.sha256 != before.sha256 and checks["all"] == 5
    assert not np.array_equal(after.train[0], before.train[0])


def test_a_file_that_has_just_changed_is_not_remembered(folder):
    load(folder)
    assert not (folder.parent / "cache" / DATABASE).exists()


def overwrite(database: Path) -> None:
    database.write_bytes(b"not a database" * 1000)


def change_row(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE files SET sha256 = ?", ("0" * 64,))


@pytest.mark.parametrize("damage", [overwrite, change_row, lambda database: os.truncate(database, 5000)])
def test_a_damaged_memory_is_read_again(folder, checks, damage: Callable[[Path], None]):
    expected = load(folder).sha256
    damage(folder.parent / "cache" / DATABASE)
    for _ in range(2):
        assert load(folder).sha256 == expected and checks["all"] == 16


def test_a_wrong_memory_is_not_trusted_over_the_bytes_that_are_read(folder, checks):
    expected = load(folder).sha256
    with sqlite3.connect(folder.parent / "cache" / DATABASE) as connection:
        for path, state in connection.execute("SELECT path, state FROM files").fetchall():
            row = (path, state, "0" * 64)
            changed = (*row[2:], zlib.crc32("\n".join(row).encode()), path)
            connection.execute("UPDATE files SET sha256 = ?, checksum = ? WHERE path = ?", changed)
    wrong = load(folder)
    with pytest.raises(UserError, match="Run the command again"):
        wrong.train[0]
    assert load(folder).sha256 not in (wrong.sha256, expected)  # three are known still by the wrong hash
    for images in (wrong.train, wrong.test):
        for index in range(4):
            with pytest.raises(UserError):
                images[index]
    assert load(folder).sha256 == expected


def test_another_decoder_checks_again(folder, checks, monkeypatch):
    load(folder)
    monkeypatch.setattr("utils.data.image_sets.DECODER", "Pillow 99")
    load(folder)
    assert checks["all"] == 16


def test_without_a_place_for_the_memory_every_run_checks(folder, checks):
    (folder.parent / "cache").write_text("a file")
    assert load(folder).sha256 == load(folder).sha256 and checks["all"] == 16


def test_names_and_places_of_files_are_no_part_of_the_content(folder, tmp_path):
    expected = load(folder)
    folder.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").glob("*/*/*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    moved = load(tmp_path / "moved")
    assert moved.sha256 == expected.sha256
    (tmp_path / "moved" / "train" / "bee" / "x1.png").unlink()
    assert load(tmp_path / "moved").sha256 != expected.sha256


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_run_sees_that_images_were_swapped_in_place(tmp_path, smoke_config, checks):
    """Test images of two classes change places, with their sizes and times: nothing stored answers for them."""
    for split in ("train", "test"):
        write_folder(tmp_path / "set", split, ["black", "grey"], ".bmp")
    config = smoke_config(**simplecil(tmp_path / "set"))
    (before,) = train(config)
    time.sleep(0.02)  # the system's clock for files ticks in milliseconds
    for number in range(2):
        black, grey = (tmp_path / "set" / "test" / name / f"{number}.bmp" for name in ("black", "grey"))
        contents, times = (
            (black.read_bytes(), grey.read_bytes()),
            (black.stat().st_mtime_ns, grey.stat().st_mtime_ns),
        )
        for path, content, at in zip((grey, black), contents, reversed(times), strict=True):
            path.write_bytes(content)
            os.utime(path, ns=(at, at))
    (after,) = train(config)
    assert before["curve"] == [100, 100] and after["curve"] == [100, 0]  # task 0 has one class


def test_what_no_finished_task_has_read_may_change(tmp_path, smoke_config):
    """A file of a later class replaced, and one removed, after task 0; then one that task 0 has read."""
    for split in ("train", "test"):
        write_folder(tmp_path / "set", split, ["ant", "bee", "cat"])
    config = smoke_config(**simplecil(tmp_path / "set"))
    learner = learner_of(config)
    with open_log(learner, Command(id="one", seeds=[1], overwrite=False)) as log:
        Run(learner, log).run_task(0)
    (tmp_path / "set" / "train" / "cat" / "0.png").unlink()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / "test" / "bee" / "1.png")
    read = tmp_path / "set" / "test" / "ant" / "1.png"
    kept = read.read_bytes()
    Image.new("RGB", (8, 8), "red").save(read)
    with pytest.raises(UserError, match="test images of task 0.*have changed"):
        resume(log.folder)
    read.write_bytes(kept)
    newest = log.folder / "checkpoints" / "task_00"
    tensors, state = load_checkpoint(newest)
    inside = state | {"data": state["data"] | {"train": [*state["data"]["train"], "of a file that was bad"]}}
    save_checkpoint(newest.with_name("task_01_step_000001"), tensors, inside)  # as if stopped in task 1
    with pytest.raises(UserError, match="train images of task 1.*remove this checkpoint to go on"):
        resume(log.folder)
    shutil.rmtree(newest.with_name("task_01_step_000001"))
    (result,) = resume(log.folder)
    assert len(result["curve"]) == 3
