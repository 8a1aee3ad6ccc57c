"""Analyses of a network on grids: CKA, Grassmann distances, linear probes, single units, samples.

    inputs = analysis_inputs(evaluator, tasks)
    found = {name: ANALYSES[name](inputs) for name in ("grassmann", "units")}
    write_results(run / "analysis", found)       # utils/analysis/results.py

Made at the end of a run, and by `python eval.py --run FOLDER --analyse cka grassmann probes units samples`.
A *task* is a multi-hot label of the training compositions; layers are `GridOutput.representations`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.shared_subspace.evaluation import SPLIT_NAMES, Evaluator
from models.shared_subspace.figures import GridSample, grid_samples_figure
from models.shared_subspace.tasks import TRAIN, GridSamples, GridTasks
from utils.analysis.figures import Heatmap, HeatmapSpec, heatmaps_figure, unit_label_figure
from utils.analysis.probes import UnitReport, chance_score, fit_probe, probe_score, unit_report
from utils.analysis.results import AnalysisResult, Row, listed, number
from utils.analysis.similarity import cka_matrix, grassmann_distance, pca_basis
from utils.console import progress
from utils.runs.tables import value_table
from utils.training.random import rng

SHARED, OTHER = "tasks that share the primitive", "tasks without it and with nothing in common"
TASK_SAMPLES = 64  # per task; more where a subspace of `rank` dimensions needs more
PROBE_SAMPLES = 2048  # to fit probes and to correlate units; half as many of each split test the probes
CHANCE_PAIRS = 20  # of random subspaces
SAMPLES_PER_SPLIT, SAMPLES_PER_UNIT = 8, 4  # in figures
Layers = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelOutputs:
    """Samples with the network's outputs."""

    samples: GridSamples
    layers: Layers  # (N, d) each
    colours: Tensor  # (N, 8, 8), predicted
    programs: Sequence[str]  # in words


@dataclass(frozen=True)
class AnalysisInputs:
    """Inputs of every analysis: layers of a network for new samples of its tasks."""

    primitives: Sequence[str]  # names
    tasks: Tensor  # (G, P) bool, the labels of the training compositions
    by_task: Layers  # (G, n, d) each, n samples per task
    same_grids: Layers  # (G, n, d) each, the same n input grids under one program per task
    fitted: ModelOutputs  # for training compositions; probes and units are fitted to them
    splits: Mapping[str, ModelOutputs]  # other samples by split
    rank: int  # dimensions of a task's subspace
    seed: int  # of permutations and random subspaces
    title: str  # of the run, for figures


