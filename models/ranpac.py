"""RanPAC: ridge regression on random features of the network; task by task it equals all tasks at once.

    # training-free
    python main.py --config exps/baselines/ranpac_cifar.json
    # adapts in task 0
    python main.py --config exps/baselines/ranpac_cifar.json --set first_session=true --set ffn_num=32

scores(x) = relu(f(x) P) (G + lambda I)^-1 Q with f the class token, P a fixed random projection to
`ranpac_dim` numbers, G and Q sums over all training images so far, and lambda chosen on a held-out fifth of
every task (`RanPACHead`). With `first_session` adapters are trained on task 0 and frozen before its features
are computed, so that all sums belong to one network. Source: McDonnell et al., *RanPAC: Random
Projections and Pre-trained Models for Continual Learning*, NeurIPS 2023.
"""

import itertools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.frozen_vit import FrozenViT
from models.config.ranpac import RanPACConfig
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.closed_form import ClosedFormHead, fit_drift
from models.vit.training import adapted_network, train_and_freeze
from utils.analysis import calibration
from utils.analysis.ridge_path import RidgePath, add_gram_, symmetric_
from utils.inc_net import IncrementalHead
from utils.training.random import rng

logger = logging.getLogger("nested_lora")

RIDGES = [10.0**k for k in range(-8, 10)]  # candidates for lambda; published code ends at 10^8
FINER = [10.0**-0.5, 10.0**0.5]  # then two more: the best of them times these
HELD_OUT = 0.2  # share of a task's training features that chooses lambda, as published
FIT, HELD = range(2)  # the two parts that the sums are kept in: fitted, and held out to choose lambda
IMAGES = 2048  # images whose random features are in memory at once, except to fit their drift
SOLUTIONS = 2**25  # numbers in the solutions W that are in memory at once: 0.27 GB


