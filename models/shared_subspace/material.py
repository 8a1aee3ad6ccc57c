"""What there is to analyse of a network on grids, for the analyses of `models/shared_subspace/analysis.py`.

    material = grid_material(learner)
    grid_analysis.ANALYSES["cka"](material).text

The samples follow from the run's seed alone, and are others than those of training, validation and tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from models.shared_subspace.analysis import GridMaterial, Looked
from models.shared_subspace.tables import SPLIT_NAMES
from models.shared_subspace.tasks import TRAIN, GridSamples
from utils.training.random import rng

if TYPE_CHECKING:
    from models.shared_subspace.learner import SharedSubspace

TASK_SAMPLES = 64  # of each task
PROBE_SAMPLES = (
    2048  # that probes are fitted on and units are looked at; half as many of each split test them
)


def grid_material(learner: SharedSubspace) -> GridMaterial:
    """Layers of a learner's network for new samples of its tasks and splits."""
    tasks, seed = learner.tasks, learner.seed
    own = tasks.draw_every_label(TRAIN, TASK_SAMPLES, rng("analysis tasks", seed))
    same = tasks.draw_same_grids(TRAIN, TASK_SAMPLES, rng("analysis same grids", seed))
    fitted = tasks.draw(TRAIN, PROBE_SAMPLES, rng("analysis fit", seed))
    splits = {
        split: tasks.draw(split, PROBE_SAMPLES // 2, rng("analysis split", seed, split))
        for split in SPLIT_NAMES
    }
    return GridMaterial(
        primitives=tasks.primitives,
        tasks=tasks.splits[TRAIN].labels,
        own=_by_task(learner.layers(own)),
        same=_by_task(learner.layers(same)),
        fitted=look_at(learner, fitted),
        splits={split: look_at(learner, samples) for split, samples in splits.items()},
        rank=learner.config.sharing_rank,
        seed=seed,
        about=f"{learner.config.prefix} · {learner.config.encoder} · seed {seed}",
    )


def look_at(learner: SharedSubspace, samples: GridSamples) -> Looked:
    """Samples with what the network makes of them."""
    programs = [learner.tasks.describe_program(program) for program in samples.program]
    return Looked(samples.batch(slice(None)), learner.layers(samples), learner.predict(samples), programs)


def _by_task(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers of samples that are sorted by task, so many of each: (G n, d) -> (G, n, d)."""
    return {layer: vectors.unflatten(0, (-1, TASK_SAMPLES)) for layer, vectors in layers.items()}