def analysis_inputs(evaluator: Evaluator, tasks: GridTasks) -> AnalysisInputs:
    """Inputs of every analysis, drawn from the seed; samples differ from those of training and tests."""
    config = evaluator.config
    rank, seed = config.sharing_rank, config.seed
    per_task = max(TASK_SAMPLES, 2 * rank)

    def by_task(samples: GridSamples) -> Layers:
        layers = evaluator.representations(samples)
        return {layer: vectors.unflatten(0, (-1, per_task)) for layer, vectors in layers.items()}

    def outputs(samples: GridSamples) -> ModelOutputs:
        programs = [tasks.describe_program(program) for program in samples.program]
        return ModelOutputs(samples, evaluator.representations(samples), evaluator.predict(samples), programs)

    return AnalysisInputs(
        primitives=tasks.primitives,
        tasks=tasks.splits[TRAIN].labels,
        by_task=by_task(tasks.draw_every_label(TRAIN, per_task, rng("analysis tasks", seed))),
        same_grids=by_task(tasks.draw_same_grids(TRAIN, per_task, rng("analysis same grids", seed))),
        fitted=outputs(tasks.draw(TRAIN, PROBE_SAMPLES, rng("analysis fit", seed))),
        splits={
            split: outputs(tasks.draw(split, PROBE_SAMPLES // 2, rng("analysis split", seed, split)))
            for split in SPLIT_NAMES
        },
        rank=rank,
        seed=seed,
        title=f"{config.prefix} · {config.encoder} · seed {seed}",
    )


# --- between tasks ------------------------------------------------------------------------------------------


def cka(inputs: AnalysisInputs) -> AnalysisResult:
    """Linear CKA between tasks on the same grids, in every layer."""
    layers = progress(inputs.same_grids.items(), desc="CKA", unit="layer")
    values = {layer: cka_matrix(list(vectors)).numpy() for layer, vectors in layers}
    note = f"{inputs.same_grids['h'].shape[1]} input grids"
    title = "Linear CKA between tasks on the same grids"
    return _between_tasks("cka", values, inputs, ("linear CKA", 1.0), title, note)


def grassmann(inputs: AnalysisInputs) -> AnalysisResult:
    """Grassmann distance between tasks' principal subspaces, in every layer, and between random subspaces."""
    rank, generator = inputs.rank, rng("chance distance", inputs.seed)
    layers = progress(inputs.by_task.items(), desc="Grassmann distances", unit="layer")
    values = {layer: _distances(vectors, rank) for layer, vectors in layers}
    chance = {layer: _chance_distance(vectors, rank, generator) for layer, vectors in inputs.by_task.items()}
    highest = max(1.0, *(float(np.nanmax(matrix)) for matrix in values.values()))
    title = "Grassmann distance between tasks' subspaces (radians)"
    note = f"{rank} directions; by chance {chance['h']:.2f} in h"
    found = _between_tasks("grassmann", values, inputs, ("radians", highest), title, note)
    found.numbers["chance"] = chance
    (shared, other), _ = task_means(values["h"], inputs.tasks)
    found.numbers["metrics"] |= {"grassmann_gap": number(other - shared), "grassmann_chance": chance["h"]}
    return found


def task_means(values: np.ndarray, tasks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means of values (G, G) over pairs of tasks (G, P): (2,), and for each primitive (2, P).

    The first are over pairs that share a primitive, and over other pairs; the second over pairs that both
    have the primitive, and over pairs of which one has it and that share nothing. NaN where there is no pair.
    """
    has = tasks.numpy().astype(bool)
    common, upper = has @ has.T, np.triu(np.ones((len(has), len(has)), dtype=bool), k=1)
    pairs = [_mean(values[upper & common]), _mean(values[upper & ~common])]
    shared = [_mean(values[np.outer(own, own) & (upper | upper.T)]) for own in has.T]
    other = [_mean(values[own[:, None] & ~common]) for own in has.T]
    return np.array(pairs), np.array([shared, other])


def _between_tasks(
    name: str,
    values: Mapping[str, np.ndarray],
    inputs: AnalysisInputs,
    scale: tuple[str, float],
    title: str,
    note: str,
) -> AnalysisResult:
    """Result of a measure between tasks: layer -> (G, G); scale: its unit and the end of its colour bar."""
    columns, tasks, layers = list(inputs.primitives), inputs.tasks, list(values)
    labels = [" + ".join(np.array(columns)[task]) for task in tasks.numpy()]
    found = [task_means(matrix, tasks) for matrix in values.values()]
    means, by_primitive = (np.stack(arrays) for arrays in zip(*found, strict=True))
    shared, other = by_primitive[:, 0], by_primitive[:, 1]  # (layers, P)
    unit, highest = scale
    spec = HeatmapSpec("layer", "primitive", unit, (0.0, highest), row_names=layers, column_names=columns)
    maps, subtitle = [Heatmap(SHARED, shared), Heatmap(OTHER, other)], f"{inputs.title} · {note}"
    of_layers = [dict(zip(("shared", "other"), row, strict=True)) for row in listed(means)]
    numbers = {
        "tasks": labels,
        "means": dict(zip(layers, of_layers, strict=True)),
        "shared_by_primitive": dict(zip(layers, listed(shared), strict=True)),
        "other_by_primitive": dict(zip(layers, listed(other), strict=True)),
    }
    numbers["metrics"] = {f"{name}_{kind}": value for kind, value in numbers["means"]["h"].items()}
    table = [
        {"layer": layer, "first": labels[i], "second": labels[j], name: number(matrix[i, j])}
        for layer, matrix in values.items()
        for i, j in combinations(range(len(tasks)), 2)
    ]
    return AnalysisResult(
        numbers=numbers,
        tables={name: table},
        figures={name: lambda: heatmaps_figure(maps, spec, title, subtitle)},
        text=value_table(title, layers, ["shared primitive", "nothing shared"], means, 3),
    )


def _distances(vectors: Tensor, rank: int) -> np.ndarray:
    """Grassmann distance of every two of the tasks' subspaces, (G, n, d) -> (G, G) radians.

    NaN beside a task whose samples vary in fewer than `rank` directions: fewer angles would make a smaller
    distance.
    """
    bases = [pca_basis(own, rank) for own in vectors]
    values = np.zeros((len(bases), len(bases)))
    for i, j in combinations(range(len(bases)), 2):
        complete = bases[i].shape[1] == bases[j].shape[1] == rank
        values[i, j] = values[j, i] = grassmann_distance(bases[i], bases[j]) if complete else np.nan
    return values


def _chance_distance(vectors: Tensor, rank: int, generator: torch.Generator) -> float:
    """Mean Grassmann distance of random subspaces of dimension `rank` in the layer's space, radians."""
    width, rank = vectors.shape[2], min(rank, *vectors.shape[1:])
    drawn = torch.randn(2 * CHANCE_PAIRS, width, rank, generator=generator, dtype=torch.float64)
    return float(np.mean([grassmann_distance(a, b) for a, b in drawn.unflatten(0, (CHANCE_PAIRS, 2))]))


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


# --- probes -------------------------------------------------------------------------------------------------


def probes(inputs: AnalysisInputs) -> AnalysisResult:
    """Mean average precision (percent) of linear probes of the primitives, per layer and split."""
    fitted, splits = inputs.fitted, inputs.splits
    scores: dict[str, dict[str, float]] = {}
    for layer, vectors in progress(fitted.layers.items(), desc="Probes", unit="layer"):
        probe = fit_probe(vectors, fitted.samples.primitives)
        scores[layer] = {
            split: 100 * probe_score(probe, outputs.layers[layer], outputs.samples.primitives)
            for split, outputs in splits.items()
        }
    chance = {split: 100 * chance_score(outputs.samples.primitives) for split, outputs in splits.items()}
    lines = scores | {"chance": chance}
    values = np.array([list(line.values()) for line in lines.values()])
    rows, columns = list(lines), [SPLIT_NAMES[split] for split in splits]
    spec = HeatmapSpec(
        "layer", "tested on", "average precision (%)", (0.0, 100.0), 1, row_names=rows, column_names=columns
    )
    maps = [Heatmap("", values)]
    table = [
        {"layer": layer, "split": split, "average_precision": score}
        for layer, line in lines.items()
        for split, score in line.items()
    ]
    title = "Linear probes of the primitives, fitted on compositions of training: mean average precision (%)"
    return AnalysisResult(
        numbers={
            "fitted_on": len(fitted.samples),
            "average_precision": scores,
            "chance": chance,
            "metrics": {f"probe_{split}": score for split, score in scores["h"].items()},
        },
        tables={"probes": table},
        figures={"probes": lambda: heatmaps_figure(maps, spec, "Linear probes (%)", inputs.title)},
        text=value_table(title, rows, columns, values, 1),
    )


# --- units --------------------------------------------------------------------------------------------------


def units(inputs: AnalysisInputs) -> AnalysisResult:
    """Correlation of single units with single primitives, in the sparse code z, and in h for comparison."""
    labels, generator = inputs.fitted.samples.primitives, rng("unit permutations", inputs.seed)
    layers = {layer: inputs.fitted.layers[layer] for layer in ("h", "z") if layer in inputs.fitted.layers}
    reports = {layer: unit_report(vectors, labels, generator) for layer, vectors in layers.items()}
    numbers: Row = {"metrics": {}}
    figures: dict[str, Callable[[], Figure]] = {}
    for layer, report in reports.items():
        name = "unit" if layer == "z" else "hidden"
        numbers["metrics"] |= {
            f"{name}_alignment": float(report.best.abs().mean()),
            f"{name}_chance": float(report.threshold.mean()),
            f"{name}_aligned": 100 * report.aligned,
        }
        numbers[layer] = {
            "units": len(report.correlation),
            "dead": report.dead,
            "mean_active_share": float(report.active_share.mean()),
            "purity": number(report.purity),
            "purity_by_chance": number(report.purity_by_chance),
            **{key: getattr(report, key).tolist() for key in ("best_unit", "best", "threshold", "p")},
        }
        figures[f"units_{layer}"] = functools.partial(
            unit_label_figure,
            report.correlation.numpy(),
            inputs.primitives,
            report.threshold.tolist(),
            f"Correlation of units of {layer} with primitives",
            f"{inputs.title} · {len(labels)} samples",
        )
    last = list(reports)[-1]
    figures["unit_samples"] = functools.partial(_unit_samples_figure, inputs, last, reports[last])
    return AnalysisResult(
        numbers=numbers,
        tables={f"units_{layer}": _unit_rows(inputs, report) for layer, report in reports.items()},
        figures=figures,
        text="\n\n".join(_unit_text(inputs, layer, report) for layer, report in reports.items()),
    )


def _unit_rows(inputs: AnalysisInputs, report: UnitReport) -> list[Row]:
    """Activity of each unit, and its correlation with every primitive."""
    units = {"mean": report.mean_activity.tolist(), "active_share": report.active_share.tolist()}
    units |= dict(zip(inputs.primitives, report.correlation.T.tolist(), strict=True))
    return pd.DataFrame(units).rename_axis("unit").reset_index().to_dict("records")


def _unit_text(inputs: AnalysisInputs, layer: str, report: UnitReport) -> str:
    size = f"{len(report.correlation)} units, {report.dead} dead"
    purity = f"purity {report.purity:.2f}, by chance {report.purity_by_chance:.2f}"
    title = f"best unit of {layer} for each primitive ({size}, {purity}): r, and |r| by chance (95 %)"
    rows = [f"{name}, {layer}{unit}" for name, unit in zip(inputs.primitives, report.best_unit, strict=True)]
    values = torch.stack([report.best, report.threshold], dim=1).numpy()
    return value_table(title, rows, ["r", "chance"], values, 2)


def _unit_samples_figure(inputs: AnalysisInputs, layer: str, report: UnitReport) -> Figure:
    """For each primitive the samples on which the unit with the highest correlation is most active."""
    outputs, shown = inputs.fitted, []
    for name, unit in zip(inputs.primitives, report.correlation.argmax(dim=0).tolist(), strict=True):
        order = outputs.layers[layer][:, unit].argsort(descending=True, stable=True)
        for index in order[:SAMPLES_PER_UNIT].tolist():
            caption = f"{name}, {layer}{unit}: {outputs.programs[index]}"
            shown.append(_sample(outputs, index)._replace(caption=caption, prediction=None))
    title = f"Samples that most activate the unit of {layer} that goes best with each primitive"
    return grid_samples_figure(shown, title, inputs.title)


# --- samples ------------------------------------------------------------------------------------------------


def samples(inputs: AnalysisInputs) -> AnalysisResult:
    """The first samples of every split with their predictions, and the share of solved grids."""
    shown = [
        _sample(outputs, index)
        for outputs in inputs.splits.values()
        for index in range(min(SAMPLES_PER_SPLIT, len(outputs.samples)))
    ]
    title = f"New grids: {', '.join(SPLIT_NAMES[split] for split in inputs.splits)} (one line per split)"
    right = {split: outputs.colours == outputs.samples.target for split, outputs in inputs.splits.items()}
    solved = {split: float(own.flatten(1).all(dim=1).double().mean()) for split, own in right.items()}
    return AnalysisResult(
        numbers={"solved": solved, "metrics": {}},
        tables={},
        figures={"samples": lambda: grid_samples_figure(shown, title, inputs.title)},
        text="samples.png shows grids of every split with the network's predictions.",
    )


def _sample(outputs: ModelOutputs, index: int) -> GridSample:
    grids = (outputs.samples.input, outputs.samples.target, outputs.colours)
    return GridSample(outputs.programs[index], *(grid[index].numpy() for grid in grids))


ANALYSES: dict[str, Callable[[AnalysisInputs], AnalysisResult]] = {
    analyse.__name__: analyse for analyse in (cka, grassmann, probes, units, samples)
}


def metrics_of(found: Mapping[str, AnalysisResult]) -> dict[str, float | None]:
    """Metrics of a run from the results of its analyses."""
    return {name: value for findings in found.values() for name, value in findings.numbers["metrics"].items()}
