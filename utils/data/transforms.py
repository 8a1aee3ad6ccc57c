"""Views of images as network inputs: random training views and the test view, on any device.

    spec = ViewSpec(image_size=224, augmentation="crop_flip")
    key = ("functional", 1993, 0)
    seen = views_of(images, spec, key, indices)     # (B, 3, 224, 224) float32, one view of every image
    seen = views_of(images, spec, None, indices)    # the test view

A view is a pure function of the key and of the stored index of its image; its numbers are those of
torchvision's transforms on uint8 tensors. They are made in one of two ways:

- `interpolated`, on the CPU: torch's own resizing, image by image, which has vector instructions for uint8.
- `products`, on other devices: resizing along one axis is a product with a matrix of filter weights, so
  cropping, antialiased resizing and mirroring of an image is `rows @ image @ columns^T`, two products for a
  whole batch. As in torch's own arithmetic for uint8, weights are multiples of 2^-p and each pass is rounded
  to whole grey levels. Every sum is therefore one of integers below 2^24, which float32 holds exactly in any
  order of summation: a view is the same to the bit whatever the batch and the device. (Not with TF32
  products, which torch leaves off by default.)

The two agree to the bit, but by at most one grey level at rare pixels where images are made smaller by more
than a factor of 2 (test view) or 4 (training views), for which torch takes weights finer than 2^-15 or 2^-16.

The test view resizes the whole image and keeps the centre. For images longer than `ELONGATED` times their
width, which would become huge, `products` makes the centre alone, on the CPU too.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.training.random import Key, stream_seed

AUGMENTATIONS = ("crop_flip", "crop", "none")
AREA = (0.05, 1.0)  # of a training crop, in parts of the image
ASPECT = (3 / 4, 4 / 3)  # width : height of a training crop
ATTEMPTS = 10  # boxes drawn before a centred one is taken
FORMAT = 3  # counts changes of this file that change the numbers
ELONGATED = 4  # longer to shorter side from which on the test view is never made by resizing the whole image

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


@dataclass(frozen=True)
class ViewSpec:
    """How images are turned into inputs.

    Attributes:
        image_size: S, side of a view in pixels.
        augmentation: of training views. "crop_flip", as published: a crop of 5 % to 100 % of the area with
            aspect 3/4 to 4/3, resized (bilinear), mirrored half the time; "crop": without mirroring; "none":
            the test view.
        mean, std: of each channel; views are (x - mean) / std of x in [0, 1], or x when they are None.

    Raises:
        UserError: another augmentation.
        ValueError: only one of mean and std.
    """

    image_size: int
    augmentation: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise UserError(
                f"augmentation = {self.augmentation!r} is not known; allowed: {', '.join(AUGMENTATIONS)}."
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean={self.mean}, std={self.std}: both or none")

    def to_json(self) -> dict[str, Any]:
        """Everything that shapes a view but its key, as JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


