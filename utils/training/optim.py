"""One optimizer over named parameter groups, some of which step only every k-th step.

    groups = [ParameterGroup("slow", slow, lr=1e-3, every=5), ParameterGroup("fast", fast, lr=1e-2)]
    optimizer = GroupedOptimizer("sgd", groups, weight_decay=5e-4, epochs=20, min_lr=0.0)
    loss.backward()
    moved = optimizer.step()      # {"slow": False, "fast": True}: on other steps slow tensors stay bit-identical

A group that does not step must have no gradient at all: a zero gradient would still move it through momentum and
weight decay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.9  # of SGD, as published
OPTIMIZERS = {
    "sgd": lambda groups, weight_decay: torch.optim.SGD(
        groups, lr=0.0, momentum=MOMENTUM, weight_decay=weight_decay
    ),
    "adam": lambda groups, weight_decay: torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay),
    "fused_adam": lambda groups, weight_decay: (
        torch.optim.AdamW(  # the same update in one kernel, other roundings
            groups, lr=0.0, weight_decay=weight_decay, fused=True
        )
    ),
}


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate and a rhythm.

    Attributes:
        name: the group's name in tables and logs.
        parameters: its tensors, each in one group only.
        lr: learning rate at the start; the optimizer's schedule changes it epoch by epoch. At 0 the group never steps,
            wherever the schedule ends.
        every: the group steps on steps k, 2k, 3k, ... (0 and 1: on every step).
        between: what happens to the gradients of the other steps: "discard" drops them, "accumulate" steps with the
            mean of all k.
    """

    name: str
    parameters: list[nn.Parameter]
    lr: float
    every: int = 1
    between: str = "discard"
    held: list[Tensor | None] = field(
        default_factory=list
    )  # summed gradients of the steps since the last update

    def __post_init__(self) -> None:
        self.every = max(1, self.every)
        self.held = [None] * len(self.parameters)

    def hold_gradients(self) -> None:
        """A step without update: drop or keep the gradients, and leave none for the optimizer to see."""
        for i, parameter in enumerate(self.parameters):
            if self.between == "accumulate" and parameter.grad is not None:
                self.held[i] = parameter.grad if self.held[i] is None else self.held[i] + parameter.grad
            parameter.grad = None

    def release_gradients(self) -> None:
        """The step with the update: under "accumulate" the gradient becomes the mean over the k steps."""
        if self.between != "accumulate":
            return
        for i, parameter in enumerate(self.parameters):
            if self.held[i] is not None:
                last = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = self.held[i] + last
            if parameter.grad is not None:
                parameter.grad = parameter.grad / self.every
            self.held[i] = None


@dataclass(frozen=True)
class StepDecay:
    """Rates that are multiplied by `decay` after each of so many epochs; without milestones they are constant."""

    milestones: Sequence[int] = ()
    decay: float = 1.0

    def factor(self, epoch: int) -> float:
        """What the rates at the start are multiplied by once `epoch` epochs have passed."""
        return self.decay ** sum(epoch >= milestone for milestone in self.milestones)


class GroupedOptimizer:
    """SGD with momentum 0.9 or AdamW over groups, weight decay on all, a schedule of rates over epochs.

    Args:
        kind: a key of `OPTIMIZERS`.
        groups: empty ones are dropped; a tensor in two of them is an error.
        weight_decay: for every group.
        epochs: the length of the cosine; `end_epoch` moves along it.
        min_lr: where the cosine ends.
        step_decay: takes the cosine's place.
    """

    def __init__(
        self,
        kind: str,
        groups: Sequence[ParameterGroup],
        *,
        weight_decay: float,
        epochs: int,
        min_lr: float,
        step_decay: "StepDecay | None" = None,
    ) -> None:
        self.groups = [group for group in groups if group.parameters]
        assert_partition([group.parameters for group in self.groups])
        self.steps = 0
        self._optimizer = OPTIMIZERS[kind](
            [{"params": g.parameters, "lr": g.lr} for g in self.groups], weight_decay
        )
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
        parameters = [parameter for group in self.groups for parameter in group.parameters]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in parameters]

    def divide_gradients(self, divisor: float) -> None:
        """Turn gradients of a sum into those of a mean."""
        for group in self.groups:
            for parameter in group.parameters:
                if parameter.grad is not None:
                    parameter.grad /= divisor

    def moves_next(self, group: ParameterGroup) -> bool:
        """Whether the group is updated by the coming step."""
        return group.lr > 0 and (self.steps + 1) % group.every == 0

    def step(self) -> dict[str, bool]:
        """Update the groups whose turn it is; says which were."""
        moved = {group.name: self.moves_next(group) for group in self.groups}
        self.steps += 1
        for group in self.groups:
            if moved[group.name]:
                group.release_gradients()
            else:
                group.hold_gradients()
        self._optimizer.step()
        return moved

    def end_epoch(self) -> None:
        """One epoch on in the schedule."""
        self._scheduler.step()

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate of each group now."""
        return {
            group.name: rate["lr"]
            for group, rate in zip(self.groups, self._optimizer.param_groups, strict=True)
        }

    def summary(self) -> str:
        """Rate and number of tensors of each group in one line."""
        rates = self.rates
        return "; ".join(f"{g.name}: lr={rates[g.name]:g}, params={len(g.parameters)}" for g in self.groups)

    def table(self) -> str:
        """Group, learning rate, interval, tensors and parameters: one line each."""
        lines = [f"{'group':<8}{'lr':>10}{'every':>7}{'tensors':>9}{'parameters':>12}"]
        for group in self.groups:
            numbers = sum(parameter.numel() for parameter in group.parameters)
            lines.append(
                f"{group.name:<8}{self.rates[group.name]:>10.6g}{group.every:>7}{len(group.parameters):>9}{numbers:>12,}"
            )
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs: optimizer, scheduler, step count, held gradients."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "steps": self.steps,
            "held": [group.held for group in self.groups],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over `state()`, also after a trip through JSON that made its integer keys strings."""
        optimizer = dict(state["optimizer"])
        optimizer["state"] = {int(key): value for key, value in optimizer["state"].items()}
        self._optimizer.load_state_dict(optimizer)
        self._scheduler.load_state_dict(state["scheduler"])
        self.steps = int(state["steps"])
        for group, held in zip(self.groups, state["held"], strict=True):
            group.held = list(held)


def assert_partition(groups: Sequence[Sequence[nn.Parameter]]) -> None:
    """Every tensor is in exactly one group and learns.

    Raises:
        ValueError: a tensor is in two groups, or is frozen.
    """
    seen: set[int] = set()
    for parameters in groups:
        for parameter in parameters:
            if id(parameter) in seen:
                raise ValueError("a parameter is in two optimizer groups")
            if not parameter.requires_grad:
                raise ValueError("a frozen parameter is in an optimizer group")
            seen.add(id(parameter))
