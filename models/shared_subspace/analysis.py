"""What a network on grids represents: how alike tasks are, what can be read out of it, what single units stand for.

    found = {name: ANALYSES[name](material) for name in ("grassmann", "units")}
    write_results(run / "analysis", found)      # utils/analysis/results.py

A run makes them when it ends, `python eval.py --run FOLDER --analyse cka grassmann probes units samples` again. A
*task* is a multi-hot label of the training compositions. Layers are those of `GridModel.layers`.

    cka         linear CKA between tasks, on the same input grids
    grassmann   Grassmann distance between the tasks' principal subspaces
    probes      linear probes of the primitives, fitted on compositions of training and read on unseen ones
    units       correlation of single units of z, and of h, with the primitives; which samples drive the best ones
    samples     grids, and what the network makes of them
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.shared_subspace.sample_figures import GridSample, grid_samples_figure
from models.shared_subspace.tables import SPLIT_NAMES
from models.shared_subspace.tasks import GridBatch
from utils.analysis.figures import Heatmap, HeatmapSpec, heatmaps_figure, unit_label_figure
from utils.analysis.probes import UnitReport, chance_score, fit_probe, probe_score, unit_report
from utils.analysis.results import AnalysisResult, Row, listed, number, value_table
from utils.analysis.similarity import cka_matrix, grassmann_distance, pca_basis
from utils.console import progress
from utils.training.random import rng

SHARED, OTHER = "tasks that share the primitive", "tasks without it and with nothing in common"
SAMPLES_A_UNIT = 4  # that a unit's picture shows
Layers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Looked:
    """Samples and what the network makes of them: layer -> (n, d), predicted colours (n, 8, 8), programs in words."""

    samples: GridBatch
    layers: Layers
    colours: Tensor
    programs: Sequence[str]


@dataclass(frozen=True)
class GridMaterial:
    """What there is to analyse of a network.

    Attributes:
        primitives: names of the P primitives.
        tasks: (G, P) bool, the labels of the training compositions.
        own: layer -> (G, n, d), new grids of each task.
        same: layer -> (G, n, d), the same n input grids under one program of each task.
        fitted: new samples of training compositions, that probes are fitted on and units are looked at.
        splits: split -> other samples.
        rank: dimensions of a task's subspace.
        seed: draws permutations and random subspaces.
        about: the run, for figures.
    """

    primitives: Sequence[str]
    tasks: Tensor
    own: Layers
    same: Layers
    fitted: Looked
    splits: Mapping[str, Looked]
    rank: int
    seed: int
    about: str


# ---------------------------------------------------------------------------------------------------------------------
# The analyses


def cka(material: GridMaterial) -> AnalysisResult:
    """How alike tasks arrange the same grids: linear CKA between them, in every layer."""
    layers = progress(material.same.items(), desc="CKA", unit="layer")
    values = {layer: cka_matrix(list(vectors)).numpy() for layer, vectors in layers}
    frame = HeatmapSpec(
        "layer", "primitive", "linear CKA", (0.0, 1.0), row_names=list(values), column_names=None
    )
    about = f"{material.about} · {material.same['h'].shape[1]} input grids"
    title = "Linear CKA between tasks on the same grids"
    return _between_tasks("cka", values, material, frame, title, about)


def grassmann(material: GridMaterial) -> AnalysisResult:
    """How far tasks' principal subspaces lie apart, in every layer; random subspaces for comparison."""
    layers = progress(material.own.items(), desc="Grassmann distances", unit="layer")
    values = {layer: _distances(vectors, material.rank) for layer, vectors in layers}
    generator = rng("chance distance", material.seed)
    chance = {
        layer: _chance_distance(vectors, material.rank, generator) for layer, vectors in material.own.items()
    }
    highest = max(1.0, *(float(np.nanmax(matrix)) for matrix in values.values()))
    frame = HeatmapSpec("layer", "primitive", "radians", (0.0, highest), row_names=list(values))
    about = f"{material.about} · {material.rank} directions; by chance {chance['h']:.2f} in h"
    title = "Grassmann distance between tasks' subspaces (radians)"
    found = _between_tasks("grassmann", values, material, frame, title, about)
    found.numbers["chance"] = chance
    shared, other = pair_means(values["h"], material.tasks)
    found.numbers["metrics"] |= {"grassmann_gap": number(other - shared), "grassmann_chance": chance["h"]}
    return found


