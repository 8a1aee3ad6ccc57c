"""Views of images as network inputs: random training views and the test view, like torchvision's transforms.

    spec = ViewSpec(image_size=224, augmentation="crop_flip")
    key = ("functional", 1993, 0)
    seen = views_of(images, spec, key, indices)     # (B, 3, 224, 224) float32, one view of every image
    seen = views_of(images, spec, None, indices)    # the test view

A view is a pure function of the key and of the stored index of its image: neither the batch nor the process,
the device or the global random states matter. Resizing is torch's own for uint8 on the CPU, with
antialiasing.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from utils.training.random import Key, stream_seed

AREA = (0.05, 1.0)  # of a training crop, in parts of the image
ASPECT = (3 / 4, 4 / 3)  # width : height of a training crop
ATTEMPTS = 10  # boxes drawn before a centred one is taken
TRANSFORM_VERSION = 3  # counts changes of this file that change the numbers
ELONGATED = 16  # largest ratio of sides; of longer images the test view takes the centre of this shape

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


@dataclass(frozen=True)
class ViewSpec:
    """Transform from images to network inputs.

    Attributes:
        image_size: S, side of a view in pixels.
        augmentation: of training views. "crop_flip", as published: a crop of 5 % to 100 % of the area with
            aspect 3/4 to 4/3, resized (bilinear), mirrored half the time; "crop": without mirroring; "none":
            the test view.
        mean, std: of each channel; views are (x - mean) / std of x in [0, 1], or x when they are None.
    """

    image_size: int
    augmentation: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything that shapes a view but its key, as JSON."""
        return {"format": TRANSFORM_VERSION, **dataclasses.asdict(self)}


@torch.no_grad()
def views_of(images: Tensor, spec: ViewSpec, key: Key | None, indices: np.ndarray) -> Tensor:
    """One view of every image, on the images' device: uint8 (B, 3, H, W) -> float32 (B, 3, S, S).

    Test view: shorter side to 256/224 of S (bicubic), then the centre. The global random states are not used.

    Args:
        images: of one size.
        key: names and integers from which random views are drawn; None is the test view.
        indices: stored index of every image, (B,); its view depends on this and the key alone.
    """
    size, (height, width) = spec.image_size, images.shape[-2:]
    if not len(images):
        return torch.empty((0, 3, size, size), device=images.device)
    if key is None or spec.augmentation == "none":
        levels = _test_view(images, size)
    else:
        mirror = spec.augmentation == "crop_flip"
        levels = _crop(images, size, *draw_crops(key, indices, height, width, mirror))
    views = levels.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    if spec.mean is not None:
        mean, std = (views.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
        views.sub_(mean).div_(std)
    return views


def _test_view(images: Tensor, size: int) -> Tensor:
    """Shorter side resized to 256/224 of `size`, then the centre: uint8 (B, 3, S, S)."""
    side = min(images.shape[-2:])
    if max(images.shape[-2:]) > ELONGATED * side:  # resized as a whole they could be huge
        images = _centre(images, *(min(length, ELONGATED * side) for length in images.shape[-2:]))
    resized = [int(256 * size // 224 * length / side) for length in images.shape[-2:]]
    if resized != list(images.shape[-2:]):
        images = interpolate(images, resized, mode="bicubic", antialias=True)
    return _centre(images, size, size)


def _centre(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of images that are at least as large; half pixels as torchvision rounds them."""
    top, left = round((images.shape[-2] - height) / 2), round((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


def _crop(images: Tensor, size: int, boxes: np.ndarray, mirrored: np.ndarray) -> Tensor:
    """The box of every image, resized and perhaps mirrored: uint8 (B, 3, S, S)."""
    views = []
    for image, (top, left, height, width), mirror in zip(images, boxes, mirrored, strict=True):
        part = image[None, :, top : top + height, left : left + width]
        view = interpolate(part, (size, size), mode="bilinear", antialias=True)
        views.append(view.flip(-1) if mirror else view)
    return torch.cat(views)


# ------------------------------------------------------------------------------------------------- randomness


def uniforms(key: Key, indices: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on key, index and position alone: float64 (B, count).

    Row b holds the first numbers of the generator SplitMix64 seeded with mix(w + (indices[b] + 1) * gamma), w
    being 64 bits of the key: its state grows by gamma every draw and is mixed (Steele, Lea and Flood 2014,
    "Fast splittable pseudorandom number generators").
    """
    word = np.uint64(stream_seed("augmentation", *key) % 2**64)
    seeds = _mix(word + (indices.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    states = seeds[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return (_mix(states) >> np.uint64(11)) * 2.0**-53


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's bijection of 64-bit words, every output bit of which depends on every input bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def draw_crops(
    key: Key, indices: np.ndarray, height: int, width: int, mirror: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Random crops of images of one size, drawn from a key.

    Boxes (top, left, height, width), int64 (B, 4); which are mirrored, bool (B,): each by chance, or none.
    As torchvision's RandomResizedCrop: area uniform, aspect uniform in its logarithm, sides rounded; the
    first of `ATTEMPTS` boxes that fits is placed uniformly. If none fits, the largest centred box of an
    allowed aspect.
    """
    numbers = uniforms(key, indices, 2 * ATTEMPTS + 3)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * numbers[:, :ATTEMPTS])
    low, high = np.log(ASPECT)
    aspect = np.exp(low + (high - low) * numbers[:, ATTEMPTS : 2 * ATTEMPTS])
    drawn_h, drawn_w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (drawn_h > 0) & (drawn_h <= height) & (drawn_w > 0) & (drawn_w <= width)
    found, chosen = fits.any(1), (np.arange(len(indices)), fits.argmax(1))
    largest_h, largest_w = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    h = np.where(found, drawn_h[chosen], largest_h).astype(np.int64)
    w = np.where(found, drawn_w[chosen], largest_w).astype(np.int64)
    row, column, coin = numbers[:, 2 * ATTEMPTS :].T
    top = np.where(found, np.floor(row * (height - h + 1)), (height - h) // 2).astype(np.int64)
    left = np.where(found, np.floor(column * (width - w + 1)), (width - w) // 2).astype(np.int64)
    return np.stack([top, left, h, w], 1), (coin < 0.5) & mirror
