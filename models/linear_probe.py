"""Linear probe: a linear classifier trained on frozen features of all classes at once; what the features alone offer.

    python main.py --config exps/linear_probe_cifar.json

There is one task that holds all classes, as for `joint`. The augmented views are those of every other method.
"""

from typing import Literal

from pydantic import Field

from models.joint import one_task
from models.tuning import Tuning
from models.vit_config import TrainingConfig
from utils.config import Conflict


class LinearProbeConfig(TrainingConfig):
    """The linear probe has no keys of its own, one task, and a trained classifier."""

    model_name: Literal["linear_probe"] = Field("linear_probe", description="The method.")
    head: Literal["fc"] = Field("fc", description="The trained classifier.")
    head_drift: Literal["none"] = Field("none", description="Features never move.")

    def conflicts(self) -> list[Conflict]:
        """Adds that all classes come at once."""
        return [*super().conflicts(), *one_task(self)]


class LinearProbe(Tuning):
    """A linear classifier on the frozen class token."""

    Config = LinearProbeConfig
    config: LinearProbeConfig
