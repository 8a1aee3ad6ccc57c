"""Closed-form classifiers on features, and an affine map that corrects their statistics for feature drift.

    head = PrototypeHead(width=384)
    head.add(features, targets)                # a task's training features (n, d), labelled with new classes
    logits = head(features)                    # (B, d) -> (B, classes so far)
    head.compensate_drift(before, after)       # the backbone moved: update the statistics of older classes

Statistics are computed on the CPU in float64, the same on every device and rank, and are state. RanPAC's
ridge regression is in `models/ranpac.py`.

Sources: class means and cosine, SimpleCIL (Zhou et al., *Revisiting Class-Incremental Learning with
Pre-Trained Models*, IJCV 2024). Once the backbone goes on learning, class statistics of earlier tasks are
those of a network that no longer exists; compensating their drift from the current task's features follows Yu
et al., *Semantic Drift Compensation for Class-Incremental Learning*, CVPR 2020; doing it with one linear map,
Gomez-Villa et al., *Exemplar-free Continual Representation Learning via Learnable Drift Compensation*, ECCV
2024. The ridge towards a common movement and its choice by leave-one-out are this project's.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.analysis.calibration import LEAVE_ONE_OUT, TRAINED_ON
from utils.analysis.ridge import fit_ridge


class ClosedFormHead(nn.Module, ABC):
    """Class statistics of features, and the classifier that they determine.

    It has buffers only: nothing is trained by gradient. All buffers grow with the classes; loaded tensors
    give a fresh head its shape.

    Args:
        width: d, length of a feature vector.
    """

    needs_rows = False  # whether trained classifier rows of earlier tasks are needed again
    unseen: ClassVar[str] = TRAINED_ON  # kind of images of `unseen_scores` (`utils/analysis/calibration.py`)
    counts: Tensor  # (C,) training images of each class

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_take_shapes)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add all training features (n, d) of new classes, labelled C, C + 1, ... in any order."""
        features, targets, known = features.cpu().double(), targets.cpu(), len(self.counts)
        self.counts = torch.cat([self.counts, torch.bincount(targets - known).double()])
        self.refit(features, targets)

    def new_means(self, features: Tensor, targets: Tensor, known: int) -> Tensor:
        """Mean feature of each class from `known` on, (new, d), of the features given to `refit`."""
        one_hot = F.one_hot(targets - known).double()  # (n, new)
        return one_hot.T @ features / self.counts[known:, None]

    @abstractmethod
    def refit(self, features: Tensor, targets: Tensor) -> None:
        """Update statistics and classifier with features (n, d), float64, of the classes just counted."""

    @abstractmethod
    def compensate_drift(self, before: Tensor, after: Tensor) -> float:
        """Correct the statistics of all classes so far after the backbone has moved; call before `add`.

        Args:
            before, after: features (n, d) of the newest task's images when it began and now.

        Returns:
            `Drift.explained`, in the space of the statistics.
        """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Scores of all classes so far, (B, d) -> (B, C), float32 on the CPU."""

    def unseen_scores(self, features: Tensor, targets: Tensor) -> Tensor | None:
        """Scores (n, C) of training images by a head fitted without them; None where it is no longer known.

        Only for heads whose `unseen` is not "trained on". features (n, d) and targets (n,): of images among
        those that `unseen_rows` names.
        """
        raise NotImplementedError

    def unseen_rows(self, images: int, classes: int) -> Tensor:
        """Positions among a task's `images` that `unseen_scores` accepts; `classes`: number known by then."""
        return torch.arange(images)

    def _apply(self, *_: Any, **__: Any) -> "ClosedFormHead":
        """Stays on the CPU in float64 wherever the modules around it go."""
        return self

    def stored_numbers(self) -> int:
        """Numbers in its statistics and in the classifier."""
        return sum(tensor.numel() for tensor in self.state_dict().values())


def _take_shapes(
    head: ClosedFormHead, tensors: Mapping[str, Tensor], prefix: str, metadata: Any, *_: Any
) -> None:
    """Load hook: give the head's buffers the shapes of the tensors that are loaded into them."""
    for name, buffer in list(head.named_buffers(recurse=False)):
        loaded = tensors.get(f"{prefix}{name}")
        if loaded is not None and loaded.dim() == buffer.dim():
            setattr(head, name, buffer.new_zeros(loaded.shape))


