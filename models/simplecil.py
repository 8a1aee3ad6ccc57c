"""SimpleCIL: class means of the frozen network's features, compared by cosine; nothing is trained.

    python main.py --config exps/baselines/simplecil_cifar.json

score_c(x) = cos(f(x), m_c), with f the class token of the frozen ViT and m_c its mean over the training
images of class c in the test view. Source: Zhou et al., *Revisiting Class-Incremental Learning with
Pre-Trained Models: Generalizability and Adaptivity are All You Need*, IJCV 2024.
"""

from typing import ClassVar, Literal

from torch import nn

from backbone.vit_sema import SEMAVisionTransformer
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.closed_form import PrototypeHead
from models.vit.config import ClassIncrementalConfig, FrozenViTKeys
from utils.config.schema import key


class SimpleCILConfig(FrozenViTKeys):
    """Features of the frozen ViT; no keys of training."""

    legacy_keys: ClassVar[dict[str, str]] = {
        **ClassIncrementalConfig.legacy_keys,
        "batch_size": "nothing is trained",
        "grad_accumulation": "nothing is trained",
        "augmentation": "nothing is trained",
        "ranpac_dim": "class means classify",
    }

    augmentation: ClassVar[str] = "none"  # no keys: nothing is trained
    cache_views: ClassVar[int] = 0

    model_name: Literal["simplecil"] = key("simplecil", "The method.")


class SimpleCIL(ClassIncrementalLearner):
    """Nearest class mean by cosine on frozen features."""

    Config = SimpleCILConfig
    config: SimpleCILConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        head = PrototypeHead(vit.num_features)
        return nn.ModuleDict({"backbone": SEMAVisionTransformer(vit), "closed_form": head})

    def learn_task(self) -> None:
        self.once("head", self.fit_head)
