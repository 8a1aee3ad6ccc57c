"""Finetune: one adapter per block that goes on learning in every task, without growth and without freezing.

    python main.py --config exps/baselines/finetune_cifar.json

The adapters (any `ffn_adapter_type`) and the newest classifier rows are trained with the cross-entropy over
the current task's classes; nothing protects what was learned before. It is what Nested LoRA with
`nested_lora_freeze` "never" must be compared with: the same freedom on one time scale.
"""

from torch import nn

from models.config.finetune import FinetuneConfig
from models.heads import build_heads
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.training import adapted_network, functional_groups, train_functional
from utils.training.optim import ParameterGroup


class Finetune(ClassIncrementalLearner):
    """Adapters trained in sequence on every task."""

    Config = FinetuneConfig
    config: FinetuneConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        network = adapted_network(vit, self.config)
        return nn.ModuleDict({"backbone": network, **build_heads(self.config, vit.num_features)})

    def learning_groups(self) -> list[ParameterGroup]:
        return functional_groups(self.network, self.head, self.config)

    def learn_task(self) -> None:
        self.once("remember features", self.remember_features)
        self.once("functional", lambda: train_functional(self))
        self.once("head", self.fit_head)
