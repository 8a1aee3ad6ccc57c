"""Image files: decoding to 8-bit RGB, and a check that they are complete.

    hashes = check_images(paths, memo, "mine")        # SHA-256 of each; UserError lists all bad files
    pixels = decode(paths[0].read_bytes())            # uint8 (h, w, 3)

`check_images` decodes every file once; what it found good is remembered by `utils.cache.file_memo`.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from utils.cache.file_memo import FileMemo, read_signed
from utils.console import progress
from utils.errors import UserError
from utils.files import why_no_file
from utils.wording import counted, escaped, is_utf8

DECODER_VERSION = 2  # counts changes of this file that change pixels, or which files are good
DECODER = f"Pillow {PIL.__version__}, format {DECODER_VERSION}"
CONVERTED = ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")  # by Pillow
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # TIFF tags, the last in EXIF data, too
START_OF_JPEG, END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"
FILLER = bytes(range(1, 241)) * 8  # entropy-coded data that holds no marker
THREADS = min(8, os.cpu_count() or 1)
BLOCK = 64 * THREADS  # files checked between two updates of the memo
NAMED = 20  # bad files named in the message


def decode(content: bytes) -> np.ndarray:
    """Pixels of an image file's bytes, uint8 (h, w, 3), rotated as EXIF data say; of frames the first.

    Raises ValueError from `to_rgb`, and exceptions of many kinds, as decoders raise them for bad bytes.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some libraries switch it on; a half grey image must not pass
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        with suppress(Exception):  # of damaged EXIF data, which say nothing about the picture
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def upright(image: Image.Image) -> Image.Image:
    """An image rotated as its EXIF data say; itself where they say nothing, or are damaged."""
    with suppress(Exception):
        image.load()  # Pillow then turns a TIFF itself; a copy would have lost its tags
        if image.getexif().get(ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image of any mode, uint8 (h, w, 3).

    Modes of `CONVERTED` are Pillow's conversion to RGB; what is transparent lies on white, as in a browser.
    Grey of 16 bits keeps its upper 8, as Pillow does for 16-bit colour. Raises ValueError for other modes,
    which have no fixed white.
    """
    if image.mode in GREY_16 or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.repeat(_upper_bits(image)[..., None], 3, axis=2)
    if image.mode not in CONVERTED:
        raise ValueError(f"its mode {image.mode} has no fixed white: save it with 8 bits, or as 16-bit grey")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB"))


def _upper_bits(image: Image.Image) -> np.ndarray:
    """16-bit grey as 8-bit grey, uint8 (h, w); TIFF files may hold 12 bits in them, or have 0 for white."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits, white_is_zero = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == 0
    levels = (np.asarray(image).astype(np.int64) >> (bits - 8)).astype(np.uint8)
    return 255 - levels if white_is_zero else levels


def decode_whole(content: bytes) -> np.ndarray:
    """Pixels of a complete image file, uint8 (h, w, 3).

    Raises ValueError for a truncated JPEG, whose missing part decoders fill with grey, and what `decode`
    raises.
    """
    pixels = decode(content)
    if content.startswith(START_OF_JPEG):
        end = content.rfind(END_OF_JPEG)  # filler before it changes pixels only if some are missing
        if not np.array_equal(pixels, decode(content[:end] + FILLER + content[end:])):
            raise ValueError("its JPEG data end before the picture does")
    return pixels


def check_images(paths: Sequence[Path], memo: FileMemo, label: str) -> dict[Path, str]:
    """Path -> SHA-256 of the content of every image file, each decoded once to see that it is whole.

    Args:
        memo: files found good before by this version of the decoder; gains those found now.
        label: name of the data set.

    Raises UserError: files that are no images, are damaged or of a refused mode: up to `NAMED` in one list.
    """
    problems = {path: reason for path in paths if (reason := why_no_file(path))}
    problems |= {path: "its path is not UTF-8" for path in paths if not is_utf8(str(path))}
    sound = [path for path in paths if path not in problems]
    hashes = memo.known(sound)
    if len(hashes) < len(sound):
        with memo.lock():
            hashes = memo.known(sound)  # another process may have checked them meanwhile
            missing, good = [path for path in sound if path not in hashes], {}
            bar = progress(total=len(missing), desc=f"checking {label}", unit="image")
            try:
                with ThreadPoolExecutor(THREADS) as threads, bar:
                    for start in range(0, len(missing), BLOCK):
                        block = missing[start : start + BLOCK]
                        for path, found in zip(block, threads.map(_checked, block), strict=True):
                            (problems if isinstance(found, str) else good)[path] = found
                        bar.update(len(block))
            finally:  # after an interrupt, too, what was found good is kept
                memo.add(good)
            hashes |= {path: sha256 for path, (_, sha256) in good.items()}
    if problems:
        named = [f"{escaped(str(path))} ({reason})" for path, reason in sorted(problems.items())[:NAMED]]
        more = f"; and {len(problems) - NAMED:,} more" if len(problems) > NAMED else ""
        them = "it" if len(problems) == 1 else "them"
        fault = f"{counted(len(problems), 'image file')} cannot be used; replace or remove {them}"
        raise UserError(f"Data set {label!r}: {fault}: {'; '.join(named)}{more}.")
    return hashes


def _checked(path: Path) -> tuple[str, str] | str:
    """State and SHA-256 of a good image file, or the reason why it is bad."""
    try:
        content, state, sha256 = read_signed(path)
        decode_whole(content)
        return state, sha256
    except Exception as error:  # decoders raise errors of many kinds on bad bytes
        return why_bad(error)


def why_bad(error: Exception) -> str:
    """Reason why an image file cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "it is in no format that Pillow reads"
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
