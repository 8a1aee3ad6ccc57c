"""Views are torchvision's to the bit, of the same distribution, and depend on key and stored index alone."""

import json

import numpy as np
import pytest
import torch
import torchvision.transforms as classic
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as published

from utils.data.transforms import ViewSpec, draw_crops, uniforms, views_of

KEY = (1993, 0, 1)


def noise(count: int, height: int, width: int) -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def train_views(images: torch.Tensor, size: int, augmentation: str = "crop_flip", key=KEY, indices=None):
    indices = np.arange(len(images)) if indices is None else indices
    return views_of(images, ViewSpec(size, augmentation), key, indices)


def crops_of(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and which of them are mirrored."""
    return draw_crops(KEY, np.arange(count), height, width, True)


def centre_views(images: torch.Tensor, size: int) -> torch.Tensor:
    return views_of(images, ViewSpec(size, "crop_flip"), None, np.arange(len(images)))


# ------------------------------------------------------------------------------------------------- resampling


def published_centre(images: torch.Tensor, size: int) -> torch.Tensor:
    resize = v2.Resize(256 * size // 224, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])(images).float() / 255


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 224), (100, 80, 56), (45, 91, 32), (224, 224, 64)]
)
def test_training_views_are_torchvisions_to_the_bit(height, width, size):
    images, expected = noise(20, height, width), []
    for image, box, mirrored in zip(images, *crops_of(20, height, width), strict=True):
        crop = published.resized_crop(image, *box, [size, size], antialias=True)
        expected.append(published.horizontal_flip(crop) if mirrored else crop)
    assert torch.equal(train_views(images, size), torch.stack(expected).float() / 255)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 224), (100, 80, 56), (45, 91, 32), (256, 257, 224), (700, 900, 56), (300, 25, 8), (9, 130, 64)],
)
def test_test_views_are_torchvisions_to_the_bit(height, width, size):
    images = noise(3, height, width)
    assert torch.equal(centre_views(images, size), published_centre(images, size))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.bytes = max([self.bytes, *(tensor.untyped_storage().nbytes() for tensor in made)])
        return result


@pytest.mark.parametrize(("height", "width"), [(1, 3000), (3000, 1), (2, 5000), (300, 9000)])
def test_views_of_elongated_images_need_little_memory(height, width):
    """Resized whole, as published, one pixel by 3000 would be 256 by 768000. What is seen hardly differs."""
    images = noise(2, height, width)
    with LargestTensor() as largest:
        centre_views(images, 224), train_views(images, 224)
    assert largest.bytes <= max(2 * images.nbytes, 16 * 2**20)


def test_the_centre_of_elongated_images_is_seen():
    images = noise(2, 7, 600)
    expected = published_centre(images, 64)
    assert (centre_views(images, 64) - expected).abs().mean() < 0.02 < images.float().std() / 255


def test_test_view_is_the_published_one():
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8))
    photo = small.resize((100, 80), Image.BICUBIC)
    resize = classic.Resize(256, interpolation=InterpolationMode.BICUBIC)
    expected = classic.Compose([resize, classic.CenterCrop(224), classic.ToTensor()])(photo)
    ours = centre_views(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None], 224)[0]
    assert ours.shape == (3, 224, 224) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1.01 / 255, rtol=0)


def test_normalisation_is_applied_when_given():
    images, mean, std = noise(9, 40, 30), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    spec = ViewSpec(32, "crop_flip", mean, std)
    for key, plain in ((None, centre_views(images, 32)), (KEY, train_views(images, 32))):
        expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        torch.testing.assert_close(views_of(images, spec, key, np.arange(9)), expected)


def test_augmentations():
    images = noise(40, 30, 40)
    plain, (_, mirrored) = train_views(images, 16, "crop"), crops_of(40, 30, 40)
    expected = torch.where(torch.from_numpy(mirrored)[:, None, None, None], plain.flip(-1), plain)
    assert torch.equal(train_views(images, 16), expected) and 10 < mirrored.sum() < 30
    assert torch.equal(train_views(images, 16, "none"), centre_views(images, 16))


# ------------------------------------------------------------------------------------------------- randomness


def test_numbers_are_uniform_and_depend_on_key_index_and_position_alone():
    numbers = uniforms(KEY, np.arange(2000), 23)
    assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    assert chisquare(np.histogram(numbers, 100, (0, 1))[0]).pvalue > 0.001
    assert np.abs(np.corrcoef(numbers, rowvar=False) - np.eye(23)).max() < 0.1
    assert np.array_equal(uniforms(KEY, np.array([7, 1999, 3]), 5), numbers[[7, 1999, 3], :5])
    keys = [KEY, (1993, 0, 2), (1993, 0), (0,), (0, 0), (), ("0",), ("a", 0), (-1, 2**70), (-1, 2**71)]
    assert len({float(uniforms(key, np.array([0]), 1)[0, 0]) for key in keys}) == len(keys)


def test_boxes_are_distributed_as_torchvisions():
    height, width, count = 60, 90, 4000
    crop, canvas = v2.RandomResizedCrop(8, scale=(0.05, 1.0)), torch.empty(3, height, width)
    torch.manual_seed(0)
    drawn = [crop.make_params([canvas]) for _ in range(count)]
    theirs = np.array([[box["top"], box["left"], box["height"], box["width"]] for box in drawn], dtype=float)
    ours = crops_of(count, height, width)[0].astype(float)

    def features(boxes: np.ndarray) -> np.ndarray:
        top, left, h, w = boxes.T
        assert (h > 0).all() and (w > 0).all() and (top + h <= height).all() and (left + w <= width).all()
        places = top / (height - h + 1), left / (width - w + 1)
        return np.stack([h * w, w / h, h, w, *places])

    for mine, other in zip(features(ours), features(theirs), strict=True):
        assert ks_2samp(mine, other).pvalue > 0.001


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10)])
def test_box_where_none_fits_is_torchvisions(height, width):
    box = v2.RandomResizedCrop(8, scale=(0.05, 1.0)).make_params([torch.empty(3, height, width)])
    expected = [box["top"], box["left"], box["height"], box["width"]]
    assert crops_of(5, height, width)[0].tolist() == [expected] * 5


@pytest.mark.parametrize("size", [24, 96])
def test_a_view_does_not_depend_on_the_other_images_of_the_batch(size):
    images, indices = noise(30, 50, 40), np.random.default_rng(1).permutation(1000)[:30]
    together = train_views(images, size, indices=indices)
    for chosen in (np.arange(30)[::-1].copy(), np.array([4, 4, 17]), np.arange(11), *np.arange(30)[:, None]):
        assert torch.equal(train_views(images[chosen], size, indices=indices[chosen]), together[chosen])
    assert torch.equal(train_views(images.contiguous(), size, indices=indices), together)
    assert together.is_contiguous() and centre_views(images, size).is_contiguous()
    assert torch.equal(centre_views(images, size)[3:4], centre_views(images[3:4], size))


def test_no_images_give_no_views():
    for empty in (train_views(noise(0, 9, 9), 16), centre_views(noise(0, 9, 9), 16)):
        assert empty.shape == (0, 3, 16, 16) and empty.dtype == torch.float32


def test_spec_as_json_tells_specs_apart():
    half = (0.5, 0.5, 0.5)
    each = [(16, "crop"), (17, "crop"), (16, "none"), (16, "crop", half, half)]
    assert len({json.dumps(ViewSpec(*values).to_json()) for values in each}) == 4
