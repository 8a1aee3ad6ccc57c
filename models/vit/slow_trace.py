"""A step-level trace of the slow branch at low frequency: when it moved, and how far.

    trace = SlowTrace(group, log, task=0)
    phase = Phase(..., before_step=trace.before_step, after_step=trace.after_step)
    trace.summary(optimizer.steps)

Changing `nested_lora_update_interval_slow` shows in the log lines and in the `slow_step` events of metrics.jsonl. A
slow branch with rate 0 never steps: there is nothing to trace, and one line says so.
"""

import logging

import torch
from torch import Tensor

from utils.runs.run_log import RunLog
from utils.training.optim import ParameterGroup

logger = logging.getLogger("nested_lora")

FIRST = 10  # every step up to this one is traced, so that intervals up to 10 show at once
SPARSE = 100  # from then on every so many steps


class SlowTrace:
    """Watches one parameter group step by step; costs a copy of the group on traced steps and nothing on others."""

    def __init__(self, group: ParameterGroup, log: RunLog, task: int) -> None:
        self.group, self.log, self.task = group, log, task
        self._before: list[Tensor] | None = None

    def before_step(self, step: int) -> None:
        """Remember the group's tensors if step (counted from 1) is traced."""
        traced = self.group.lr > 0 and (step <= FIRST or step % SPARSE == 0)
        self._before = [p.detach().clone() for p in self.group.parameters] if traced else None

    def after_step(self, step: int, moved: dict[str, bool]) -> None:
        """Record whether the group was updated and the L2 distance it moved."""
        if self._before is None:
            return
        differences = [
            p.detach() - before for p, before in zip(self.group.parameters, self._before, strict=True)
        ]
        distance = float(torch.stack([d.double().square().sum() for d in differences]).sum().sqrt())
        updated = moved[self.group.name]
        self.log.metric("slow_step", task=self.task, phase="func", step=step, updated=updated, moved=distance)
        if updated:
            logger.info(
                f"Task {self.task} step {step}: slow updated, moved by {distance:.3e} (every {self.group.every})"
            )

    def summary(self, steps: int) -> None:
        """One line at the phase's end: how many of its steps updated the group."""
        if self.group.lr == 0:
            logger.info(
                f"Task {self.task}: slow stays as it is in all {steps} steps (nested_lora_lr_slow is 0)"
            )
            return
        every = self.group.every
        logger.info(f"Task {self.task}: slow updated in {steps // every} of {steps} steps (interval {every})")
