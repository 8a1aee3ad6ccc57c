"""Config of joint training (`models/joint.py`)."""

from typing import Literal

from models.vit.config import AdapterKeys, HeadKeys, OneTaskRules, TrainingKeys
from utils.config.schema import key


class JointConfig(OneTaskRules, AdapterKeys, HeadKeys, TrainingKeys):
    """The keys of finetuning, for one task."""

    model_name: Literal["joint"] = key("joint", "Adapters and classifier trained on all classes at once.")
