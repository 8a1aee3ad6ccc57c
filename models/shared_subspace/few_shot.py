"""Few-shot adaptation on grids: adapters at the bottleneck learn an unseen composition from a few samples.

    adapt_to_all(learner)    # every row goes to `learner.method_state["few_shot"]` and to the record

The network is frozen, adapters are put on both linear layers at its bottleneck (`GridModel.insert`), fitted, and taken
away again, so that every composition starts from the same network. A row says how many steps, and seconds of them, the
IoU on other samples of the composition took to reach the target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.base import EpochNote, Phase, StepResult
from models.shared_subspace.losses import TASK_LOSSES
from models.shared_subspace.tasks import UNSEEN, GridBatch, GridSamples
from utils.training.optim import GroupedOptimizer, ParameterGroup, StepDecay
from utils.training.random import rng

if TYPE_CHECKING:
    from models.shared_subspace.learner import SharedSubspace


def adapt_to_all(learner: SharedSubspace) -> None:
    """Fit adapters to the unseen compositions that are left, one after the other."""
    rows = learner.method_state["few_shot"]
    while len(rows) < learner.config.few_shot_tasks:
        row = adapt_to(learner, len(rows))
        rows.append(row)
        learner.log.metric("few_shot", **row)


def adapt_to(learner: SharedSubspace, number: int) -> dict[str, Any]:
    """Fit adapters to one composition with its parameters, and take them away: its row of the table, IoU in percent."""
    config, memory, model = learner.config, learner.method_state, learner.model
    composition = chosen_compositions(learner)[number]
    counts = (config.few_shot_samples, config.few_shot_queries)
    support, query = learner.tasks.draw_task(
        composition, counts, rng("few-shot samples", learner.seed, number)
    )
    if not model.is_adapted:  # else: stopped while they learned
        memory["looks"] = {"iou": [learner.accuracy(query)["iou"]], "seconds": [0.0]}
        model.insert(config.few_shot_method, config.few_shot_rank)
    looks = memory["looks"]
    name = f"{number + 1} of {config.few_shot_tasks}: {learner.tasks.describe(composition)}"
    learner.run_phase(FewShotPhase(learner, support, query, looks, name))
    model.remove_adapters()
    memory["looks"] = None
    first = next((i for i, value in enumerate(looks["iou"]) if value >= config.few_shot_target), None)
    return {
        "composition": learner.tasks.describe(composition),
        "before": looks["iou"][0],
        "after": looks["iou"][-1],
        "steps": None if first is None else first * config.few_shot_every,
        "all_steps": config.few_shot_steps,
        "every": config.few_shot_every,
        "target": config.few_shot_target,
        "looks": looks["iou"],
        "seconds": looks["seconds"][-1 if first is None else first],
    }


def chosen_compositions(learner: SharedSubspace) -> Tensor:
    """The unseen compositions in the order in which they are adapted to, (M, S)."""
    compositions = learner.tasks.splits[UNSEEN].compositions
    return compositions[torch.randperm(len(compositions), generator=rng("few-shot choice", learner.seed))]


class FewShotPhase(Phase):
    """Steps on all samples of `support`, with a test on `query` after every few of them; its name in the log."""

    name = "few_shot"

    def __init__(
        self,
        learner: SharedSubspace,
        support: GridSamples,
        query: GridSamples,
        looks: dict[str, list[float]],
        label: str,
    ) -> None:
        config = learner.config
        optimizer = GroupedOptimizer(
            config.optimizer,
            [ParameterGroup("adapter", learner.model.adapters(), lr=config.few_shot_lr)],
            weight_decay=0.0,
            epochs=1,
            min_lr=0.0,
            step_decay=StepDecay(),
        )
        super().__init__(epochs=1, steps_per_epoch=config.few_shot_steps, optimizer=optimizer)
        self.learner, self.config, self.query, self.looks, self.label = learner, config, query, looks, label
        self.batch = support.batch(slice(None))
        self.announced = not learner.method_state["few_shot"]
        self.began, self.spent = 0.0, looks["seconds"][-1]

    def batches(self, epoch: int, start: int) -> list[GridBatch]:
        return [self.batch] * (self.config.few_shot_steps - start)

    def loss(self, part: GridBatch) -> StepResult:
        self.began = time.perf_counter()
        part = part.to(self.learner.device)
        with self.learner.autocast():
            logits = self.learner.model(part.input, part.program).logits
        right = (logits.argmax(dim=1) == part.target).flatten(1).all(dim=1).sum()
        return StepResult(TASK_LOSSES[self.config.task_loss](logits, part.target), len(part), right)

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        self.spent += time.perf_counter() - self.began
        if step % self.config.few_shot_every == 0:
            self.looks["iou"].append(self.learner.accuracy(self.query)["iou"])
            self.looks["seconds"].append(self.spent)

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        return EpochNote(f" ({self.label}: IoU {self.looks['iou'][0]:.2f} -> {self.looks['iou'][-1]:.2f})")
