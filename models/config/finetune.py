"""Config of finetuning (`models/finetune.py`)."""

from typing import Literal

from models.vit.config import AdapterKeys, FrozenViTKeys, HeadKeys, RidgeKeys, StepKeys, TrainingKeys
from utils.config.schema import key


class FinetuneConfig(AdapterKeys, HeadKeys, RidgeKeys, TrainingKeys, StepKeys, FrozenViTKeys):
    """Adapters, training, and a choice of classifier; no keys of its own."""

    model_name: Literal["finetune"] = key(
        "finetune", "Adapters that go on learning in every task: the matched adapter of Nested LoRA."
    )
