"""The loss over all classes beside the ridge regression's fixed scores, by numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.base import Learner
from models.ranpac import RanPACHead
from models.vit import calibration
from models.vit.training import FunctionalPhase
from tests.conftest import run_tasks
from utils.config.loading import ConfigError
from utils.config.schema import RunConfig

Make = Callable[..., Learner]
DIM = 50
RESIDUAL: dict[str, Any] = {
    "model_name": "finetune",
    "head": "ranpac",
    "ranpac_dim": DIM,
    "loss": "ridge_residual",
}


def test_loss_and_gradients_are_those_of_fixed_scores_plus_a_linear_term(make_sema: Make) -> None:
    """No gradient passes the ridge regression, whose sums stay without the new task until it is learned."""
    learner = run_tasks(make_sema(**RESIDUAL), 1)
    learner.begin_task(1)
    kept = {name: tensor.clone() for name, tensor in learner.closed_form.state_dict().items()}
    before = learner.training_features()
    learner.anticipate_head()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in learner.closed_form.state_dict().items())

    head = RanPACHead(before.shape[1], learner.seed, DIM)
    head.load_state_dict(kept)
    labels = learner.data.targets(learner.data.indices(learner.classes, "train"), "train")
    head.add(before, labels)
    held = head.unseen_rows(len(before), 4)
    fitted = calibration.fit(head.unseen_scores(before[held], labels[held]), labels[held], head.unseen)
    assert abs(fitted.temperature - 1) > 0.1

    phase = FunctionalPhase(learner)
    batch = next(iter(phase.batches(0, 0)))
    rows = learner.head.weight
    assert rows.shape == (4, before.shape[1]) and not rows.any()
    with torch.no_grad():
        rows.normal_(generator=torch.Generator().manual_seed(0))
    features = before[: len(batch.targets)].clone().requires_grad_()
    result = phase.result(batch, features)
    result.loss.backward()

    f, r = features.detach().double().numpy(), rows.detach().double().numpy()
    hidden = np.maximum(f @ head.projection.numpy(), 0)
    logits = hidden @ head.weights.numpy() / fitted.temperature + f @ r.T
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    p, wanted = odds / odds.sum(axis=1, keepdims=True), np.eye(4)[batch.targets.numpy()]
    assert result.loss.item() == pytest.approx(-np.log((p * wanted).sum(axis=1)).mean(), rel=1e-4)
    errors = (p - wanted) / len(f)
    np.testing.assert_allclose(features.grad.numpy(), errors @ r, atol=1e-6)
    np.testing.assert_allclose(rows.grad.numpy(), errors.T @ f, atol=1e-5)


def test_it_is_learned_with_and_starts_anew_in_every_task(make_sema: Make) -> None:
    learner = run_tasks(make_sema(**RESIDUAL), 2)
    assert learner.head.weight.shape[0] == 4 and learner.head.weight.abs().sum(dim=1).all()
    assert not learner.method_tensors
    learner.begin_task(2)
    assert learner.head.weight.shape[0] == 6 and not learner.head.weight.any()
    other = run_tasks(make_sema(**RESIDUAL | {"loss": "task"}), 2)
    assert not torch.equal(learner.closed_form.weights, other.closed_form.weights)


@pytest.mark.parametrize("changes", [{"head": "cosine"}, {"merge": "ema", "merge_ensemble": True}])
def test_it_needs_one_ridge_regression(
    changes: dict[str, Any], smoke_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match="loss.*ranpac"):
        smoke_config(**RESIDUAL | changes)
