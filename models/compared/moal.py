"""MoAL: a moving average of adapters, ridge regression on its features, and rumination of old classes.

    python main.py --config exps/methods/moal_cifar.json

The adapters' weights w are trained on every task with cross-entropy over its classes. Their moving average
a <- decay a + (1 - decay) w, after the first task w itself, gives the deployed features. RanPAC's ridge
regression on random features classifies; after a task it also learns pseudo-features of the old classes
(`RuminatingHead`). Source: Gao et al., *Knowledge Memorization and Rumination for Pre-trained Model-based
Class-Incremental Learning*, CVPR 2025. Published code moves the average once per epoch, and multiplies the
first task's regression by 0.9; here it moves in every step (`ema_every`), and nothing is multiplied.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.merging import MovingAverage
from models.config.moal import MoALConfig
from models.ranpac import FIT, HELD, RanPACHead
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.training import FunctionalPhase, adapted_network
from utils.inc_net import IncrementalHead
from utils.training.phase import EpochNote
from utils.wording import counted

logger = logging.getLogger("nested_lora")


class RuminatingHead(RanPACHead):
    """`RanPACHead` that also learns pseudo-features of old classes, those that it misclassifies.

    For every old class i with mean feature m_i, and the new class j whose mean is nearest to it by cosine,
    each new feature x of class j gives a pseudo-feature x + m_i - m_j of class i. Those that the regression
    over all classes so far misclassifies are added to its sums, once per task; none without `rumination`.
    Those made from held-out features are held out, too.
    """

    means: Tensor  # (C, d), of each class as the network gave them when it was new

    def __init__(self, width: int, seed: int, dim: int, rumination: bool) -> None:
        super().__init__(width, seed, dim)
        self.rumination = rumination
        self.register_buffer("means", torch.zeros(0, width, dtype=torch.float64))

    def refit(self, features: Tensor, targets: Tensor) -> None:
        old = len(self.means)
        self.means = torch.cat([self.means, self.new_means(features, targets, old)])
        super().refit(features, targets)
        if not (self.rumination and old):
            return
        is_held = torch.zeros(len(features), dtype=torch.bool)
        is_held[self.unseen_rows(len(features), len(self.means))] = True
        total, misclassified = 0, 0
        for part, rows in ((FIT, ~is_held), (HELD, is_held)):
            pseudo, labels = self.pseudo_features(features[rows], targets[rows], old)
            wrong = self(pseudo).argmax(dim=1) != labels
            self.accumulate(part, pseudo[wrong], labels[wrong])
            total, misclassified = total + len(wrong), misclassified + int(wrong.sum())
        logger.info(f"Rumination: {counted(misclassified, 'pseudo-feature')} of {total} misclassified")
        if misclassified:
            self.solve()

    def pseudo_features(self, features: Tensor, targets: Tensor, old: int) -> tuple[Tensor, Tensor]:
        """Pseudo-features (n, d) of the first `old` classes from those of the new ones, and labels (n,)."""
        directions = F.normalize(self.means, dim=1)
        nearest = old + (directions[:old] @ directions[old:].T).argmax(dim=1)
        moved = [features[targets == j] + self.means[i] - self.means[j] for i, j in enumerate(nearest)]
        labels = torch.arange(old).repeat_interleave(torch.tensor([len(rows) for rows in moved]))
        return torch.cat(moved), labels


class MoAL(ClassIncrementalLearner):
    """A moving average of adapters, ridge regression, and rumination of old classes."""

    Config = MoALConfig
    config: MoALConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        config, width, network = self.config, vit.num_features, adapted_network(vit, self.config)
        parameters = [p for group in network.parameter_groups().values() for p in group]
        head = RuminatingHead(width, self.seed, config.ranpac_dim, config.rumination)
        return nn.ModuleDict(
            {
                "backbone": network,
                "head": IncrementalHead(width),
                "closed_form": head,
                "average": MovingAverage(parameters),
            }
        )

    @property
    def average(self) -> MovingAverage:
        return self.modules["average"]

    def learn_task(self) -> None:
        self.once("start weights", self.average.begin)
        self.once("functional", lambda: self.run_phase(AveragedPhase(self)))
        self.once("average", lambda: self.average.end(first=self.task == 0))
        self.once("head", self.fit_head)


class AveragedPhase(FunctionalPhase):
    """`FunctionalPhase` that moves the average of the weights."""

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        super().after_step(step, moved)
        if self.config.ema_every == "step":
            self.learner.average.update(self.config.ema_decay)

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        if self.config.ema_every == "epoch":
            self.learner.average.update(self.config.ema_decay)
        return super().after_epoch(loss, steps)
