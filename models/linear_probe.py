"""Linear probe: a linear classifier trained on frozen features of all classes at once.

It measures the features alone, without adaptation and without forgetting.

    python main.py --config exps/baselines/linear_probe_cifar.json

There is one task that holds all classes, as for `joint`. The augmented views are drawn as for other methods.
"""

from torch import nn

from backbone.frozen_vit import FrozenViT
from models.config.linear_probe import LinearProbeConfig
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.training import train_functional
from utils.inc_net import IncrementalHead


class LinearProbe(ClassIncrementalLearner):
    """A linear classifier on the frozen class token."""

    Config = LinearProbeConfig
    config: LinearProbeConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        head = IncrementalHead(vit.num_features)
        return nn.ModuleDict({"backbone": FrozenViT(vit), "head": head})

    def learn_task(self) -> None:
        self.once("functional", lambda: train_functional(self))