class RanPACHead(ClosedFormHead):
    """Ridge regression of one-hot labels on random features h(f) = relu(f P).

    P (d, M) is standard normal and fixed.

        scores(f) = h(f) W,   W = (G + lambda I)^-1 Q
        G = sum_i h_i h_i^T (M, M),   Q = sum_i h_i y_i^T (M, C)

    G and Q are sums over all training features ever added, so learning task by task equals learning all at
    once. They are kept in two parts, over four fifths of every task's features and over the fifth that is
    held out: lambda is the candidate whose W, solved from the first part, has the smallest squared error on
    the second,

        ||H_held W - Y_held||^2 = tr(W^T G_held W) - 2 tr(W^T Q_held) + n_held,

    and the classifier is then solved from both. The W of all candidates come from one factorization
    (`utils/analysis/ridge_path.py`). In published code the newest task's fifth alone chooses: few images of
    few classes, so that lambda jumps by a factor of ten from task to task. If G + lambda I is not positive
    definite to working precision (repeated images, fewer images than random features), the next best lambda
    is taken, at equal errors the smaller; if none is left, powers of ten above all candidates.

    When the backbone moves, the random features of the newest task's images before and after give an affine
    map h -> J^T h + b (`fit_drift`). Applied to all earlier images it changes their sums, with n images,
    m = sum_i h_i = Q 1 and the class counts c, to

        G -> J^T G J + J^T m b^T + b m^T J + n b b^T,   Q -> J^T Q + b c^T

    A checkpoint holds the lower triangle of each symmetric G, in float64, so that a resumed run goes on from
    exactly these sums, and W, since the search for lambda would take longer than reading it. `seed` names the
    random streams of P and of the held-out parts; `dim` is M.
    """

    unseen = calibration.HELD_OUT
    gram: Tensor  # (2, M, M): sums of the parts that fit and that are held out
    cross: Tensor  # (2, M, C)
    part_counts: Tensor  # (2, C) images
    weights: Tensor  # (M, C)

    def __init__(self, width: int, seed: int, dim: int) -> None:
        super().__init__(width)
        self.seed, self.dim = seed, dim
        self.ridge: float | None = None  # lambda; unknown until `refit`, as in a head that was loaded
        self.fit_weights: Tensor | None = None  # (M, C), with the same lambda from the part FIT alone
        shapes = {"gram": (2, dim, dim), "cross": (2, dim, 0), "part_counts": (2, 0), "weights": (dim, 0)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_state_dict_post_hook(_pack_gram)
        self.register_load_state_dict_pre_hook(_unpack_gram)
        projection = torch.randn(width, dim, generator=rng("projection", seed))
        self.register_buffer("projection", projection.double(), persistent=False)

    def refit(self, features: Tensor, targets: Tensor) -> None:
        classes = len(self.counts)
        missing = classes - self.cross.shape[-1]
        self.cross, self.part_counts = F.pad(self.cross, (0, missing)), F.pad(self.part_counts, (0, missing))
        held, rest = self._split(len(features), classes)
        for part, rows in ((FIT, rest), (HELD, held)):
            self.accumulate(part, features[rows], targets[rows])
        self.solve()
        logger.info(f"Ridge head: lambda {self.ridge:g} for {classes} classes, {self.dim} random features")

    def accumulate(self, part: int, features: Tensor, targets: Tensor) -> None:
        """Add features (n, d), of any classes so far, to the sums of a part, `FIT` or `HELD`."""
        for some, labels in zip(features.split(IMAGES), targets.split(IMAGES), strict=True):
            hidden = self.random_features(some)
            one_hot = F.one_hot(labels, len(self.counts)).double()
            add_gram_(self.gram[part], hidden)
            self.cross[part] += hidden.T @ one_hot
            self.part_counts[part] += one_hot.sum(dim=0)
        symmetric_(self.gram[part])

    def compensate_drift(self, before: Tensor, after: Tensor) -> float:
        hidden = (self.random_features(features.cpu().double()) for features in (before, after))
        drift = fit_drift(*hidden)
        shift = drift.shift
        for gram, cross, counts in zip(self.gram, self.cross, self.part_counts, strict=True):  # views
            cross.copy_(drift.map_sums(cross))
            mixed = torch.outer(cross.sum(dim=1), shift)
            moved = drift.map_form(gram) + mixed + mixed.T + counts.sum() * torch.outer(shift, shift)
            symmetric_(gram.copy_(moved))
            cross += torch.outer(shift, counts)
        return drift.explained

    def forward(self, features: Tensor) -> Tensor:
        return self._scores(features, self.weights)

    def unseen_rows(self, images: int, classes: int) -> Tensor:
        """The images of a task that were held out."""
        return self._split(images, classes)[0].sort().values

    def unseen_scores(self, features: Tensor, targets: Tensor) -> Tensor | None:
        """Scores by the ridge regression of the part FIT alone, with the chosen lambda."""
        if self.ridge is None:
            self.solve()
        if self.fit_weights is None:
            return None
        return self._scores(features, self.fit_weights)

    def _scores(self, features: Tensor, weights: Tensor) -> Tensor:
        parts = features.cpu().double().split(IMAGES)
        return torch.cat([self.random_features(some) @ weights for some in parts]).float()

    def _split(self, images: int, classes: int) -> tuple[Tensor, Tensor]:
        """Positions among a task's images: those held out, and the others."""
        order = torch.randperm(images, generator=rng("ridge split", self.seed, classes))
        held, rest = order.tensor_split([max(1, round(HELD_OUT * images))])
        return held, rest

    def random_features(self, features: Tensor) -> Tensor:
        """h(f) = relu(f P): (n, d) -> (n, M), float64."""
        return F.relu(features @ self.projection)

    def solve(self) -> None:
        """Choose lambda, and solve for the weights with it: from both parts, and from FIT alone."""
        ranked, fitted = self.ranked_ridges()
        larger = (RIDGES[-1] * 10.0**k for k in itertools.count(1))
        for ridge in itertools.chain(ranked, larger):
            weights = _solve(self.gram, self.cross, ridge)
            if weights is not None:
                break
        if fitted is None or ridge != ranked[0]:
            fitted = _solve(self.gram[FIT, None], self.cross[FIT, None], ridge)
        self.ridge, self.weights, self.fit_weights = ridge, weights, fitted

    def ranked_ridges(self) -> tuple[list[float], Tensor | None]:
        """Candidates for lambda, smallest held-out error first: powers of ten, and neighbours of the best.

        With them the weights (M, C) of the best, from FIT alone; None where no candidate can be solved for.
        """
        path = RidgePath(self.gram[FIT])
        errors = self._held_out_errors(path, RIDGES)
        best = min(errors, key=errors.get, default=None)
        errors |= self._held_out_errors(path, [best * factor for factor in FINER] if best else [])
        ranked = sorted(errors, key=errors.get)
        return ranked, path.solve(self.cross[FIT], ranked[:1])[0][0] if ranked else None

    def _held_out_errors(self, path: RidgePath, ridges: list[float]) -> dict[float, float]:
        """Squared error on the held-out part, up to a constant, by lambda.

        A lambda with which the system cannot be solved is left out.
        """
        errors, at_once = {}, max(1, SOLUTIONS // self.cross[FIT].numel())
        for start in range(0, len(ridges), at_once):
            some = ridges[start : start + at_once]
            weights, solved = path.solve(self.cross[FIT], some)  # (R, M, C)
            fitted = (self.gram[HELD] @ weights.movedim(0, 1).flatten(1)).view(self.dim, len(some), -1)
            terms = weights * (fitted.movedim(1, 0) - 2 * self.cross[HELD])
            found = zip(some, terms.sum(dim=(1, 2)).tolist(), solved.tolist(), strict=True)
            errors |= {ridge: error for ridge, error, is_solved in found if is_solved}
        return errors


def _solve(grams: Tensor, crosses: Tensor, ridge: float) -> Tensor | None:
    """(G + ridge I)^-1 Q of parts (n, M, M) and (n, M, C), summed.

    None where the sum is not positive definite to working precision.
    """
    gram = grams.sum(dim=0)
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return None
    half = torch.linalg.solve_triangular(factor, crosses.sum(dim=0), upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _pack_gram(head: RanPACHead, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of `state_dict`: (2, M, M) -> (2, M (M + 1) / 2), the lower triangles row by row."""
    gram = tensors[f"{prefix}gram"]
    lower = torch.ones(gram.shape[1:], dtype=torch.bool).tril()
    tensors[f"{prefix}gram"] = torch.stack([part[lower] for part in gram])


def _unpack_gram(head: RanPACHead, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of `load_state_dict`: the reverse; whole matrices of older checkpoints are loaded as they are."""
    head.ridge = head.fit_weights = None
    packed, whole = tensors.get(f"{prefix}gram"), torch.zeros_like(head.gram)
    if packed is None or packed.dim() != 2 or packed.shape[1] != head.dim * (head.dim + 1) // 2:
        return
    lower = torch.ones(head.dim, head.dim, dtype=torch.bool).tril()
    for part, values in zip(whole, packed, strict=True):
        part[lower] = values
        symmetric_(part)
    tensors[f"{prefix}gram"] = whole


class RanPAC(ClassIncrementalLearner):
    """Random projection and ridge regression on frozen, or once adapted, features."""

    Config = RanPACConfig
    config: RanPACConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        head = RanPACHead(vit.num_features, self.seed, self.config.ranpac_dim)
        if not self.config.first_session:
            return nn.ModuleDict({"backbone": FrozenViT(vit), "closed_form": head})
        rows = IncrementalHead(vit.num_features, kind=self.config.training_classifier)
        network = adapted_network(vit, self.config)
        return nn.ModuleDict({"backbone": network, "head": rows, "closed_form": head})

    def open_task(self) -> None:
        """Add classifier rows in the first task only, which alone may be trained."""
        if self.task == 0:
            super().open_task()

    def learn_task(self) -> None:
        if self.config.first_session and self.task == 0:
            self.once("functional", lambda: train_and_freeze(self))
        self.once("head", self.fit_head)
