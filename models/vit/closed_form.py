"""Classifiers computed in closed form from features, which forget nothing of their own.

    readout = RanPACReadout(width=384, seed=1993, dim=2000)
    readout.add(features, targets)            # a task's training features (n, d) with labels of new classes
    logits = readout(features)                # (B, d) -> (B, classes so far)
    readout.follow(before, after)             # the backbone moved: carry what is known of older classes along

Everything is computed on the CPU in float64, the same on every device and rank, and is state.

Sources: SimpleCIL (Zhou et al., *Revisiting Class-Incremental Learning with Pre-Trained Models*, IJCV 2024), class
means and cosine; RanPAC (McDonnell et al., *RanPAC: Random Projections and Pre-trained Models for Continual Learning*,
NeurIPS 2023), random projection and ridge regression.
"""

import itertools
import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.vit.feature_drift import fit_drift
from utils.training.device import seeded_generator

logger = logging.getLogger("nested_lora")

RIDGES = [10.0**k for k in range(-8, 10)]  # candidates for lambda, as published
FINER = [10.0**-0.5, 10.0**0.5]  # and, relative to the best of them, its neighbours on a grid twice as fine
HELD_OUT = 0.2  # share of a task's training features that chooses lambda, as published
FIT, HELD = range(2)  # the two parts that the sums are kept in
PROJECTION, SPLIT = range(2)  # what a random stream is for; with the seed and a number it names one


