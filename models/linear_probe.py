"""Linear probe: a linear classifier trained on frozen features of all classes at once; what the features alone offer.

    python main.py --config exps/baselines/linear_probe_cifar.json

There is one task that holds all classes, as for `joint`. The augmented views are those of every other method.
"""

from typing import ClassVar, Literal

from pydantic import Field

from models.vit.config import TrainingConfig
from models.vit.tuning import Tuning


class LinearProbeConfig(TrainingConfig):
    """The linear probe has no keys of its own, one task, and a trained classifier."""

    one_task: ClassVar[bool] = True

    model_name: Literal["linear_probe"] = Field("linear_probe", description="The method.")
    head: Literal["fc"] = Field("fc", description="The trained classifier.")
    head_drift: Literal["none"] = Field("none", description="Features never move.")


class LinearProbe(Tuning):
    """A linear classifier on the frozen class token."""

    Config = LinearProbeConfig
    config: LinearProbeConfig
