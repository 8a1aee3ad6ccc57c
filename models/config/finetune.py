"""Config of finetuning (`models/finetune.py`)."""

from typing import Literal

from models.vit.backbones import BackboneShape
from models.vit.config import AdapterKeys, HeadKeys, MergeKeys, TrainingKeys
from utils.config.schema import Conflict, UnusedRule, key


class FinetuneConfig(MergeKeys, AdapterKeys, HeadKeys, TrainingKeys):
    """Adapters, their training and merging, and a choice of classifier; of its own, terms of the loss."""

    model_name: Literal["finetune"] = key(
        "finetune", "Adapters that go on learning in every task: the matched adapter of Nested LoRA."
    )
    loss: Literal["task", "ridge_residual"] = key(
        "task",
        "Cross-entropy over the task's classes; or over all classes seen, of the scores that the head "
        '"ranpac" gives when the task begins, which stay fixed, plus a linear term that starts at zero.',
    )

    nested_lora_slow_importance: float = key(
        0.0,
        "Strength lambda that holds slow branches where a task begins, each number by its mean squared "
        "gradient in past tasks.",
        ge=0,
        le=1e12,
    )

    @property
    def learns_residual(self) -> bool:
        """Whether the loss is over all classes seen."""
        return self.loss == "ridge_residual" and self.func_epoch > 0

    @property
    def holds_slow(self) -> bool:
        """Whether slow branches learn and are held."""
        learns = self.nested and self.func_epoch > 0 and self.nested_lora_lr_slow > 0
        return learns and self.nested_lora_slow_importance > 0

    def stored_bytes(self, shape: BackboneShape, task: int, classes: int) -> int:
        slow = self.adapter_bytes(shape, task) // 2 if self.holds_slow else 0
        return super().stored_bytes(shape, task, classes) + 3 * slow

    def conflicts(self) -> list[Conflict]:
        """A loss that needs a ridge regression, and one."""
        found = super().conflicts()
        if self.learns_residual and (self.head != "ranpac" or self.ensembles):
            fault = "the loss is beside the scores of one ridge regression"
            sentence = f'{fault}; allowed: head "ranpac" and merge_ensemble false'
            found.append((("loss", "head", "merge_ensemble"), sentence))
        return found

    def unused_rules(self) -> list[UnusedRule]:
        held = ("nested_lora_slow_importance",)
        return [
            (self.func_epoch == 0, "func_epoch is 0", ("loss", *held)),
            (self.nested_lora_lr_slow == 0, "nested_lora_lr_slow is 0", held),
            *super().unused_rules(),
        ]

    def one_class_advice(self, task: int) -> str:
        return "" if self.learns_residual and task else super().one_class_advice(task)
