"""What the methods that learn by gradient share: the functional phase, the trained classifier, the groups of rates.

A functional phase trains whatever may learn in the network and the newest rows of the classifier with the cross-entropy
over the current task's classes. `head` says what classifies in the end: those rows ("fc"), or a readout of the features
that the phase has shaped.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from backbone.sema_block import AdapterSpec
from backbone.vit_sema import SEMAVisionTransformer
from models.base import Phase, StepResult
from models.vit.config import AdapterConfig, TrainingConfig
from models.vit.frozen_vit import FrozenViT
from models.vit.pretrained import Backbone
from models.vit.slow_trace import SlowTrace
from models.vit.task_inputs import Batch
from utils.inc_net import IncrementalHead
from utils.training.optim import GroupedOptimizer, ParameterGroup

logger = logging.getLogger("nested_lora")

FUNCTIONAL = (
    0  # what a data-order key is for; a method numbers its own purposes from 1 on (4 is `task_inputs.VIEW`)
)


class Tuning(FrozenViT):
    """A method that trains a classifier, and in subclasses more, on features of the ViT."""

    Config = TrainingConfig
    config: TrainingConfig

    def build(self, backbone: Backbone) -> nn.ModuleDict:
        modules = super().build(backbone)
        modules["head"] = IncrementalHead(backbone.vit.num_features)
        return modules

    @property
    def head_kind(self) -> str:
        return self.config.head

    @property
    def fixed_views(self) -> int:
        return self.config.cache_views

    @property
    def head(self) -> IncrementalHead:
        return self.modules["head"]

    def open_task(self) -> None:
        self.head.grow(len(self.classes))

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features) if self.readout is None else super().classify(features)

    @property
    def stages(self) -> dict[str, Callable[[], str]]:
        return {"start": self.start_task, "functional": self.train_functional, "readout": self.fit_readout}

    def start_task(self) -> str:
        """Remember the features as the task finds them, where the readout is to follow their movement."""
        if self.readout is not None and self.task and self.config.head_drift == "linear":
            self.features_before = self.training_features().cpu()
        return "functional"

    # --- stage: functional ------------------------------------------------------------------------------------------

    def train_functional(self) -> str:
        """Train what may learn in the network and the newest classifier rows, on the current task's classes only."""
        phase = self.functional_phase()
        trace = next(
            (SlowTrace(g, self.log, self.task) for g in phase.optimizer.groups if g.name == "slow"), None
        )
        if trace is not None:
            phase.before_step, phase.after_step = trace.before_step, trace.after_step
            logger.info(f"[NestedLoRA] optimizer groups => {phase.optimizer.summary()}")
        self.run_phase(phase)
        if trace is not None:
            trace.summary(phase.optimizer.steps)
        return self.after_functional()

    def after_functional(self) -> str:
        """The stage that comes after a functional phase."""
        return "readout"

    @property
    def phase_block(self) -> int | None:
        """The block that the open phase is about, if it is about one."""
        return None

    def functional_phase(self) -> Phase:
        """The functional phase that the task has come to."""
        config, epochs = self.config, self.config.func_epoch
        key = (self.seed, self.task, FUNCTIONAL, self.progress.phases)
        source = self.inputs.by_epoch(self.task, key, epochs)
        return Phase(
            name="func",
            epochs=epochs,
            optimizer=self.update_optimizer_and_scheduler(epochs),
            batches=lambda epoch, start: self.inputs.read(
                self.task, source(epoch), (*key, epoch), config.batch_size, start
            ),
            steps_per_epoch=self.inputs.batch_count(self.task, config.batch_size),
            observe=self._classify,
            parts=lambda batch: batch.parts(config.grad_accumulation),
            block=self.phase_block,
        )

    def _classify(self, batch: Batch) -> StepResult:
        """Cross-entropy over the current task's classes; older classes take no part."""
        targets = batch.targets.to(self.device) - self.classes.start
        with self.autocast(), self.quickest_attention():
            features = self.network(batch.inputs.to(self.device), batch.depth).float()
        logits = self.head.newest(features)
        return StepResult(
            F.cross_entropy(logits, targets), len(targets), (logits.argmax(dim=1) == targets).sum()
        )

    def quickest_attention(self) -> AbstractContextManager[None]:
        """How attention is computed in training: fused, but for bf16 on CPUs.

        There the fused kernel's backward pass takes 35 to 40 % of a step: a step of the last three blocks took 109 ms
        fused and 69 ms plain for ViT-S at 112 px, 350 and 266 ms at 224 px (batch 16, one thread with AMX); forward
        passes alone, and fp32, are as fast or faster fused.
        """
        plain = self.device.type == "cpu" and self.config.precision == "bf16"
        return self.network.plain_attention() if plain else nullcontext()

    def update_optimizer_and_scheduler(self, num_epoch: int) -> GroupedOptimizer:
        """The functional optimizer, over exactly what learns now.

        Raises:
            RuntimeError: the groups are not exactly the parameters that learn.
        """
        groups = self.learning_groups()
        learning = {id(p) for p in self.modules.parameters() if p.requires_grad}
        learning -= {id(p) for p in self.network.descriptor_parameters()}
        if learning != {id(p) for group in groups for p in group.parameters}:
            raise RuntimeError("the optimizer groups are not the parameters that learn")
        return self.optimizer_over(groups, num_epoch)

    def learning_groups(self) -> list[ParameterGroup]:
        """What learns in a functional phase, by learning rate."""
        return [ParameterGroup("other", self.head.trainable(), lr=self.config.init_lr)]

    def optimizer_over(self, groups: list[ParameterGroup], epochs: int) -> GroupedOptimizer:
        """The configured optimizer over some groups."""
        config = self.config
        return GroupedOptimizer(
            config.optimizer, groups, weight_decay=config.weight_decay, epochs=epochs, min_lr=config.min_lr
        )

    # --- state ------------------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        return super().structure() | {"classes": [rows.out_features for rows in self.head.tasks]}

    def rebuild(self, structure: dict[str, Any]) -> None:
        super().rebuild(structure)
        for classes in structure["classes"]:
            self.head.grow(classes)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        head = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return super().checkpoint_tensors() | head

    def parameter_counts(self) -> dict[str, int]:
        head = sum(parameter.numel() for parameter in self.head.parameters())
        return super().parameter_counts() | {"head": head}


