"""Functional phase of methods that train a classifier, and often adapters, on a frozen ViT.

    network = adapted_network(vit, config)           # adapters in the blocks that the config names
    learner.run_phase(FunctionalPhase(learner))      # what may learn, on the current task's classes only

The phase trains whatever may learn in the network and the newest classifier rows, with the learner's `loss`
over the current task's classes; older classes take no part.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from backbone.frozen_block import freeze
from backbone.sema_block import AdapterSpec
from backbone.task_adapters import TaskAdapterViT
from backbone.vit_sema import SEMAVisionTransformer
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.config import AdapterKeys
from models.vit.task_inputs import Batch
from utils.runs.run_log import RunLog
from utils.training.optim import ParameterGroup
from utils.training.phase import EpochNote, Phase, StepResult
from utils.wording import counted

logger = logging.getLogger("nested_lora")

TRACED_STEPS = 10  # every step up to this one is traced, so that intervals up to 10 show at once
TRACE_INTERVAL = 100  # steps between two traces from then on


def adapter_spec(config: AdapterKeys, width: int, **described: int | bool) -> AdapterSpec:
    """Shape of an adapter of a configuration; `described`: what a growing block adds."""
    return AdapterSpec(
        width=width,
        kind=config.ffn_adapter_type,
        bottleneck=config.nested_lora_rank if config.nested else config.ffn_num,
        scale=config.ffn_adapter_scalar,
        stacked=config.engine == "fast",
        **described,
    )


def adapted_network(vit: nn.Module, config: AdapterKeys) -> SEMAVisionTransformer:
    """The ViT with one adapter in every block, or in those that may grow; none of them grows."""
    spec, adapted = adapter_spec(config, vit.embed_dim), config.adapted_blocks(len(vit.blocks))
    return SEMAVisionTransformer(vit, spec, adapted=adapted)


def task_adapter_network(vit: nn.Module, config: AdapterKeys, plain: bool = False) -> TaskAdapterViT:
    """The ViT with adapters of each task in those blocks, `plain` as in `TaskAdapterViT`."""
    spec, adapted = adapter_spec(config, vit.embed_dim), config.adapted_blocks(len(vit.blocks))
    return TaskAdapterViT(vit, spec, adapted, plain)


class FunctionalPhase(Phase):
    """The learner's `loss` over the current task's classes, for `func_epoch` epochs.

    Epoch e reads the task's view e, or with K fixed views of an image view e mod K; those used more than once
    are run through the network up to where learning begins and stored there.

    Args:
        learner: whose network and newest classifier rows are trained.
        block: the block whose new adapter is trained, where it is one.
    """

    name = "func"

    def __init__(self, learner: ClassIncrementalLearner, block: int | None = None) -> None:
        config, inputs, task = learner.config, learner.inputs, learner.task
        super().__init__(
            epochs=config.func_epoch,
            steps_per_epoch=inputs.batch_count(task, config.batch_size),
            optimizer=learner.update_optimizer_and_scheduler(config.func_epoch),
            block=block,
        )
        self.learner, self.inputs, self.config = learner, inputs, config
        self.key = ("functional", learner.seed, task, learner.progress.phases)
        self.source_of_epoch = inputs.by_epoch(task, config.func_epoch)
        slow = next((group for group in self.optimizer.groups if group.name == "slow"), None)
        self.trace = None if slow is None else SlowTrace(slow, learner.log, task)
        if self.trace is not None:
            level = logging.DEBUG if task or learner.progress.phases else logging.INFO
            logger.log(level, f"[NestedLoRA] optimizer groups => {self.optimizer.summary()}")

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        key, size = (*self.key, epoch), self.config.batch_size
        return self.inputs.read(self.learner.task, self.source_of_epoch(epoch), key, size, start)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        return batch.micro_batches(self.config.grad_accumulation)

    def loss(self, batch: Batch) -> StepResult:
        learner = self.learner
        with learner.autocast():
            features = learner.network(batch.inputs.to(learner.device), batch.depth).float()
        return self.result(batch, features)

    def result(self, batch: Batch, features: Tensor) -> StepResult:
        """The learner's loss for features (B, d) of a batch, and how many of it are classified right."""
        learner = self.learner
        logits, targets = learner.training_logits(features, batch.targets.to(learner.device))
        loss = learner.loss(logits, targets, features)
        return StepResult(loss, len(targets), (logits.argmax(1) == targets).sum())

    def before_step(self, step: int) -> None:
        if self.trace is not None:
            self.trace.before_step(step)

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        if self.trace is not None:
            self.trace.after_step(step, moved)

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        """How often the slow branch was updated so far, where there is one."""
        return EpochNote(remark=self.trace.summary(self.optimizer.steps) if self.trace else "")


def train_functional(learner: ClassIncrementalLearner, block: int | None = None) -> None:
    """Run a functional phase."""
    learner.run_phase(FunctionalPhase(learner, block))


def train_and_freeze(learner: ClassIncrementalLearner) -> None:
    """Run a functional phase, and freeze what it has trained for good: adapters and classifier rows."""
    train_functional(learner)
    learner.network.freeze()
    freeze(learner.head)


class SlowTrace:
    """Trace of the slow branch at low frequency: when it was updated, and how far it moved.

    `nested_lora_update_interval_slow` shows in the line of the phase and in the `slow_step` events of
    metrics.jsonl.
    It costs a copy of the group on traced steps and nothing on others.
    """

    def __init__(self, group: ParameterGroup, log: RunLog, task: int) -> None:
        self.group, self.log, self.task = group, log, task
        self._before: list[Tensor] | None = None

    def before_step(self, step: int) -> None:
        """Remember the group's tensors if the step (counted from 1) is traced."""
        traced = self.group.lr > 0 and (step <= TRACED_STEPS or step % TRACE_INTERVAL == 0)
        self._before = [p.detach().clone() for p in self.group.parameters] if traced else None

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        """Record whether the group was updated and the L2 distance it moved."""
        if self._before is None:
            return
        pairs: Iterable[tuple[Tensor, Tensor]] = zip(self.group.parameters, self._before, strict=True)
        squares = [(p.detach() - before).double().square().sum() for p, before in pairs]
        distance, updated = float(torch.stack(squares).sum().sqrt()), moved[self.group.name]
        self.log.metric("slow_step", task=self.task, phase="func", step=step, updated=updated, moved=distance)
        if updated:
            every = f"(every {self.group.update_interval})"
            logger.debug(f"Task {self.task} step {step}: slow updated, moved by {distance:.3e} {every}")

    def summary(self, steps: int) -> str:
        """How many of the phase's steps have updated the group."""
        if self.group.lr == 0:
            return "slow stays as it is, nested_lora_lr_slow is 0"
        return f"slow updated in {steps // self.group.update_interval} of {counted(steps, 'step')}"
