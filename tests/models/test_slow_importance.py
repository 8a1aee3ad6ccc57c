"""Slow branches that are held near their past by their own importance."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.base import Learner
from models.vit.training import FunctionalPhase
from tests.conftest import run_tasks, tensors

Make = Callable[..., Learner]
STRENGTH = 30.0
FINETUNE: dict[str, Any] = {
    "model_name": "finetune",
    "ffn_adapter_type": "nested_lora",
    "nested_lora_lr_slow": 0.05,
    "nested_lora_update_interval_slow": 1,
    "func_epoch": 2,
}


def slow_of(learner: Learner) -> list[torch.nn.Parameter]:
    return learner.network.parameter_groups()["slow"]


def vector(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


class Recorded(FunctionalPhase):
    """Weights of slow, its gradients of the loss, and those that the optimizer gets, step by step."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner)
        self.record: list[tuple[Tensor, Tensor, Tensor]] = []

    def before_step(self, step: int) -> None:
        slow = slow_of(self.learner)
        given = vector([p.grad for p in slow])
        super().before_step(step)
        self.record.append((vector(slow), given, vector([p.grad for p in slow])))


def test_the_gradient_is_that_of_the_penalty_by_hand(make_sema: Make) -> None:
    """Omega from the last epochs of both past tasks, s* from the beginning of the newest."""
    learner = make_sema(**FINETUNE, nested_lora_slow_importance=STRENGTH)
    omega = torch.tensor(0.0)
    for task in range(3):
        learner.begin_task(task)
        anchor = vector(slow_of(learner))
        learner.modules["slow_importance"].begin_task()
        phase = Recorded(learner)
        learner.run_phase(phase)
        learner.modules["slow_importance"].end_task()
        assert len(phase.record) == 2 * phase.steps_per_epoch
        for slow, given, taken in phase.record:
            torch.testing.assert_close(taken, given + STRENGTH * omega * (slow - anchor))
        last = [given for _, given, _ in phase.record[phase.steps_per_epoch :]]
        omega = omega + torch.stack(last).square().mean(dim=0)
    pulls = [float((taken - given).abs().max()) for _, given, taken in phase.record]
    assert pulls[0] == 0 and pulls[-1] > 1e-6


def test_slow_moves_less_the_more_it_is_held_and_as_before_where_it_is_not(make_sema: Make) -> None:
    """Distance from where the first task left it, by strength; one that rounds to nothing changes nothing."""
    learned, moved = {}, {}
    for strength in (0.0, 1e-30, 1e3):
        learner = run_tasks(make_sema(**FINETUNE, nested_lora_slow_importance=strength), 1)
        before = vector(slow_of(learner))
        learner.begin_task(1)
        learner.train_task()
        moved[strength] = float((vector(slow_of(learner)) - before).norm())
        learned[strength] = tensors(learner)
    assert not any(key.startswith("slow_importance") for key in learned[0.0])
    assert all(torch.equal(tensor, learned[1e-30][key]) for key, tensor in learned[0.0].items())
    assert moved[1e3] < 0.9 * moved[0.0]