class PrototypeHead(ClosedFormHead):
    """Cosine with class means: score_c(f) = f . m_c / (||f|| ||m_c||).

    m_c is the mean training feature of class c.
    """

    unseen = LEAVE_ONE_OUT
    means: Tensor  # (C, d)

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("means", torch.zeros(0, width, dtype=torch.float64))

    def refit(self, features: Tensor, targets: Tensor) -> None:
        self.means = torch.cat([self.means, self.new_means(features, targets, len(self.means))])

    def compensate_drift(self, before: Tensor, after: Tensor) -> float:
        drift = fit_drift(before, after)
        self.means = drift.apply(self.means)
        return drift.explained

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features.cpu().float(), dim=1), F.normalize(self.means.float(), dim=1))

    def unseen_scores(self, features: Tensor, targets: Tensor) -> Tensor:
        """Leave-one-out: an image's own class mean is taken without it, (n m_c - f) / (n - 1)."""
        features, own, rows = features.cpu().double(), self.means[targets], torch.arange(len(targets))
        others = own * self.counts[targets, None] - features  # up to a factor, which the cosine ignores
        scores = self(features)
        scores[rows, targets] = F.cosine_similarity(features, others, dim=1).float()
        return scores


# Ridge candidates, relative to the largest squared singular value. Smaller ones fit the newest task's images
# better but do not generalise to others; on DINOv2 features of CIFAR-100 leave-one-out never chose one.
STRENGTHS = [10.0**k for k in range(-2, 4)]


class Drift(NamedTuple):
    """after ~ before J + shift, for features as rows, J = I + A B.

    Attributes:
        left, right: A (d, k) and B (k, d), k at most the number of images.
        shift: (d,).
        explained: 1 - ||leave-one-out residual||^2 / ||after - before||^2; 1 where nothing moved.
    """

    left: Tensor
    right: Tensor
    shift: Tensor
    explained: float

    @property
    def jacobian(self) -> Tensor:
        """J (d, d)."""
        return torch.eye(len(self.shift), dtype=self.shift.dtype) + self.left @ self.right

    def apply(self, features: Tensor) -> Tensor:
        """Features (n, d) as the new network would give them."""
        return features + (features @ self.left) @ self.right + self.shift

    def map_sums(self, sums: Tensor) -> Tensor:
        """J^T S of sums S (d, m) over features."""
        return sums + self.right.T @ (self.left.T @ sums)

    def map_form(self, form: Tensor) -> Tensor:
        """J^T F J of a symmetric F (d, d), by products with the factors where these are narrow."""
        if 2 * self.left.shape[1] >= len(form):
            jacobian = self.jacobian
            return jacobian.T @ form @ jacobian
        product = form @ self.left  # (d, k)
        half = (product + self.right.T @ (self.left.T @ product) / 2) @ self.right
        return form + half + half.T


def fit_drift(before: Tensor, after: Tensor) -> Drift:
    """The affine map from old to new features of the same images (n, d); computed and returned in float64.

    It is fitted on the newest task's images alone; features of older classes may move differently.

    With X = before - mean and Y = after - before - mean movement, J = I + (X^T X + s I)^-1 X^T Y: the larger
    s, the closer the map is to one common shift. s is the candidate of `STRENGTHS` with the smallest
    leave-one-out error. Identical images give J = I; for a single image that moved `explained` is 0.
    """
    before, after = before.double(), after.double()
    movement = after - before
    total = float(movement.square().sum())
    if total == 0 or len(before) == 1:
        return Drift(before[:0].T, before[:0], movement.mean(dim=0), float(total == 0))
    centre, common = before.mean(dim=0), movement.mean(dim=0)
    fit = fit_ridge(before - centre, movement - common, STRENGTHS)
    return Drift(fit.left, fit.right, common - centre @ fit.left @ fit.right, 1 - fit.error / total)
