"""Few-shot adaptation on grids: adapters at the bottleneck learn an unseen composition from a few samples.

    task = few_shot_task(tasks, config, number=0)
    learner.run_phase(FewShotPhase(evaluator, task, history))      # extends the history
    row = few_shot_row(task, history, config)

A row holds the steps, and their seconds, until the IoU on other samples reached the target.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.evaluation import Evaluator
from models.shared_subspace.losses import TASK_LOSSES
from models.shared_subspace.tasks import UNSEEN, GridSamples, GridTasks
from utils.training.device import autocast
from utils.training.optim import GroupedOptimizer, ParameterGroup, StepDecay, trainable
from utils.training.phase import EpochNote, Phase, StepResult
from utils.training.random import rng

History = dict[str, list[float]]  # "iou" (percent), "seconds": at the start and at every test


@dataclass(frozen=True)
class FewShotTask:
    """Samples of one unseen composition with fixed parameters."""

    number: int  # from 0
    composition: str  # its primitives in words
    support: GridSamples  # to train on
    query: GridSamples  # to test on


def few_shot_task(tasks: GridTasks, config: SharedSubspaceConfig, number: int) -> FewShotTask:
    """The few-shot task with a number from 0; each has a composition of its own."""
    compositions = tasks.splits[UNSEEN].compositions
    order = torch.randperm(len(compositions), generator=rng("few-shot choice", config.seed))
    composition = compositions[order[number]]
    counts = (config.few_shot_samples, config.few_shot_queries)
    support, query = tasks.draw_task(composition, counts, rng("few-shot samples", config.seed, number))
    return FewShotTask(number, tasks.describe(composition), support, query)


def few_shot_row(task: FewShotTask, history: History, config: SharedSubspaceConfig) -> dict[str, Any]:
    """Row of the few-shot table; "steps" is None where the target was not reached. IoU in percent."""
    values, seconds = history["iou"], history["seconds"]
    reached = next((i for i, value in enumerate(values) if value >= config.few_shot_target), None)
    return {
        "composition": task.composition,
        "before": values[0],
        "after": values[-1],
        "steps": None if reached is None else min(reached * config.few_shot_every, config.few_shot_steps),
        "all_steps": config.few_shot_steps,
        "every": config.few_shot_every,
        "target": config.few_shot_target,
        "looks": values,
        "seconds": seconds[-1 if reached is None else reached],
    }


class FewShotPhase(Phase):
    """Training of the adapters in the evaluator's network: full-batch steps on the support set.

    Tests on the query set extend the history in place; its seconds are those of training steps.
    """

    name = "few_shot"

    def __init__(self, evaluator: Evaluator, task: FewShotTask, history: History) -> None:
        config = evaluator.config
        group = ParameterGroup("adapter", trainable(evaluator.model.parameters()), lr=config.few_shot_lr)
        constant = {"weight_decay": 0.0, "epochs": 1, "min_lr": 0.0, "step_decay": StepDecay()}
        optimizer = GroupedOptimizer(config.optimizer, [group], **constant)
        super().__init__(epochs=1, steps_per_epoch=config.few_shot_steps, optimizer=optimizer)
        self.evaluator, self.config, self.task, self.history = evaluator, config, task, history
        self.step_began, self.seconds = 0.0, history["seconds"][-1]

    def batches(self, epoch: int, start: int) -> Iterable[GridSamples]:
        return [self.task.support] * (self.config.few_shot_steps - start)

    def loss(self, batch: GridSamples) -> StepResult:
        self.step_began = time.perf_counter()
        batch = batch.to(self.evaluator.device)
        with autocast(self.evaluator.device, self.config.precision):
            logits = self.evaluator.model(batch.input, batch.program).logits.float()
        solved = (logits.argmax(dim=1) == batch.target).flatten(1).all(dim=1).sum()
        return StepResult(TASK_LOSSES[self.config.task_loss](logits, batch.target), len(batch), solved)

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        self.seconds += time.perf_counter() - self.step_began
        if step % self.config.few_shot_every == 0 or step == self.config.few_shot_steps:
            self.history["iou"].append(self.evaluator.accuracy(self.task.query)["iou"])
            self.history["seconds"].append(self.seconds)

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        values, task = self.history["iou"], f"{self.task.number + 1} of {self.config.few_shot_tasks}"
        return EpochNote(f" ({task}: {self.task.composition}: IoU {values[0]:.2f} -> {values[-1]:.2f})")
