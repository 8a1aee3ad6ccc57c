"""Images decoded once for all runs and processes, kept as uint8 pixels below the cache's folder.

decoded = DecodedImages(Path("cache/images/1f2e"), count=30_000, label="decoding imagenet-r train")
decoded.add(indices, decode)                  # those that are not there yet, by several threads
pixels = decoded.read(7)                      # uint8 (h, w, 3), or None
"""

import hashlib
import io
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.cache.tensor_cache import RESERVE
from utils.console import progress
from utils.files import write_synced

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("nested_lora")

IMAGES = (
    "images"  # folder in a cache of what is known of image files: decoded pixels, and which files are good
)
PIXELS, INDEX, LOCK = "pixels.u8", "index.npy", "lock"
ABSENT = (-1, 0, 0, 0)  # row of the index for an image that is not there
BLOCK = 16  # images decoded and written at a time
SAVE_EVERY = 5.0  # seconds between two indexes
THREADS = min(8, os.cpu_count() or 1)


class DecodedImages:
    """Images decoded once for all runs and processes: one flat file that grows, read through a memory map.

    `pixels.u8` holds images one after the other, each (h, w, 3). `index.npy` is int64 (N, 4): where each image starts
    (-1: it is not there), h, w and the CRC-32 of its bytes; its last 32 bytes are the SHA-256 of the folder's name and
    of those before. Pixels are on disk before an index that knows of them takes the old one's place, so that a killed
    process loses its last seconds. One process writes at a time; where files cannot be locked (Windows), none does.
    Damage is noticed, and what it hit decoded again.

    Args:
        folder: of these images alone, named by their content and by what decodes them; created when there is something
            to write; it can be removed between runs.
        count: N.
        label: what the progress bar says.
        limit_gb: size in GB (10^9 bytes) up to which this folder and those beside it are filled.
    """

    def __init__(self, folder: Path, count: int, label: str, limit_gb: float = math.inf) -> None:
        self.folder, self.count, self.label, self.limit_gb = folder, count, label, limit_gb
        self._table: np.ndarray | None = None  # the index; None: not looked at yet
        self._pixels: np.ndarray | None = None  # memory map of what the table knows of
        self._closed = fcntl is None  # nothing more is written

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_table": None,
            "_pixels": None,
        }  # a copy of a memory map would be all its bytes

    def read(self, index: int) -> np.ndarray | None:
        """A copy of an image, uint8 (h, w, 3), or None where it is not there or damaged."""
        start, height, width, checksum = self._known()[index].tolist()
        if start < 0:
            return None
        pixels = np.array(self._pixels[start : start + height * width * 3])
        if zlib.crc32(pixels) == checksum:
            return pixels.reshape(height, width, 3)
        logger.warning(f"{self.folder / PIXELS} is damaged: its images are decoded again")
        self._known()[index] = ABSENT
        with suppress(OSError):
            (self.folder / INDEX).unlink()
        return None

    def add(self, indices: np.ndarray, decode: Callable[[int], np.ndarray]) -> None:
        """Decode and keep those of these images that are not there, as many as there is room for.

        Args:
            decode: number of an image -> uint8 (h, w, 3); called from several threads, its errors are passed on.
        """
        if self._closed or not len(self._missing(indices)):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / LOCK, "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._open()  # another process may have written since
                try:
                    self._write(self._missing(indices), decode)
                finally:
                    self._open()
        except OSError as error:
            self._closed = True
            logger.warning(
                f"Images cannot be kept in {self.folder} ({error}): they are decoded whenever they are used"
            )

    def _missing(self, indices: np.ndarray) -> np.ndarray:
        indices = np.unique(indices)
        return indices[self._known()[indices, 0] < 0]

    def _known(self) -> np.ndarray:
        if self._table is None:
            self._open()
        return self._table

    def _open(self) -> None:
        """Take the files as they are on disk: nothing where there are none, or they are damaged."""
        self._table, self._pixels = np.tile(np.array(ABSENT), (self.count, 1)), None
        try:
            content = (self.folder / INDEX).read_bytes()
            if self._checksum(content[:-32]) != content[-32:]:
                raise ValueError(f"{INDEX} does not have its SHA-256")
            table = np.load(io.BytesIO(content), allow_pickle=False)
            pixels = np.memmap(self.folder / PIXELS, np.uint8, "r")
            if len(pixels) < _end(table):
                raise ValueError(f"{PIXELS} is too short")
            self._table, self._pixels = table, pixels
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            logger.warning(
                f"The decoded images in {self.folder} cannot be used ({error}): they are decoded again"
            )

    def _write(self, missing: np.ndarray, decode: Callable[[int], np.ndarray]) -> None:
        """Append images block by block; after an error, too, those before it are kept."""
        path, table = self.folder / PIXELS, self._known().copy()
        if (table[:, 0] < 0).all():
            path.unlink(missing_ok=True)  # a new file: other processes may still map a damaged one
        room = self.limit_gb * 1e9 - sum(
            file.stat().st_size for file in self.folder.parent.glob(f"*/{PIXELS}")
        )
        bar = progress(total=len(missing), desc=self.label, unit="image")
        with open(path, "ab") as file, ThreadPoolExecutor(THREADS) as threads, bar:
            try:
                saved = time.monotonic()
                for block in np.split(missing, range(BLOCK, len(missing), BLOCK)):
                    images = list(threads.map(decode, block.tolist()))
                    room -= sum(image.nbytes for image in images)
                    if room < 0:
                        raise OSError(f"{self.folder.parent} may hold {self.limit_gb:g} GB")
                    self._append(file, table, block, images)
                    if time.monotonic() - saved > SAVE_EVERY:
                        self._save(file, table)
                        saved = time.monotonic()
                    bar.update(len(block))
            finally:
                if _end(table):
                    self._save(file, table)

    def _append(self, file: BinaryIO, table: np.ndarray, block: np.ndarray, images: list[np.ndarray]) -> None:
        if shutil.disk_usage(self.folder).free < RESERVE + sum(image.nbytes for image in images):
            raise OSError(f"less than {RESERVE / 1e9:g} GB of the disk would be left")
        for index, image in zip(block, images, strict=True):
            start = file.tell()
            file.write(image)
            table[index] = start, *image.shape[:2], zlib.crc32(image)

    def _save(self, file: BinaryIO, table: np.ndarray) -> None:
        file.flush()
        os.fsync(file.fileno())
        stream = io.BytesIO()
        np.save(stream, table)
        content = stream.getvalue()
        write_synced(self.folder / f"{INDEX}.tmp", content + self._checksum(content))
        os.replace(self.folder / f"{INDEX}.tmp", self.folder / INDEX)

    def _checksum(self, content: bytes) -> bytes:
        """Of an index, and of the folder's name: an index of other images is not taken for this one."""
        return hashlib.sha256(self.folder.name.encode() + content).digest()


def _end(table: np.ndarray) -> int:
    """Bytes of the pixel file that a table of decoded images knows of."""
    return int((table[:, 0] + table[:, 1] * table[:, 2] * 3).max(initial=0))


def decoded_in(folder: Path) -> dict[Path, int]:
    """The stores of decoded images in a folder, and their bytes."""
    return {
        path.parent: sum(f.stat().st_size for f in path.parent.iterdir())
        for path in folder.glob(f"*/{PIXELS}")
    }


def remove_decoded(store: Path) -> None:
    """Remove a store's files, and its folder where nothing else is in it."""
    for name in (PIXELS, INDEX, f"{INDEX}.tmp", LOCK):
        (store / name).unlink(missing_ok=True)
    with suppress(OSError):
        store.rmdir()
