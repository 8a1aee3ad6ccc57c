"""What a learner is, and the only epoch loop of the repository.

    learner.begin_task(task)
    learner.train_task()          # the method's own story, made of stages; a stage may run a phase of training

A phase (`Phase`) names its epochs, batches, loss and optimizer; `Learner.run_phase` runs it, logs an epoch line, and
stops cleanly between two steps when asked to. Everything that a resumed run needs is in `Learner.state`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from models.experiment import Parts, Scores
from utils.config.schema import RunConfig
from utils.console import progress
from utils.errors import Interrupted, UserError
from utils.runs.figures import Figures
from utils.runs.run_log import RunLog
from utils.training.device import (
    autocast,
    dead_worker_advice,
    not_finite_advice,
    pack_tensors,
    require_finite,
    sha256_of,
    unpack_tensors,
)
from utils.training.optim import GroupedOptimizer

logger = logging.getLogger("nested_lora")

Saved = TypeVar("Saved")


@dataclass
class StepResult:
    """Outcome of one training batch: a differentiable loss, the samples in it, and how many were classified right."""

    loss: Tensor
    samples: int
    correct: Tensor | None = None


@dataclass
class EpochNote:
    """What a method adds to the record of an epoch: words after the loss in its line, numbers for its event."""

    words: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass
class Phase:
    """One stretch of training.

    Attributes:
        name: "func", "rd", ...: what is trained, in log lines.
        epochs: passes over the batches.
        optimizer: the groups that learn.
        batches: (epoch, start) -> the epoch's batches from number `start` on; the same for the same arguments.
        steps_per_epoch: number of batches when start = 0.
        observe: one batch, or a part of one -> loss; a method's own mathematics.
        parts: cuts a batch into parts that are worked on one after the other; an empty batch has none.
        replicated: every rank sees whole batches, so that gradients are equal already and not summed over ranks.
        classifies: whether results say how many samples were classified right.
        block: the block that grew, when the phase is about one.
        announced: whether its start is logged with its rates.
        save_every: epochs after which the run is saved inside the phase; 0: only when it is interrupted.
        before_step: called with the number of the coming step (from 1), gradients in place.
        after_step: called with the number of the step just taken and what moved in it.
        after_epoch: called with an epoch's mean loss and its steps, before the epoch is logged.
    """

    name: str
    epochs: int
    optimizer: GroupedOptimizer
    batches: Callable[[int, int], Iterable[Any]]
    steps_per_epoch: int
    observe: Callable[[Any], StepResult]
    parts: Callable[[Any], list[Any]] = lambda batch: [batch]
    replicated: bool = False
    classifies: bool = True
    block: int | None = None
    announced: bool = True
    save_every: int = 0
    before_step: Callable[[int], None] | None = None
    after_step: Callable[[int, dict[str, bool]], None] | None = None
    after_epoch: Callable[[float, int], EpochNote] = lambda loss, steps: EpochNote()


@dataclass
class Position:
    """Where a phase stands: epochs and steps done, and the running sums of the open epoch's log line."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: int | None = None  # of the samples so far; None where the phase classifies nothing
    samples: int = 0


@dataclass
class Progress:
    """Where a task stands (JSON): the stage that comes next, and what a method needs to remember inside the task."""

    stage: str = "done"
    phases: int = 0  # phases finished in this task: seeds their data order
    steps: int = 0  # batches worked on in this task: says how far it is
    memory: dict[str, Any] = field(default_factory=dict)


