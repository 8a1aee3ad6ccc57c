"""What there is to measure about SD-LoRA: a training step and evaluation, with few and with many adapters.

costs = SDLoRACosts(learner)
for cost in costs.parts(): ...               # for utils/benchmark.py
costs.projected(values, train=5000, test=1000, tasks=10, growths=1)
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch

from models.base import Position
from utils.costs import Cost

STEP = "training step, {} adapters"
EVALUATION = "evaluation, {} adapters"
ADAPTERS = (1, 10, 50)
KEPT_COST = 1.02  # evaluation with the most adapters, in evaluation with one


class SDLoRACosts:
    """The measurable parts of a run, in an order in which each finds the network as the one before left it.

    Args:
        learner: a fresh one.
    """

    def __init__(self, learner: Any) -> None:
        self.learner = learner

    @property
    def _step_images(self) -> int:
        """Images of a measured step: a batch, or all that the first task has."""
        data = self.learner.data
        return min(self.learner.config.batch_size, data.count(data.task_classes(0), "train"))

    def parts(self) -> list[Cost]:
        """Every part; the design's target for evaluation after many tasks."""
        config, found = self.learner.config, []
        for adapters in ADAPTERS:
            found += [
                Cost(STEP.format(adapters), self._step(adapters), self._step_images),
                Cost(EVALUATION.format(adapters), self._evaluation(adapters), config.eval_batch_size),
            ]
        least, most = ADAPTERS[0], ADAPTERS[-1]
        ratio = f"  {most} against {least} adapter"
        against = EVALUATION.format(least)
        return [
            *found,
            Cost(ratio, self._evaluation(most), config.eval_batch_size, KEPT_COST, against=against),
        ]

    def projected(
        self, cost: Mapping[str, float], *, train: int, test: int, tasks: int, growths: float
    ) -> dict[str, float]:
        """Image-forwards of a whole run, part by part, from the cost an image of each part.

        Args:
            cost: by name, in plain forwards an image; a step's is taken to lie on straight lines between the measured.
            train, test: images of a task.
            tasks: number of tasks.
            growths: adapters that a later task keeps, at most 1.
        """
        config, measured = self.learner.config, [cost[STEP.format(adapters)] for adapters in ADAPTERS]
        adapters = [2 + min(growths, 1.0) * earlier for earlier in range(tasks - 1)]
        steps = np.interp(adapters, ADAPTERS, measured)
        return {
            "task 0": train * config.init_epoch * measured[0],
            "later tasks": train * config.epochs * float(steps.sum()),
            "test images": test * cost[EVALUATION.format(1)] * tasks * (tasks + 1) / 2,
        }

    def _step(self, adapters: int) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            self._grow_to(adapters)
            learner = self.learner
            learner.network.unmerge()
            phase, position = learner.functional_phase(), Position()

            def endless() -> Iterator[Any]:
                for epoch in count():
                    for batch in phase.batches(epoch, 0):
                        if len(batch[1]) == self._step_images:  # the last one of an epoch may be smaller
                            yield batch

            batches = endless()
            return lambda: learner.take_step(phase, position, next(batches))

        return prepare

    def _evaluation(self, adapters: int) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            self._grow_to(adapters)
            learner = self.learner
            indices = learner.data.indices(learner.classes, "train")[: learner.config.eval_batch_size]
            images = learner.data.views(indices, "train", "test", None).to(learner.device)

            @torch.no_grad()
            def evaluate() -> None:
                learner.classify(learner.features(images))

            return evaluate

        return prepare

    def _grow_to(self, adapters: int) -> None:
        """So many adapters, of which the newest learns its direction."""
        learner = self.learner
        if learner.task < 0:
            learner.begin_task(0)
        while len(learner.adapters) < adapters:
            learner.network.freeze_newest()
            learner.grow()
