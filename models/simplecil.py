"""SimpleCIL: class means of the frozen network's features, compared by cosine; nothing is trained.

    python main.py --config exps/simplecil_cifar.json

score_c(x) = cos(f(x), m_c), with f the class token of the frozen ViT and m_c its mean over the training images of
class c in the test view. Source: Zhou et al., *Revisiting Class-Incremental Learning with Pre-Trained Models:
Generalizability and Adaptivity are All You Need*, IJCV 2024.
"""

from typing import Literal

from pydantic import Field

from models.frozen_vit import FrozenViT
from models.vit_config import ViTConfig


class SimpleCILConfig(ViTConfig):
    """SimpleCIL has no keys of its own."""

    model_name: Literal["simplecil"] = Field("simplecil", description="The method.")


class SimpleCIL(FrozenViT):
    """Nearest class mean by cosine on frozen features (`utils.readout.PrototypeReadout`)."""

    Config = SimpleCILConfig
    config: SimpleCILConfig
