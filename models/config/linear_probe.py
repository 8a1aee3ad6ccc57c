"""Config of the linear probe (`models/linear_probe.py`)."""

from typing import ClassVar, Literal

from models.vit.config import OneTaskRules, RowsRules, TrainingKeys
from utils.config.schema import key


class LinearProbeConfig(OneTaskRules, RowsRules, TrainingKeys):
    """Training of a classifier, for one task."""

    legacy_keys: ClassVar[dict[str, str]] = TrainingKeys.legacy_keys | {
        "head": "the trained classifier classifies",
        "head_drift": "features never move",
        "ranpac_dim": "the trained classifier classifies",
    }

    model_name: Literal["linear_probe"] = key(
        "linear_probe", "A linear classifier on frozen features, trained on all classes at once."
    )
