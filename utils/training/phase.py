"""Phase, a part of training with its own batches, optimizer and loss, and the progress inside one."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from utils.training.optim import GroupedOptimizer


@dataclass
class StepResult:
    """Result of one micro-batch: mean loss (differentiable), number of samples, number classified right."""

    loss: Tensor
    samples: int
    correct: Tensor | None = None


@dataclass
class EpochNote:
    """A method's additions to the record of an epoch.

    `text` follows the loss in the log line of the epoch, `remark` ends it; the numbers are for its event.
    """

    text: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    remark: str = ""


class Phase(ABC):
    """Training for a number of epochs over one kind of batches, with one optimizer and one loss.

    `Learner.run_phase` runs it.

    Attributes:
        name: "func", "rd", ...: what is trained, in log lines.
        replicated: every rank sees whole batches, so gradients are equal already and are not summed over
            ranks.
        classifies: results say how many samples were classified right.
        tells_epochs: the log shows every epoch; otherwise the last one, and one per minute.

    Args:
        epochs: passes over the batches.
        steps_per_epoch: batches of one pass.
        optimizer: the groups that learn.
        block: the block that the phase trains, where it is a single one.
        save_every: epochs after which the run is saved inside the phase; 0: only when it is interrupted.
    """

    name: str
    replicated = False
    classifies = True
    tells_epochs = False

    def __init__(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        optimizer: GroupedOptimizer,
        block: int | None = None,
        save_every: int = 0,
    ) -> None:
        self.epochs, self.steps_per_epoch, self.optimizer = epochs, steps_per_epoch, optimizer
        self.block, self.save_every = block, save_every

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterable[Any]:
        """The epoch's batches from number `start` on; the same for the same arguments."""

    def micro_batches(self, batch: Any) -> list[Any]:
        """The batch in parts that are processed one after the other; none is empty."""
        return [batch]

    @abstractmethod
    def loss(self, micro_batch: Any) -> StepResult:
        """Forward pass and loss of a micro-batch: the method's own mathematics."""

    def before_step(self, step: int) -> None:  # noqa: B027 - optional hook
        """Called with the number of the coming step (from 1), gradients in place."""

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:  # noqa: B027 - optional hook
        """Called with the number of the step just taken and, by group, whether it was updated."""

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        """Called with an epoch's mean loss and its steps, before the epoch is logged."""
        return EpochNote()


@dataclass
class PhaseProgress:
    """Progress inside a phase: epochs and steps done, and the running sums of the open epoch's log line."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: int | None = None  # None where the phase classifies nothing
    samples: int = 0
