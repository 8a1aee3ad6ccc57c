"""Training of merged adapters at the scale that they are deployed at."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.base import Learner
from models.finetune import ScaledPhase
from models.phase import PhaseProgress
from models.vit.training import FunctionalPhase
from tests.conftest import run_tasks

Make = Callable[..., Learner]


def in_second_task(make: Make, **changes: object) -> Learner:
    """A learner whose second task is about to train on from the weights of the first."""
    learner = make(
        **{"model_name": "finetune", "ffn_adapter_type": "adaptmlp", "head": "cosine", "merge": "ema"}
        | changes
    )
    run_tasks(learner, 2)  # so that the weights that learn are not those that are deployed
    learner.begin_task(2)
    learner.merging.begin()
    return learner


def adapters(learner: Learner) -> list[torch.nn.Parameter]:
    return [p for group in learner.network.parameter_groups().values() for p in group]


def gradient(learner: Learner) -> Tensor:
    return torch.cat([p.grad.flatten() for p in adapters(learner)])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("scale", ["drawn", "last_epoch"])
def test_a_step_learns_from_the_interpolated_weights_and_moves_those_that_learn(
    scale: str, parts: int, make_sema: Make
) -> None:
    learner = in_second_task(make_sema, merge_train_scale=scale, grad_accumulation=parts, merge_alpha=0.4)
    phase = ScaledPhase(learner)
    batch = next(iter(phase.batches(0, 0)))
    s, w = phase.scale(1), learner.merging.weights()
    m = learner.merging.deployed()
    assert 0.4 <= s < 1 and not torch.equal(w, m)

    learner.merging.write(m + s * (w - m))
    plain = FunctionalPhase(learner)
    plain.optimizer.zero_grad()
    plain.loss(batch).loss.backward()
    expected = s * gradient(learner)
    learner.merging.write(w)

    learner.take_step(phase, PhaseProgress(), batch)
    torch.testing.assert_close(gradient(learner), expected, rtol=1e-4, atol=1e-7)
    config = learner.config
    stepped = w - config.init_lr * (gradient(learner) + config.weight_decay * w)
    torch.testing.assert_close(learner.merging.weights(), stepped)


def test_scales_are_drawn_anew_and_the_last_epoch_has_the_share_that_is_merged(make_sema: Make) -> None:
    learner = in_second_task(make_sema, merge_train_scale="drawn", merge_alpha=0.4, func_epoch=3)
    drawn = [ScaledPhase(learner).scale(step) for step in range(1, 200)]
    assert len(set(drawn)) == len(drawn) and min(drawn) >= 0.4 and max(drawn) < 1
    assert sum(drawn) / len(drawn) == pytest.approx(0.7, abs=0.05)
    changes = {"merge_train_scale": "last_epoch", "merge_alpha": 0.1, "merge_schedule": "mean_first"}
    learner = in_second_task(make_sema, func_epoch=3, **changes)
    phase = ScaledPhase(learner)
    steps = phase.steps_per_epoch
    scales = [phase.scale(step) for step in range(1, 3 * steps + 1)]
    assert scales == pytest.approx([1.0] * 2 * steps + [1 / 3] * steps)