class Readout(nn.Module, ABC):
    """Class statistics of features and the classifier they determine; buffers only, nothing is trained by gradient.

    Args:
        width: d, length of a feature vector.
        seed: names the random streams.
        dim: M, number of random features (only `RanPACReadout` uses them).
    """

    counts: Tensor

    def __init__(self, width: int, seed: int, dim: int = 0) -> None:
        super().__init__()
        self.width, self.seed, self.dim = width, seed, dim
        for name, shape in {"counts": (0,), **self.shapes(0)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @abstractmethod
    def shapes(self, classes: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the buffers beside `counts` (C,), the training images of each class."""

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in all training features (n, d) of new classes, labelled C, C + 1, ... in any order."""
        features, targets, known = features.cpu().double(), targets.cpu(), len(self.counts)
        self.counts = torch.cat([self.counts, torch.bincount(targets - known).double()])
        self.refit(features, targets)

    @abstractmethod
    def refit(self, features: Tensor, targets: Tensor) -> None:
        """Take in features (n, d) float64 of the classes that `counts` has just gained, and solve."""

    @abstractmethod
    def follow(self, before: Tensor, after: Tensor) -> float:
        """The backbone moved: carry what is known of the classes so far along. Call before `add`.

        Args:
            before, after: features (n, d) of the newest task's images when it began and now.

        Returns:
            `Drift.explained`, in the space that the statistics live in.
        """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Scores of all classes so far, (B, d) -> (B, C), float32 on the CPU."""

    def structure(self) -> dict[str, int]:
        """What `rebuild` needs to give a fresh readout the shape of this one (JSON)."""
        return {"classes": len(self.counts)}

    def rebuild(self, structure: dict[str, int]) -> None:
        """Give a fresh readout a saved shape."""
        classes = structure["classes"]
        for name, shape in {"counts": (classes,), **self.shapes(classes)}.items():
            setattr(self, name, torch.zeros(shape, dtype=torch.float64))

    def stored_numbers(self) -> int:
        """Numbers that a checkpoint keeps of it."""
        return sum(tensor.numel() for tensor in self.state_dict().values())


class PrototypeReadout(Readout):
    """Cosine with class means: score_c(f) = f . m_c / (||f|| ||m_c||), m_c the mean training feature of class c."""

    means: Tensor

    def shapes(self, classes: int) -> dict[str, tuple[int, ...]]:
        return {"means": (classes, self.width)}

    def refit(self, features: Tensor, targets: Tensor) -> None:
        known = len(self.means)
        one_hot = F.one_hot(targets - known).double()  # (n, new)
        self.means = torch.cat([self.means, one_hot.T @ features / self.counts[known:, None]])

    def follow(self, before: Tensor, after: Tensor) -> float:
        drift = fit_drift(before, after)
        self.means = drift.apply(self.means)
        return drift.explained

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features.cpu().float(), dim=1), F.normalize(self.means.float(), dim=1))


class RanPACReadout(Readout):
    """Ridge regression of one-hot labels on random features h(f) = relu(f P), P (d, M) standard normal and fixed.

        scores(f) = h(f) W,   W = (G + lambda I)^-1 Q,   G = sum_i h_i h_i^T (M, M),   Q = sum_i h_i y_i^T (M, C)

    G and Q are sums over all training features ever added, so learning task by task equals learning all at once. They
    are kept in two parts, over four fifths of every task's features and over the fifth that is held out: lambda is the
    candidate whose W, solved from the first part, has the smallest squared error on the second,

        ||H_held W - Y_held||^2 = tr(W^T G_held W) - 2 tr(W^T Q_held) + n_held,

    and the classifier is then solved from both. Published, the newest task's fifth alone chooses: few images of few
    classes, with which lambda jumps by a factor of ten from task to task. A lambda with which a sum is not positive
    definite to working precision (images repeated, fewer than random features) is passed over for the next best, of
    equal errors for the smaller power of ten; where all are, lambda goes on growing by tens until one will do.

    When the backbone moves, the random features of the newest task's images are known before and after, which gives an
    affine map h -> J^T h + b (`models/vit/feature_drift.py`). Sums over images that are no longer there follow it exactly,
    with n images, m = sum_i h_i = Q 1 and the class counts c:

        G -> J^T G J + J^T m b^T + b m^T J + n b b^T,   Q -> J^T Q + b c^T
    """

    gram: Tensor
    cross: Tensor
    part_counts: Tensor
    weights: Tensor

    def __init__(self, width: int, seed: int, dim: int) -> None:
        super().__init__(width, seed, dim)
        projection = torch.randn(width, dim, generator=seeded_generator(seed, PROJECTION))
        self.register_buffer("projection", projection.double(), persistent=False)

    def shapes(self, classes: int) -> dict[str, tuple[int, ...]]:
        m = self.dim
        return {
            "gram": (2, m, m),
            "cross": (2, m, classes),
            "part_counts": (2, classes),
            "weights": (m, classes),
        }

    def refit(self, features: Tensor, targets: Tensor) -> None:
        classes = len(self.counts)
        missing = classes - self.cross.shape[-1]
        self.cross, self.part_counts = F.pad(self.cross, (0, missing)), F.pad(self.part_counts, (0, missing))
        hidden = self.random_features(features)
        order = torch.randperm(len(hidden), generator=seeded_generator(self.seed, SPLIT, classes))
        held, rest = order.tensor_split([max(1, round(HELD_OUT * len(order)))])
        for part, rows in ((FIT, rest), (HELD, held)):
            one_hot = F.one_hot(targets[rows], classes).double()
            self.gram[part] += hidden[rows].T @ hidden[rows]
            self.cross[part] += hidden[rows].T @ one_hot
            self.part_counts[part] += one_hot.sum(dim=0)
        gram, cross = self.gram.sum(dim=0), self.cross.sum(dim=0)
        larger = (RIDGES[-1] * 10.0**k for k in itertools.count(1))
        solutions = (
            (ridge, _solve(gram, cross, ridge)) for ridge in itertools.chain(self.ranked_ridges(), larger)
        )
        ridge, self.weights = next((ridge, weights) for ridge, weights in solutions if weights is not None)
        logger.info(f"Readout: lambda {ridge:g} for {classes} classes, {self.dim} random features")

    def follow(self, before: Tensor, after: Tensor) -> float:
        hidden = (self.random_features(features.cpu().double()) for features in (before, after))
        jacobian, shift, explained = fit_drift(*hidden)
        for gram, cross, counts in zip(self.gram, self.cross, self.part_counts, strict=True):  # views
            mixed = torch.outer(jacobian.T @ cross.sum(dim=1), shift)
            gram.copy_(
                jacobian.T @ gram @ jacobian + mixed + mixed.T + counts.sum() * torch.outer(shift, shift)
            )
            cross.copy_(jacobian.T @ cross + torch.outer(shift, counts))
        return explained

    def forward(self, features: Tensor) -> Tensor:
        return (self.random_features(features.cpu().double()) @ self.weights).float()

    def random_features(self, features: Tensor) -> Tensor:
        """h(f) = relu(f P): (n, d) -> (n, M), float64."""
        return F.relu(features @ self.projection)

    def ranked_ridges(self) -> list[float]:
        """Candidates for lambda by squared error on what is held out: powers of ten, and neighbours of the best."""
        errors = self._held_out_errors(RIDGES)
        best = min(errors, key=errors.get, default=None)
        errors |= self._held_out_errors([best * factor for factor in FINER] if best else [])
        return sorted(errors, key=errors.get)

    def _held_out_errors(self, ridges: list[float]) -> dict[float, float]:
        """Squared error on the held-out part, up to a constant, by lambda; those that cannot be solved are left out."""
        errors = {}
        for ridge in ridges:
            weights = _solve(self.gram[FIT], self.cross[FIT], ridge)
            if weights is not None:
                fitted = self.gram[HELD] @ weights - 2 * self.cross[HELD]
                errors[ridge] = float((weights * fitted).sum())
        return errors


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """(G + ridge I)^-1 Q; None where the sum is not positive definite to working precision."""
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return None if failed else torch.cholesky_solve(cross, factor)
