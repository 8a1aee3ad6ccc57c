"""Finetune: one adapter a block that goes on learning in every task, without growth and without freezing.

    python main.py --config exps/baselines/finetune_cifar.json

The adapters (any `ffn_adapter_type`) and the newest classifier rows are trained with the cross-entropy over the current
task's classes; nothing protects what was learned before. It is what Nested LoRA with `nested_lora_freeze` "never" must
be compared with: the same freedom on one time scale.
"""

from typing import Literal

from pydantic import Field

from models.vit.config import AdapterConfig
from models.vit.tuning import AdapterTuning


class FinetuneConfig(AdapterConfig):
    """Finetune has no keys of its own."""

    model_name: Literal["finetune"] = Field("finetune", description="The method.")


class Finetune(AdapterTuning):
    """Adapters trained in sequence on every task."""

    Config = FinetuneConfig
    config: FinetuneConfig
