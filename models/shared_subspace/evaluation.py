"""Evaluation of a network on grids: accuracy, zero-shot and few-shot tables, metrics of a run.

    evaluator = Evaluator(model, config)
    evaluator.accuracy(samples)                       # {"iou": ..., "cells": ..., "solved": ...}, percent
    evaluation = {"zero_shot": zero_shot(evaluator, tasks), "few_shot": rows, "analysis": metrics}
    run_metrics(evaluation)["unseen_iou"]

IoU is defined in `losses.py`; a grid is solved when all its cells are right.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from models.base import Report
from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.losses import iou
from models.shared_subspace.metrics import GRIDS
from models.shared_subspace.network import GridModel, GridOutput
from models.shared_subspace.tasks import HELD_OUT, TRAIN, UNSEEN, GridSamples, GridTasks
from utils.training.device import autocast, predictions
from utils.training.random import rng

SPLIT_NAMES = {TRAIN: "met in training", HELD_OUT: "held-out pairs", UNSEEN: "of unseen length"}


@dataclass(frozen=True)
class Evaluator:
    """A network applied to samples in batches, without gradients."""

    model: GridModel
    config: SharedSubspaceConfig  # with the precision that the device has

    @property
    def device(self) -> torch.device:
        return self.model.positions.device

    def predict(self, samples: GridSamples) -> Tensor:
        """Predicted colours, (N, 8, 8) on the CPU. UserError: a score is not finite."""
        outputs = (output.logits for output in self._outputs(samples))
        return torch.cat([predictions(logits, "grids", self.config.precision).cpu() for logits in outputs])

    def representations(self, samples: GridSamples) -> dict[str, Tensor]:
        """`GridOutput.representations` of the samples, (N, ...) each, float32 on the CPU."""
        parts = defaultdict(list)
        for output in self._outputs(samples):
            for name, vectors in output.representations().items():
                parts[name].append(vectors.float().cpu())
        return {name: torch.cat(vectors) for name, vectors in parts.items()}

    def accuracy(self, samples: GridSamples) -> dict[str, float]:
        """IoU, cells right and grids solved, percent."""
        colours = self.predict(samples)
        right = (colours == samples.target).flatten(1)
        return {
            "iou": 100 * iou(colours, samples.target).double().mean().item(),
            "cells": 100 * right.double().mean().item(),
            "solved": 100 * right.all(dim=1).double().mean().item(),
        }

    def _outputs(self, samples: GridSamples) -> Iterator[GridOutput]:
        size = self.config.eval_batch_size
        for start in range(0, len(samples), size):
            batch = samples.select(slice(start, start + size)).to(self.device)
            with torch.no_grad(), autocast(self.device, self.config.precision):
                output = self.model(batch.input, batch.program)
            yield output


def zero_shot(evaluator: Evaluator, tasks: GridTasks) -> dict[str, dict[str, float]]:
    """Accuracy (percent) on new samples of every split; "copied" is the IoU of the copy-input baseline."""
    config, found = evaluator.config, {}
    for split in SPLIT_NAMES:
        samples = tasks.draw(split, config.test_samples, rng("grid test", config.seed, split))
        copied = iou(samples.input, samples.target).double().mean().item()
        found[split] = evaluator.accuracy(samples) | {"copied": 100 * copied}
    return found


def run_metrics(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of a run, in the order of `GRIDS`; few-shot tasks that miss the target count all steps."""
    metrics: dict[str, float | None] = {}
    for split, values in evaluation["zero_shot"].items():
        metrics |= {f"{split}_iou": values["iou"], f"{split}_solved": values["solved"]}
    metrics |= evaluation["analysis"]
    if evaluation["few_shot"]:
        rows = pd.DataFrame(evaluation["few_shot"])
        rows["reached"] = rows["steps"].notna()
        rows["steps"] = rows["steps"].astype(float).fillna(rows["all_steps"])
        numbers = rows[["before", "after", "steps", "reached"]]
        metrics |= {f"few_shot_{name}": statistics.fmean(values) for name, values in numbers.items()}
        metrics["few_shot_reached"] *= 100
    return {spec.key: metrics[spec.key] for spec in GRIDS if spec.key in metrics}


def report(evaluation: Mapping[str, Any]) -> Report:
    """The run's report: event, log lines, result and tables; times are in its cost alone."""
    zero_shot, rows = evaluation["zero_shot"], evaluation["few_shot"]
    seconds = [row["seconds"] for row in rows]
    untimed = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return Report(
        event={"zero_shot": zero_shot, "analysis": evaluation["analysis"]},
        lines=log_lines(evaluation),
        result={"metrics": run_metrics(evaluation), "zero_shot": zero_shot, "few_shot": untimed},
        tables=lambda: result_tables(evaluation),
        cost={"few_shot_seconds": statistics.fmean(seconds)} if seconds else {},
    )


def log_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """The main results in sentences; a dash where no pair of tasks is of a kind."""
    unseen, metrics = evaluation["zero_shot"][UNSEEN], evaluation["analysis"]
    shared, other = (
        "-" if metrics[name] is None else f"{metrics[name]:.3f}"
        for name in ("grassmann_shared", "grassmann_other")
    )
    tasks = f"{shared} between tasks that share a primitive, {other} between others"
    lines = [
        f"Unseen compositions: IoU {unseen['iou']:.2f} %, {unseen['solved']:.2f} % of grids solved",
        f"Subspaces of h: Grassmann distance {tasks}, {metrics['grassmann_chance']:.3f} by chance",
    ]
    if "unit_alignment" in metrics:
        chance = f"{metrics['unit_chance']:.3f} by chance; of h {metrics['hidden_alignment']:.3f}"
        best = f"|r| of the best unit for a primitive {metrics['unit_alignment']:.3f}"
        lines.append(f"Sparse code: {best}, {chance}")
    return lines


def result_tables(evaluation: Mapping[str, Any]) -> list[str]:
    """The zero-shot table with one line per split, and the few-shot table where there is one."""
    rows = evaluation["few_shot"]
    table = pd.DataFrame(evaluation["zero_shot"]).T.rename(index=SPLIT_NAMES)
    table.columns = ["IoU", "cells right", "grids solved", "IoU of the input itself"]
    zero_shot_table = f"New grids (%), no adaptation\n{table.to_string(float_format='%.2f')}"
    return [zero_shot_table, *([few_shot_table(rows)] if rows else [])]


def few_shot_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table with one line per unseen composition; steps and seconds are those to the target."""
    table = pd.DataFrame(rows).set_index("composition")[["before", "after", "steps", "seconds"]]
    table["steps"] = table["steps"].astype(float)  # NaN where the target was not reached
    reached = table["steps"].notna()
    table["seconds"] = table["seconds"].where(reached)
    table.loc["mean"] = table[["before", "after"]].mean()
    steps = {"steps": lambda number: "-" if pd.isna(number) else f"{number:.0f}"}
    text = table.to_string(float_format="%.2f", formatters=steps, na_rep="-", index_names=False)
    title = "IoU (%) of unseen compositions before and after adapters, steps and seconds to the target"
    return f"{title}\n{text}\n{reached.sum()} of {len(rows)} reached {rows[0]['target']:g} %"
