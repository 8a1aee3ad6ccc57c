"""Config of finetuning (`models/finetune.py`)."""

from typing import Literal

from models.vit.config import (
    AdapterKeys,
    FrozenViTKeys,
    HeadKeys,
    MergeKeys,
    RidgeKeys,
    StepKeys,
    TrainingKeys,
)
from utils.config.schema import Conflict, UnusedRule, key


class FinetuneConfig(MergeKeys, AdapterKeys, HeadKeys, RidgeKeys, TrainingKeys, StepKeys, FrozenViTKeys):
    """Adapters, their training and merging, and a choice of classifier; of its own, the loss."""

    model_name: Literal["finetune"] = key(
        "finetune", "Adapters that go on learning in every task: the matched adapter of Nested LoRA."
    )
    loss: Literal["task", "ridge_residual"] = key(
        "task",
        "Cross-entropy over the task's classes; or over all classes seen, of the scores that the head "
        '"ranpac" gives when the task begins, which stay fixed, plus a linear term that starts at zero.',
    )

    @property
    def learns_residual(self) -> bool:
        """Whether the loss is over all classes seen."""
        return self.loss == "ridge_residual" and self.func_epoch > 0

    def conflicts(self) -> list[Conflict]:
        """A loss that needs a ridge regression, and one."""
        found = super().conflicts()
        if self.learns_residual and (self.head != "ranpac" or self.ensembles):
            fault = "the loss is beside the scores of one ridge regression"
            sentence = f'{fault}; allowed: head "ranpac" and merge_ensemble false'
            found.append((("loss", "head", "merge_ensemble"), sentence))
        return found

    def unused_rules(self) -> list[UnusedRule]:
        return [(self.func_epoch == 0, "func_epoch is 0", ("loss",)), *super().unused_rules()]

    def one_class_advice(self, task: int) -> str:
        return "" if self.learns_residual and task else super().one_class_advice(task)
