"""Finetune: one adapter per block that goes on learning in every task, without growth and without freezing.

    python main.py --config exps/baselines/finetune_cifar.json

The adapters (any `ffn_adapter_type`) and the newest classifier rows are trained with the cross-entropy over
the current task's classes; nothing protects what was learned before. It is what Nested LoRA with
`nested_lora_freeze` "never" must be compared with: the same freedom on one time scale. With `merge` the
weights reached task by task are merged, and the merged ones are tested (`backbone/merging.py`); with
`merge_ensemble` these and the ones that training goes on from classify together (`models/vit/ensemble.py`).
With `loss` "ridge_residual" cross-entropy is over all classes seen, and knows the head that will classify;
with `nested_lora_slow_importance` slow branches are held near their past (`backbone/importance.py`).
"""

import logging

import torch
from torch import Tensor, nn

from backbone.importance import SlowImportance
from backbone.merging import Merging
from backbone.paired import PairedViT
from models.config.finetune import FinetuneConfig
from models.heads import build_heads
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.ensemble import EntropyEnsemble
from models.vit.task_inputs import Batch
from models.vit.training import FunctionalPhase, adapted_network
from utils.inc_net import ResidualRows
from utils.training.random import rng

logger = logging.getLogger("nested_lora")


class Finetune(ClassIncrementalLearner):
    """Adapters trained in sequence on every task."""

    Config = FinetuneConfig
    config: FinetuneConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        config, width = self.config, vit.num_features
        network = adapted_network(vit, config, kind=PairedViT)
        modules = {"backbone": network, **build_heads(config, width)}
        if config.merge != "none":
            parameters = [p for group in network.parameter_groups().values() for p in group]
            rule = config.merge, config.merge_start, config.merge_alpha, config.merge_schedule
            modules["merging"] = Merging(parameters, *rule)
        if config.ensembles:
            network.pair(modules["merging"])
            heads = [modules["closed_form"], build_heads(config, width)["closed_form"]]
            modules["closed_form"] = EntropyEnsemble(2 * width, heads)
        if config.learns_residual:
            modules["head"] = ResidualRows(width)
        if config.holds_slow:
            slow = network.parameter_groups()["slow"]
            modules["slow_importance"] = SlowImportance(slow, config.nested_lora_slow_importance)
        return nn.ModuleDict(modules)

    @property
    def merging(self) -> Merging | None:
        return dict(self.modules.items()).get("merging")

    def learn_task(self) -> None:
        self.once("remember features", self.remember_features)
        if self.config.learns_residual:
            self.once("ridge of the loss", self.anticipate_head)
        if self.merging is not None:
            self.once("start weights", self.merging.begin)
        if self.config.holds_slow:
            self.once("slow anchor", self.modules["slow_importance"].begin_task)
        with self.network.unpaired():
            self.once("functional", self.train)
        if self.config.holds_slow:
            self.once("slow importance", self.end_slow_importance)
        if self.merging is not None:
            self.once("merge", self.merging.end)
        self.once("head", self.fit_head)

    def train(self) -> None:
        """Run the task's functional phase; the first task has nothing deployed to scale towards."""
        scaled = self.task > 0 and "merge_train_scale" not in self.config.without_effect()
        self.run_phase(ScaledPhase(self) if scaled else FunctionalPhase(self))
        self.method_tensors.pop("ridge", None)

    def end_slow_importance(self) -> None:
        """Take the open task's importance in, and log how large it has become."""
        importance = self.modules["slow_importance"]
        importance.end_task()
        mean, largest = float(importance.omega.mean()), float(importance.omega.max())
        shown = f"{mean:.3g} on average, {largest:.3g} at most"
        logger.info(f"Task {self.task}: importance of slow weights {shown}")

    @torch.no_grad()
    def anticipate_head(self) -> None:
        """Storage of the ridge regression of all classes seen, as the features are before training."""
        features = self.method_tensors.get("features_before", None)
        if features is None:
            features = self.training_features().cpu()
        targets = self.data.targets(self.data.indices(self.classes, "train"), "train")
        self.method_tensors["ridge"] = self.closed_form.anticipated(features, targets)

    def training_logits(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `ClassIncrementalLearner` has them; of the residual h(f) W / T + f V over all classes, (B, C).

        W and T are fixed in a task and no gradient passes h; V is zero when it begins.
        """
        if not self.config.learns_residual:
            return super().training_logits(features, targets)
        hidden = self.closed_form.random_features(features.detach().cpu().double())
        scores = (hidden @ self.method_tensors["ridge"]).to(features)
        return scores + self.head(features), targets


class ScaledPhase(FunctionalPhase):
    """`FunctionalPhase` of a later task with forwards at m + s (w - m): m is deployed, w learns.

    The gradient of w is s times that of the interpolated weights. These are in the parameters between the two
    hooks of a step alone; before and after it the parameters are w. Classifier rows are not scaled.
    """

    def __init__(self, learner: Finetune) -> None:
        super().__init__(learner)
        self.merging, self.share = learner.merging, learner.merging.share
        self.deployed = learner.merging.deployed()

    def scale(self, step: int) -> float:
        """s of a step, counted from 1: drawn from U[alpha_t, 1]; or 1, and alpha_t in the last epoch."""
        if self.config.merge_train_scale == "drawn":
            stream = rng("merge train scale", self.learner.seed, self.learner.task, step)
            return self.share + (1 - self.share) * float(torch.rand((), generator=stream))
        return self.share if step > (self.epochs - 1) * self.steps_per_epoch else 1.0

    def micro_batches(self, batch: Batch) -> list[Batch]:
        scale = self.scale(self.optimizer.steps + 1)
        self.learning = self.merging.weights()
        if scale != 1:
            self.merging.write(self.deployed + scale * (self.learning - self.deployed))
        return super().micro_batches(batch)

    def before_step(self, step: int) -> None:
        self.merging.write(self.learning)
        self.merging.scale_gradients(self.scale(step))
        super().before_step(step)