@torch.no_grad()
def views_of(images: Tensor, spec: ViewSpec, key: Key | None, indices: np.ndarray) -> Tensor:
    """One view of every image, on the images' device: uint8 (B, 3, H, W) -> float32 (B, 3, S, S).

    Test view: shorter side to 256/224 of S (bicubic), then the centre. The global random states are not used.

    Args:
        images: of one size.
        spec: what a view is.
        key: any names and integers that name the random views; None is the test view.
        indices: stored index of every image, (B,): with the key all that its view depends on.
    """
    size, (height, width) = spec.image_size, images.shape[-2:]
    if not len(images):
        return torch.empty((0, 3, size, size), device=images.device)
    crops = None
    if key is not None and spec.augmentation != "none":
        crops = draw_crops(key, indices, height, width, spec.augmentation == "crop_flip")
    elongated = crops is None and max(height, width) > ELONGATED * min(height, width)
    resize = interpolated if images.device.type == "cpu" and not elongated else products
    levels = resize(images, size, crops)
    views = levels.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    if spec.mean is not None and spec.std is not None:
        mean, std = (views.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
        views.sub_(mean).div_(std)
    return views


# ------------------------------------------------------------------------------------------------- randomness


def uniforms(key: Key, indices: np.ndarray, count: int) -> np.ndarray:
    """Numbers of [0, 1) that only key, index and position decide: float64 (B, count).

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


@dataclass(frozen=True)
class Crops:
    """One box for each image, int64 (B,) each, and which of them are mirrored, bool (B,)."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    mirrored: np.ndarray


def draw_crops(key: Key, indices: np.ndarray, height: int, width: int, mirror: bool) -> Crops:
    """The crops of images of one size that a key names; half of them mirrored, or none.

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
    return Crops(top, left, h, w, (coin < 0.5) & mirror)


# ------------------------------------------------------------------------------------------------- resampling


@dataclass(frozen=True)
class Filter:
    """A kernel of antialiased resizing.

    Attributes:
        weight: of a pixel at this distance from the centre, in source pixels, or output pixels where those
            are larger.
        radius: distance from which on it is 0.
        bits: finest grid of the weights, 2^-bits: 255 * sum |weights| * 2^bits < 2^24.
    """

    weight: Callable[[Tensor], Tensor]
    radius: int
    bits: int


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2, as for antialiased bicubic resizing in torch and Pillow."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


BILINEAR, BICUBIC = Filter(_triangle, 1, 16), Filter(_cubic, 2, 15)


def taps(
    starts: np.ndarray,
    lengths: np.ndarray,
    size: int,
    kernel: Filter,
    device: torch.device,
    part: range | None = None,
) -> tuple[Tensor, Tensor]:
    """Pixels that make the `size` outputs of each span: int64 positions and float64 weights, (B, size, taps).

    Spans have `lengths[b]` pixels from `starts[b]` on. Output pixel i weighs pixel j of its span with
    kernel((j + 1/2 - c) / r), where c = (i + 1/2) s, s is the length by the size and r = max(s, 1); the
    weights of an output pixel sum to 1, and those of positions outside the span are 0. `part`: these output
    pixels only.
    """
    part = range(size) if part is None else part
    start, length = (torch.from_numpy(values).to(device)[:, None, None] for values in (starts, lengths))
    scale = length.double() / size
    reach = scale.clamp(min=1)
    centre = (torch.arange(part.start, part.stop, device=device, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (centre - kernel.radius * reach + 0.5).long().clamp(min=0)
    count = 2 * int(np.ceil(kernel.radius * max(1.0, lengths.max() / size))) + 1
    pixel = first + torch.arange(count, device=device)
    values = torch.where(pixel < length, kernel.weight((pixel + 0.5 - centre) / reach), 0.0)
    total = sum(values.unbind(-1))  # in this order, so that further taps of weight 0 change no bit
    return start + pixel, values / total[..., None]


def matrices(positions: Tensor, values: Tensor, source: int) -> Tensor:
    """Taps as matrices of the type of their values, (B, size, source)."""
    zeros = values.new_zeros((*values.shape[:2], source))
    return zeros.scatter_add_(2, positions.clamp(max=source - 1), values)


def _on_grid(values: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Weights rounded to multiples of 2^-p, float32, for the largest p <= bits with largest < 2^(15 - p)."""
    power = ((2**15 - 0.5) / largest).log2().ceil().long() - 1
    steps = torch.ones_like(power) << power.clamp(max=bits)
    return ((values * steps).round() / steps).float()


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax((1, 2), keepdim=True)


def _exact(device: torch.device) -> torch.device:
    """Where weights are computed, as some devices have no float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def _resizing(
    source: int, starts: np.ndarray, lengths: np.ndarray, size: int, kernel: Filter, device: torch.device
) -> Tensor:
    """Matrices that resize spans of an axis of `source` pixels, float32 (B, size, source) on the device."""
    positions, values = taps(starts, lengths, size, kernel, _exact(device))
    return matrices(positions.to(device), _on_grid(values, _largest(values), kernel.bits).to(device), source)


def _resizing_centre(side: int, resized: int, part: range, device: torch.device) -> tuple[range, Tensor]:
    """Some output pixels of an axis resized as a whole: the range of pixels they need, and their matrix.

    Weights are rounded as in the whole axis. Where that is made longer, its largest is one of the first
    output pixel, which lacks the negative weights of the pixels before it.
    """

    def weights(of: range) -> tuple[Tensor, Tensor]:
        return taps(np.array([0]), np.array([side]), resized, BICUBIC, _exact(device), of)

    largest = _largest(weights(range(resized if resized <= side else 1))[1])
    positions, values = weights(part)
    used = range(int(positions.min()), min(int(positions.max()) + 1, side))
    values = _on_grid(values, largest, BICUBIC.bits)
    return used, matrices((positions - used.start).to(device), values.to(device), len(used))


def _test_size(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the test view: height and width that an image is resized to, first row and column of its centre."""
    resized = tuple(int(256 * size // 224 * side / min(height, width)) for side in (height, width))
    return resized, tuple(round((side - size) / 2) for side in resized)


def interpolated(images: Tensor, size: int, crops: Crops | None) -> Tensor:
    """Grey levels of the crops, for None of the test view, image by image on the CPU: uint8 (B, 3, S, S)."""
    resize = torch.nn.functional.interpolate
    if crops is None:
        resized, (top, left) = _test_size(*images.shape[-2:], size)
        images = (
            images
            if resized == images.shape[-2:]
            else resize(images, resized, mode="bicubic", antialias=True)
        )
        return images[:, :, top : top + size, left : left + size]
    views = []
    for i, (top, left, height, width) in enumerate(
        zip(crops.top, crops.left, crops.height, crops.width, strict=True)
    ):
        part = images[i : i + 1, :, top : top + height, left : left + width]
        view = resize(part, (size, size), mode="bilinear", antialias=True)
        views.append(view.flip(-1) if crops.mirrored[i] else view)
    return torch.cat(views)


def products(images: Tensor, size: int, crops: Crops | None) -> Tensor:
    """Grey levels of the crops, or for None of the test view, on any device: float32 (B, 3, S, S)."""
    used, rows, columns = _centre(images, size) if crops is None else _crops(images, size, crops)
    with torch.autocast(images.device.type, enabled=False):
        return _resampled(used, rows, columns)


def _centre(images: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the images that the test view uses, and the matrices of its rows and columns."""
    sides, axes = images.shape[-2:], []
    for side, resized, first in zip(sides, *_test_size(*sides, size), strict=True):
        axes.append(_resizing_centre(side, resized, range(first, first + size), images.device))
    (high, rows), (wide, columns) = axes
    return images[:, :, high.start : high.stop, wide.start : wide.stop], rows, columns


def _crops(images: Tensor, size: int, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the images that the crops use, and the matrices of its rows and columns."""
    top, left = crops.top.min(), crops.left.min()
    used = images[:, :, top : (crops.top + crops.height).max(), left : (crops.left + crops.width).max()]
    rows = _resizing(used.shape[2], crops.top - top, crops.height, size, BILINEAR, images.device)
    columns = _resizing(used.shape[3], crops.left - left, crops.width, size, BILINEAR, images.device)
    mirrored = torch.from_numpy(crops.mirrored).to(images.device)[:, None, None]
    return used, rows, torch.where(mirrored, columns.flip(1), columns)


def _resampled(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns^T of every channel, passes rounded to grey levels: float32 (B, 3, S, S).

    Matrices are (B, S, height or width), or (1, S, height or width) for all images.
    """
    batch, channels, height, width = images.shape
    levels = images.permute(0, 2, 1, 3).reshape(batch, height * channels, width).float()
    levels = _to_levels(levels @ columns.mT)
    levels = _to_levels(rows @ levels.view(batch, height, -1))  # (B, S, channels times S)
    return levels.view(batch, -1, channels, columns.shape[1]).permute(0, 2, 1, 3)


def _to_levels(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)
