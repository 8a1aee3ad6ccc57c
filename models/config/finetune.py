"""Config of finetuning (`models/finetune.py`)."""

from typing import Literal

from models.vit.config import AdapterKeys, HeadKeys, MergeKeys, TrainingKeys
from utils.config.schema import key


class FinetuneConfig(MergeKeys, AdapterKeys, HeadKeys, TrainingKeys):
    """Adapters, their training and merging, and a choice of classifier; no keys of its own."""

    model_name: Literal["finetune"] = key(
        "finetune", "Adapters that go on learning in every task: the matched adapter of Nested LoRA."
    )
