"""What kinds of experiments differ in: what a run is made from, and what it measures. `trainer.py` tells the rest.

    parts = learner_class.Parts.prepare(config, seed=1993, device=device, world=world, warnings=[])   # nothing written
    learner = learner_class(parts, log=log)
    scores = learner_class.Scores()
    scores.add(scores.measure(learner))  # after each of `parts.nb_tasks` tasks
    scores.result(learner.summary())     # what `result.json` says

Class-incremental learning is in `models/vit/class_incremental.py`, tasks on grids in `models/shared_subspace/evaluation.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch

from utils.config.schema import RunConfig
from utils.runs.run_log import RunLog
from utils.training.distributed import World


@dataclass(frozen=True)
class Parts(ABC):
    """What a configuration and a seed determine before anything is trained or written; each kind adds its own.

    Attributes:
        config: the run's, with the precision that the device has.
        warnings: what is not quite as the configuration asks, for the log.
    """

    config: RunConfig
    seed: int
    device: torch.device
    world: World
    warnings: list[str]

    @classmethod
    @abstractmethod
    def prepare(
        cls, config: RunConfig, *, seed: int, device: torch.device, world: World, warnings: list[str]
    ) -> Self:
        """Get hold of everything.

        Raises:
            UserError: something cannot be had.
        """

    @property
    @abstractmethod
    def nb_tasks(self) -> int:
        """Tasks of the run; after each it is tested and saved."""

    @abstractmethod
    def introduction(self) -> str:
        """What is learned on, for the log."""

    @abstractmethod
    def opening(self, task: int) -> str:
        """What a task begins with, for the log."""

    @abstractmethod
    def weights(self) -> dict[str, str]:
        """Where the weights at the start come from: "tag", and a "note" that must stand beside every number, or ""."""

    @abstractmethod
    def manifest(self) -> dict[str, Any]:
        """What the run is made from, for its `manifest.json`."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run to belong to it; subclasses extend `super()`'s."""
        return {"model_name": self.config.model_name, "seed": self.seed}

    def data_read(self, trained: int, tested: int) -> dict[str, list[str]]:
        """SHA-256 of the images and labels that a run has read: of the first tasks' "train" and "test" ones.

        A checkpoint belongs to a run with the same; what no task has read may change. None where data are generated.
        """
        return {}

    @property
    def keeps_every_task(self) -> bool:
        """Whether the checkpoints of earlier tasks stay."""
        return True


class Scores(ABC):
    """What a run measures at the end of each task, and what it says of it."""

    @abstractmethod
    def __len__(self) -> int:
        """Tasks measured so far."""

    @staticmethod
    @abstractmethod
    def measure(learner: Any) -> Any:
        """Test a learner on what it should know after its task."""

    @staticmethod
    @abstractmethod
    def describe(measured: Any, parts: Parts) -> str:
        """What was measured, for a reader."""

    @abstractmethod
    def add(self, measured: Any) -> None:
        """Keep what was measured after the task that has just finished."""

    @abstractmethod
    def event(self) -> dict[str, Any]:
        """What the newest task's event in `metrics.jsonl` says."""

    @abstractmethod
    def lines(self, summary: dict[str, Any]) -> list[str]:
        """What the log says of the newest task; summary: the learner's."""

    @abstractmethod
    def result(self, summary: dict[str, Any]) -> dict[str, Any]:
        """What `result.json` says beside seed, parameters, weights and cost: "metrics" by name, and more."""

    @abstractmethod
    def tables(self, summary: dict[str, Any]) -> list[str]:
        """The tables that close a run."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything measured so far, exactly."""

    @abstractmethod
    def load_json(self, values: dict[str, Any]) -> None:
        """Become what `to_json` was taken of."""

    def record(self, log: RunLog) -> None:  # noqa: B027 - most kinds have no file of their own
        """Write the newest task's files into the run folder."""

    def cost(self) -> dict[str, float]:
        """Times beside the run's seconds; they differ from run to run."""
        return {}
