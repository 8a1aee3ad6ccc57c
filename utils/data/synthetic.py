"""Generated data set: eight classes of 32x32 colour images, the same at every call, nothing to download.

Used by `exps/smoke.json` and tests under the data set name `synthetic`. Classes come in pairs, (0, 1) to
(6, 7), and every pair has image statistics of its own (smooth gradients, saturated stripes, dark blobs,
bright pixel noise): in stored class order with two classes per task, each task is a clear shift of the input
distribution.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIDE = 32
TRAIN_PER_CLASS = 40
TEST_PER_CLASS = 20
NOISE = 8.0  # standard deviation of the added pixel noise, in grey levels of 0..255

ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)  # of the pixels, each (SIDE, SIDE) in 0..1

# (rng, 0 or 1 within the pair) -> (SIDE, SIDE, 3) of 0..255
Drawer = Callable[[np.random.Generator, int], np.ndarray]


def synthetic_arrays() -> tuple[list[str], dict[str, np.ndarray]]:
    """Class names, and arrays: uint8 images `x_*` (N, 32, 32, 3) and int64 labels `y_*` (N,)."""
    return list(CLASS_NAMES), {name: array.copy() for name, array in _arrays().items()}


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    """The arrays, drawn once a process."""
    arrays = {}
    for split, (source, count) in enumerate((("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS))):
        images = [_image(label, split, index) for label in range(len(CLASS_NAMES)) for index in range(count)]
        arrays[f"x_{source}"] = np.stack(images)
        arrays[f"y_{source}"] = np.repeat(np.arange(len(CLASS_NAMES), dtype=np.int64), count)
    return arrays


def write_noise(path: Path, classes: int, train: int, test: int) -> None:
    """Write an .npz of noise for timing: images of CIFAR's size, `train` and `test` of each class."""
    rng, arrays = np.random.default_rng(0), {"class_names": np.array([f"noise_{k}" for k in range(classes)])}
    for source, count in (("train", train), ("test", test)):
        arrays[f"x_{source}"] = rng.integers(0, 256, (classes * count, SIDE, SIDE, 3), dtype=np.uint8)
        arrays[f"y_{source}"] = np.repeat(np.arange(classes), count)
    np.savez(path, **arrays)


def _image(label: int, split: int, index: int) -> np.ndarray:
    rng = np.random.default_rng([label, split, index])
    picture = PAIRS[label // 2](rng, label % 2) + rng.normal(0.0, NOISE, (SIDE, SIDE, 3))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _gradient(rng: np.random.Generator, which: int) -> np.ndarray:
    """A soft ramp between two mid-tone colours, across or down."""
    ramp = (ROWS, COLUMNS)[which][..., None]
    low, high = ((110, 130, 150), (150, 130, 110)) if which == 0 else ((130, 110, 130), (130, 160, 120))
    return np.array(low) * (1 - ramp) + np.array(high) * ramp + rng.uniform(-15, 15, 3)


def _stripes(rng: np.random.Generator, which: int) -> np.ndarray:
    """Saturated diagonal stripes, broad and red-blue or fine and green-magenta."""
    wave = np.sin(2 * np.pi * ((3, 8)[which] * (ROWS + COLUMNS) + rng.uniform()))[..., None] > 0
    bright, dark = (((240, 30, 30), (20, 30, 230)), ((20, 230, 40), (230, 20, 220)))[which]
    return np.where(wave, bright, dark).astype(float)


def _blobs(rng: np.random.Generator, which: int) -> np.ndarray:
    """A few soft lights on black: one large warm one or five small cold ones."""
    picture = np.zeros((SIDE, SIDE, 3))
    for _ in range((1, 5)[which]):
        row, column = rng.uniform(0.2, 0.8, 2)
        light = np.exp(-((ROWS - row) ** 2 + (COLUMNS - column) ** 2) / (0.05, 0.006)[which])
        picture += light[..., None] * np.array(((220, 160, 60), (90, 160, 230))[which])
    return picture


def _grain(rng: np.random.Generator, which: int) -> np.ndarray:
    """Bright, pixel-sized contrast: random grey speckle or a jittered checkerboard."""
    if which == 0:
        return np.repeat(rng.choice([150.0, 255.0], (SIDE, SIDE, 1)), 3, axis=2)
    rows, columns = np.indices((SIDE, SIDE)) + rng.integers(0, 2, (2, 1, 1))
    bright = (rows // 2 + columns // 2) % 2 == 0
    return np.where(bright[..., None], (255, 255, 200), (170, 200, 255)).astype(float)


PAIRS: tuple[Drawer, ...] = (_gradient, _stripes, _blobs, _grain)
CLASS_NAMES = tuple(f"{draw.__name__.strip('_')}_{which}" for draw in PAIRS for which in (0, 1))
