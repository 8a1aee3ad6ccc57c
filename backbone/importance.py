"""Importance of slow weights to past tasks, by which they are held near where a task begins.

    importance = SlowImportance(slow_parameters, strength=100.0)
    importance.begin_task()
    loss.backward()
    importance.before_step(measured=True)      # gradients are measured, and the pull to the past is added
    optimizer.step()
    importance.end_task()

Source of the penalty: EWC (Kirkpatrick et al., *Overcoming Catastrophic Forgetting in Neural Networks*, PNAS
2017), here with the steps' own gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backbone.merging import WeightVector


class SlowImportance(WeightVector):
    """Penalty lambda / 2 sum_i Omega_i (s_i - s*_i)^2 on weights s, by its gradient.

    s* are the weights that the task begins with. Omega is the sum over past tasks of the mean squared
    gradient of the loss, without the penalty, over the measured steps of a task: those of mini-batches as
    training takes them, so no pass over the data is added.

    Args:
        parameters: of s.
        strength: lambda.
    """

    omega: Tensor  # (P,)
    anchor: Tensor  # (P,): s*
    squares: Tensor  # (P,): sum of squared gradients in the open task
    steps: Tensor  # measured in the open task

    def __init__(self, parameters: Sequence[nn.Parameter], strength: float) -> None:
        super().__init__(parameters)
        self.strength = strength
        for name in ("omega", "squares"):
            self.register_buffer(name, torch.zeros_like(self.weights()))
        self.register_buffer("anchor", self.weights())
        self.register_buffer("steps", torch.tensor(0))

    def begin_task(self) -> None:
        """Hold the weights where they are now."""
        self.anchor = self.weights()

    @torch.no_grad()
    def before_step(self, measured: bool) -> None:
        """Add the penalty's gradient to those of the parameters, which are those of the loss.

        Args:
            measured: whether the step counts for Omega.
        """
        if measured:
            self.squares += self.gradients().square()
            self.steps += 1
        self.add_gradients(self.strength * self.omega * (self.weights() - self.anchor))

    @torch.no_grad()
    def end_task(self) -> None:
        """Take the task's importance in."""
        self.omega += self.squares / self.steps.clamp_min(1)
        self.squares.zero_()
        self.steps.zero_()

    def stored_numbers(self) -> int:
        """Numbers needed between tasks: Omega."""
        return len(self.omega)
