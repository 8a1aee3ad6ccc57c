"""What the representations of a class-incremental run did while it learned: drift, subspaces, what can be read out.

    found = {name: ANALYSES[name](material) for name in ("cka", "probes")}
    write_results(run / "analysis", found)      # utils/analysis/results.py

`python eval.py --run FOLDER --analyse cka grassmann probes` gathers the material from a run's checkpoints. All that
is compared are class tokens of the same test images, after each block of the network that each task left behind:

    cka         linear CKA with the network after task 0, and with the one before
    grassmann   angle between the principal subspaces of the same; and of fast and slow branches, where there are any
    probes      accuracy of a linear probe, on the network it was fitted on and on those after other tasks
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.analysis.figures import Heatmap, HeatmapSpec, branch_angles_figure, heatmaps_figure
from utils.analysis.probes import chance_score, transfer_scores
from utils.analysis.results import AnalysisResult, Row, listed, number, value_table
from utils.analysis.similarity import (
    FEWEST_SAMPLES,
    cka_matrix,
    grassmann_distance,
    pca_basis,
    principal_angles,
    rms_angle,
)
from utils.console import progress
from utils.data.tasks import DataManager
from utils.errors import UserError
from utils.training.device import seeded_generator

PCA_RANK = 10  # principal directions that stand for a representation
RANDOM_PAIRS = 20  # of subspaces, for the angle to be expected by chance
IMAGES, HALVES, CHANCE = range(1000, 1003)  # what a random stream is for; beside the seed, used nowhere else

Spaces = Mapping[tuple[int, int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class AnalysisInputs:
    """What there is to analyse of a run of T tasks, on n test images.

    Attributes:
        tokens: (T, L, n, d) class token after each of the L blocks, of the network after each task.
        labels: (n,) incremental labels of the images.
        spaces: for each task, (block, adapter) -> "fast" and "slow": basis (d, k) of what the branch can write to,
            without a column where it is silent. Empty where adapters have no such branches.
        seed: of the run; draws halves of images and random subspaces.
        about: the run, for figures.
    """

    tokens: Tensor
    labels: Tensor
    spaces: Sequence[Spaces]
    seed: int
    about: str


def chosen_images(data: DataManager, seed: int, per_class: int) -> np.ndarray:
    """Stored positions of at most `per_class` test images of every class of the run, class by class, int64 (n,).

    Raises:
        UserError: there are too few to compare representations, or to fit and test probes.
    """
    classes = range(data.task_classes(data.nb_tasks - 1).stop)
    chosen = [np.sort(data.order(range(c, c + 1), "test", (seed, IMAGES))[:per_class]) for c in classes]
    images = np.concatenate(chosen)
    if len(images) < FEWEST_SAMPLES or max(map(len, chosen)) < 2:
        raise UserError(
            f"the run has {len(images)} test images of {len(chosen)} classes to analyse; needed: at least "
            f"{FEWEST_SAMPLES}, and 2 of a class; run it again with a larger max_test_per_class"
        )
    return images


# ---------------------------------------------------------------------------------------------------------------------
# The analyses


def cka(material: AnalysisInputs) -> AnalysisResult:
    """How much of each block's geometry is kept: linear CKA between the networks after different tasks."""
    blocks = progress(material.tokens.unbind(1), desc="CKA", unit="block")
    values = np.stack([cka_matrix(list(tokens)).numpy() for tokens in blocks])  # (L, T, T)
    lowest = min(0.9, math.floor(10 * np.nanmin(values, initial=1.0)) / 10)
    frame = HeatmapSpec("block", "after task", "linear CKA", (lowest, 1.0), 3)
    title = "Linear CKA of class tokens between tasks"
    return AnalysisResult(
        numbers=_facts(material) | {"cka": listed(values)},
        tables={"cka": _drift_rows(values)},
        figures={"cka": lambda: heatmaps_figure(_drift_maps(values), frame, title, material.about)},
        text=_drift_text(values, "linear CKA (1: the same geometry)", 3),
    )


