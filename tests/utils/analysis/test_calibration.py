"""utils.analysis.calibration: the fitted temperature, the errors, and which images are used."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.base import Learner
from models.vit.closed_form import PrototypeHead
from tests.conftest import run_tasks
from utils.analysis.calibration import (
    HELD_OUT,
    MAX_IMAGES,
    TRAINED_ON,
    VALIDATION,
    chosen_images,
    errors,
    fit,
    probabilities,
)
from utils.training.random import rng


def drawn(temperature: float, images: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, and classes drawn with softmax(scores / temperature)."""
    scores = 3 * torch.randn(images, 5, generator=rng("test scores"))
    targets = (scores / temperature).softmax(dim=1).multinomial(1, generator=rng("test targets"))[:, 0]
    return scores, targets


@pytest.mark.parametrize(
    ("temperature", "fitted_on"), [(0.2, HELD_OUT), (1.0, HELD_OUT), (8.0, HELD_OUT), (3.0, TRAINED_ON)]
)
def test_the_temperature_that_made_the_classes_is_found(temperature: float, fitted_on: str) -> None:
    scores, targets = drawn(temperature)
    found = fit(scores, targets, fitted_on)
    assert found.temperature == pytest.approx(temperature, rel=0.1) and found.images == len(scores)
    calibrated = errors(probabilities(scores, found.temperature), targets)
    assert calibrated["ece"] < 2
    for other in (0.5, 2.0):
        assert calibrated["nll"] < errors(probabilities(scores, other * temperature), targets)["nll"]


def test_scores_of_images_that_were_trained_on_are_never_sharpened() -> None:
    assert fit(*drawn(0.2), TRAINED_ON).temperature == 1


def test_a_faultless_head_is_confident_as_far_as_its_images_tell() -> None:
    targets = torch.arange(4).repeat(5)
    found = fit(F.one_hot(targets).float(), targets, HELD_OUT)
    assert 0.9 < probabilities(F.one_hot(targets).float(), found.temperature).max() < 0.99


@pytest.mark.parametrize("classes", [1, 3])
def test_scores_that_are_all_alike_are_neither_sharpened_nor_softened(classes: int) -> None:
    """Of a single class above all, whose images may be gone when others come."""
    targets = torch.arange(6) % classes
    found = fit(torch.full((6, classes), 0.1), targets, HELD_OUT)
    assert found.temperature == 1


def test_no_error_is_zero_without_a_sign() -> None:
    found = errors(torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    assert [str(value) for value in found.values()] == ["0.0", "0.0"]


def test_errors_are_those_of_their_definition() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.39, 0.61]])
    found = errors(p, torch.tensor([0, 1, 1, 1]))
    # bins of 1/15: both 0.9 (accuracy 0.5), and 0.6 alone from 0.6 on with 0.61 (accuracy 1)
    assert found["ece"] == pytest.approx(100 * (2 * 0.4 + 2 * 0.395) / 4, abs=1e-4)
    assert found["nll"] == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.61]).mean())


def test_chosen_images_are_as_many_of_every_class_and_stay_the_same_with_further_classes() -> None:
    images = {c: np.arange(100 * c, 100 * c + 50) for c in range(60)}
    few, many = chosen_images({c: images[c] for c in range(10)}), chosen_images(images)
    assert len(few) == 100 and len(many) <= MAX_IMAGES and set(np.bincount(many // 100)) == {8}
    assert set(many[many < 1000]) < set(few)


def test_scores_of_class_means_are_those_of_means_without_the_image() -> None:
    features, targets = torch.randn(30, 6, generator=rng("test features")), torch.arange(3).repeat(10)
    whole, without = PrototypeHead(6), PrototypeHead(6)
    whole.add(features, targets)
    without.add(features[1:], targets[1:])
    assert torch.allclose(whole.unseen_scores(features[:1], targets[:1]), without(features[:1]), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "fitted_on"),
    [
        ({"model_name": "ranpac", "ranpac_dim": 50}, HELD_OUT),
        ({"model_name": "simplecil", "validation_share": 0.25}, VALIDATION),
        ({"expansion": "never", "head": "fc"}, TRAINED_ON),
        ({"expansion": "never", "head": "fecam"}, TRAINED_ON),
    ],
)
def test_the_temperature_belongs_to_the_state(
    changes: dict[str, Any], fitted_on: str, make_sema: Callable[..., Learner]
) -> None:
    learner = run_tasks(make_sema(max_tasks=2, **changes), 2)
    state, tensors = learner.state()
    assert state["class_names"] == learner.data.class_names[:4]
    assert learner.calibration.images > 0 and learner.calibration.fitted_on == fitted_on
    other = make_sema(max_tasks=2, **changes)
    other.load_state(state, tensors)
    assert other.calibration == learner.calibration and other.evaluate() == learner.evaluate()
    assert {"ece", "nll"} <= other.evaluate().keys()
