"""Config of finetuning (`models/finetune.py`)."""

from typing import Literal

from models.vit.config import AdapterKeys, HeadKeys, TrainingKeys
from utils.config.schema import UnusedRule, key


class FinetuneConfig(AdapterKeys, HeadKeys, TrainingKeys):
    """Adapters, their training, the merging of their weights over tasks, and a choice of classifier."""

    model_name: Literal["finetune"] = key(
        "finetune", "Adapters that go on learning in every task: the matched adapter of Nested LoRA."
    )
    merge: Literal["none", "mean", "ema", "max_magnitude", "orthogonal"] = key(
        "none",
        "Adapter weights that are deployed: those after the newest task; their mean over tasks (ACMap); a "
        "moving average over tasks; element by element the largest change (MagMax); or the sum of changes "
        "orthogonal to earlier ones (OPCM).",
    )
    merge_alpha: float = key(0.15, 'Share of the newest task\'s weights with merge "ema".', ge=0, le=1)
    merge_start: Literal["carried", "merged", "first", "initial"] | None = key(
        None,
        "Weights that a later task starts from: those its predecessor ended with, the merged ones, those "
        "after the first task, or the initial ones; null for what the rule's paper does.",
    )

    def unused_rules(self) -> list[UnusedRule]:
        return [
            (self.merge == "none", 'merge is "none"', ("merge_start",)),
            (self.merge != "ema", f'merge is "{self.merge}"', ("merge_alpha",)),
            (self.func_epoch == 0, "func_epoch is 0", ("merge", "merge_alpha", "merge_start")),
            *super().unused_rules(),
        ]
