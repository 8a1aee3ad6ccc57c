"""Linear probe: a linear classifier trained on frozen features of all classes at once; what the features alone offer.

    python main.py --config exps/baselines/linear_probe_cifar.json

There is one task that holds all classes, as for `joint`. The augmented views are those of every other method.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from backbone.vit_sema import SEMAVisionTransformer
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.config import TrainingConfig
from models.vit.training import train_functional
from utils.inc_net import IncrementalHead


class LinearProbeConfig(TrainingConfig):
    """The linear probe has no keys of its own, one task, and a trained classifier."""

    one_task: ClassVar[bool] = True

    model_name: Literal["linear_probe"] = Field("linear_probe", description="The method.")
    head: Literal["fc"] = Field("fc", description="The trained classifier.")
    head_drift: Literal["none"] = Field("none", description="Features never move.")


class LinearProbe(ClassIncrementalLearner):
    """A linear classifier on the frozen class token."""

    Config = LinearProbeConfig
    config: LinearProbeConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        head = IncrementalHead(vit.num_features)
        return nn.ModuleDict({"backbone": SEMAVisionTransformer(vit), "head": head})

    def learn_task(self) -> None:
        self.once("functional", lambda: train_functional(self))
        self.once("head", self.fit_head)
