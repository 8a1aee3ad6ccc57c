"""Evaluation of the shared-subspace experiment: new grids of every split, few-shot rows, and what a run reports."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.base import Report
from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.losses import iou
from models.shared_subspace.tables import SPLIT_NAMES, few_shot_table, zero_shot_table
from models.shared_subspace.tasks import UNSEEN, GridTasks
from utils.errors import UserError
from utils.training.random import rng

if TYPE_CHECKING:
    from models.shared_subspace.learner import SharedSubspace

Measured = dict[str, Any]  # "zero_shot": percent by split; "few_shot": rows; "analysis": metrics


def grid_tasks(config: SharedSubspaceConfig, seed: int, processes: int) -> GridTasks:
    """The tasks of a configuration. UserError: several processes."""
    if processes > 1:
        several = f"model_name = {config.model_name!r} trains in one process, and there are {processes}"
        raise UserError(
            f"{several}: the groups of a step are compared with each other; start it without torchrun"
        )
    return GridTasks(
        config.primitives,
        colours=config.colours,
        train_lengths=config.train_lengths,
        test_length=config.test_length,
        held_out_pairs=config.held_out_pairs,
        test_compositions=config.test_compositions,
        seed=seed,
    )


def splits_sha256(tasks: GridTasks) -> str:
    """Hash of which compositions are in which split."""
    return hashlib.sha256(json.dumps(tasks.fingerprint()).encode()).hexdigest()


def measure(learner: SharedSubspace) -> Measured:
    """Accuracy on new grids of every split, few-shot rows, and the numbers of the analyses."""
    zero_shot = {}
    for split in SPLIT_NAMES:
        generator = rng("grid test", learner.seed, split)
        samples = learner.tasks.draw(split, learner.config.test_samples, generator)
        copied = iou(samples.input, samples.target).double().mean().item()
        zero_shot[split] = learner.accuracy(samples) | {"copied": 100 * copied}
    state = learner.method_state
    return {"zero_shot": zero_shot, "few_shot": state["few_shot"], "analysis": state["analysis"]}


def describe_measured(measured: Measured) -> str:
    """The tables of an evaluation."""
    return "\n\n".join(["new grids, and a few of unseen compositions", *_tables(measured)])


def grid_report(measured: Measured) -> Report:
    """What a run on grids says of itself."""
    unseen, seen = measured["zero_shot"][UNSEEN], measured["analysis"]
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
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in measured["few_shot"]]
    seconds = [row["seconds"] for row in measured["few_shot"]]
    return Report(
        event={"zero_shot": measured["zero_shot"], "analysis": seen},
        lines=lines,
        result={
            "metrics": metrics_of(measured),
            "zero_shot": measured["zero_shot"],
            "few_shot": rows,
        },
        tables=_tables(measured),
        cost={"few_shot_seconds": statistics.fmean(seconds)} if seconds else {},
    )


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
