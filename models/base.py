"""Learner: base class of every method, with the only training loop of the repository.

    learner = SEMA(config, context)      # data, backbone and modules; nothing is written
    for task in range(learner.nb_tasks):
        learner.begin_task(task)
        learner.train_task()             # the method's `learn_task`
        evaluations.append(learner.evaluate())
    learner.report(evaluations).result   # what result.json says

A method writes a task as a sequence of named steps (`Learner.learn_task`), some of which run a phase of
training (`Phase`). A run that was stopped between two optimizer steps goes on from there: finished steps of
the task are skipped, an interrupted phase is restored with its optimizer.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from utils.analysis.results import AnalysisResult
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
from utils.training.distributed import DistributedContext
from utils.training.phase import Phase, PhaseProgress, StepResult
from utils.wording import counted, some

logger = logging.getLogger("nested_lora")

QUIET_SECONDS = 60  # of a phase, after which the next epoch is logged though it is not the last

Saved = TypeVar("Saved")


@dataclass
class RunContext:
    """Device, processes, record and stop signal of a learner.

    Attributes:
        device: of the modules.
        precision: "fp32" or "bf16", resolved for the device.
        distributed: this process among those that train together.
        log: the run's record; None where a finished model is only used.
        stop: whether this process is to stop; asked between two steps and between two files (`check_stop`).
        save: writes a checkpoint, for phases that are saved before their end.
        reads_data: whether the data set is read; False where a model is rebuilt for predictions without it.
        warnings: departures from the configuration, for the log.
        trains_from: first task to be trained, so that training images of earlier ones may be missing; None
            if nothing is trained.
    """

    device: torch.device
    precision: str = "fp32"
    distributed: DistributedContext = field(default_factory=DistributedContext)
    log: RunLog | None = None
    stop: Callable[[], bool] = lambda: False
    save: Callable[[], object] = lambda: None
    reads_data: bool = True
    warnings: list[str] = field(default_factory=list)
    trains_from: int | None = None

    def check_stop(self) -> None:
        """Raise Interrupted on all ranks if any of them is to stop; all must ask at the same point."""
        if self.distributed.any(self.stop()):
            raise Interrupted


@dataclass
class TaskProgress:
    """Progress inside a task (JSON).

    Attributes:
        finished: names of the steps that are done (`Learner.once`).
        phases: number of phases finished in this task; part of the keys of their data order.
        steps: batches processed in this task, those of optimizer steps and of scans.
        state: the method's own (`Learner.method_state`); `open_task` resets what belongs to one task.
    """

    finished: list[str] = field(default_factory=list)
    phases: int = 0
    steps: int = 0
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Report of a run after a task.

    Attributes:
        event: results of the newest task, for `metrics.jsonl`.
        lines: about the newest task, for the log.
        result: results of the whole run for `result.json`: "metrics" by name, and more.
        tables: makes the plain-text tables at the end of a run's log.
        cost: timings besides the run's seconds; they are not reproducible.
        csv: tables of the newest task for the run folder, by file name.
    """

    event: dict[str, Any]
    lines: list[str]
    result: dict[str, Any]
    tables: Callable[[], list[str]]
    cost: dict[str, float] = field(default_factory=dict)
    csv: dict[str, pd.DataFrame] = field(default_factory=dict)


