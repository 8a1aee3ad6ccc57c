"""Slow and fast weights that classify together, against two networks and heads by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import Learner
from models.finetune import Finetune
from models.ranpac import RanPACHead
from models.vit import calibration
from models.vit.ensemble import combined
from tests.conftest import run_tasks
from utils.config.loading import ConfigError
from utils.config.schema import RunConfig

Make = Callable[..., Learner]
DIM = 50
MERGED: dict[str, Any] = {
    "model_name": "finetune",
    "head": "ranpac",
    "head_drift": "linear",
    "ranpac_dim": DIM,
    "merge": "ema",
    "merge_alpha": 0.3,
}


def softmax(scores: np.ndarray) -> np.ndarray:
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def by_hand(scores: list[np.ndarray], temperatures: list[float]) -> np.ndarray:
    """Probabilities: image by image, weights exp(-entropy) over their sum."""
    each = [softmax(s.astype(float) / t) for s, t in zip(scores, temperatures, strict=True)]
    found = np.zeros_like(each[0])
    for image in range(len(found)):
        weights = [np.exp(np.sum(p[image] * np.log(p[image]))) for p in each]
        found[image] = sum(w * p[image] for w, p in zip(weights, each, strict=True)) / sum(weights)
    return found


def test_the_more_certain_head_counts_more() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    temperatures = torch.tensor([0.5, 2.0]).double()
    found = combined(scores, temperatures)
    expected = by_hand([s.numpy() for s in scores], temperatures.tolist())
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=1e-5)
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.1]])
    assert combined([sure, unsure], torch.ones(2).double()).argmax() == 0
    assert torch.isfinite(combined([1e6 * sure, unsure], torch.ones(2).double())).all()


def features_of(learner: Finetune, task: int, source: str, weights: Tensor) -> Tensor:
    """Features of a task's images with these adapter weights written into an ordinary network."""
    data = learner.data
    images = data.views(data.indices(data.task_classes(task), source), source, None)
    reached = learner.merging.weights()
    learner.merging.write(weights)
    with torch.no_grad():
        features = learner.features(images)
    learner.merging.write(reached)
    return features


def test_both_weights_are_fitted_followed_and_combined(make_sema: Make) -> None:
    """A run without the ensemble has the same weights; its slow and fast features go through own heads."""
    plain = make_sema(**MERGED)
    heads = [RanPACHead(plain.network.vit.num_features, 1, DIM) for _ in range(2)]
    weights: list[Tensor] = []
    wanted = [1.0, 1.0]
    for task in range(3):
        plain.begin_task(task)
        before = [features_of(plain, task, "train", w) for w in weights]
        plain.train_task()
        weights = [plain.merging.weights(), plain.merging.start_weights.clone()]
        targets = plain.data.targets(plain.data.indices(plain.classes, "train"), "train")
        for number, head in enumerate(heads):
            after = features_of(plain, task, "train", weights[number])
            if task:
                head.compensate_drift(before[number], after)
            head.add(after, targets)
            rows = head.unseen_rows(len(after), plain.classes.stop)  # of the newest task alone
            unseen = head.unseen_scores(after[rows], targets[rows])
            wanted[number] = calibration.fit(unseen, targets[rows], calibration.HELD_OUT).temperature
    tests = [[features_of(plain, task, "test", w) for task in range(3)] for w in weights]
    learner = run_tasks(make_sema(**MERGED, merge_ensemble=True), 3)
    assert torch.equal(learner.merging.weights(), weights[0])
    features = learner.seen_features("test")
    torch.testing.assert_close(features, torch.cat([torch.cat(each) for each in tests], dim=1))
    temperatures = learner.closed_form.temperatures.tolist()
    assert temperatures == pytest.approx(wanted, rel=1e-3)
    scores = [head(torch.cat(each)).numpy() for head, each in zip(heads, tests, strict=True)]
    found = learner.classify(features).exp().numpy()
    np.testing.assert_allclose(found, by_hand(scores, temperatures), atol=1e-4)
    assert np.abs(found - softmax(scores[0] / temperatures[0])).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"merge": "mean"}, "merge"), ({"merge_start": "merged"}, "merge_start"), ({"head": "cosine"}, "head")],
)
def test_what_cannot_be_ensembled_is_refused(
    changes: dict[str, Any], named: str, smoke_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=f"merge_ensemble.*{named}"):
        smoke_config(**MERGED | changes, merge_ensemble=True)
