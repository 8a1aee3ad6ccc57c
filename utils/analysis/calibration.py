"""Calibration of class scores by one temperature, and the errors of calibrated probabilities.

    p(c | x) = softmax(scores(x) / T)_c

    calibration = fit(scores, targets, "held out")       # scores of images that the head has not seen
    p = probabilities(scores, calibration.temperature)   # (n, C)
    errors(p, targets)                                   # {"ece": ..., "nll": ...} of the test images

T changes no prediction. It is fitted at the end of every task, never on test images. No image is held out of
training for it; if a `validation_share` holds some out anyway, those are used. The kinds of images:

    "held out"        the fifth of every task that chooses the ridge, scored by the ridge of the other four
                      fifths
    "leave one out"   every image, scored by class means without it
    "validation"      images that the run held out of training (`validation_share`)
    "trained on"      images that a classifier was trained on by gradient: their scores are too good, so T may
                      soften scores but never sharpens them (T >= 1)

Sources: temperature and expected calibration error, Guo et al., *On Calibration of Modern Neural Networks*,
ICML 2017; smoothed targets, Platt, *Probabilistic Outputs for Support Vector Machines*, 1999.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.training.random import numpy_rng

BINS = 15
MAX_IMAGES, MAX_PER_CLASS = 500, 10  # images that a temperature is fitted on
LIMITS = (1e-4, 1e4)  # of T
PRECISION = 1e-9  # of log T
HELD_OUT, LEAVE_ONE_OUT, TRAINED_ON = "held out", "leave one out", "trained on"
VALIDATION = "validation"
FITTED_ON = {  # the kinds of images, in words
    HELD_OUT: "held out of the ridge regression",
    LEAVE_ONE_OUT: "each left out of its own class mean",
    VALIDATION: "held out of training",
    TRAINED_ON: "which the classifier was trained on",
}


class Calibration(NamedTuple):
    """Temperature of a model's scores, the number of images it was fitted on, and which images those are."""

    temperature: float
    images: int
    fitted_on: str


def chosen_images(images_of_class: Mapping[int, np.ndarray], ever: bool = False) -> np.ndarray:
    """Images that a temperature is fitted on, as many of every class: stored positions, ascending.

    Args:
        images_of_class: label of a class in the data set -> stored positions of its images.
        ever: every image that may be chosen for any number of classes, instead of those for this number.
    """
    count = MAX_PER_CLASS if ever else max(1, min(MAX_PER_CLASS, MAX_IMAGES // len(images_of_class)))
    drawn = [
        numpy_rng("calibration", label).permutation(images)[:count]
        for label, images in images_of_class.items()
    ]
    return np.sort(np.concatenate(drawn))


def fit(scores: Tensor, targets: Tensor, fitted_on: str) -> Calibration:
    """Temperature with the smallest negative log-likelihood of the targets (n,), from scores (n, C).

    Targets are smoothed: 1 - e for the class of an image, plus e spread over all classes, e = 1 / (n + 2), so
    that T stays away from zero where every image is classified right. T is 1 where all are alike, as with a
    single class: it will be kept if images are gone when further classes come.
    """
    wide, smoothing = scores.double(), 1 / (len(scores) + 2)
    wide = wide - wide.mean(dim=1, keepdim=True)  # which changes no probability
    if (scores == scores[:, :1]).all():
        return Calibration(1.0, len(scores), fitted_on)
    wanted = (1 - smoothing) * wide.gather(1, targets[:, None]).mean()  # mean score under the targets

    def too_sharp(log_t: float) -> bool:
        """Whether T has to rise: the loss is convex in 1 / T, its slope the mean score less the wanted."""
        return bool((probabilities(wide, math.exp(log_t)) * wide).sum(dim=1).mean() > wanted)

    low, high = math.log(1.0 if fitted_on == TRAINED_ON else LIMITS[0]), math.log(LIMITS[1])
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if too_sharp(middle) else (low, middle)
    return Calibration(math.exp(low), len(scores), fitted_on)


def probabilities(scores: Tensor, temperature: float) -> Tensor:
    """softmax(scores / T), (n, C) -> (n, C), float64."""
    return (scores.double() / temperature).softmax(dim=1)


def errors(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """Errors of probabilities (n, C) for targets (n,): "ece" in points and "nll" in nats.

    ece = 100 sum_b n_b / n |accuracy_b - mean confidence_b| over bins b of equal width in confidence, which
    is an image's highest probability; nll = mean of -ln p(target).
    """
    confidence, predicted = probabilities.max(dim=1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = (predicted == targets).double() - confidence
    of_bins = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, gaps)
    tiny = torch.finfo(probabilities.dtype).tiny
    own = probabilities.gather(1, targets[:, None]).clamp_min(tiny)
    return {"ece": 100 * float(of_bins.abs().sum()) / len(gaps), "nll": 0.0 - float(own.log().mean())}