class Learner(ABC):
    """A learning method: its data, its modules, its training in a task, and its evaluation.

    Attributes:
        Config: the schema of its configuration.
        figures: draws the figures of a run from its record.
        task_files: names of files and folders that tasks leave in the run folder beside its record.
        captions: captions of the figures by file name, in the order of the run's page.
        analyses: analyses of finished runs by name, for `eval.py --analyse`; see `analysis_inputs`.
        modules: all modules; their state without `frozen_names` is the checkpoint.
        method_tensors: tensors that a method must remember inside a task, beside `method_state`.

    Args:
        config: of the subclass's own `Config`, with the precision that the device has.
        context: device, processes, record.
    """

    Config: ClassVar[type[RunConfig]]
    figures: ClassVar[Figures]
    task_files: ClassVar[tuple[str, ...]] = ()
    captions: ClassVar[Mapping[str, str]] = {}
    analyses: ClassVar[Mapping[str, Callable[[Any], AnalysisResult]]] = {}
    modules: nn.ModuleDict

    def __init__(self, config: RunConfig, context: RunContext) -> None:
        self.config, self.context = config, context
        self.task = -1
        self.progress = TaskProgress()
        self.method_tensors: dict[str, Tensor] = {}
        self._open_phase: dict[str, Any] | None = None  # progress and optimizer of an interrupted phase
        self._last_logged = 0.0  # time at which the open phase last logged an epoch at level INFO

    # --- what a method defines ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def nb_tasks(self) -> int:
        """Number of tasks of the run; after each it is evaluated and saved."""

    @abstractmethod
    def open_task(self) -> None:
        """Prepare for task `self.task`, for example by adding classifier rows for new classes."""

    @abstractmethod
    def learn_task(self) -> None:
        """The steps of a task, each as `self.once(name, work)`."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Evaluate on everything learned so far, after a task: exact numbers (JSON)."""

    @abstractmethod
    def report(self, evaluations: Sequence[dict[str, Any]]) -> Report:
        """Report of the run after its newest task; `evaluations` has one entry per finished task."""

    @abstractmethod
    def describe_evaluation(self, evaluation: dict[str, Any]) -> str:
        """One evaluation as text, for `eval.py`."""

    @abstractmethod
    def describe_run(self) -> list[str]:
        """Data and model in a sentence each, for the log."""

    @abstractmethod
    def describe_task(self, task: int) -> str:
        """Description of a task's data, for the log line at its start."""

    @abstractmethod
    def weights(self) -> dict[str, str]:
        """Origin of the initial weights: "tag", and a "note" that must stand beside every number, or ""."""

    @abstractmethod
    def manifest(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """Data and weights of the run, for its `manifest.json`.

        earlier: what that has said so far; empty for a new run. It stands for what the tasks before
        `RunContext.trains_from` have read, since their training images may be gone.
        """

    @abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Counts of numbers beside the frozen backbone, by part, with the totals "stored" and "trained".

        The parts are what is kept to predict and to learn on, each number once, and "stored" is their sum.
        "trained" counts the numbers that a gradient has ever updated, also those that are not kept, such as
        classifier rows that a closed-form head replaces.
        """

    # --- what a method may define ---------------------------------------------------------------------------

    def analysis_inputs(
        self, checkpoints: Sequence[Path], load: Callable[[Path], None], images_per_class: int | None
    ) -> Any:
        """Inputs of `analyses` from the checkpoints of all tasks, in order, each restored by `load`."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Values that a checkpoint must share with a run to belong to it; subclasses extend `super()`'s."""
        return {"model_name": self.config.model_name, "seed": self.seed}

    def data_read(self, trained: int, tested: int) -> dict[str, list[str]]:
        """SHA-256 per task of the images and labels read so far, by source.

        "train" of the first `trained` tasks; "test" or "validation", whichever the run is measured on, of the
        first `tested`. A checkpoint belongs only to a run with the same; data that no task has read may
        change. Empty where data are generated.
        """
        return {}

    @classmethod
    def method(cls) -> str:
        """The method in a sentence: the first line of the class's docstring."""
        return (cls.__doc__ or cls.__name__).split("\n")[0]

    def summary(self) -> dict[str, Any]:
        """The model as a task's event describes it."""
        return {"parameters": self.parameter_counts()}

    def frozen_names(self) -> set[str]:
        """Names in `modules.state_dict()` of pretrained tensors that no checkpoint holds."""
        return set()

    @property
    def keeps_every_task(self) -> bool:
        """Whether the checkpoints of earlier tasks stay."""
        return True

    def calibrate(self) -> None:  # noqa: B027 - optional hook
        """Fit what turns scores into probabilities, at the end of a task; no prediction changes."""

    def close_run(self) -> None:  # noqa: B027 - optional hook
        """Remove files that only this run needs, at its end."""

    # --- a task ---------------------------------------------------------------------------------------------

    def begin_task(self, task: int) -> None:
        """Open a task: its classes become known."""
        self.task, self.progress = task, TaskProgress(state=self.progress.state)
        self.open_task()
        self.modules.to(self.device)  # moves newly added modules
        parameters = list(self.modules.parameters())
        learning = sum(p.numel() for p in parameters if p.requires_grad)
        level = logging.DEBUG if task else logging.INFO
        logger.log(level, f"All params: {sum(p.numel() for p in parameters)}, Trainable params: {learning}")

    def train_task(self) -> None:
        """Learn the open task from where it stands, to its end or until a stop is requested.

        Raises:
            Interrupted: a stop was requested; `state` holds everything needed to go on.
        """
        with dead_worker_advice():
            self.learn_task()
            self.once("calibration", self.calibrate)

    def once(self, step: str, work: Callable[[], object]) -> None:
        """Run one step of the task, unless it was finished before a resume; names are unique in a task."""
        if step not in self.progress.finished:
            work()
            self.progress.finished.append(step)

    # --- the training loop ----------------------------------------------------------------------------------

    def run_phase(self, phase: Phase) -> None:
        """Run a phase from where it stands to its end.

        Raises:
            Interrupted: a stop was requested; progress and optimizer are kept for the checkpoint.
            UserError: the loss is not finite, or the last step left weights that are not.
        """
        at = self._restore_phase(phase)
        name = f"Task {self.task} {phase.name}" + (f" block {phase.block}" if phase.block is not None else "")
        self._last_logged = time.monotonic()
        if at == PhaseProgress():
            steps = f"{counted(phase.epochs, 'epoch')} of {counted(phase.steps_per_epoch, 'step')}"
            logger.debug(f"{name}: {steps}\n{phase.optimizer.table()}")
        total = phase.epochs * phase.steps_per_epoch
        done = at.epoch * phase.steps_per_epoch + at.step
        with progress(total=total, initial=done, desc=name, unit="step") as bar:
            while at.epoch < phase.epochs:
                try:
                    for batch in phase.batches(at.epoch, at.step):
                        self.context.check_stop()
                        self.take_step(phase, at, batch)
                        bar.update()
                except Interrupted:  # raised here, or while a batch was made
                    self._keep_phase(phase, at)
                    raise
                at = self._end_epoch(phase, at)
                if phase.save_every and at.epoch % phase.save_every == 0 and at.epoch < phase.epochs:
                    self._keep_phase(phase, at)
                    self.context.save()
                    self._open_phase = None
                bar.set_postfix_str(f"epoch {at.epoch}/{phase.epochs}")
        for group in phase.optimizer.groups:
            what = f"{name}: the weights of group {group.name}"
            for parameter in group.parameters:
                require_finite(parameter.detach(), what, self.config.precision)
        self.progress.phases += 1

    def take_step(self, phase: Phase, at: PhaseProgress, batch: Any) -> None:
        """Forward, backward, one optimizer step; sums for the epoch line.

        The gradient is that of the mean loss over all samples of the batch, in whatever micro-batches and on
        however many ranks: gradients of summed losses are added up, then divided by the number of samples.
        """
        phase.optimizer.zero_grad()
        results = []
        for micro_batch in phase.micro_batches(batch):
            result = phase.loss(micro_batch)
            (result.loss * result.samples).backward()
            results.append(result)
        loss, samples, correct = self._totals(phase, results)
        phase.optimizer.divide_gradients(samples)
        step = phase.optimizer.steps + 1
        phase.before_step(step)
        moved = phase.optimizer.step()
        phase.after_step(step, moved)
        self.progress.steps += 1
        at.step += 1
        at.loss += loss / samples
        at.samples += samples
        if correct is not None:
            at.correct = (at.correct or 0) + correct
        if not math.isfinite(at.loss):
            raise UserError(
                f"the loss of task {self.task}, phase {phase.name}, epoch {at.epoch + 1} is not finite; "
                f"learning rates are {phase.optimizer.lrs}: {not_finite_advice(self.config.precision)}"
            )

    def _totals(self, phase: Phase, results: list[StepResult]) -> tuple[float, int, int | None]:
        """Summed loss, samples and correct ones of a batch over all ranks.

        Gradients are summed over the ranks in the same exchange, except in a replicated phase.
        """
        sums = torch.zeros(3, device=self.device)
        for result in results:
            sums[0] += result.loss.detach() * result.samples
            sums[1] += result.samples
            if phase.classifies:
                sums[2] += result.correct
        if self.distributed.size > 1 and not phase.replicated:
            self.distributed.all_reduce([*phase.optimizer.gradients(), sums])
        loss, samples, correct = sums.tolist()
        return loss, int(samples), int(correct) if phase.classifies else None

    def _end_epoch(self, phase: Phase, at: PhaseProgress) -> PhaseProgress:
        """Record the epoch and step the schedule; the progress at the start of the next epoch."""
        lrs = phase.optimizer.lrs
        loss = at.loss / max(1, at.step)
        accuracy = None if at.correct is None else 100 * at.correct / at.samples
        phase.optimizer.end_epoch()
        epoch = at.epoch + 1
        note = phase.after_epoch(loss, at.step)
        shown = note.text + ("" if accuracy is None else f", Train_accy {accuracy:.2f}")
        remarks = [*([] if phase.block is None else [f"block {phase.block}"]), *filter(None, [note.remark])]
        shown += f" ({'; '.join(remarks)})" if remarks else ""
        due = time.monotonic() - self._last_logged > QUIET_SECONDS
        level = logging.INFO if phase.tells_epochs or epoch == phase.epochs or due else logging.DEBUG
        if level == logging.INFO:
            self._last_logged = time.monotonic()
        line = f"{phase.name} Task {self.task}, Epoch {epoch}/{phase.epochs} => Loss {loss:.3f}{shown}"
        logger.log(level, line)
        self.log.metric(
            "epoch",
            task=self.task,
            phase=phase.name,
            block=phase.block,
            epoch=epoch,
            steps_in_task=self.progress.steps,
            loss=loss,
            train_accuracy=accuracy,
            lr=lrs,
            **note.numbers,
        )
        return PhaseProgress(epoch=epoch)

    def _keep_phase(self, phase: Phase, at: PhaseProgress) -> None:
        """Keep progress and optimizer of an unfinished phase for `state`."""
        self._open_phase = {"progress": asdict(at), "optimizer": phase.optimizer.state()}

    def _restore_phase(self, phase: Phase) -> PhaseProgress:
        """The start of a phase, or the point at which it was interrupted."""
        saved, self._open_phase = self._open_phase, None
        if saved is None:
            return PhaseProgress()
        phase.optimizer.load_state(saved["optimizer"])
        return _exactly(PhaseProgress, saved["progress"])

    # --- short forms ----------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def device(self) -> torch.device:
        return self.context.device

    @property
    def distributed(self) -> DistributedContext:
        return self.context.distributed

    @property
    def log(self) -> RunLog:
        return self.context.log

    @property
    def method_state(self) -> dict[str, Any]:
        """The method's own state inside a task and from task to task (JSON)."""
        return self.progress.state

    def autocast(self) -> Any:
        """The run's precision, for forward passes of the backbone."""
        return autocast(self.device, self.config.precision)

    # --- state ----------------------------------------------------------------------------------------------

    def learned_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers that training has made, by their names in `modules`."""
        frozen = self.frozen_names()
        return {name: tensor for name, tensor in self.modules.state_dict().items() if name not in frozen}

    def fingerprint(self) -> str:
        """SHA-256 of everything that was learned: equal on all ranks, and before and after a resume."""
        return sha256_of(self.learned_tensors())

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything a resumed run needs: (JSON, tensors). Valid between tasks and after `Interrupted`."""
        phase, tensors = pack_tensors(self._open_phase, "phase")
        tensors |= {f"model.{name}": tensor for name, tensor in self.learned_tensors().items()}
        tensors |= {f"method.{name}": tensor for name, tensor in self.method_tensors.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        learning = [name for name, parameter in self.modules.named_parameters() if parameter.requires_grad]
        state = {"task": self.task, "progress": asdict(self.progress), "learning": learning, "phase": phase}
        return state, tensors

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned; modules that grow take their shapes from the tensors.

        Raises:
            UserError: the tensors are not exactly those of this configuration.
        """
        load_learned(self.modules, with_prefix("model.", tensors), self.frozen_names())
        self.modules.to(self.device)
        self.method_tensors = with_prefix("method.", tensors)
        learning = set(state["learning"])
        for name, parameter in self.modules.named_parameters():
            parameter.requires_grad_(name in learning)
        self.task, self.progress = state["task"], _exactly(TaskProgress, state["progress"])
        self._open_phase = unpack_tensors(state["phase"], tensors)
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)


def continued(
    before: Mapping[str, list[Saved]], now: Mapping[str, list[Saved]], kept: int | None = None
) -> dict[str, list[Saved]]:
    """By source: the first `kept` values of before, all of them for None, then what follows of now."""
    first = {source: before.get(source, [])[:kept] for source in now}
    return {source: [*first[source], *values[len(first[source]) :]] for source, values in now.items()}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def load_learned(modules: nn.Module, tensors: Mapping[str, Tensor], frozen: set[str]) -> None:
    """Load tensors by name into modules; the frozen ones are those that stay as they are.

    Raises:
        UserError: names or shapes differ from what the modules have; it says which.
    """
    try:
        missing, unexpected = modules.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # shapes
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise UserError(f"the checkpoint does not fit this configuration: {first.rstrip('.')}") from error
    wrong = [f"{name} is missing" for name in sorted(set(missing) - frozen)]
    wrong += [f"{name} is unexpected" for name in sorted(unexpected)]
    if wrong:
        raise UserError(f"the checkpoint does not fit this configuration: {some(wrong, '; ', most=3)}")


def _exactly(kind: type[Saved], values: dict[str, Any]) -> Saved:
    """The dataclass that `asdict` gave these values of; ValueError if a field is missing or unknown."""
    names = [field.name for field in fields(kind)]
    if sorted(values) != sorted(names):
        raise ValueError(
            f"{kind.__name__} has {', '.join(sorted(values))} instead of {', '.join(sorted(names))}"
        )
    return kind(**values)
