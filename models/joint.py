"""Joint: the same adapters trained on all classes at once; an upper bound for what task-by-task learning can reach.

    python main.py --config exps/joint_cifar.json

There is one task that holds all classes, so the record has a final accuracy and neither forgetting nor a curve.
"""

from typing import Literal

from pydantic import Field

from models.tuning import AdapterTuning
from models.vit_config import AdapterConfig
from utils.config import ClassIncrementalConfig, Conflict
from utils.data import class_count


class JointConfig(AdapterConfig):
    """Joint training has no keys of its own, and one task."""

    model_name: Literal["joint"] = Field("joint", description="The method.")

    def conflicts(self) -> list[Conflict]:
        """Adds that all classes come at once."""
        return [*super().conflicts(), *one_task(self)]


class Joint(AdapterTuning):
    """Adapters and classifier trained on all classes together."""

    Config = JointConfig
    config: JointConfig


def one_task(config: ClassIncrementalConfig) -> list[Conflict]:
    """The conflict of a joint method with a first task that leaves classes out, if there is one."""
    classes = class_count(config.dataset, config.data_root)
    if classes in (None, config.init_cls):
        return []
    sentence = f"{config.model_name} learns all classes at once; allowed: init_cls = {classes}"
    return [(("init_cls", "dataset"), sentence)]
