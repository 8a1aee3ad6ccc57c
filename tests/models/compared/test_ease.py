"""EASE's prototypes and scores, as double sums, and its learner in a run."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.base import Learner
from models.compared.ease import EASEHead
from tests.conftest import run_tasks

WIDTH, PER_CLASS = 4, 5


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def features(tasks: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of two new classes in the subspaces of all tasks so far."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat(PER_CLASS) + 2 * (tasks - 1)
    return torch.randn(len(labels), tasks * WIDTH, generator=generator), labels


def test_prototypes_and_scores_are_the_double_sums_of_the_formula() -> None:
    head, alpha, temperature = EASEHead(WIDTH, 0.3, 0.5), 0.3, 0.5
    prototypes: dict[tuple[int, int], np.ndarray] = {}  # (subspace, class)
    task_of: dict[int, int] = {}
    for t in range(3):
        x, y = features(t + 1, seed=t)
        head.add(x, y)
        new = [2 * t, 2 * t + 1]
        for c in new:
            task_of[c] = t
            for j in range(t + 1):
                rows = x[y == c, j * WIDTH : (j + 1) * WIDTH].double().numpy()
                prototypes[j, c] = rows.mean(axis=0)
        for c in range(2 * t):
            i = task_of[c]
            weights = np.exp([cosine(prototypes[i, c], prototypes[i, b]) / temperature for b in new])
            weights /= weights.sum()
            prototypes[t, c] = sum(w * prototypes[t, b] for w, b in zip(weights, new, strict=True))
    queries = torch.randn(4, 3 * WIDTH)
    parts = queries.double().numpy().reshape(4, 3, WIDTH)
    for n in range(4):
        for c in range(6):
            i = task_of[c]
            others = sum(cosine(parts[n, j], prototypes[j, c]) for j in range(3) if j != i)
            expected = cosine(parts[n, i], prototypes[i, c]) + alpha / 2 * others
            np.testing.assert_allclose(head(queries)[n, c], expected, atol=1e-5)


def test_a_task_trains_its_own_adapter_and_leaves_the_others(make_sema: Callable[..., Learner]) -> None:
    learner = make_sema(model_name="ease", adapter_blocks="growing")
    run_tasks(learner, 1)
    before = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    run_tasks(learner, 2)
    after = learner.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    grown = [name for name in after if name not in before]
    assert grown and all(".adapters.1." in name for name in grown)
    assert learner.network.feature_width == 2 * learner.network.vit.num_features