def grassmann(material: AnalysisInputs) -> AnalysisResult:
    """How far principal subspaces turn, and what angle fast and slow branches make."""
    values = _subspace_angles(material)
    rows = branch_rows(material)
    generator = seeded_generator(material.seed, CHANCE)
    width, rank = material.tokens.shape[-1], min(PCA_RANK, *material.tokens.shape[2:])
    chance = chance_angle(width, rank, rank, generator)
    highest = max(10.0, 10 * math.ceil(np.nanmax(values, initial=0.0) / 10))
    frame = HeatmapSpec("block", "after task", "angle (degrees)", (0.0, highest), 1)
    title = "Angle between principal subspaces of class tokens (degrees)"
    about = f"{material.about} · {rank} directions, root mean square of their angles; by chance {chance:.1f}"
    figures = {"grassmann": lambda: heatmaps_figure(_drift_maps(values), frame, title, about)}
    if rows:
        figures["branches"] = lambda: branch_angles_figure(rows, material.about)
    pca = {"rank": rank, "rms_degrees": listed(values), "chance_degrees": chance}
    drift = (
        f"angle between the first {rank} principal directions (degrees; two random subspaces: {chance:.1f})"
    )
    return AnalysisResult(
        numbers=_facts(material) | {"principal": pca, "branches": rows},
        tables={"grassmann": _drift_rows(values)} | ({"branches": rows} if rows else {}),
        figures=figures,
        text=f"{_drift_text(values, drift, 1)}\n\n{_branch_text(rows)}",
    )


def probes(material: AnalysisInputs) -> AnalysisResult:
    """What a linear probe reads out of each block, and whether it still reads it after later tasks.

    Half of each class's images fit the probes, the other half test them.
    """
    labels = material.labels
    train, test = halves(labels, seeded_generator(material.seed, HALVES))
    blocks = progress(material.tokens.unbind(1), desc="Probes", unit="block")
    scores = torch.stack([transfer_scores(list(tokens), labels, train, test) for tokens in blocks])
    values = 100 * scores.numpy()  # (L, T, T), percent
    chance = 100 * chance_score(labels[test])
    rows = [
        {"block": block, "fitted_after": i, "tested_after": j, "accuracy": float(value)}
        for (block, i, j), value in np.ndenumerate(values)
    ]
    own = np.diagonal(values, axis1=1, axis2=2)
    split = f"{len(train)} images to fit, {len(test)} to test, chance {chance:.1f}"
    about = f"{material.about} · {split}"
    frame = HeatmapSpec("block", "after task", "accuracy (%)", (0.0, 100.0), 1)
    maps = [Heatmap("fitted on the same network", own), Heatmap("fitted after task 0", values[:, 0])]
    title = "Accuracy of linear probes of class tokens (%)"
    pairs = HeatmapSpec("fitted after task", "tested after task", "accuracy (%)", (0.0, 100.0), 1)
    panels = [Heatmap(f"block {block}", matrix) for block, matrix in enumerate(values)]
    facts = {"fitted_on": len(train), "tested_on": len(test), "chance": chance, "accuracy": listed(values)}
    return AnalysisResult(
        numbers=_facts(material) | facts,
        tables={"probes": rows},
        figures={
            "probes": lambda: heatmaps_figure(maps, frame, title, about),
            "probe_transfer": lambda: heatmaps_figure(panels, pairs, title, about),
        },
        text="\n\n".join(
            task_table(f"linear probes {name}: accuracy (%); {split}", _blocks(values), numbers, 1)
            for name, numbers in maps
        ),
    )


ANALYSES: dict[str, Callable[[AnalysisInputs], AnalysisResult]] = {
    "cka": cka,
    "grassmann": grassmann,
    "probes": probes,
}


# ---------------------------------------------------------------------------------------------------------------------
# Their parts