class Learner(ABC):
    """A learning method: its modules and the stages its tasks go through.

    Subclasses add only what is particular to them. The parts of a kind of experiment are in `models/experiment.py`.

    Args:
        parts: what the run is made from: its validated configuration, of the subclass's own `Config`, and more.
        log: the run's record.
        stop_requested: asked between two steps; True on any rank makes `train_task` raise `Interrupted` on all.
        save: writes a checkpoint, where a phase asks for one before its end.
    """

    Config: ClassVar[type[RunConfig]]
    Parts: ClassVar[type[Parts]]
    Scores: ClassVar[type[Scores]]
    figures: ClassVar[Figures]
    modules: nn.ModuleDict  # the subclass makes them

    def __init__(
        self,
        parts: Parts,
        *,
        log: RunLog,
        stop_requested: Callable[[], bool] = lambda: False,
        save: Callable[[], object] = lambda: None,
    ) -> None:
        self.config, self.seed, self.device, self.world = parts.config, parts.seed, parts.device, parts.world
        self.log, self._stop_requested, self._save = log, stop_requested, save
        self.task = -1
        self.progress = Progress()
        self._open_phase: dict[str, Any] | None = (
            None  # position and optimizer of a phase that was interrupted
        )

    # --- what a method adds -----------------------------------------------------------------------------------------

    @abstractmethod
    def open_task(self) -> None:
        """`self.task` has begun: make room for what it brings."""

    @property
    @abstractmethod
    def stages(self) -> dict[str, Callable[[], str]]:
        """The stages of a task by name, each returning the next one's; begins at "start", ends with "done"."""

    @abstractmethod
    def structure(self) -> dict[str, Any]:
        """What `rebuild` needs to give fresh modules the shape of these (JSON)."""

    @abstractmethod
    def rebuild(self, structure: dict[str, Any]) -> None:
        """Give fresh modules a saved shape."""

    @abstractmethod
    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The tensors that training has made: parameters and buffers without the frozen backbone."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """What the task record says of the model: "parameters" {part: number}, and what its experiment needs."""

    # --- what a method may do otherwise -----------------------------------------------------------------------------

    def costs(self, build: Callable[[Mapping[str, Any]], "Learner"]) -> Any:
        """What there is to measure about the method (`utils/benchmark.py`): see `models/sema_costs.py`.

        Raises:
            UserError: the method names nothing.
        """
        raise UserError(f"model_name = {self.config.model_name!r}: this method names no costs to measure")

    def close_run(self) -> None:  # noqa: B027 - most methods keep nothing
        """The run is over: remove what only it needs."""

    # --- a task -----------------------------------------------------------------------------------------------------

    def begin_task(self, task: int) -> None:
        """Open a task: its classes become known."""
        self.task, self.progress = task, Progress(stage="start")
        self.open_task()
        parameters = list(self.modules.parameters())
        logger.info(f"All params: {sum(p.numel() for p in parameters)}")
        logger.info(f"Trainable params: {sum(p.numel() for p in parameters if p.requires_grad)}")

    def train_task(self) -> None:
        """Go through the open task's stages from where it stands; after an interruption, from there."""
        with dead_worker_advice():
            while self.progress.stage != "done":
                self.progress.stage = self.stages[self.progress.stage]()

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run_phase(self, phase: Phase) -> None:
        """Run a phase from where it stands to its end: the only epoch loop of the repository.

        Raises:
            Interrupted: a stop was requested; the phase's position and optimizer are kept for the checkpoint.
            UserError: the loss is not finite, or the last step left weights that are not.
        """
        position = self._restore_phase(phase)
        where = f"Task {self.task} {phase.name}" + (
            f" block {phase.block}" if phase.block is not None else ""
        )
        if phase.announced and position == Position():
            logger.info(
                f"{where}: {phase.epochs} epochs of {phase.steps_per_epoch} steps\n{phase.optimizer.table()}"
            )
        total = phase.epochs * phase.steps_per_epoch
        done = position.epoch * phase.steps_per_epoch + position.step
        with progress(total=total, initial=done, desc=where, unit="step") as bar:
            while position.epoch < phase.epochs:
                try:
                    for batch in phase.batches(position.epoch, position.step):
                        if self.stopping():
                            raise Interrupted
                        self.take_step(phase, position, batch)
                        bar.update()
                except Interrupted:  # also from what makes the batches
                    self._keep_phase(phase, position)
                    raise
                position = self._end_epoch(phase, position)
                if (
                    phase.save_every
                    and position.epoch % phase.save_every == 0
                    and position.epoch < phase.epochs
                ):
                    self._keep_phase(phase, position)
                    self._save()
                    self._open_phase = None
                bar.set_postfix_str(f"epoch {position.epoch}/{phase.epochs}")
        for group in phase.optimizer.groups:
            for parameter in group.parameters:
                require_finite(
                    parameter.detach(), f"{where}: the weights of group {group.name}", self.config.precision
                )
        self.progress.phases += 1

    def take_step(self, phase: Phase, position: Position, batch: Any) -> None:
        """Forward, backward, one optimizer step; sums for the epoch line.

        The gradient is that of the mean loss over all samples of the batch, in whatever parts and on however many
        ranks: gradients of summed losses are added up, then divided by the number of samples.
        """
        phase.optimizer.zero_grad()
        results = []
        for part in phase.parts(batch):
            result = phase.observe(part)
            (result.loss * result.samples).backward()
            results.append(result)
        loss, samples, correct = self._totals(phase, results)
        phase.optimizer.divide_gradients(samples)
        step = phase.optimizer.steps + 1
        if phase.before_step is not None:
            phase.before_step(step)
        moved = phase.optimizer.step()
        if phase.after_step is not None:
            phase.after_step(step, moved)
        position.step += 1
        self.progress.steps += 1
        position.loss += loss / samples
        position.samples += samples
        if correct is not None:
            position.correct = (position.correct or 0) + correct
        if position.loss != position.loss or abs(position.loss) == float("inf"):
            raise UserError(
                f"the loss of task {self.task}, phase {phase.name}, epoch {position.epoch + 1} is not finite; "
                f"learning rates are {phase.optimizer.rates}: {not_finite_advice(self.config.precision)}"
            )

    def _totals(self, phase: Phase, results: list[StepResult]) -> tuple[float, int, int | None]:
        """Summed loss, samples and correct ones of a batch; over all ranks, whose gradients are summed with them."""
        classifies = phase.classifies
        sums = torch.zeros(3, device=self.device)
        for result in results:
            sums[0] += result.loss.detach() * result.samples
            sums[1] += result.samples
            if classifies:
                sums[2] += result.correct
        if self.world.size > 1 and not phase.replicated:
            self.world.sum_in_place([*phase.optimizer.gradients(), sums])
        loss, samples, correct = sums.tolist()
        return loss, int(samples), int(correct) if classifies else None

    def _end_epoch(self, phase: Phase, position: Position) -> Position:
        """Log the epoch, move along the cosine; the position at the start of the next one."""
        rates = phase.optimizer.rates
        loss = position.loss / max(1, position.step)
        accuracy = None if position.correct is None else 100 * position.correct / position.samples
        phase.optimizer.end_epoch()
        epoch = position.epoch + 1
        note = phase.after_epoch(loss, position.step)
        shown = note.words + ("" if accuracy is None else f", Train_accy {accuracy:.2f}")
        logger.info(f"{phase.name} Task {self.task}, Epoch {epoch}/{phase.epochs} => Loss {loss:.3f}{shown}")
        self.log.metric(
            "epoch", task=self.task, phase=phase.name, block=phase.block, epoch=epoch, loss=loss,
            train_accuracy=accuracy, lr=rates, **note.numbers,
        )  # fmt: skip
        return Position(epoch=epoch)

    def _keep_phase(self, phase: Phase, position: Position) -> None:
        """Make where a phase stands part of the state."""
        self._open_phase = {"position": asdict(position), "optimizer": phase.optimizer.state()}

    def _restore_phase(self, phase: Phase) -> Position:
        """The start of a phase, or where an interrupted one stopped."""
        saved, self._open_phase = self._open_phase, None
        if saved is None:
            return Position()
        phase.optimizer.load_state(saved["optimizer"])
        return _exactly(Position, saved["position"])

    # --- helpers for methods ----------------------------------------------------------------------------------------

    def stopping(self) -> bool:
        """Whether a stop was requested on any rank; every rank must ask at the same point."""
        return self.world.any(self._stop_requested())

    def autocast(self) -> Any:
        """The run's precision, for forwards of the backbone."""
        return autocast(self.device, self.config.precision)

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything a resumed run needs: (JSON, tensors). Valid between tasks and after `Interrupted`."""
        phase, tensors = pack_tensors(self._open_phase, "phase")
        learning = [name for name, parameter in self.modules.named_parameters() if parameter.requires_grad]
        tensors |= {f"model.{name}": tensor for name, tensor in self.checkpoint_tensors().items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "task": self.task,
            "progress": asdict(self.progress),
            "structure": self.structure(),
            "learning": learning,
            "phase": phase,
        }
        return state, tensors

    def fingerprint(self) -> str:
        """SHA-256 of everything that was learned: equal on all ranks, and before and after a resume."""
        return sha256_of(self.checkpoint_tensors())

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Become the learner that `state` came from.

        Raises:
            UserError: the tensors are not exactly those this configuration has.
        """
        self.rebuild(state["structure"])
        self.modules.to(self.device)
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        load_strictly(self.checkpoint_tensors(), model)
        learning = set(state["learning"])
        for name, parameter in self.modules.named_parameters():
            parameter.requires_grad_(name in learning)
        self.task, self.progress = state["task"], _exactly(Progress, state["progress"])
        self._open_phase = unpack_tensors(state["phase"], tensors)
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)


def _exactly(kind: type[Saved], values: dict[str, Any]) -> Saved:
    """A dataclass with the values that `asdict` took of one; ValueError where any is missing or unknown."""
    names = [field.name for field in fields(kind)]
    if sorted(values) != sorted(names):
        raise ValueError(
            f"{kind.__name__} has {', '.join(sorted(values))} instead of {', '.join(sorted(names))}"
        )
    return kind(**values)


@torch.no_grad()
def load_strictly(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Copy tensors by name; names and shapes must be exactly the same.

    Raises:
        UserError: naming what is missing, unexpected or of another shape.
    """
    wrong = [f"{name} is missing" for name in ours.keys() - theirs.keys()]
    wrong += [f"{name} is unexpected" for name in theirs.keys() - ours.keys()]
    for name in ours.keys() & theirs.keys():
        if ours[name].shape != theirs[name].shape:
            wrong.append(f"{name} has shape {tuple(theirs[name].shape)} instead of {tuple(ours[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"the checkpoint does not fit this configuration: {'; '.join(sorted(wrong)[:3])}{more}"
        )
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
