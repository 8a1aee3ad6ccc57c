"""Pixels of image files: every mode scaled right or refused, pictures that end early found."""

import colorsys
import functools
import io
import itertools
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.conftest import ROOT
from tests.image_folders import folder_images
from utils.data.image_files import decode, decode_whole, to_rgb, upright
from utils.errors import UserError

RNG = np.random.default_rng(0)

# ------------------------------------------------------------------------------------------------------ modes


def levels(*channels: int) -> np.ndarray:
    """Random bytes, (5, 7) or (5, 7, channels)."""
    return RNG.integers(0, 256, (5, 7, *channels), dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What shows of pixels (5, 7, 3) with opacities 0 to 255 before white."""
    return 255 - (255 - pixels.astype(float)) * alpha[..., None] / 255


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
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1}
    tags |= {278: height, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


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


@functools.cache
def modes() -> dict[str, list[tuple[Image.Image | bytes, np.ndarray, int]]]:
    """Mode -> images or files of it, the pixels that they stand for, and by how much rounding may differ."""
    black_white, one, two, three, four = levels() > 127, levels(), levels(2), levels(3), levels(4)
    deep = RNG.integers(0, 2**16, (5, 7), dtype=np.uint16)
    wide = RNG.integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
    palette, entries = levels(3).reshape(-1, 3)[:8], RNG.integers(0, 8, (5, 7), dtype=np.uint8)
    paletted = Image.fromarray(entries)
    paletted.putpalette(palette.tobytes())
    translucent = Image.new("PA", (7, 5))
    translucent.putpalette(palette.tobytes())
    translucent.putdata(list(zip(entries.ravel().tolist(), one.ravel().tolist(), strict=True)))
    near_grey = np.stack([RNG.integers(90, 200, (5, 7)), *RNG.integers(-8, 8, (2, 5, 7))], -1)
    lab = Image.frombytes("LAB", (7, 5), near_grey.astype(np.int8).astype(np.uint8).tobytes())
    luma, blue, red = (three[..., i].astype(float) for i in range(3))
    green = luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128)
    jfif = np.stack([luma + 1.402 * (red - 128), green, luma + 1.772 * (blue - 128)], -1)
    hue = np.array([[colorsys.hsv_to_rgb(*pixel) for pixel in row] for row in three / 255]) * 255
    printed = (255.0 - four[..., :3]) * (255.0 - four[..., 3:]) / 255
    twelve = RNG.integers(0, 2**12, (5, 8), dtype=np.uint16)
    bits = "".join(f"{value:012b}" for value in twelve.ravel())
    packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    one_clear = file_of(Image.fromarray(one), "PNG", transparency=int(one[0, 0]))
    three_clear = file_of(Image.fromarray(three), "PNG", transparency=tuple(three[0, 0].tolist()))
    fading = file_of(paletted, "PNG", transparency=bytes(range(0, 256, 32)))
    return {
        "1": [(Image.fromarray(black_white), grey(black_white * 255), 0)],
        "L": [
            (file_of(Image.fromarray(one), "PNG"), grey(one), 0),
            (one_clear, grey(np.where(one == one[0, 0], 255, one)), 0),
        ],
        "LA": [(file_of(Image.fromarray(two, "LA"), "PNG"), on_white(grey(two[..., 0]), two[..., 1]), 1)],
        "P": [
            (file_of(paletted, "PNG"), palette[entries], 0),
            (fading, on_white(palette[entries], 32.0 * entries), 1),
            (file_of(paletted, "GIF"), palette[entries], 0),
        ],
        "PA": [(translucent, on_white(palette[entries], one), 1)],
        "RGB": [
            (file_of(Image.fromarray(three), "BMP"), three, 0),
            (three_clear, np.where((three == three[0, 0]).all(-1, keepdims=True), 255, three), 0),
            (png(16, 2, wide.astype(">u2")), wide >> 8, 0),
        ],
        "RGBX": [(Image.frombytes("RGBX", (7, 5), four.tobytes()), four[..., :3], 0)],
        "RGBA": [
            (file_of(Image.fromarray(four), kind), on_white(four[..., :3], four[..., 3]), 1)
            for kind in ("PNG", "TIFF")
        ],
        "CMYK": [(Image.frombytes("CMYK", (7, 5), four.tobytes()), printed, 1)],
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
    "I": [Image.new("I", (7, 5)), tiff(7, 5, bytes(140), 32), tiff(7, 5, bytes(70), 16, sample_format=2)],
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_data_say(kind, orientation):
    """As `exif_transpose` of Pillow turns it; 6, a phone held upright, is a quarter to the right."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(Image.fromarray(levels(3)), kind, exif=exif)
    pixels, shown = decode(content), ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels, np.asarray(shown.convert("RGB")))
    assert pixels.shape == ((7, 5, 3) if orientation > 4 else (5, 7, 3))


def test_a_turned_tiff_keeps_its_white_as_bytes_and_as_an_opened_image():
    buffer, grey = io.BytesIO(), np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    Image.fromarray(grey).save(buffer, "TIFF", tiffinfo={262: 0, 274: 6})  # 0 is white; a quarter turn
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    assert np.array_equal(to_rgb(upright(opened)), decode(buffer.getvalue()))


def test_damaged_exif_data_spoil_no_image():
    damaged = (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    plain = decode(file_of(PHOTO, "JPEG"))
    assert all(np.array_equal(decode(file_of(PHOTO, "JPEG", exif=exif)), plain) for exif in damaged)


# ------------------------------------------------------------------------------------------------------ JPEGs

PHOTO = Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160, 120), Image.BICUBIC)
KINDS = {"baseline": {}, "optimised": {"optimize": True}, "progressive": {"progressive": True}}
KINDS |= {"restarts": {"restart_marker_rows": 1}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.97])
def test_a_jpeg_whose_picture_ends_early_is_refused_though_it_has_an_end(kind, kept):
    whole = file_of(PHOTO, "JPEG", **KINDS[kind])
    start = whole.index(b"\xff\xda") + 20
    cut = whole[: start + int(kept * (len(whole) - start))] + b"\xff\xd9"
    decode(cut)  # Pillow says nothing
    with pytest.raises(ValueError, match="its JPEG data end before the picture"):
        decode_whole(cut)


def test_whole_jpegs_of_all_kinds_pass():
    thumbnail = PHOTO.getexif()
    thumbnail[0x010E] = "\xff\xd9 in the header"
    decode_whole(file_of(PHOTO, "JPEG", exif=thumbnail))
    decode_whole(file_of(PHOTO, "MPO", save_all=True, append_images=[PHOTO]))
    images = [PHOTO, Image.new("RGB", (3, 900), "white"), Image.new("RGB", (1, 1))]
    for (number, image), options in itertools.product(enumerate(images), KINDS.values()):
        for mode in ("RGB", "L", "CMYK"):
            content = file_of(image.convert(mode), "JPEG", subsampling=number, **options)
            assert decode_whole(content + b"more" * (mode == "L")).shape == (*image.size[::-1], 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_truncated_image_is_named_and_never_filled(tmp_path, suffix, kept, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # as some libraries leave it
    whole = file_of(PHOTO, {".jpg": "JPEG", ".png": "PNG"}[suffix])
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=f"{path}.*replace or remove"):
        folder_images([path])[0]
