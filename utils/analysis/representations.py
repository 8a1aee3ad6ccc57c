"""Analyses of how representations change over the tasks of a class-incremental run.

    results = {name: ANALYSES[name](inputs) for name in ("cka", "probes")}
    write_results(run / "analysis", results)     # utils/analysis/results.py

`python eval.py --run FOLDER --analyse cka grassmann probes` gathers the inputs from a run's checkpoints:
class tokens of the same test images after each block of the network, once for the network after every task.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from utils.analysis.figures import (
    Heatmap,
    HeatmapSpec,
    branch_angles_figure,
    heatmaps_figure,
    weights_figure,
)
from utils.analysis.probes import chance_score, transfer_scores
from utils.analysis.results import AnalysisResult, Row, listed, number
from utils.analysis.similarity import (
    MIN_SAMPLES,
    cka_matrix,
    grassmann_distance,
    pca_basis,
    principal_angles,
    rms_angle,
)
from utils.console import progress
from utils.data.tasks import DataManager
from utils.errors import UserError
from utils.runs.tables import value_table
from utils.training.random import rng

PCA_RANK = 10  # principal directions that stand for a representation
RANDOM_PAIRS = 20  # of subspaces, for the angle to be expected by chance


@dataclass(frozen=True)
class AnalysisInputs:
    """Representations of n test images by a run of T tasks.

    Spaces are, for each task, (block, adapter) -> "fast" and "slow": basis (d, k) of the branch's output
    space, k = 0 where its output is zero; empty where adapters have no such branches. Weights are, for each
    task, the gate's evaluation weights of the adapters by the task that grew them; empty without a gate.
    """

    tokens: Tensor  # (T, L, n, d) class token after each of the L blocks, of the network after each task
    labels: Tensor  # (n,) incremental labels of the images
    spaces: Sequence[Mapping[tuple[int, int], Mapping[str, Tensor]]]
    seed: int  # of the run; draws halves of images and random subspaces
    about: str  # the run, for figures
    tasks: Tensor  # (n,) task of each image's class
    weights: Sequence[Mapping[int, float]]

    @property
    def facts(self) -> Row:
        """Sizes, for the JSON files."""
        tasks, blocks, images, width = self.tokens.shape
        classes = len(self.labels.unique())
        return {"tasks": tasks, "blocks": blocks, "images": images, "classes": classes, "width": width}


def chosen_images(data: DataManager, seed: int, per_class: int) -> np.ndarray:
    """Stored positions of at most `per_class` images of every class that the run is measured on, int64 (n,).

    Raises:
        UserError: there are too few to compare representations, or to fit and test probes.
    """
    classes = range(data.task_classes(data.nb_tasks - 1).stop)
    chosen = [
        np.sort(data.order(range(c, c + 1), data.evaluated, ("analysis images", seed))[:per_class])
        for c in classes
    ]
    images = np.concatenate(chosen)
    if len(images) < MIN_SAMPLES or max(map(len, chosen)) < 2:
        raise UserError(
            f"the run has {len(images)} {data.evaluated} images of {len(chosen)} classes to analyse; needed: "
            f"at least {MIN_SAMPLES}, and 2 of a class; run it again with a larger max_test_per_class"
        )
    return images


# ------------------------------------------------------------------------------------------------------------
# The analyses


def cka(inputs: AnalysisInputs) -> AnalysisResult:
    """Drift of each block's geometry: linear CKA between the networks after different tasks."""
    blocks = progress(inputs.tokens.unbind(1), desc="CKA", unit="block")
    values = np.stack([cka_matrix(list(tokens)).numpy() for tokens in blocks])  # (L, T, T)
    lowest = min(0.9, math.floor(10 * np.nanmin(values, initial=1.0)) / 10)
    spec = HeatmapSpec("block", "after task", "linear CKA", (lowest, 1.0), 3)
    title, what = "Linear CKA of class tokens between tasks", "linear CKA (1: the same geometry)"
    found = _drift("cka", values, inputs, spec, title, inputs.about, what)
    found.numbers["cka"] = listed(values)
    return found


