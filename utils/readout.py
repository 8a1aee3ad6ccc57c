"""Classifiers computed in closed form from features, which forget nothing of their own.

    readout = RanPACReadout(width=384, seed=1993, dim=2000)
    readout.add(features, targets)            # a task's training features (n, d) with labels of new classes
    logits = readout(features)                # (B, d) -> (B, classes so far)
    readout.follow(fit_drift(before, after))  # the backbone moved: carry what is known of older classes along

Everything is computed on the CPU in float64, the same on every device and rank, and is state.

Sources: SimpleCIL (Zhou et al., *Revisiting Class-Incremental Learning with Pre-Trained Models*, IJCV 2024), class
means and cosine; RanPAC (McDonnell et al., *RanPAC: Random Projections and Pre-trained Models for Continual Learning*,
NeurIPS 2023), random projection and ridge regression.
"""

import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.feature_drift import Drift
from utils.toolkit import seeded_generator

logger = logging.getLogger("nested_lora")

RIDGES = [10.0**k for k in range(-8, 10)]  # candidates for lambda, as published
HELD_OUT = 0.2  # share of a task's training features that chooses lambda, as published
PROJECTION, SPLIT, SAMPLES = range(3)  # what a random stream is for; with the seed and a number it names one


class Readout(nn.Module, ABC):
    """Class statistics of features and the classifier they determine; buffers only, nothing is trained by gradient.

    Args:
        width: d, length of a feature vector.
        seed: names the random streams.
        dim: M, number of random features (only `RanPACReadout` uses them).
    """

    def __init__(self, width: int, seed: int, dim: int = 0) -> None:
        super().__init__()
        self.width, self.seed, self.dim = width, seed, dim
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))  # (C,) training images of each class
        self.register_buffer("means", torch.zeros(0, width, dtype=torch.float64))  # (C, d)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in all training features (n, d) of new classes, labelled C, C + 1, ... in any order."""
        features, known = features.cpu().double(), len(self.counts)
        one_hot = F.one_hot(targets.cpu() - known).double()  # (n, new)
        counts = one_hot.sum(dim=0)
        self.counts = torch.cat([self.counts, counts])
        self.means = torch.cat([self.means, one_hot.T @ features / counts[:, None]])
        self.refit(features, targets.cpu())

    @abstractmethod
    def refit(self, features: Tensor, targets: Tensor) -> None:
        """Determine the classifier anew; `features` (n, d) float64 are those of the newest task."""

    @abstractmethod
    def follow(self, drift: Drift) -> None:
        """The backbone moved: carry what is known of the classes so far along. Call before `add`."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Scores of all classes so far, (B, d) -> (B, C), float32 on the CPU."""

    def structure(self) -> dict[str, int]:
        """What `rebuild` needs to give a fresh readout the shape of this one (JSON)."""
        return {"classes": len(self.counts)}

    def rebuild(self, structure: dict[str, int]) -> None:
        """Give a fresh readout a saved shape."""
        self.counts = self.counts.new_zeros(structure["classes"])
        self.means = self.means.new_zeros(structure["classes"], self.width)

    def stored_numbers(self) -> int:
        """Numbers that a checkpoint keeps of it."""
        return sum(tensor.numel() for tensor in self.state_dict().values())


class PrototypeReadout(Readout):
    """Cosine with class means: score_c(f) = f . m_c / (||f|| ||m_c||), m_c the mean training feature of class c."""

    def refit(self, features: Tensor, targets: Tensor) -> None:
        """The means are the classifier."""

    def follow(self, drift: Drift) -> None:
        self.means = drift.apply(self.means)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features.cpu().float(), dim=1), F.normalize(self.means.float(), dim=1))


