"""Tasks on 8x8 grids as a run: one task to train on, then zero-shot and few-shot tables. See `models/experiment.py`.

parts = GridParts.prepare(config, seed=1993, device=device, world=world, warnings=[])
parts.tasks.splits["unseen"]         # compositions of primitives that training never meets
scores = GridScores()
scores.add(scores.measure(learner))
scores.result(learner.summary())["metrics"]["unseen_iou"]        # percent
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from models.experiment import Parts, Scores
from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.losses import iou
from models.shared_subspace.tables import SPLIT_NAMES, few_shot_table, zero_shot_table
from models.shared_subspace.tasks import HELD_OUT, UNSEEN, GridTasks
from utils.errors import UserError
from utils.reports.metric_catalogue import KIND
from utils.training.device import seeded_generator
from utils.training.distributed import World

if TYPE_CHECKING:
    from models.shared_subspace.learner import SharedSubspace

TEST = 0x7E  # what a key of random numbers is for, beside the seed and the number of the split
Measured = dict[str, Any]  # "zero_shot": percent by split; "few_shot": rows; "analysis": metrics


@dataclass(frozen=True)
class GridParts(Parts):
    """Adds the tasks."""

    config: SharedSubspaceConfig
    tasks: GridTasks

    @classmethod
    def prepare(
        cls,
        config: SharedSubspaceConfig,
        *,
        seed: int,
        device: torch.device,
        world: World,
        warnings: list[str],
    ) -> Self:
        if world.size > 1:
            several = f"model_name = {config.model_name!r} trains in one process, and there are {world.size}"
            raise UserError(
                f"{several}: the groups of a step are compared with each other; start it without torchrun"
            )
        tasks = GridTasks(
            config.primitives,
            colours=config.colours,
            train_lengths=config.train_lengths,
            test_length=config.test_length,
            held_out_pairs=config.held_out_pairs,
            test_compositions=config.test_compositions,
            seed=seed,
        )
        return cls(config, seed, device, world, warnings, tasks)

    @property
    def nb_tasks(self) -> int:
        return 1

    def introduction(self) -> str:
        number, steps = len(self.tasks.primitives), len(self.tasks.steps)
        return (
            f"Grids of {self.tasks.colours} colours, {number} primitives, {steps} with all their parameters"
        )

    def opening(self, task: int) -> str:
        counts = (f"{len(self.tasks.splits[split])} {name}" for split, name in SPLIT_NAMES.items())
        return f"Learning on generated grids; compositions: {', '.join(counts)}"

    def weights(self) -> dict[str, str]:
        return {"tag": "trained from scratch", "note": ""}

    def manifest(self) -> dict[str, Any]:
        pairs = [self.tasks.describe(composition) for composition in self.tasks.splits[HELD_OUT].compositions]
        return {"splits_sha256": self._splits_sha256, "held_out": pairs}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"splits_sha256": self._splits_sha256}

    @property
    def _splits_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.tasks.fingerprint()).encode()).hexdigest()


class GridScores(Scores):
    """How well compositions are done that were met in training and that were not, and what a few samples add."""

    def __init__(self) -> None:
        self.values: Measured | None = None

    def __len__(self) -> int:
        return int(self.values is not None)

    @staticmethod
    def measure(learner: SharedSubspace) -> Measured:
        zero_shot = {}
        for number, split in enumerate(SPLIT_NAMES):
            generator = seeded_generator(learner.seed, TEST, number)
            samples = learner.tasks.draw(split, learner.config.test_samples, generator)
            copied = iou(samples.input, samples.target).double().mean().item()
            zero_shot[split] = learner.accuracy(samples) | {"copied": 100 * copied}
        memory = learner.progress.memory
        return {"zero_shot": zero_shot, "few_shot": memory["few_shot"], "analysis": memory["analysis"]}

    @staticmethod
    def describe(measured: Measured, parts: Parts) -> str:
        return "\n\n".join(["new grids, and a few of unseen compositions", *_tables(measured)])

    def add(self, measured: Measured) -> None:
        self.values = measured

    def event(self) -> dict[str, Any]:
        return {"zero_shot": self.values["zero_shot"], "analysis": self.values["analysis"]}

    def lines(self, summary: dict[str, Any]) -> list[str]:
        unseen, seen = self.values["zero_shot"][UNSEEN], self.values["analysis"]
        lines = [
            f"Unseen compositions: IoU {unseen['iou']:.2f} %, {unseen['solved']:.2f} % of grids solved",
            f"Subspaces of h: Grassmann distance {_shown(seen['grassmann_shared'])} between tasks that share a "
            f"primitive, {_shown(seen['grassmann_other'])} between others, {seen['grassmann_chance']:.3f} by chance",
        ]
        if "unit_alignment" in seen:
            lines.append(
                f"Sparse code: |r| of the best unit for a primitive {seen['unit_alignment']:.3f}, "
                f"{seen['unit_chance']:.3f} by chance; of h {seen['hidden_alignment']:.3f}"
            )
        return lines

    def result(self, summary: dict[str, Any]) -> dict[str, Any]:
        rows = [
            {key: value for key, value in row.items() if key != "seconds"} for row in self.values["few_shot"]
        ]
        return {
            KIND: SharedSubspaceConfig.kind,
            "metrics": metrics_of(self.values),
            "zero_shot": self.values["zero_shot"],
            "few_shot": rows,
        }

    def tables(self, summary: dict[str, Any]) -> list[str]:
        return _tables(self.values)

    def cost(self) -> dict[str, float]:
        seconds = [row["seconds"] for row in self.values["few_shot"]]
        return {"few_shot_seconds": statistics.fmean(seconds)} if seconds else {}

    def to_json(self) -> dict[str, Any]:
        return {"measured": self.values}

    def load_json(self, values: dict[str, Any]) -> None:
        self.values = values["measured"]


def metrics_of(measured: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers that runs are compared by; few-shot steps count all of them where the target is not reached."""
    zero_shot, rows = measured["zero_shot"], measured["few_shot"]
    metrics: dict[str, float | None] = {}
    for split, values in zero_shot.items():
        metrics |= {f"{split}_iou": values["iou"], f"{split}_solved": values["solved"]}
    metrics |= measured["analysis"]
    if rows:
        steps = [row["all_steps"] if row["steps"] is None else row["steps"] for row in rows]
        metrics |= {
            "few_shot_before": statistics.fmean(row["before"] for row in rows),
            "few_shot_after": statistics.fmean(row["after"] for row in rows),
            "few_shot_steps": statistics.fmean(steps),
            "few_shot_reached": 100 * statistics.fmean(row["steps"] is not None for row in rows),
        }
    return metrics


def _tables(measured: Mapping[str, Any]) -> list[str]:
    """The zero-shot table, and the few-shot one where there is one."""
    rows = measured["few_shot"]
    return [zero_shot_table(measured["zero_shot"]), *([few_shot_table(rows)] if rows else [])]


def _shown(value: float | None) -> str:
    """A number for the log, a dash where there is none: not every set of compositions has both kinds of pairs."""
    return "-" if value is None else f"{value:.3f}"