def probes(material: GridMaterial) -> AnalysisResult:
    """What a linear probe reads of the primitives in every layer: mean average precision, percent."""
    fitted, names = material.fitted, list(material.splits)
    layers = progress(fitted.layers.items(), desc="Probes", unit="layer")
    probe_of = {layer: fit_probe(vectors, fitted.samples.primitives) for layer, vectors in layers}
    scores = {
        layer: [
            100 * probe_score(probe, looked.layers[layer], looked.samples.primitives)
            for looked in material.splits.values()
        ]
        for layer, probe in probe_of.items()
    }
    chance = {
        split: 100 * chance_score(looked.samples.primitives) for split, looked in material.splits.items()
    }
    values = np.array([*scores.values(), list(chance.values())])
    rows, columns = [*scores, "chance"], [SPLIT_NAMES[split] for split in names]
    title = "Linear probes of the primitives, fitted on compositions of training: mean average precision (%)"
    frame = HeatmapSpec(
        "layer", "tested on", "average precision (%)", (0.0, 100.0), 1, "viridis", rows, columns
    )
    table = [
        {"layer": layer, "split": split, "average_precision": float(values[i, j])}
        for i, layer in enumerate(rows)
        for j, split in enumerate(names)
    ]
    return AnalysisResult(
        numbers={
            "fitted_on": len(fitted.samples),
            "average_precision": {layer: dict(zip(names, own, strict=True)) for layer, own in scores.items()},
            "chance": chance,
            "metrics": {f"probe_{split}": score for split, score in zip(names, scores["h"], strict=True)},
        },
        tables={"probes": table},
        figures={
            "probes": lambda: heatmaps_figure(
                [Heatmap("", values)], frame, "Linear probes (%)", material.about
            )
        },
        text=value_table(title, rows, columns, values, 1),
    )


def units(material: GridMaterial) -> AnalysisResult:
    """Whether single units stand for single primitives, in the sparse code z, and in h for comparison."""
    labels, generator = material.fitted.samples.primitives, rng("unit permutations", material.seed)
    reports = {
        layer: unit_report(material.fitted.layers[layer], labels, generator)
        for layer in ("h", "z")
        if layer in material.fitted.layers
    }
    figures: dict[str, Callable[[], Figure]] = {}
    for layer, report in reports.items():
        figures[f"units_{layer}"] = lambda layer=layer, report=report: _units_figure(material, layer, report)
    code = "z" if "z" in reports else "h"
    figures["unit_samples"] = lambda: _unit_samples_figure(material, code, reports[code])
    text = [_unit_text(material, layer, report) for layer, report in reports.items()]
    return AnalysisResult(
        numbers={layer: _unit_numbers(report) for layer, report in reports.items()}
        | {
            "metrics": {
                name: value for layer in reports for name, value in _unit_metrics(layer, reports[layer])
            }
        },
        tables={f"units_{layer}": _unit_rows(material, report) for layer, report in reports.items()},
        figures=figures,
        text="\n\n".join(text),
    )


def samples(material: GridMaterial) -> AnalysisResult:
    """The first samples of every split with what the network makes of them."""
    shown = [
        _sample(looked, i) for looked in material.splits.values() for i in range(min(8, len(looked.samples)))
    ]
    title = f"New grids: {', '.join(SPLIT_NAMES[split] for split in material.splits)} (a line each)"
    solved = {
        split: float((looked.colours == looked.samples.target).flatten(1).all(dim=1).double().mean())
        for split, looked in material.splits.items()
    }
    return AnalysisResult(
        numbers={"solved": solved, "metrics": {}},
        tables={},
        figures={"samples": lambda: grid_samples_figure(shown, title, material.about)},
        text="samples.png shows grids of every split, and what the network makes of them.",
    )


