"""Config of SimpleCIL (`models/simplecil.py`)."""

from typing import ClassVar, Literal

from models.vit.config import ClassIncrementalConfig, FrozenViTKeys
from utils.config.schema import key


class SimpleCILConfig(FrozenViTKeys):
    """Features of the frozen ViT; no keys of training."""

    legacy_keys: ClassVar[dict[str, str]] = ClassIncrementalConfig.legacy_keys | {
        "batch_size": "nothing is trained",
        "grad_accumulation": "nothing is trained",
        "augmentation": "nothing is trained",
        "ranpac_dim": "class means classify",
    }

    augmentation: ClassVar[str] = "none"  # no keys: nothing is trained
    cache_views: ClassVar[int] = 0

    model_name: Literal["simplecil"] = key(
        "simplecil", "SimpleCIL: nearest class mean by cosine on frozen features."
    )