class AdapterTuning(Tuning):
    """A method that also trains adapters in the ViT's blocks."""

    Config = AdapterConfig
    config: AdapterConfig

    def build_network(self, backbone: Backbone) -> SEMAVisionTransformer:
        vit, growing = backbone.vit, range(self.config.adapt_start_layer, self.config.adapt_end_layer + 1)
        adapted = range(len(vit.blocks)) if self.config.adapter_blocks == "all" else growing
        return SEMAVisionTransformer(vit, self.adapter_spec(vit.embed_dim), growing=(), adapted=adapted)

    def adapter_spec(self, width: int) -> AdapterSpec:
        """What an adapter looks like."""
        config = self.config
        return AdapterSpec(
            width=width,
            kind=config.ffn_adapter_type,
            bottleneck=config.nested_lora_rank if config.nested else config.ffn_num,
            scale=config.ffn_adapter_scalar,
            stacked=config.engine == "fast",
        )

    def learning_groups(self) -> list[ParameterGroup]:
        """Groups slow, fast and adapter, as the adapters name them, and other: routers and classifier."""
        config = self.config
        groups = {name: learning(parameters) for name, parameters in self.network.parameter_groups().items()}
        return [
            ParameterGroup(
                "slow",
                groups.get("slow", []),
                lr=config.nested_lora_lr_slow,
                every=config.nested_lora_update_interval_slow,
                between=config.nested_lora_slow_grad,
            ),
            ParameterGroup("fast", groups.get("fast", []), lr=config.nested_lora_lr_fast),
            ParameterGroup(
                "adapter",
                groups.get("adapter", []),
                lr=config.init_lr if config.adapter_lr is None else config.adapter_lr,
            ),
            ParameterGroup("other", [*groups.get("other", []), *self.head.trainable()], lr=config.init_lr),
        ]

    def structure(self) -> dict[str, Any]:
        blocks = {str(block): modules.structure() for block, modules in self.network.modules_by_block.items()}
        return super().structure() | {"blocks": blocks}

    def rebuild(self, structure: dict[str, Any]) -> None:
        for block, modules in self.network.modules_by_block.items():
            modules.rebuild(structure["blocks"][str(block)])
        super().rebuild(structure)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        named = {f"block.{block}": modules for block, modules in self.network.modules_by_block.items()}
        adapters = {
            f"{part}.{name}": t for part, module in named.items() for name, t in module.state_dict().items()
        }
        return adapters | super().checkpoint_tensors()


def learning(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those that receive gradients."""
    return [parameter for parameter in parameters if parameter.requires_grad]
