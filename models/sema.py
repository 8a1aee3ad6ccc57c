"""SEMA, and Nested LoRA on SEMA: adapters that grow where the data are new, one router a block, one classifier.

    python main.py --config exps/sema_cifar.json            # ffn_adapter_type "adaptmlp"
    python main.py --config exps/nested_lora_cifar.json     # ffn_adapter_type "nested_lora"

Task 0 trains adapters, routers and classifier, then the representation descriptors. A later task scans its training
images; the shallowest block that finds a batch novel grows by one adapter, which is trained, then its descriptor;
the scan goes on, and is repeated until a whole one adds nothing. If nothing grew, what is trainable is trained. Then
the task closes: consolidation (nested, if asked for), router rows merged, freezing.

Source: SEMA (Wang et al., CVPR 2025) as its published code computes it; Nested LoRA as in the project's design.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from backbone.consolidation import Consolidation
from backbone.sema_block import AdapterSpec, SEMAModules, is_learning
from backbone.sema_components import NestedLoRAAdapter
from backbone.vit_sema import SEMAVisionTransformer
from models.activations import Place
from models.base import Interrupted, Learner, Phase, StepResult
from models.sema_config import SEMAConfig
from models.sema_costs import SEMACosts
from models.slow_trace import SlowTrace
from models.task_inputs import Batch, TaskInputs
from utils.factory import Backbone
from utils.inc_net import IncrementalHead
from utils.optim import GroupedOptimizer, ParameterGroup
from utils.toolkit import seeded_generator

logger = logging.getLogger("nested_lora")

# What a data-order key is for; with the seed, the task and a counter it names one order and one set of augmentations.
FUNCTIONAL, DESCRIPTORS, SCAN, FEATURES = range(4)
CONSOLIDATION_IMAGES = 128  # images of the task that consolidation looks at
CONSOLIDATION_TOKENS = 32  # tokens of each of them


class SEMA(Learner):
    """Self-expansion with a mixture of adapters; functional parts are `Adapter` or `NestedLoRAAdapter`."""

    Config = SEMAConfig
    config: SEMAConfig

    def build(self, backbone: Backbone) -> nn.ModuleDict:
        config, vit = self.config, backbone.vit
        nested = config.ffn_adapter_type == "nested_lora"
        spec = AdapterSpec(
            width=vit.embed_dim,
            kind=config.ffn_adapter_type,
            bottleneck=config.nested_lora_rank if nested else config.ffn_num,
            scale=config.ffn_adapter_scalar,
            rd_dim=config.rd_dim,
            buffer_size=config.buffer_size,
            stacked=config.engine == "fast",
        )
        growing = range(config.adapt_start_layer, config.adapt_end_layer + 1)
        adapted = range(len(vit.blocks)) if config.adapter_blocks == "all" else growing
        network = SEMAVisionTransformer(vit, spec, growing=growing, adapted=adapted)
        place = Place(
            device=self.device,
            precision=config.precision,
            batch_size=config.eval_batch_size,
            identity={"weights": backbone.sha256, "data": self.data.dataset.sha256, "torch": torch.__version__},
            world=self.world,
            stop_requested=self._stop_requested,
        )
        self.inputs = TaskInputs(network, self.data, self.cache, config, place)
        return nn.ModuleDict({"backbone": network, "head": IncrementalHead(vit.num_features)})

    @property
    def network(self) -> SEMAVisionTransformer:
        return self.modules["backbone"]

    @property
    def head(self) -> IncrementalHead:
        return self.modules["head"]

    def open_task(self) -> None:
        self.head.grow(len(self.classes))
        self.progress.memory = {
            "block": None,  # the block whose new adapter is in training
            "grown": [],  # blocks that have grown in this task
            "scan": 0,  # whole scans before this one
            "batch": 0,  # batches of this scan looked at
            "grown_in_scan": False,
            "highest_z": {},  # by block, since it was last trained
        }

    @property
    def stages(self) -> dict[str, Callable[[], str]]:
        return {
            "start": lambda: "functional" if self.task == 0 else "scan",
            "scan": self.scan,
            "functional": self.train_functional,
            "descriptors": self.train_descriptors,
            "close": self.end_of_task_training,
        }

    def features(self, images: Tensor) -> Tensor:
        """Class token of the adapted backbone, (B, 3, S, S) -> (B, d), float32."""
        with self.autocast():
            return self.network(images).float()

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)

    def test_features(self, task: int) -> Tensor:
        return self.inputs.test_features(task) if self.config.engine == "fast" else super().test_features(task)

    def costs(self, build: Callable[[Mapping[str, Any]], Learner]) -> SEMACosts:
        return SEMACosts(self, build)

    def close_run(self) -> None:
        self.inputs.store.drop_own("train")
        self.inputs.store.drop_own("test")

    # --- stage: scan ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scan(self) -> str:
        """Look through the task's training images until a block finds a batch novel and grows, or to the end."""
        memory = self.progress.memory
        if len(memory["grown"]) == len(self.network.growing):
            return "close"
        key = (self.seed, self.task, SCAN, memory["scan"])
        size = self.config.detect_batch_size
        source = self.inputs.view(self.task, memory["scan"], key)
        batches = self.inputs.read(self.task, source, key, size, start=memory["batch"])
        left = self.inputs.batch_count(self.task, size) - memory["batch"]
        for batch in tqdm(batches, total=left, desc=f"Task {self.task} scan", unit="batch", leave=False):
            if self.stopping():
                raise Interrupted
            memory["batch"] += 1
            self.progress.steps += 1
            block = self._grow_where_novel(batch)
            if block is not None:
                memory["block"] = block
                return "functional"
        self._log_scan()
        if memory["grown_in_scan"]:
            memory.update(scan=memory["scan"] + 1, batch=0, grown_in_scan=False)
            return "scan"
        memory["block"] = None
        return "close" if memory["grown"] else "functional"

    def _grow_where_novel(self, batch: Batch) -> int | None:
        """Grow the shallowest block that has not grown in this task and finds the batch novel; says which, if any."""
        memory = self.progress.memory
        candidates = [block for block in self.network.growing if block not in memory["grown"]]
        means = self.inputs.token_means(batch, candidates)
        for block in candidates:
            modules = self.network.modules_by_block[block]
            z = modules.novelty(means[block])
            memory["highest_z"][str(block)] = max(z, memory["highest_z"].get(str(block), 0.0))
            if z > self.config.exp_threshold:
                modules.grow()
                memory.update(grown=[*memory["grown"], block], grown_in_scan=True, highest_z={})
                newest = len(modules.adapters) - 1
                logger.info(f"Adapter {block}.{newest} added at block {block} (z-score {z:.2f})")
                self.log.metric("growth", task=self.task, block=block, adapters=newest + 1, z=z)
                return block
        return None

    def _log_scan(self) -> None:
        """The highest z-score of every block that was looked at: how near each came to growing."""
        highest, threshold = self.progress.memory["highest_z"], self.config.exp_threshold
        if not highest:
            return  # every growing block has grown in this task
        shown = ", ".join(f"block {block}: {z:.2f}" for block, z in highest.items())
        logger.info(f"Task {self.task} scan: highest z-score {shown} (threshold {threshold:g})")
        self.log.metric("scan", task=self.task, scan=self.progress.memory["scan"], highest_z=highest)

    # --- stage: functional ------------------------------------------------------------------------------------------

    def train_functional(self) -> str:
        """Train adapters, router rows and classifier rows that may learn, on the current task's classes only."""
        phase = self.functional_phase()
        trace = next((SlowTrace(g, self.log, self.task) for g in phase.optimizer.groups if g.name == "slow"), None)
        if trace is not None:
            phase.before_step, phase.after_step = trace.before_step, trace.after_step
        self.run_phase(phase)
        if trace is not None:
            trace.summary(phase.optimizer.steps)
        return "descriptors" if self.task == 0 or phase.block is not None else "close"

    def functional_phase(self) -> Phase:
        """The functional phase that the task has come to."""
        block, epochs = self.progress.memory["block"], self.config.func_epoch
        key = (self.seed, self.task, FUNCTIONAL, self.progress.phases)
        config, source = self.config, self.inputs.by_epoch(self.task, key, epochs)
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
            block=block,
        )

    def _classify(self, batch: Batch) -> StepResult:
        """Cross-entropy over the current task's classes; older classes take no part."""
        targets = batch.targets.to(self.device) - self.classes.start
        with self.autocast():
            features = self.network(batch.inputs.to(self.device), batch.depth).float()
        logits = self.head.newest(features)
        return StepResult(F.cross_entropy(logits, targets), len(targets), (logits.argmax(dim=1) == targets).sum())

    def update_optimizer_and_scheduler(self, num_epoch: int) -> GroupedOptimizer:
        """The functional optimizer: groups slow, fast and other, over what learns now.

        Raises:
            RuntimeError: the groups are not exactly the parameters that learn.
        """
        config = self.config
        groups = {name: _learning(parameters) for name, parameters in self.network.parameter_groups().items()}
        groups["other"] = groups["other"] + self.head.trainable()
        learning = {id(p) for p in self.modules.parameters() if p.requires_grad}
        learning -= {id(p) for p in self.network.descriptor_parameters()}
        if learning != {id(p) for parameters in groups.values() for p in parameters}:
            raise RuntimeError("the optimizer groups are not the parameters that learn")
        return self._optimizer(
            [
                ParameterGroup(
                    "slow",
                    groups.get("slow", []),
                    lr=config.nested_lora_lr_slow,
                    every=config.nested_lora_update_interval_slow,
                    between=config.nested_lora_slow_grad,
                ),
                ParameterGroup("fast", groups.get("fast", []), lr=config.nested_lora_lr_fast),
                ParameterGroup("other", groups["other"], lr=config.init_lr),
            ],
            num_epoch,
        )

    # --- stage: descriptors -----------------------------------------------------------------------------------------

    def train_descriptors(self) -> str:
        """Train the descriptors that may learn, recording their errors; after a growth, freeze what is new."""
        phase = self.descriptor_phase()
        self.run_phase(phase)
        if phase.block is None:
            return "close"
        modules = self.network.modules_by_block[phase.block]
        modules.freeze_functional(adapters=self._freezes)
        modules.freeze_rd()
        return "scan"

    def descriptor_phase(self) -> Phase:
        """The descriptor phase that the task has come to."""
        epochs = self.config.rd_epoch
        key = (self.seed, self.task, DESCRIPTORS, self.progress.phases)
        learning = [b for b in self.network.growing if is_learning(self.network.modules_by_block[b].adapters[-1].rd)]
        return Phase(
            name="rd",
            epochs=epochs,
            optimizer=self.update_rd_optimizer_and_scheduler(epochs),
            batches=self.inputs.means_by_epoch(self.task, key, learning),
            steps_per_epoch=self.inputs.batch_count(self.task, self.config.batch_size),
            observe=self._describe,
            replicated=True,
            classifies=False,
            block=self.progress.memory["block"],
        )

    def _describe(self, means: dict[int, Tensor]) -> StepResult:
        """Reconstruction error of the newest descriptors, recorded as it is measured."""
        self.network.observe(means)
        return StepResult(self.network.descriptor_loss(means), len(next(iter(means.values()))))

    def update_rd_optimizer_and_scheduler(self, num_epoch: int) -> GroupedOptimizer:
        """The optimizer of the descriptors that learn."""
        parameters = _learning(self.network.descriptor_parameters())
        return self._optimizer([ParameterGroup("rd", parameters, lr=self.config.rd_lr)], num_epoch)

    # --- stage: close -----------------------------------------------------------------------------------------------

    def end_of_task_training(self) -> str:
        """Consolidate if asked to, freeze, log the two branches' norms."""
        config = self.config
        consolidation = None
        if config.ffn_adapter_type == "nested_lora" and config.nested_lora_use_consolidation:
            consolidation = Consolidation(
                config.nested_lora_consolidation, config.nested_lora_consolidation_alpha, config.nested_lora_reset
            )
        tokens = self._task_tokens() if consolidation else {}
        for block, modules in self.network.modules_by_block.items():
            reports = modules.end_of_task_training(self._freezes, consolidation, tokens.get(block))
            for k, report in reports.items():
                logger.info(
                    f"Task {self.task}: consolidated Nested LoRA {block}.{k} with alpha={consolidation.alpha:g} "
                    f"({consolidation.rule}), drift {report.drift:.3f}, "
                    f"fast {report.before['fast']:.3f} -> {report.after['fast']:.3f}, "
                    f"slow {report.before['slow']:.3f} -> {report.after['slow']:.3f}"
                )
                self.log.metric("norms", task=self.task, block=block, adapter=k, when="before", **report.before)
                self.log.metric(
                    "consolidation", task=self.task, block=block, adapter=k, alpha=consolidation.alpha,
                    rule=consolidation.rule, drift=report.drift,
                )  # fmt: skip
            self._log_norms(block, modules)
        self.inputs.store.drop_own("train")
        return "done"

    def _log_norms(self, block: int, modules: SEMAModules) -> None:
        """`||theta_fast||` and `||theta_slow||` of a block's adapters as the task leaves them."""
        nested = [a.functional.norms() for a in modules.adapters if isinstance(a.functional, NestedLoRAAdapter)]
        for k, norms in enumerate(nested):
            self.log.metric("norms", task=self.task, block=block, adapter=k, when="after", **norms)
        if nested:
            norms = ", ".join(f"{n['fast']:.3f} / {n['slow']:.3f}" for n in nested)
            effects = ", ".join(f"{n['fast_effect']:.3f} / {n['slow_effect']:.3f}" for n in nested)
            logger.info(
                f"Task {self.task}: block {block} ||theta_fast|| / ||theta_slow|| {norms}; ||W_up W_down|| {effects}"
            )

    @torch.no_grad()
    def _task_tokens(self) -> dict[int, Tensor]:
        """Inputs of every block's adapters on some of the task's images: {block: (tokens, d)}, float32."""
        generator = seeded_generator(self.seed, self.task, FEATURES)

        def pick(x: Tensor) -> Tensor:
            chosen = torch.randperm(x.shape[1], generator=generator)[:CONSOLIDATION_TOKENS]
            return x[:, chosen.to(x.device)].float().flatten(0, 1)

        key = (self.seed, self.task, FEATURES)
        chosen = self.data.order(self.classes, "train", key)[:CONSOLIDATION_IMAGES]
        images = self.inputs.fresh(key)
        blocks = self.network.modules_by_block
        parts: dict[int, list[Tensor]] = {block: [] for block in blocks}
        for start in range(0, len(chosen), self.config.eval_batch_size):
            x = images.take(chosen[start : start + self.config.eval_batch_size])
            with self.network.capture_inputs(blocks, pick) as inputs, self.autocast():
                self.network(x.to(self.device))
            for block, tokens in inputs.items():
                parts[block].append(tokens)
        return {block: torch.cat(tokens) for block, tokens in parts.items()}

    # --- shared by the stages ---------------------------------------------------------------------------------------

    @property
    def _freezes(self) -> bool:
        """Whether adapters freeze with their task (SEMA's rule)."""
        return not (self.config.ffn_adapter_type == "nested_lora" and self.config.nested_lora_freeze == "never")

    def _optimizer(self, groups: list[ParameterGroup], epochs: int) -> GroupedOptimizer:
        config = self.config
        return GroupedOptimizer(
            config.optimizer, groups, weight_decay=config.weight_decay, epochs=epochs, min_lr=config.min_lr
        )

    # --- state ------------------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        blocks = {str(block): modules.structure() for block, modules in self.network.modules_by_block.items()}
        return {"blocks": blocks, "classes": [rows.out_features for rows in self.head.tasks]}

    def rebuild(self, structure: dict[str, Any]) -> None:
        for block, modules in self.network.modules_by_block.items():
            modules.rebuild(structure["blocks"][str(block)])
        for classes in structure["classes"]:
            self.head.grow(classes)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        named = {f"block.{block}": modules for block, modules in self.network.modules_by_block.items()}
        parts: dict[str, nn.Module] = {**named, "head": self.head}
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}

    def summary(self) -> dict[str, Any]:
        counts = self.network.parameter_counts()
        counts["head"] = sum(parameter.numel() for parameter in self.head.parameters())
        counts["stored"] = sum(counts.values())
        return {"adapters": self.network.adapters_per_block(), "parameters": counts}


def _learning(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those that receive gradients."""
    return [parameter for parameter in parameters if parameter.requires_grad]