def grassmann(inputs: AnalysisInputs) -> AnalysisResult:
    """Angles between principal subspaces over tasks, and between fast and slow branches."""
    tasks, blocks = inputs.tokens.shape[:2]
    values = np.zeros((blocks, tasks, tasks))  # NaN where a block's tokens do not vary
    for block, tokens in enumerate(progress(inputs.tokens.unbind(1), desc="Angles", unit="block")):
        bases = [pca_basis(representation, PCA_RANK) for representation in tokens]
        for i, j in itertools.combinations_with_replacement(range(tasks), 2):
            values[block, i, j] = values[block, j, i] = rms_angle(bases[i], bases[j])
    rows = branch_rows(inputs)
    images, width = inputs.tokens.shape[2:]
    rank = min(PCA_RANK, images - 1, width)  # rows less their mean span one direction less than they are
    chance = chance_angle(width, rank, rank, rng("chance angle", inputs.seed))
    highest = max(10.0, 10 * math.ceil(np.nanmax(values, initial=0.0) / 10))
    spec = HeatmapSpec("block", "after task", "angle (degrees)", (0.0, highest), 1)
    title = "Angle between principal subspaces of class tokens (degrees)"
    about = f"{inputs.about} · {rank} directions, root mean square of their angles; by chance {chance:.1f}"
    what = (
        f"angle between the first {rank} principal directions (degrees; two random subspaces: {chance:.1f})"
    )
    found = _drift("grassmann", values, inputs, spec, title, about, what)
    pca = {"rank": rank, "rms_degrees": listed(values), "chance_degrees": chance}
    found.numbers.update(principal=pca, branches=rows)
    found.tables["branches"] = rows
    if rows:
        found.figures["branches"] = lambda: branch_angles_figure(rows, inputs.about)
    return replace(found, text=f"{found.text}\n\n{_branch_text(rows)}")


def probes(inputs: AnalysisInputs) -> AnalysisResult:
    """Accuracy of linear probes of each block, on their own network and on those after other tasks.

    Half of each class's images fit the probes, the other half test them.
    """
    labels = inputs.labels
    train, test = halves(labels, rng("probe halves", inputs.seed))
    blocks = progress(inputs.tokens.unbind(1), desc="Probes", unit="block")
    scores = torch.stack([transfer_scores(list(tokens), labels, train, test) for tokens in blocks])
    values = 100 * scores.numpy()  # (L, T, T), percent
    chance = 100 * chance_score(labels[test])
    split = f"{len(train)} images to fit, {len(test)} to test, chance {chance:.1f}"
    about = f"{inputs.about} · {split}"
    title = "Accuracy of linear probes of class tokens (%)"
    over_tasks = HeatmapSpec("block", "after task", "accuracy (%)", (0.0, 100.0), 1)
    own = np.diagonal(values, axis1=1, axis2=2)
    maps = [Heatmap("fitted on the same network", own), Heatmap("fitted after task 0", values[:, 0])]
    pairs = HeatmapSpec("fitted after task", "tested after task", "accuracy (%)", (0.0, 100.0), 1)
    panels = [Heatmap(f"block {block}", matrix) for block, matrix in enumerate(values)]
    rows = [
        {"block": block, "fitted_after": i, "tested_after": j, "accuracy": float(value)}
        for (block, i, j), value in np.ndenumerate(values)
    ]
    facts = {"fitted_on": len(train), "tested_on": len(test), "chance": chance, "accuracy": listed(values)}
    return AnalysisResult(
        numbers=inputs.facts | facts,
        tables={"probes": rows},
        figures={
            "probes": lambda: heatmaps_figure(maps, over_tasks, title, about),
            "probe_transfer": lambda: heatmaps_figure(panels, pairs, title, about),
        },
        text=_texts(f"accuracy of linear probes (%; {split})", maps, 1),
    )


def gate(inputs: AnalysisInputs) -> AnalysisResult:
    """Gate weights of earlier tasks' adapters, compared with the similarity of these tasks to the newest one.

    Similarity of two tasks is the cosine of their mean class tokens after the last block of the network after
    task 0, centred over tasks. A weight is given as a multiple of 1 / K, that of K adapters with equal
    weights. The rank correlation is Spearman's over all pairs.
    """
    similarity, rows = task_similarity(inputs.tokens[0, -1], inputs.tasks), []
    for newest, weights in enumerate(inputs.weights):
        for earlier, weight in weights.items():
            if earlier != newest:
                row = {"task": newest, "adapter": earlier, "weight": weight, "share": weight * len(weights)}
                rows.append(row | {"similarity": float(similarity[newest, earlier])})
    pairs = pd.DataFrame(rows, columns=["task", "adapter", "weight", "share", "similarity"])
    varies = len(pairs) > 2 and pairs["share"].nunique() > 1 and pairs["similarity"].nunique() > 1
    rank = float(pairs[["similarity", "share"]].rank().corr().iloc[0, 1]) if varies else math.nan
    finding = f"rank correlation {rank:.2f} over {len(pairs)} pairs" if varies else "no rank correlation"
    return AnalysisResult(
        numbers=inputs.facts | {"rank_correlation": number(rank), "pairs": rows},
        tables={"gate": rows},
        figures={"gate": lambda: weights_figure(rows, f"{inputs.about} · {finding}")} if rows else {},
        text=f"weight of earlier tasks' adapters and similarity of the tasks: {finding}"
        if rows
        else "This run has no gate over adapters of several tasks: there are no weights to compare.",
    )