ANALYSES: dict[str, Callable[[GridMaterial], AnalysisResult]] = {
    "cka": cka,
    "grassmann": grassmann,
    "probes": probes,
    "units": units,
    "samples": samples,
}


def metrics_of(found: Mapping[str, AnalysisResult]) -> dict[str, float | None]:
    """The numbers of analyses by which runs are compared."""
    return {name: value for findings in found.values() for name, value in findings.numbers["metrics"].items()}


# ---------------------------------------------------------------------------------------------------------------------
# Between tasks


def pair_means(values: np.ndarray, tasks: Tensor) -> tuple[float, float]:
    """Means of values (G, G) over pairs of tasks (G, P) that have a primitive in common, and over other pairs."""
    common = (tasks.double() @ tasks.double().T).numpy() > 0
    upper = np.triu(np.ones_like(common), k=1).astype(bool)
    return _mean(values[upper & common]), _mean(values[upper & ~common])


def primitive_means(values: np.ndarray, tasks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each primitive, means of values (G, G) over pairs of tasks (G, P): both have it; or one has it, and the other
    has nothing in common with that one. (P,) each, NaN where there is no such pair.
    """
    has, common = tasks.numpy().astype(bool), (tasks.double() @ tasks.double().T).numpy() > 0
    off_diagonal = ~np.eye(len(has), dtype=bool)
    shared = [_mean(values[np.outer(own, own) & off_diagonal]) for own in has.T]
    other = [_mean(values[own[:, None] & ~common]) for own in has.T]
    return np.array(shared), np.array(other)


def _between_tasks(
    name: str,
    values: Mapping[str, np.ndarray],
    material: GridMaterial,
    frame: HeatmapSpec,
    title: str,
    about: str,
) -> AnalysisResult:
    """AnalysisResult of a measure between tasks: layer -> (G, G)."""
    columns, tasks = list(material.primitives), material.tasks
    means = {layer: pair_means(matrix, tasks) for layer, matrix in values.items()}
    shared, other = (
        np.stack(both)
        for both in zip(*(primitive_means(matrix, tasks) for matrix in values.values()), strict=True)
    )
    frame = frame._replace(column_names=columns)
    maps = [Heatmap(SHARED, shared), Heatmap(OTHER, other)]
    table = [
        {
            "layer": layer,
            "first": _label(tasks[i], columns),
            "second": _label(tasks[j], columns),
            name: number(m[i, j]),
        }
        for layer, m in values.items()
        for i, j in combinations(range(len(tasks)), 2)
    ]
    with_primitive, without = means["h"]
    text = value_table(
        title, list(means), ["shared primitive", "nothing shared"], np.array([*means.values()]), 3
    )
    return AnalysisResult(
        numbers={
            "tasks": [_label(task, columns) for task in tasks],
            "means": {layer: {"shared": number(a), "other": number(b)} for layer, (a, b) in means.items()},
            "shared_by_primitive": dict(zip(values, listed(shared), strict=True)),
            "other_by_primitive": dict(zip(values, listed(other), strict=True)),
            "metrics": {f"{name}_shared": number(with_primitive), f"{name}_other": number(without)},
        },
        tables={name: table},
        figures={name: lambda: heatmaps_figure(maps, frame, title, about)},
        text=text,
    )


def _distances(vectors: Tensor, rank: int) -> np.ndarray:
    """Grassmann distance of every two of the tasks' subspaces, (G, n, d) -> (G, G) radians.

    NaN beside a task whose samples vary in fewer than `rank` directions: fewer angles would make a smaller distance.
    """
    bases = [pca_basis(own, rank) for own in vectors]
    values = np.zeros((len(bases), len(bases)))
    for i, j in combinations(range(len(bases)), 2):
        whole = bases[i].shape[1] == bases[j].shape[1] == rank
        values[i, j] = values[j, i] = grassmann_distance(bases[i], bases[j]) if whole else np.nan
    return values


def _chance_distance(vectors: Tensor, rank: int, generator: torch.Generator, pairs: int = 20) -> float:
    """Mean Grassmann distance of random subspaces of that many dimensions in the layer's space, radians."""
    width, rank = vectors.shape[2], min(rank, *vectors.shape[1:])
    drawn = torch.randn(2 * pairs, width, rank, generator=generator, dtype=torch.float64)
    return float(np.mean([grassmann_distance(a, b) for a, b in drawn.unflatten(0, (pairs, 2))]))


# ---------------------------------------------------------------------------------------------------------------------
# Units


def _unit_metrics(layer: str, report: UnitReport) -> list[tuple[str, float]]:
    """Means over primitives of the best unit's |r|, and of what that stays below by chance; percent that do not."""
    name = "unit" if layer == "z" else "hidden"
    return [
        (f"{name}_alignment", float(report.best.abs().mean())),
        (f"{name}_chance", float(report.threshold.mean())),
        (f"{name}_aligned", 100 * report.aligned),
    ]


def _unit_numbers(report: UnitReport) -> Row:
    return {
        "units": len(report.correlation),
        "dead": report.dead,
        "mean_active_share": float(report.active_share.mean()),
        "purity": number(report.purity),
        "purity_by_chance": number(report.purity_by_chance),
        "best_unit": report.best_unit.tolist(),
        "best": report.best.tolist(),
        "threshold": report.threshold.tolist(),
        "p": report.p.tolist(),
    }


def _unit_rows(material: GridMaterial, report: UnitReport) -> list[Row]:
    """A row for each unit: its activity, and its correlation with every primitive."""
    return [
        {
            "unit": unit,
            "mean": float(report.mean_activity[unit]),
            "active_share": float(report.active_share[unit]),
        }
        | dict(zip(material.primitives, report.correlation[unit].tolist(), strict=True))
        for unit in range(len(report.correlation))
    ]


def _unit_text(material: GridMaterial, layer: str, report: UnitReport) -> str:
    rows = np.stack([report.best_unit.numpy(), report.best.numpy(), report.threshold.numpy()], axis=1)
    lines = [
        f"best unit of {layer} for each primitive ({len(report.correlation)} units, {report.dead} silent, "
        f"purity {report.purity:.2f}, by chance {report.purity_by_chance:.2f}): r, and |r| by chance (95 %)",
        f"{'':<16}{'unit':>8}{'r':>8}{'chance':>8}",
    ]
    lines += [
        f"{name:<16}{unit:>8.0f}{r:>8.2f}{chance:>8.2f}"
        for name, (unit, r, chance) in zip(material.primitives, rows, strict=True)
    ]
    return "\n".join(lines)


def _units_figure(material: GridMaterial, layer: str, report: UnitReport) -> Figure:
    title = f"Correlation of units of {layer} with primitives"
    about = f"{material.about} · {len(material.fitted.samples)} samples"
    return unit_label_figure(
        report.correlation.numpy(), material.primitives, report.threshold.tolist(), title, about
    )


def _unit_samples_figure(material: GridMaterial, layer: str, report: UnitReport) -> Figure:
    """For each primitive the samples on which the unit with the highest correlation is most active."""
    looked, shown = material.fitted, []
    for name, unit in zip(material.primitives, report.correlation.argmax(dim=0).tolist(), strict=True):
        activity = looked.layers[layer][:, unit]
        for index in activity.argsort(descending=True, stable=True)[:SAMPLES_A_UNIT].tolist():
            words = f"{name}, {layer}{unit}: {looked.programs[index]}"
            shown.append(_sample(looked, index)._replace(caption=words, prediction=None))
    title = (
        f"What drives the unit of {layer} that goes best with each primitive, {SAMPLES_A_UNIT} samples each"
    )
    return grid_samples_figure(shown, title, material.about)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _sample(looked: Looked, index: int) -> GridSample:
    grids = (looked.samples.input, looked.samples.target, looked.colours)
    return GridSample(looked.programs[index], *(grid[index].numpy() for grid in grids))


def _label(task: Tensor, primitives: Sequence[str]) -> str:
    """The primitives of a multi-hot label: "rotate + shift"."""
    return " + ".join(name for name, there in zip(primitives, task.tolist(), strict=True) if there)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
