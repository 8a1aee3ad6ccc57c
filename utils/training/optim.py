"""GroupedOptimizer: one optimizer over named parameter groups, each with an update interval of its own.

    groups = [ParameterGroup("slow", slow, lr=1e-3, update_interval=5), ParameterGroup("fast", fast, lr=1e-2)]
    optimizer = GroupedOptimizer("sgd", groups, weight_decay=5e-4, epochs=20, min_lr=0.0)
    loss.backward()
    moved = optimizer.step()      # {"slow": False, "fast": True}: slow tensors stay bit-identical here

A group that does not step must have no gradient at all: a zero gradient would still move it through momentum
and weight decay.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.training.late_compiler import late

OPTIMIZERS = {
    "sgd": functools.partial(late(torch.optim.SGD), momentum=0.9),  # as published
    "adam": functools.partial(late(torch.optim.AdamW), fused=False),
    "fused_adam": functools.partial(late(torch.optim.AdamW), fused=True),  # one kernel, other roundings
}


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate and an update interval.

    Attributes:
        name: of the group in tables and logs.
        lr: initial learning rate, lowered epoch by epoch by the optimizer's schedule; a group with 0 is never
            updated.
        update_interval: k; the group is updated on steps k, 2k, 3k, ... (0 and 1: on every step).
        between: use of the gradients of the other steps: "discard" drops them, with "accumulate" an update
            uses the mean of all k.
        accumulated_grads: sums over the steps since the last update, one per parameter.
    """

    name: str
    parameters: list[nn.Parameter]
    lr: float
    update_interval: int = 1
    between: str = "discard"
    accumulated_grads: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self.update_interval = max(1, self.update_interval)
        self.accumulated_grads = [None] * len(self.parameters)

    def skip_step(self) -> None:
        """Drop or accumulate the gradients of a step without update, so that the optimizer sees none."""
        for i, parameter in enumerate(self.parameters):
            if self.between == "accumulate" and parameter.grad is not None:
                earlier = self.accumulated_grads[i]
                self.accumulated_grads[i] = parameter.grad if earlier is None else earlier + parameter.grad
            parameter.grad = None

    def average_grads(self) -> None:
        """On the step with the update: under "accumulate" gradients become the mean over the k steps."""
        if self.between != "accumulate":
            return
        for i, parameter in enumerate(self.parameters):
            earlier = self.accumulated_grads[i]
            if earlier is not None:
                last = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = earlier + last
            if parameter.grad is not None:
                parameter.grad = parameter.grad / self.update_interval
            self.accumulated_grads[i] = None


@dataclass(frozen=True)
class StepDecay:
    """Schedule that multiplies the learning rates by `decay` after each number of epochs in `milestones`.

    Without milestones they are constant.
    """

    milestones: Sequence[int] = ()
    decay: float = 1.0

    def factor(self, epoch: int) -> float:
        """Factor on the initial learning rates once `epoch` epochs have passed."""
        return self.decay ** sum(epoch >= milestone for milestone in self.milestones)


class GroupedOptimizer:
    """SGD with momentum 0.9 or AdamW over parameter groups, with weight decay and a schedule over epochs.

    Args:
        kind: a key of `OPTIMIZERS`.
        groups: empty ones are dropped; ValueError for a tensor in two of them, and for a frozen one.
        epochs, min_lr: length and end of the cosine schedule, which `end_epoch` advances.
        step_decay: a schedule in place of the cosine.
    """

    def __init__(
        self,
        kind: str,
        groups: Sequence[ParameterGroup],
        *,
        weight_decay: float,
        epochs: int,
        min_lr: float,
        step_decay: StepDecay | None = None,
    ) -> None:
        self.groups = [group for group in groups if group.parameters]
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        if len(set(map(id, self.parameters))) < len(self.parameters):
            raise ValueError("a parameter is in two optimizer groups")
        if not all(parameter.requires_grad for parameter in self.parameters):
            raise ValueError("a frozen parameter is in an optimizer group")
        self.steps = 0
        with_lrs = [{"params": group.parameters, "lr": group.lr} for group in self.groups]
        self._optimizer = OPTIMIZERS[kind](with_lrs, lr=0.0, weight_decay=weight_decay)
        schedulers = torch.optim.lr_scheduler
        self._scheduler = (
            schedulers.CosineAnnealingLR(self._optimizer, T_max=max(1, epochs), eta_min=min_lr)
            if step_decay is None
            else schedulers.LambdaLR(self._optimizer, step_decay.factor)
        )

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        """The gradient of every parameter, a zero one where the loss did not reach it."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters]

    def divide_gradients(self, divisor: float) -> None:
        """Turn gradients of a sum into those of a mean; a parameter that the loss did not reach gets zeros.

        So weight decay acts on every learning parameter, in one process as in several.
        """
        for gradient in self.gradients():
            gradient /= divisor

    def step(self) -> dict[str, bool]:
        """Update the groups that are due; returns for each whether it was updated."""
        moved = {}
        self.steps += 1
        for group in self.groups:
            moved[group.name] = group.lr > 0 and self.steps % group.update_interval == 0
            if moved[group.name]:
                group.average_grads()
            else:
                group.skip_step()
        self._optimizer.step()
        return moved

    def end_epoch(self) -> None:
        """Advance the schedule by one epoch."""
        self._scheduler.step()

    @property
    def lrs(self) -> dict[str, float]:
        """Learning rate of each group now; 0 for one that is never updated, wherever the schedule ends."""
        groups = zip(self.groups, self._optimizer.param_groups, strict=True)
        return {group.name: options["lr"] if group.lr else 0.0 for group, options in groups}

    def summary(self) -> str:
        """Rate, update interval and number of tensors of each group in one line."""
        lrs, shown = self.lrs, []
        for group in self.groups:
            every = f", every={group.update_interval}" if group.update_interval > 1 else ""
            shown.append(f"{group.name}: lr={lrs[group.name]:g}{every}, params={len(group.parameters)}")
        return "; ".join(shown)

    def table(self) -> str:
        """Group, learning rate, update interval, tensors and parameters: one line each."""
        lines = [f"{'group':<8}{'lr':>10}{'every':>7}{'tensors':>9}{'parameters':>12}"]
        for group in self.groups:
            interval, tensors = group.update_interval, len(group.parameters)
            numbers = sum(parameter.numel() for parameter in group.parameters)
            lines.append(
                f"{group.name:<8}{self.lrs[group.name]:>10.6g}{interval:>7}{tensors:>9}{numbers:>12,}"
            )
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs: optimizer, scheduler, step count, accumulated gradients."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "steps": self.steps,
            "accumulated_grads": [group.accumulated_grads for group in self.groups],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned, also after JSON has made its integer keys strings."""
        optimizer = dict(state["optimizer"])
        optimizer["state"] = {int(key): value for key, value in optimizer["state"].items()}
        self._optimizer.load_state_dict(optimizer)
        self._scheduler.load_state_dict(state["scheduler"])
        self.steps = int(state["steps"])
        for group, saved in zip(self.groups, state["accumulated_grads"], strict=True):
            group.accumulated_grads = [
                gradient if gradient is None else gradient.to(parameter.device)
                for gradient, parameter in zip(saved, group.parameters, strict=True)
            ]


def assert_complete(groups: Sequence[ParameterGroup], learning: Iterable[nn.Parameter]) -> None:
    """Raise RuntimeError unless the groups hold exactly the parameters that learn."""
    if {id(p) for p in learning} != {id(p) for group in groups for p in group.parameters}:
        raise RuntimeError("the optimizer groups are not the parameters that learn")


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [parameter for parameter in parameters if parameter.requires_grad]