def task_similarity(tokens: Tensor, tasks: Tensor) -> np.ndarray:
    """Cosines of tasks' mean tokens, centred over tasks: (n, d) and (n,) -> (T, T)."""
    means = torch.stack([tokens[tasks == task].double().mean(0) for task in tasks.unique()])
    centred = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    return (centred @ centred.T).numpy()


ANALYSES: dict[str, Callable[[AnalysisInputs], AnalysisResult]] = {
    "cka": cka,
    "grassmann": grassmann,
    "probes": probes,
}
GATE_ANALYSES = ANALYSES | {"gate": gate}


# ------------------------------------------------------------------------------------------------------------
# Their parts


def halves(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of two halves of each class: (to fit, to test); an odd one out goes to the first."""
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
    angles = []
    for _ in range(RANDOM_PAIRS):
        a, b = (torch.randn(width, k, generator=generator, dtype=torch.float64) for k in (first, second))
        angles.append(rms_angle(a, b))
    return float(np.mean(angles))


def branch_rows(inputs: AnalysisInputs) -> list[Row]:
    """A row for each task and nested adapter: the angles of `branch_angles_figure`, in degrees.

    None where there is none. Also the dimensions of both spaces, the smallest angle between them, and their
    Grassmann distance in radians.
    """
    generator, chances, rows = rng("chance angle of branches", inputs.seed), {}, []
    for task, spaces in enumerate(inputs.spaces):
        earlier = inputs.spaces[task - 1] if task else {}
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


def _drift(
    name: str,
    values: np.ndarray,
    inputs: AnalysisInputs,
    spec: HeatmapSpec,
    title: str,
    subtitle: str,
    what: str,
) -> AnalysisResult:
    """Result of a measure (L, T, T): each network with that after task 0, and with the one before."""
    first, before = values[:, 0], np.full(values.shape[:2], np.nan)  # (L, T)
    before[:, 1:] = np.diagonal(values, offset=1, axis1=1, axis2=2)
    maps = [
        Heatmap("with the network after task 0", first),
        Heatmap("with the network one task before", before),
    ]
    rows = [
        {"task": t, "block": b, "with_first": number(first[b, t]), "with_before": number(before[b, t])}
        for t, b in np.ndindex(first.T.shape)
    ]
    return AnalysisResult(
        numbers=inputs.facts,
        tables={name: rows},
        figures={name: lambda: heatmaps_figure(maps, spec, title, subtitle)},
        text=_texts(what, maps, spec.decimals),
    )


def _texts(what: str, maps: Sequence[Heatmap], decimals: int) -> str:
    """A table of blocks and tasks for each map."""
    blocks, tasks = (
        [f"{axis} {i}" for i in range(n)]
        for axis, n in zip(("block", "task"), maps[0].values.shape, strict=True)
    )
    tables = (value_table(f"{what}, {name}", blocks, tasks, values, decimals) for name, values in maps)
    return "\n\n".join(tables)


def _branch_text(rows: Sequence[Row]) -> str:
    """The angle between fast and slow of every adapter over tasks, or a sentence where there is none."""
    if not rows:
        return "This run has no nested adapters: there is no angle between a fast and a slow branch."
    if all(row["between"] is None for row in rows):
        return (
            "The output of a branch is zero whenever a task ends (consolidation restarts fast, or a learning "
            "rate is 0): there is no angle between fast and slow; branches.csv tells how the other one moved."
        )
    table = pd.DataFrame(rows).pivot(index=["block", "adapter"], columns="task", values="between")
    names = [f"block {block}.{adapter}" for block, adapter in table.index]
    chance = np.mean([row["chance"] for row in rows if row["chance"] is not None])
    title = f"angle between fast and slow (degrees; two random subspaces: about {chance:.1f})"
    tasks = [f"task {task}" for task in table.columns]
    return value_table(title, names, tasks, table.to_numpy(dtype=float), 1)
