"""Heads on one Gaussian per class: FeCAM's Mahalanobis distance, and SLCA's alignment of a classifier.

    head = FeCAMHead(width=384)
    head.add(features, targets)      # a task's training features (n, d), labelled with new classes
    scores = head(features)          # (B, d) -> (B, C)

Sources: Goswami et al., *FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free
Continual Learning*, NeurIPS 2023; Zhang et al., *SLCA: Slow Learner with Classifier Alignment for Continual
Learning on a Pre-trained Model*, ICCV 2023.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from models.vit.closed_form import ClosedFormHead, fit_drift
from utils.inc_net import IncrementalHead
from utils.training.random import rng

JITTER = 1e-6  # first tried addition to the diagonal of matrices that may be singular, relative to its mean


class GaussianHead(ClosedFormHead):
    """Mean m and covariance S of each class's training features, and the classifier that they determine.

    S is the unbiased estimate, or exactly zero where all features are equal. When the backbone moves by
    f -> J^T f + b (`fit_drift`), m -> J^T m + b and S -> J^T S J. A checkpoint holds the lower triangle of
    each S in float32: d (d + 1) / 2 numbers per class.
    """

    means: Tensor  # (C, d)
    triangles: Tensor  # (C, d (d + 1) / 2), float32: lower triangles of S, row by row

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("means", torch.zeros(0, width, dtype=torch.float64))
        self.register_buffer("triangles", torch.zeros(0, width * (width + 1) // 2))

    def refit(self, features: Tensor, targets: Tensor) -> None:
        for label in range(len(self.means), len(self.counts)):
            rows = features[targets == label]
            mean = rows.mean(dim=0)
            centred = rows - mean if (rows != rows[0]).any() else torch.zeros_like(rows)  # exact
            covariance = centred.T @ centred / max(1, len(rows) - 1)
            self.means = torch.cat([self.means, mean[None]])
            self.triangles = torch.cat([self.triangles, covariance[self._lower()].float()[None]])
        self.solve()

    @abstractmethod
    def solve(self) -> None:
        """Compute the classifier from the statistics of all classes so far."""

    def compensate_drift(self, before: Tensor, after: Tensor) -> float:
        drift = fit_drift(before, after)
        self.means = drift.apply(self.means)
        for label, row in enumerate(self.triangles):
            row.copy_(drift.map_form(self.covariance(label))[self._lower()])
        return drift.explained

    def covariance(self, label: int) -> Tensor:
        """S of a class, (d, d), float64."""
        matrix = torch.zeros(self.width, self.width, dtype=torch.float64)
        matrix[self._lower()] = self.triangles[label].double()
        return matrix + matrix.tril(-1).T

    def _lower(self) -> Tensor:
        return torch.ones(self.width, self.width, dtype=torch.bool).tril()


class FeCAMHead(GaussianHead):
    """Mahalanobis distance to class means, with a shrunk and normalised covariance of each class.

    m, S: mean and covariance of a class's unit features f/|f|, as published for pretrained ViTs
    S' = S + alpha1 v I + alpha2 u (1 1^T - I)     v, u: mean entry of S on and off its diagonal
    R  = D^-1/2 S' D^-1/2 + 10^-6 I                D: diagonal of S', so R is a correlation matrix
    score(f) = -(f/|f| - m)^T R^-1 (f/|f| - m)

    S' is never indefinite, as u <= v, -u (d - 1) <= v and alpha2 <= alpha1. A class with identical features,
    or with one image, has R = I.

    Args:
        alpha1, alpha2: weights of the shrinkage, 0 <= alpha2 <= alpha1.
    """

    def __init__(self, width: int, alpha1: float = 1.0, alpha2: float = 1.0) -> None:
        super().__init__(width)
        self.alpha1, self.alpha2 = alpha1, alpha2
        self._factors: list[Tensor] = []
        self.register_load_state_dict_post_hook(lambda head, _: head.solve())

    def refit(self, features: Tensor, targets: Tensor) -> None:
        super().refit(F.normalize(features, dim=1), targets)

    def compensate_drift(self, before: Tensor, after: Tensor) -> float:
        return super().compensate_drift(F.normalize(before, dim=1), F.normalize(after, dim=1))

    def solve(self) -> None:
        """Forget the factors, which `factors` computes where they are needed."""
        self._factors = []

    def factors(self) -> list[Tensor]:
        """Lower Cholesky factor L of R of each class, (d, d), float32."""
        for label in range(len(self._factors), len(self.means)):
            correlation = correlations(shrunk(self.covariance(label), self.alpha1, self.alpha2))
            self._factors.append(cholesky(correlation).float())
        return self._factors

    def forward(self, features: Tensor) -> Tensor:
        queries, means = F.normalize(features.cpu().float(), dim=1), self.means.float()
        whitened = (
            torch.linalg.solve_triangular(factor, (queries - mean).T, upper=False)
            for factor, mean in zip(self.factors(), means, strict=True)
        )
        return -torch.stack([distances.square().sum(dim=0) for distances in whitened], dim=1)


class AlignedHead(GaussianHead):
    """The trained classifier, trained once more on features drawn from the Gaussians of all classes.

    After task T every epoch draws `samples` features of every class c, t_c its task (from 1),

        f ~ N((0.9 + 0.1 t_c / T) m_c, S_c),

    and all rows W, b learn from them by SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule from
    `lr` to 0 over `epochs`, in batches of `samples`. The loss is cross-entropy over all classes of the
    normalised logits z / (0.1 n), n the mean over tasks of the norm of z over a task's classes. Scores are
    z = W f + b.

    Args:
        rows: the trained classifier, whose newest rows join those aligned so far.
        seed: names the random streams of the drawn features.
        restart: older rows start from their trained values, as published, instead of the aligned ones.
    """

    weight: Tensor  # (C, d)
    bias: Tensor  # (C,)
    task_of_class: Tensor  # (C,) counted from 1

    def __init__(
        self,
        width: int,
        rows: IncrementalHead,
        *,
        seed: int,
        samples: int,
        epochs: int,
        lr: float,
        restart: bool,
    ) -> None:
        super().__init__(width)
        self._rows = (rows,)  # a tuple: its state is not this module's
        self.seed, self.samples, self.epochs, self.lr, self.restart = seed, samples, epochs, lr, restart
        self.needs_rows = restart
        for name, shape in {"weight": (0, width), "bias": (0,), "task_of_class": (0,)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def solve(self) -> None:
        new = len(self.means) - len(self.task_of_class)
        tasks = int(self.task_of_class.max()) + 1 if len(self.task_of_class) else 1
        self.task_of_class = torch.cat([self.task_of_class, torch.full((new,), tasks).double()])
        known = 0 if self.restart else len(self.weight)
        trained = [
            torch.cat([getattr(rows, name).detach().cpu().double() for rows in self._rows[0].tasks])
            for name in ("weight", "bias")
        ]
        self.weight = torch.cat([self.weight[:known], trained[0][known:]])
        self.bias = torch.cat([self.bias[:known], trained[1][known:]])
        with torch.enable_grad():
            self._align(tasks)

    def _align(self, tasks: int) -> None:
        """Train all rows on drawn features."""
        weight, bias = (tensor.float().requires_grad_() for tensor in (self.weight, self.bias))
        optimizer = torch.optim.SGD([weight, bias], lr=self.lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.epochs))
        for epoch in range(self.epochs):
            generator = rng("alignment", self.seed, tasks, epoch)
            features = torch.cat([self.drawn(label, generator) for label in range(len(self.means))])
            targets = torch.arange(len(self.means)).repeat_interleave(self.samples)
            for chosen in torch.randperm(len(targets), generator=generator).split(self.samples):
                logits = normalised(F.linear(features[chosen], weight, bias), self.task_of_class)
                optimizer.zero_grad()
                F.cross_entropy(logits, targets[chosen]).backward()
                optimizer.step()
            schedule.step()
        self.weight, self.bias = weight.detach().double(), bias.detach().double()

    def drawn(self, label: int, generator: torch.Generator) -> Tensor:
        """Features drawn for a class, (samples, d), float32."""
        share = 0.9 + 0.1 * self.task_of_class[label] / self.task_of_class.max()
        noise = torch.randn(self.samples, self.width, generator=generator).double()
        return (share * self.means[label] + noise @ cholesky(self.covariance(label)).T).float()

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features.cpu().float(), self.weight.float(), self.bias.float())


def normalised(logits: Tensor, task_of_class: Tensor) -> Tensor:
    """z / (0.1 n) of logits z (B, C), n the mean over tasks of the norm of a task's logits."""
    norms = [logits[:, task_of_class == task].norm(dim=1, keepdim=True) for task in task_of_class.unique()]
    return logits / (torch.stack(norms).mean(dim=0) + 1e-7) / 0.1


