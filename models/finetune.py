"""Finetune: one adapter per block, trained on task after task without growth and without freezing.

    python main.py --config exps/baselines/finetune_cifar.json

The adapters (any `ffn_adapter_type`) and the newest classifier rows are trained with the cross-entropy over
the current task's classes; nothing protects what was learned before. It is the baseline for Nested LoRA with
`nested_lora_freeze` "never": the same freedom on one time scale. With `merge` the weights reached in each
task are merged, and the merged weights are evaluated (`backbone/merging.py`).
"""

from torch import nn

from backbone.merging import Merging
from models.config.finetune import FinetuneConfig
from models.heads import build_heads
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.training import adapted_network, train_functional


class Finetune(ClassIncrementalLearner):
    """Adapters trained in sequence on every task."""

    Config = FinetuneConfig
    config: FinetuneConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        config, network = self.config, adapted_network(vit, self.config)
        modules = {"backbone": network, **build_heads(config, vit.num_features)}
        if config.merge != "none":
            parameters = [p for group in network.parameter_groups().values() for p in group]
            modules["merging"] = Merging(parameters, config.merge, config.merge_start, config.merge_alpha)
        return nn.ModuleDict(modules)

    @property
    def merging(self) -> Merging | None:
        return dict(self.modules.items()).get("merging")

    def learn_task(self) -> None:
        self.once("remember features", self.remember_features)
        if self.merging is not None:
            self.once("start weights", self.merging.begin)
        self.once("functional", lambda: train_functional(self))
        if self.merging is not None:
            self.once("merge", self.merging.end)
        self.once("head", self.fit_head)
