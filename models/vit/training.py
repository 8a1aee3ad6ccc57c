"""Functional phase of methods that train a classifier, and often adapters, on a frozen ViT.

    network = adapted_network(vit, config)           # adapters in the blocks that the config names
    learner.run_phase(FunctionalPhase(learner))      # trains what is not frozen, on the current task

The phase trains the unfrozen parameters of the network and the newest classifier rows, with the learner's
`loss` over the current task's classes only.
"""

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from backbone.frozen_block import freeze
from backbone.sema_block import AdapterSpec
from backbone.task_adapters import TaskAdapterViT
from backbone.vit_sema import SEMAVisionTransformer
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.config import AdapterKeys
from models.vit.task_inputs import Batch
from utils.training.phase import EpochNote, Phase, StepResult
from utils.wording import counted

logger = logging.getLogger("nested_lora")

TRACED_STEPS = 10  # every step up to this one is traced, so that intervals up to 10 show at once
TRACE_INTERVAL = 100  # steps between two traces from then on


def adapter_spec(config: AdapterKeys, width: int, **described: int | bool) -> AdapterSpec:
    """The adapters of a configuration; `described`: fields that only networks with descriptors set."""
    return AdapterSpec(
        width=width,
        kind=config.ffn_adapter_type,
        bottleneck=config.nested_lora_rank if config.nested else config.ffn_num,
        scale=config.ffn_adapter_scalar,
        stacked=config.engine == "fast",
        **described,
    )


def adapted_network(vit: nn.Module, config: AdapterKeys) -> SEMAVisionTransformer:
    """The ViT with one adapter in each of the config's adapted blocks, none of which grows."""
    spec, adapted = adapter_spec(config, vit.embed_dim), config.adapted_blocks(len(vit.blocks))
    return SEMAVisionTransformer(vit, spec, adapted=adapted)


def task_adapter_network(vit: nn.Module, config: AdapterKeys, plain: bool = False) -> TaskAdapterViT:
    """The ViT with adapters of each task in the adapted blocks, `plain` as in `TaskAdapterViT`."""
    spec, adapted = adapter_spec(config, vit.embed_dim), config.adapted_blocks(len(vit.blocks))
    return TaskAdapterViT(vit, spec, adapted, plain)


class FunctionalPhase(Phase):
    """Training of a learner's network and newest classifier rows over the current task's classes.

    Epoch e reads the task's view e, or with K fixed views per image view e mod K; the activations of views
    that are used more than once are stored at the depth where learning begins. Slow branches are traced: the
    log line of an epoch says how often they were updated, events "slow_step" when, and how far they moved.

    Args:
        block: the block whose new adapter is trained, where there is one; for the log.
    """

    name = "func"

    def __init__(self, learner: ClassIncrementalLearner, block: int | None = None) -> None:
        config, inputs, task = learner.config, learner.inputs, learner.task
        super().__init__(
            epochs=learner.epochs,
            steps_per_epoch=inputs.batch_count(task, config.batch_size),
            optimizer=learner.update_optimizer_and_scheduler(learner.epochs),
            block=block,
        )
        self.learner, self.inputs, self.config = learner, inputs, config
        self.key = ("functional", learner.seed, task, learner.progress.phases)
        self.source_of_epoch = inputs.by_epoch(task, learner.epochs)
        self.slow = next((group for group in self.optimizer.groups if group.name == "slow"), None)
        self._slow_before: list[Tensor] | None = None  # its tensors before a step that is traced
        if self.slow is not None:
            level = logging.DEBUG if task or learner.progress.phases else logging.INFO
            logger.log(level, f"[NestedLoRA] optimizer groups => {self.optimizer.summary()}")

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        key, size = (*self.key, epoch), self.config.batch_size
        return self.inputs.read(self.learner.task, self.source_of_epoch(epoch), key, size, start)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        return batch.micro_batches(self.config.grad_accumulation)

    def loss(self, batch: Batch, **options: Tensor | None) -> StepResult:
        """The learner's loss, and how many samples are classified right; `options` are the network's."""
        learner = self.learner
        with learner.autocast():
            features = learner.network(batch.inputs.to(learner.device), batch.depth, **options).float()
        logits, targets = learner.training_logits(features, batch.targets.to(learner.device))
        loss = learner.loss(logits, targets, features)
        return StepResult(loss, len(targets), (logits.argmax(1) == targets).sum())

    def before_step(self, step: int) -> None:
        slow = self.slow
        traced = slow is not None and slow.lr > 0 and (step <= TRACED_STEPS or step % TRACE_INTERVAL == 0)
        self._slow_before = [p.detach().clone() for p in slow.parameters] if traced else None

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        """On traced steps record whether the slow branch was updated, and the L2 distance that it moved."""
        if self._slow_before is None:
            return
        pairs = zip(self.slow.parameters, self._slow_before, strict=True)
        squares = [(p.detach() - before).double().square().sum() for p, before in pairs]
        distance, updated = float(torch.stack(squares).sum().sqrt()), moved["slow"]
        task, log = self.learner.task, self.learner.log
        log.metric("slow_step", task=task, phase="func", step=step, updated=updated, moved=distance)
        if updated:
            every = f"(every {self.slow.update_interval})"
            logger.debug(f"Task {task} step {step}: slow updated, moved by {distance:.3e} {every}")

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        slow, taken = self.slow, self.optimizer.steps
        if slow is None:
            return EpochNote()
        if slow.lr == 0:
            return EpochNote(remark="slow stays as it is, nested_lora_lr_slow is 0")
        updates = taken // slow.update_interval
        if updates:
            self.learner.note_updated(slow.parameters)
        return EpochNote(remark=f"slow updated in {updates} of {counted(taken, 'step')}")


def train_functional(learner: ClassIncrementalLearner, block: int | None = None) -> None:
    """Run a functional phase."""
    learner.run_phase(FunctionalPhase(learner, block))


def train_and_freeze(learner: ClassIncrementalLearner) -> None:
    """Run a functional phase, then freeze all adapters and classifier rows for good."""
    train_functional(learner)
    learner.network.freeze()
    freeze(learner.head)