def shrunk(covariance: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """S + alpha1 v I + alpha2 u (1 1^T - I) of S (d, d), with its mean variance v and mean covariance u."""
    width = len(covariance)
    variance = covariance.diagonal().mean()
    off = (covariance.sum() - width * variance) / max(1, width * (width - 1))
    identity = torch.eye(width, dtype=covariance.dtype)
    return covariance + alpha1 * variance * identity + alpha2 * off * (1 - identity)


def correlations(covariance: Tensor) -> Tensor:
    """D^-1/2 S D^-1/2 of a covariance (d, d) with diagonal D; the identity where that has a zero."""
    deviations = covariance.diagonal().sqrt()
    scaled = covariance / torch.outer(deviations, deviations)
    return scaled if bool((deviations > 0).all()) else torch.eye(len(covariance), dtype=covariance.dtype)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a matrix (d, d) that may be singular, with `JITTER`; about zero for zero.

    Rounding of stored triangles can make a singular matrix indefinite: the jitter grows by factors of ten
    until the matrix is positive definite.
    """
    jitter, identity = JITTER * matrix.diagonal().mean(), torch.eye(len(matrix), dtype=matrix.dtype)
    while True:
        added = jitter + torch.finfo(matrix.dtype).tiny
        factor, failed = torch.linalg.cholesky_ex(matrix + added * identity)
        if not failed or not 0 < float(jitter) < math.inf:  # no jitter helps a matrix that is not finite
            return factor
        jitter = 10 * jitter