def halves(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of two halves of the samples, class by class: (to fit, to test); an odd one out goes to the first."""
    fit, test = [], []
    for label in labels.unique():
        members = torch.nonzero(labels == label)[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        cut = (len(members) + 1) // 2
        fit.append(members[:cut])
        test.append(members[cut:])
    return torch.cat(fit), torch.cat(test)


def chance_angle(width: int, first: int, second: int, generator: torch.Generator) -> float:
    """Mean of `rms_angle` over pairs of random subspaces of these dimensions in R^width, degrees."""

    def subspace(dimension: int) -> Tensor:
        return torch.randn(width, dimension, generator=generator, dtype=torch.float64)

    return float(np.mean([rms_angle(subspace(first), subspace(second)) for _ in range(RANDOM_PAIRS)]))


def branch_rows(material: AnalysisInputs) -> list[Row]:
    """A row for each task and nested adapter: the angles of `branch_angles_figure`, degrees, None where there is none.

    Also the dimensions of both spaces, the smallest angle between them, and their Grassmann distance in radians.
    """
    generator, chances, rows = seeded_generator(material.seed, CHANCE), {}, []
    for task, spaces in enumerate(material.spaces):
        earlier = material.spaces[task - 1] if task else {}
        for (block, adapter), now in spaces.items():
            fast, slow, before = now["fast"], now["slow"], earlier.get((block, adapter))
            (width, k), m = fast.shape, slow.shape[1]
            there = k > 0 and m > 0
            if there and (k, m) not in chances:
                chances[k, m] = chance_angle(width, k, m, generator)
            rows.append(
                {
                    "task": task,
                    "block": block,
                    "adapter": adapter,
                    "fast_dimension": k,
                    "slow_dimension": m,
                    "between": number(rms_angle(fast, slow)),
                    "smallest": math.degrees(float(principal_angles(fast, slow)[0])) if there else None,
                    "distance": grassmann_distance(fast, slow) if there else None,
                    "fast_moved": number(rms_angle(before["fast"], fast)) if before else None,
                    "slow_moved": number(rms_angle(before["slow"], slow)) if before else None,
                    "chance": chances.get((k, m)),
                }
            )
    return rows


def task_table(title: str, names: Sequence[str], values: np.ndarray, decimals: int) -> str:
    """A line for each name and a column for each task of values (names, T)."""
    return value_table(title, names, [f"task {t}" for t in range(values.shape[1])], values, decimals)


def _subspace_angles(material: AnalysisInputs) -> np.ndarray:
    """`rms_angle` between principal subspaces, (L, T, T) degrees; NaN where a block's tokens do not vary."""
    tasks = len(material.tokens)
    values = np.zeros((material.tokens.shape[1], tasks, tasks))
    for block, tokens in enumerate(progress(material.tokens.unbind(1), desc="Angles", unit="block")):
        bases = [pca_basis(representation, PCA_RANK) for representation in tokens]
        for i, j in np.ndindex(tasks, tasks):
            values[block, i, j] = values[block, j, i] if j < i else rms_angle(bases[i], bases[j])
    return values


def _against(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of values (L, T, T): those of each task with task 0, and with the task before, (L, T); NaN where none is."""
    before = np.full(values.shape[:2], np.nan)
    before[:, 1:] = np.diagonal(values, offset=1, axis1=1, axis2=2)
    return values[:, 0], before


def _drift_rows(values: np.ndarray) -> list[Row]:
    first, before = _against(values)
    return [
        {"task": t, "block": b, "with_first": number(first[b, t]), "with_before": number(before[b, t])}
        for t in range(values.shape[1])
        for b in range(len(values))
    ]


def _drift_maps(values: np.ndarray) -> list[Heatmap]:
    first, before = _against(values)
    return [
        Heatmap("with the network after task 0", first),
        Heatmap("with the network a task before", before),
    ]


def _drift_text(values: np.ndarray, what: str, decimals: int) -> str:
    tables = [(f"{what}, {name}", numbers) for name, numbers in _drift_maps(values)]
    return "\n\n".join(task_table(title, _blocks(values), numbers, decimals) for title, numbers in tables)


def _branch_text(rows: Sequence[Row]) -> str:
    """The angle between fast and slow of every adapter over tasks, or a sentence where there is none."""
    if not rows:
        return "This run has no nested adapters: there is no angle between a fast and a slow branch."
    adapters = sorted({(row["block"], row["adapter"]) for row in rows})
    values = np.full((len(adapters), 1 + max(row["task"] for row in rows)), np.nan)
    for row in rows:
        if row["between"] is not None:
            values[adapters.index((row["block"], row["adapter"])), row["task"]] = row["between"]
    if np.isnan(values).all():
        return (
            "A branch is silent whenever a task ends (consolidation restarts fast, or a rate is 0): there is no angle "
            "between fast and slow; how far the other one moved is in branches.csv."
        )
    chances = [row["chance"] for row in rows if row["chance"] is not None]
    title = f"angle between fast and slow (degrees; two random subspaces: about {np.mean(chances):.1f})"
    return task_table(title, [f"block {block}.{adapter}" for block, adapter in adapters], values, 1)


def _facts(material: AnalysisInputs) -> Row:
    """What was looked at."""
    tasks, blocks, images, width = material.tokens.shape
    classes = len(material.labels.unique())
    return {"tasks": tasks, "blocks": blocks, "images": images, "classes": classes, "width": width}


def _blocks(values: np.ndarray) -> list[str]:
    return [f"block {block}" for block in range(len(values))]
