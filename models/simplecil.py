"""SimpleCIL: class means of the frozen network's features, compared by cosine; nothing is trained.

    python main.py --config exps/baselines/simplecil_cifar.json

score_c(x) = cos(f(x), m_c), with f the class token of the frozen ViT and m_c its mean over the training
images of class c in the test view. Source: Zhou et al., *Revisiting Class-Incremental Learning with
Pre-Trained Models: Generalizability and Adaptivity are All You Need*, IJCV 2024.
"""

from torch import nn

from backbone.frozen_vit import FrozenViT
from models.config.simplecil import SimpleCILConfig
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.closed_form import PrototypeHead


class SimpleCIL(ClassIncrementalLearner):
    """Nearest class mean by cosine on frozen features."""

    Config = SimpleCILConfig
    config: SimpleCILConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        head = PrototypeHead(vit.num_features)
        return nn.ModuleDict({"backbone": FrozenViT(vit), "closed_form": head})

    def learn_task(self) -> None:
        self.once("head", self.fit_head)
