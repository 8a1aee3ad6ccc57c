"""Joint: the same adapters trained on all classes at once; an upper bound for what task-by-task learning can reach.

    python main.py --config exps/baselines/joint_cifar.json

There is one task that holds all classes, so the record has a final accuracy and neither forgetting nor a curve.
"""

from typing import ClassVar, Literal

from pydantic import Field

from models.vit.config import AdapterConfig
from models.vit.tuning import AdapterTuning


class JointConfig(AdapterConfig):
    """Joint training has no keys of its own, and one task."""

    one_task: ClassVar[bool] = True

    model_name: Literal["joint"] = Field("joint", description="The method.")


class Joint(AdapterTuning):
    """Adapters and classifier trained on all classes together."""

    Config = JointConfig
    config: JointConfig
