"""APER: nearest class mean by cosine on frozen and first-task-adapted features, concatenated.

    python main.py --config exps/methods/aper_cifar.json

f(x) = [class token of the frozen ViT, class token of the ViT with adapters], of 2 d numbers. The adapters are
trained on the first task with cross-entropy over its classes, and frozen; score_c(x) = cos(f(x), m_c), where
m_c is the mean of f over the training images of class c in the test view. Source: Zhou et al., *Revisiting
Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All You Need*, IJCV
2024.
"""

from torch import nn

from models.config.aper import APERConfig
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.closed_form import PrototypeHead
from models.vit.training import task_adapter_network, train_and_freeze
from utils.inc_net import IncrementalHead


class APER(ClassIncrementalLearner):
    """Nearest class mean by cosine on frozen and once adapted features."""

    Config = APERConfig
    config: APERConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        head = PrototypeHead(2 * vit.num_features)
        network = task_adapter_network(vit, self.config, plain=True)
        rows = IncrementalHead(vit.num_features, kind=self.config.training_classifier)
        return nn.ModuleDict({"backbone": network, "head": rows, "closed_form": head})

    def open_task(self) -> None:
        """Add an adapter, and classifier rows to train it with, in the first task only."""
        if self.task == 0:
            super().open_task()
            self.network.grow()

    def learn_task(self) -> None:
        if self.task == 0:
            self.once("functional", lambda: train_and_freeze(self))
        self.once("head", self.fit_head)
