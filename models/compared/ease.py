"""EASE: an adapter per task, and prototypes in the subspaces of all adapters.

    python main.py --config exps/methods/ease_cifar.json

A task trains an adapter of its own with cross-entropy over its classes, and freezes it. f_j(x) (d,) is the
class token of the ViT with adapter j. A class's prototypes in the subspaces of later tasks, when its images
are no longer available, are reconstructed (`EASEHead`). Source: Zhou et al., *Expandable Subspace
Ensemble for Pre-Trained Model-Based Class-Incremental Learning*, CVPR 2024.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config.ease import EASEConfig
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.closed_form import ClosedFormHead
from models.vit.training import task_adapter_network, train_and_freeze
from utils.inc_net import IncrementalHead


class EASEHead(ClosedFormHead):
    """Cosine similarity to class prototypes in the subspaces of all adapters.

    P[j, c] is the mean training feature of class c in subspace j <= i, i the task of the class. When task
    t > i has been learned, P[t, c] is reconstructed from prototypes of its classes b,

        P[t, c] = sum_b s_b P[t, b],   s = softmax_b(cos(P[i, c], P[i, b]) / temperature)

    With t + 1 subspaces the score of a class c of task i is

        score_c(f) = cos(f_i, P[i, c]) + (alpha / t) sum_(j != i) cos(f_j, P[j, c])

    and its first term alone for t = 0. Published code has no temperature: cosines lie close together, so that
    its reconstructed prototypes lie near the mean of the newest ones.
    """

    prototypes: Tensor  # (subspaces, C, d)
    task_of_class: Tensor  # (C,)

    def __init__(self, width: int, alpha: float, temperature: float) -> None:
        super().__init__(width)
        self.alpha, self.temperature = alpha, temperature
        self.register_buffer("prototypes", torch.zeros(0, 0, width, dtype=torch.float64))
        self.register_buffer("task_of_class", torch.zeros(0, dtype=torch.float64))

    def refit(self, features: Tensor, targets: Tensor) -> None:
        """As in `ClosedFormHead`, with features of all subspaces (n, (t + 1) d)."""
        known, newest = len(self.task_of_class), len(self.prototypes)
        means = self.new_means(features, targets, known)  # (new, (t + 1) d)
        new = means.unflatten(1, (newest + 1, self.width)).transpose(0, 1)  # (t + 1, new, d)
        old = torch.cat([self.prototypes, self._reconstructed(new)]) if known else new[:, :0]
        self.prototypes = torch.cat([old, new], dim=1)
        tasks = torch.full((new.shape[1],), newest, dtype=torch.float64)
        self.task_of_class = torch.cat([self.task_of_class, tasks])

    def _reconstructed(self, new: Tensor) -> Tensor:
        """Prototypes of older classes in the newest subspace, (1, old, d), from those of the new classes."""
        own = self.task_of_class.long()
        directions = F.normalize(self.prototypes[own, torch.arange(len(own))], dim=1)  # (old, d)
        similarities = torch.einsum("cd,cbd->cb", directions, F.normalize(new, dim=2)[own])
        return ((similarities / self.temperature).softmax(dim=1) @ new[-1])[None]

    def compensate_drift(self, before: Tensor, after: Tensor) -> float:
        """Do nothing: subspaces never move."""
        return 1.0

    def forward(self, features: Tensor) -> Tensor:
        subspaces = F.normalize(features.cpu().float().unflatten(1, (-1, self.width)), dim=2)
        cosines = torch.einsum("bjd,jcd->bjc", subspaces, F.normalize(self.prototypes.float(), dim=2))
        return (cosines * self.shares()).sum(dim=1)

    def shares(self) -> Tensor:
        """Weight of each subspace in the score of each class, (subspaces, C): 1 or alpha / t."""
        own = F.one_hot(self.task_of_class.long(), len(self.prototypes)).T
        return own + self.alpha / max(1, len(self.prototypes) - 1) * (1 - own)


class EASE(ClassIncrementalLearner):
    """Adapters of each task, and prototypes in all their subspaces."""

    Config = EASEConfig
    config: EASEConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        config, width = self.config, vit.num_features
        head = EASEHead(width, config.alpha, config.ease_temperature)
        network = task_adapter_network(vit, config)
        rows = IncrementalHead(width, kind=config.training_classifier)
        return nn.ModuleDict({"backbone": network, "head": rows, "closed_form": head})

    def open_task(self) -> None:
        super().open_task()
        self.network.grow()

    def learn_task(self) -> None:
        self.once("functional", lambda: train_and_freeze(self))
        self.once("head", self.fit_head)
