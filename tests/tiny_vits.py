"""Tiny untrained networks of the timm families that wrappers must fit, and images for them."""

import timm
import torch
from torch import Tensor, nn

DEPTH, WIDTH = 3, 48
SMALL = {"img_size": 28, "depth": DEPTH, "embed_dim": WIDTH, "num_heads": 3}
MODELS = {
    "vit_small_patch16_224": {**SMALL, "img_size": 32},
    "deit_small_patch16_224": {**SMALL, "img_size": 32},
    "deit3_small_patch16_224": {**SMALL, "img_size": 32},
    "vit_small_patch14_dinov2": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
}
NAME = "vit_small_patch14_reg4_dinov2"


def plain_vit(name: str = NAME) -> nn.Module:
    """The network, the same at every call."""
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, global_pool="token", **MODELS[name]).eval()
    with torch.no_grad():
        for parameter in vit.parameters():  # away from the zeros and ones of a fresh model
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vit


def images(name: str = NAME, count: int = 4) -> Tensor:
    """Images of its size, the same at every call."""
    side = MODELS[name]["img_size"]
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))
