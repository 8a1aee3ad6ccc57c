"""What there is to measure about SEMA and Nested LoRA: the parts of a run, and what a whole run costs from them.

    costs = SEMACosts(learner, build)
    for cost in costs.parts(): ...               # for utils/benchmark.py
    costs.projected(values, train=5000, test=1000, tasks=10, growths=1)

The parts of later tasks are measured with stored activations (`cache_views` at least 1); those of task 0 as configured.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import torch

from models.base import Learner, Phase, Position
from utils.costs import Cost

FIRST_STEP = "functional step of task 0"
MATCHED_STEP = "  the same with one adapter of as many parameters"
RD_FIRST = "descriptors, first pass over a view"
RD_EPOCH = "descriptors, an epoch after the first pass"
PREFIX = "frozen blocks of a training image, once"
SCAN = "detection scan of a later task"
STEP = "functional step of a later task, {} adapters in each growing block"
HEAD_STEP = "functional step of a later task that grows nothing, after one pass"
TAIL = "growing blocks and head of a stored image, no gradients"
EVALUATION = "evaluation, 6 adapters in each growing block"
ADAPTERS = (1, 6, 20)


class SEMACosts:
    """The measurable parts of a SEMA run, in an order in which each finds the network as the one before left it.

    Args:
        learner: a fresh one.
        build: makes another fresh learner of the same configuration with some keys changed.
    """

    def __init__(self, learner: Any, build: Callable[[Mapping[str, Any]], Learner]) -> None:
        self.learner, self.build = learner, build
        self.network, self.inputs = learner.network, learner.inputs

    def parts(self) -> list[Cost]:
        """Every part, with the targets of the design where it names one."""
        config, images = (
            self.learner.config,
            self.learner.data.count(self.learner.data.task_classes(0), "train"),
        )
        step = config.batch_size
        found = [Cost(FIRST_STEP, self._first_step, step, 2.1)]
        if config.nested:
            found += [
                Cost(MATCHED_STEP, self._matched_step, step),
                Cost("  nested against that adapter", self._first_step, step, 1.05, against=MATCHED_STEP),
            ]
        found += [
            Cost(RD_FIRST, self._descriptor_pass, images),
            Cost(RD_EPOCH, self._descriptor_epoch, images, 0.02),
            Cost(PREFIX, self._prefix, images),
            Cost("  of which making the augmented views", self._views, images),
            Cost("reading the stored activations of an image", self._reading, images),
            Cost(SCAN, self._scan, images),
            Cost(HEAD_STEP, self._head_step, step),
        ]
        for adapters in ADAPTERS:
            name = STEP.format(adapters)
            found.append(Cost(name, self._later_step(adapters), step, 0.6 if adapters == 6 else None))
            if adapters == 6:
                found.append(Cost(TAIL, self._tail, images))
                found.append(Cost(EVALUATION, self._evaluation, config.eval_batch_size, 1.05))
        most, some = ADAPTERS[-1], ADAPTERS[-2]
        ratio = f"  {most} against {some} adapters (1 % each is {1 + (most - some) / 100:g})"
        found.append(
            Cost(ratio, self._later_step(most), step, 1 + (most - some) / 100, against=STEP.format(some))
        )
        return found

    def projected(
        self, cost: Mapping[str, float], *, train: int, test: int, tasks: int, growths: float
    ) -> dict[str, float]:
        """Image-forwards of a whole run, part by part, from the cost an image of each part.

        Args:
            cost: by name, in plain forwards an image.
            train, test: images of a task.
            tasks: number of tasks.
            growths: adapters that a later task adds; each brings a functional and a descriptor phase, and changes the
                features of all test images seen so far.
        """
        config, later = self.learner.config, tasks - 1
        views = max(1, config.cache_views)
        epochs = config.rd_epoch * cost[RD_EPOCH]
        grown = growths * config.func_epoch * cost[STEP.format(6)]
        still = views * cost[TAIL] + config.func_epoch * cost[HEAD_STEP]
        tested = sum(range(2, tasks + 1)) if growths else later
        errors = min(config.buffer_size, config.rd_epoch * train) if config.repeats_rd_views else 0
        return {
            "task 0, functional": train * config.func_epoch * cost[FIRST_STEP],
            "task 0, descriptors": train * (config.distinct_rd_views * cost[RD_FIRST] + epochs),
            "later tasks, frozen blocks": later * views * train * cost[PREFIX],
            "later tasks, scans": later * train * cost[SCAN] * (2 if growths else 1),
            "later tasks, functional": later * train * (grown if growths else still),
            "later tasks, descriptors": later
            * growths
            * train
            * (config.distinct_rd_views * cost[SCAN] + epochs),
            "descriptors' errors on new views": (1 + later * growths) * errors * (cost[PREFIX] + cost[SCAN]),
            "test images": test * (tasks * cost[PREFIX] + (1 + tested) * cost[TAIL]),
        }

    # --- task 0 -------------------------------------------------------------------------------------------------------

    def _first_step(self) -> Callable[[], object]:
        if self.learner.task < 0:
            self.learner.begin_task(0)
        return steps(self.learner, self.learner.functional_phase())

    def _matched_step(self) -> Callable[[], object]:
        rank = self.learner.config.nested_lora_rank
        kind = "lora" if self.learner.config.ffn_adapter_type == "nested_lora_linear" else "adaptmlp"
        other = self.build({"ffn_adapter_type": kind, "ffn_num": 2 * rank})
        other.begin_task(0)
        return steps(other, other.functional_phase())

    def _descriptor_pass(self) -> Callable[[], object]:
        numbers = count()
        return lambda: self.inputs.all_means(0, 0, (next(numbers),), list(self.network.growing))

    def _descriptor_epoch(self) -> Callable[[], object]:
        phase, epochs = self.learner.descriptor_phase(), count()

        def epoch() -> None:
            for batch in phase.batches(next(epochs) % max(1, phase.epochs), 0):
                self.learner.take_step(phase, Position(), batch)

        return epoch

    # --- later tasks --------------------------------------------------------------------------------------------------

    def _prefix(self) -> Callable[[], object]:
        """Close task 0 and open task 1; then run the blocks below the growing ones on its images, none of it stored."""
        self.learner.end_of_task_training()
        self.learner.begin_task(1)
        indices = self.learner.data.indices(self.learner.classes, "train")
        opened = self.inputs.view(1, 0, (0,))
        return lambda: opened.compute(indices)

    def _views(self) -> Callable[[], object]:
        data = self.learner.data
        indices = data.indices(self.learner.classes, "train")
        return lambda: data.views(indices, "train", "train", ("view", 0))

    def _reading(self) -> Callable[[], object]:
        data, opened, key, size = (
            self.learner.data,
            self.inputs.view(1, 0, (0,)),
            (0,),
            self.learner.config.batch_size,
        )
        order = data.order(self.learner.classes, "train", key)
        return lambda: [opened.take(order[start : start + size]) for start in range(0, len(order), size)]

    def _scan(self) -> Callable[[], object]:
        blocks = list(self.network.growing)

        def scan() -> None:
            source = self.inputs.view(1, 0, (0,))
            for batch in self.inputs.read(1, source, (0,), self.learner.config.detect_batch_size):
                means = self.inputs.token_means(batch, blocks)
                for block in blocks:
                    self.network.modules_by_block[block].novelty(means[block])

        return scan

    def _head_step(self) -> Callable[[], object]:
        return steps(self.learner, self.learner.functional_phase())

    def _later_step(self, adapters: int) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            self._set_adapters(adapters)
            return steps(self.learner, self.learner.functional_phase())

        return prepare

    def _set_adapters(self, adapters: int) -> None:
        """So many in each growing block, of which the newest of the shallowest learns: the dearest phase there is."""
        for modules in (self.network.modules_by_block[block] for block in self.network.growing):
            while len(modules.adapters) < adapters:
                modules.grow()
                modules.freeze_functional()
                modules.freeze_rd()
        for parameter in (
            self.network.modules_by_block[self.network.growing[0]].adapters[-1].functional.parameters()
        ):
            parameter.requires_grad_(True)

    @torch.no_grad()
    def _tail(self) -> Callable[[], object]:
        opened = self.inputs.view(1, 0, (0,))
        indices = self.learner.data.indices(self.learner.classes, "train")
        size, network = self.learner.config.eval_batch_size, self.network

        @torch.no_grad()
        def tail() -> None:
            for start in range(0, len(indices), size):
                x = opened.take(indices[start : start + size]).to(self.learner.device)
                with self.learner.autocast():
                    network(x, opened.depth)

        return tail

    def _evaluation(self) -> Callable[[], object]:
        images = self.learner.data.indices(self.learner.classes, "train")[
            : self.learner.config.eval_batch_size
        ]
        views = self.learner.data.views(images, "train", "train", ("view", 0)).to(self.learner.device)

        @torch.no_grad()
        def evaluate() -> None:
            self.learner.classify(self.learner.features(views))

        return evaluate


def steps(learner: Any, phase: Phase) -> Callable[[], object]:
    """Work that takes the next step of a phase, reading included, epoch after epoch."""

    def endless() -> Iterator[Any]:
        for epoch in count():
            for batch in phase.batches(epoch, 0):
                if batch.total == learner.config.batch_size:  # the last one of an epoch may be smaller
                    yield batch

    batches, position = endless(), Position()
    return lambda: learner.take_step(phase, position, next(batches))