class RanPACReadout(Readout):
    """Ridge regression of one-hot labels on random features h(f) = relu(f P), P (d, M) standard normal and fixed.

        scores(f) = h(f) W,   W = (G + lambda I)^-1 Q,   G = sum_i h_i h_i^T (M, M),   Q = sum_i h_i y_i^T (M, C)

    G and Q are sums over all training features ever added, so learning task by task equals learning all at once. lambda
    is the candidate of `RIDGES` with the smallest squared error on a held-out fifth of the newest task's features.

    Once the backbone has moved (`follow`), those sums belong to a network that is no more. From then on the classes
    seen before are Gaussians with their own means and one shared covariance, which the drift can carry along: G and Q
    are summed over as many random draws from each as it had training images, and over the newest task's features.
    """

    def __init__(self, width: int, seed: int, dim: int) -> None:
        super().__init__(width, seed, dim)
        projection = torch.randn(width, dim, generator=seeded_generator(seed, PROJECTION))
        self.register_buffer("projection", projection.double(), persistent=False)
        for name, shape in self._shapes(0).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.moved = False

    def _shapes(self, classes: int) -> dict[str, tuple[int, ...]]:
        """Scatter within classes (d, d), G, Q and W for a number of classes."""
        m = self.dim
        return {"scatter": (self.width, self.width), "gram": (m, m), "cross": (m, classes), "weights": (m, classes)}

    def refit(self, features: Tensor, targets: Tensor) -> None:
        centred = features - self.means[targets]
        self.scatter = self.scatter + centred.T @ centred
        known, classes = self.cross.shape[1], len(self.counts)
        if self.moved:
            drawn, labels = self._draw_known(known)
            self.gram, self.cross = self._sums(self.random_features(drawn), labels, classes)
        else:
            self.cross = F.pad(self.cross, (0, classes - known))
        hidden = self.random_features(features)
        ridge = self._choose_ridge(hidden, targets)
        gram, cross = self._sums(hidden, targets, classes)
        self.gram, self.cross = self.gram + gram, self.cross + cross
        self.weights = _solve(self.gram, self.cross, ridge)
        logger.info(f"Readout: lambda {ridge:g} for {classes} classes, {self.dim} random features")

    def follow(self, drift: Drift) -> None:
        self.means = drift.apply(self.means)
        self.scatter = drift.apply_covariance(self.scatter / self._freedom()) * self._freedom()
        self.moved = True

    def forward(self, features: Tensor) -> Tensor:
        return (self.random_features(features.cpu().double()) @ self.weights).float()

    def random_features(self, features: Tensor) -> Tensor:
        """h(f) = relu(f P): (n, d) -> (n, M), float64."""
        return F.relu(features @ self.projection)

    def structure(self) -> dict[str, int]:
        return super().structure() | {"moved": int(self.moved)}

    def rebuild(self, structure: dict[str, int]) -> None:
        super().rebuild(structure)
        for name, shape in self._shapes(structure["classes"]).items():
            setattr(self, name, torch.zeros(shape, dtype=torch.float64))
        self.moved = bool(structure["moved"])

    def _freedom(self) -> float:
        """Degrees of freedom of the pooled covariance."""
        return max(1.0, float(self.counts.sum()) - len(self.counts))

    def _sums(self, hidden: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """G and Q of some random features (n, M)."""
        return hidden.T @ hidden, hidden.T @ F.one_hot(targets, classes).double()

    def _choose_ridge(self, hidden: Tensor, targets: Tensor) -> float:
        """The lambda with the smallest squared error on held-out rows, fitted on the rest and all that came before."""
        order = torch.randperm(len(hidden), generator=seeded_generator(self.seed, SPLIT, len(self.counts)))
        held = order[: max(1, round(HELD_OUT * len(order)))]
        rest = order[len(held) :]
        classes = len(self.counts)
        gram, cross = self._sums(hidden[rest], targets[rest], classes)
        gram, cross = self.gram + gram, self.cross + cross
        wanted = F.one_hot(targets[held], classes).double()
        errors = {}
        for ridge in RIDGES:
            weights = _solve(gram, cross, ridge)
            if weights is not None:
                errors[ridge] = float((hidden[held] @ weights - wanted).square().mean())
        return min(errors, key=errors.get)

    def _draw_known(self, known: int) -> tuple[Tensor, Tensor]:
        """Random features vectors of the first `known` classes (n, d), from their Gaussians, and their labels."""
        generator = seeded_generator(self.seed, SAMPLES, known)
        labels = torch.repeat_interleave(torch.arange(known), self.counts[:known].long())
        values, vectors = torch.linalg.eigh(self.scatter / self._freedom())
        root = vectors * values.clamp_min(0).sqrt()  # root root^T = covariance
        noise = torch.randn(len(labels), self.width, generator=generator, dtype=torch.float64)
        return self.means[labels] + noise @ root.T, labels


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """(G + ridge I)^-1 Q; None where the sum is not positive definite to working precision."""
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return None if failed else torch.cholesky_solve(cross, factor)
