"""SEMA, and Nested LoRA on SEMA: adapters that grow where the data are new, one router a block, one classifier.

    python main.py --config exps/sema_cifar.json            # ffn_adapter_type "adaptmlp"
    python main.py --config exps/nested_lora_cifar.json     # ffn_adapter_type "nested_lora"

Task 0 trains adapters, routers and classifier, then the representation descriptors. A later task scans its training
images; the shallowest block that finds a batch novel grows by one adapter, which is trained, then its descriptor;
the scan goes on, and is repeated until a whole one adds nothing. If nothing grew, what is trainable is trained. Then
the task closes: consolidation (nested, if asked for), router rows merged, freezing.

What a batch is compared with are a descriptor's errors on views of its task's images that it has not trained on. With
new views in every epoch they are recorded while it trains, as published. Where views come again (`rd_views`), its
training errors would be too small: then errors on newly drawn views are recorded when it has been trained.

Source: SEMA (Wang et al., CVPR 2025) as its published code computes it; Nested LoRA as in the project's design.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backbone.consolidation import Consolidation
from backbone.sema_block import AdapterSpec, SEMAModules, is_learning
from backbone.sema_components import NestedLoRAAdapter
from backbone.vit_sema import SEMAVisionTransformer
from models.base import Interrupted, Learner, Phase, StepResult
from models.sema_config import SEMAConfig
from models.sema_costs import SEMACosts
from models.vit.pretrained import Backbone
from models.vit.task_inputs import VIEW, Batch
from models.vit.tuning import FUNCTIONAL, AdapterTuning, learning
from utils.console import progress
from utils.errors import UserError
from utils.training.device import seeded_generator
from utils.training.optim import GroupedOptimizer, ParameterGroup

logger = logging.getLogger("nested_lora")

# What a data-order key is for; with the seed, the task and a counter it names one order and one set of augmentations.
DESCRIPTORS, SCAN, FEATURES = range(FUNCTIONAL + 1, FUNCTIONAL + 4)
RECORDS = VIEW + 1
CONSOLIDATION_IMAGES = 128  # images of the task that consolidation looks at
CONSOLIDATION_TOKENS = 32  # tokens of each of them


class SEMA(AdapterTuning):
    """Self-expansion with a mixture of adapters; functional parts are `Adapter` or `NestedLoRAAdapter`."""

    Config = SEMAConfig
    config: SEMAConfig

    def build_network(self, backbone: Backbone) -> SEMAVisionTransformer:
        config, vit = self.config, backbone.vit
        chosen = range(config.adapt_start_layer, config.adapt_end_layer + 1)
        adapted = range(len(vit.blocks)) if config.adapter_blocks == "all" else chosen
        growing = () if config.expansion == "never" else chosen
        return SEMAVisionTransformer(vit, self.adapter_spec(vit.embed_dim), growing=growing, adapted=adapted)

    def adapter_spec(self, width: int) -> AdapterSpec:
        config = self.config
        return replace(
            super().adapter_spec(width),
            rd_dim=config.rd_dim,
            buffer_size=config.buffer_size,
            aligned=config.aligned,
        )

    def open_task(self) -> None:
        super().open_task()
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
        return super().stages | {
            "scan": self.scan,
            "descriptors": self.train_descriptors,
            "records": self.record_errors,
            "close": self.end_of_task_training,
        }

    def start_task(self) -> str:
        first = super().start_task()
        return first if self.task == 0 or not self.network.growing else "scan"

    def costs(self, build: Callable[[Mapping[str, Any]], Learner]) -> SEMACosts:
        if not self.network.growing:
            raise UserError(
                'expansion = "never": the benchmark measures growth; allowed with it: "novelty", "always"'
            )
        return SEMACosts(self, build)

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
        for batch in progress(batches, total=left, desc=f"Task {self.task} scan", unit="batch"):
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
            if z > self.config.exp_threshold or self.config.expansion == "always":
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

    @property
    def phase_block(self) -> int | None:
        return self.progress.memory["block"]

    def after_functional(self) -> str:
        described = bool(self.network.growing) and (self.task == 0 or self.phase_block is not None)
        return "descriptors" if described else "close"

    # --- stage: descriptors -----------------------------------------------------------------------------------------

    def train_descriptors(self) -> str:
        """Train the descriptors that may learn."""
        self.run_phase(self.descriptor_phase())
        return "records"

    def descriptor_phase(self) -> Phase:
        """The descriptor phase that the task has come to."""
        epochs = self.config.rd_epoch
        key = (self.seed, self.task, DESCRIPTORS, self.progress.phases)
        views, size = self.config.distinct_rd_views, self.config.batch_size
        return Phase(
            name="rd",
            epochs=epochs,
            optimizer=self.update_rd_optimizer_and_scheduler(epochs),
            batches=self.inputs.means_by_epoch(
                self.task, key, self._described, views=views, epochs=epochs, size=size
            ),
            steps_per_epoch=self.inputs.batch_count(self.task, size),
            observe=self._describe,
            replicated=True,
            classifies=False,
            block=self.progress.memory["block"],
        )

    def _describe(self, means: dict[int, Tensor]) -> StepResult:
        """Reconstruction error of the newest descriptors; recorded as it is measured while no view has come before."""
        if not self.config.repeats_rd_views:
            self.network.observe(means)
        return StepResult(self.network.descriptor_loss(means), len(next(iter(means.values()))))

    @property
    def _described(self) -> list[int]:
        """The blocks whose newest descriptor is learning."""
        newest = {block: self.network.modules_by_block[block].adapters[-1] for block in self.network.growing}
        return [block for block, adapter in newest.items() if is_learning(adapter.rd)]

    def update_rd_optimizer_and_scheduler(self, num_epoch: int) -> GroupedOptimizer:
        """The optimizer of the descriptors that learn."""
        parameters = learning(self.network.descriptor_parameters())
        return self.optimizer_over([ParameterGroup("rd", parameters, lr=self.config.rd_lr)], num_epoch)

    # --- stage: records ---------------------------------------------------------------------------------------------

    def record_errors(self) -> str:
        """Record the errors of trained descriptors unless training has; after a growth, freeze what is new.

        As many as training would have recorded: min(`buffer_size`, images of the task * `rd_epoch`), each on a newly
        drawn view, of one image after the other in a drawn order.
        """
        config, blocks = self.config, self._described
        if config.repeats_rd_views:
            key = (self.seed, self.task, RECORDS, self.progress.phases)
            errors = min(config.buffer_size, config.rd_epoch * self.data.count(self.classes, "train"))
            self.network.observe(self.inputs.new_means(self.task, key, blocks, errors))
        self._log_records(blocks)
        if self.phase_block is None:
            return "close"
        modules = self.network.modules_by_block[self.phase_block]
        modules.freeze_functional(adapters=self.config.freezes)
        modules.freeze_rd()
        return "scan"

    def _log_records(self, blocks: list[int]) -> None:
        """What z-scores of the newest descriptors compare with: how many errors, of which views, mean and deviation."""
        views, shown = "new" if self.config.repeats_rd_views else "training", []
        for block in blocks:
            adapters = self.network.modules_by_block[block].adapters
            record = adapters[-1].rd_loss_record
            if len(record) > 2:  # else every z-score is zero
                mean, std = float(record.mean), float(record.stddev)
                shown.append(f"block {block}: {len(record)}, {mean:.3g} ± {std:.3g}")
                self.log.metric(
                    "records", task=self.task, block=block, adapter=len(adapters) - 1, views=views,
                    errors=len(record), mean=mean, std=std,
                )  # fmt: skip
        if shown:
            logger.info(f"Task {self.task} rd: errors recorded on {views} views: {'; '.join(shown)}")

    # --- stage: close -----------------------------------------------------------------------------------------------

    def end_of_task_training(self) -> str:
        """Consolidate if asked to, freeze, log the two branches' norms."""
        config = self.config
        consolidation = self.consolidation() if config.consolidates else None
        tokens = self._task_tokens() if consolidation else {}
        for block, modules in self.network.modules_by_block.items():
            reports = modules.end_of_task_training(self.config.freezes, consolidation, tokens.get(block))
            for k, report in reports.items():
                logger.info(
                    f"Consolidated Nested LoRA at layer {block} with alpha={consolidation.alpha:g}: task {self.task}, "
                    f"adapter {k}, {consolidation.rule}, drift {report.drift:.3f}, "
                    f"fast {report.before['fast']:.3f} -> {report.after['fast']:.3f}, "
                    f"slow {report.before['slow']:.3f} -> {report.after['slow']:.3f}"
                )
                self.log.metric(
                    "norms", task=self.task, block=block, adapter=k, when="before", **report.before
                )
                self.log.metric(
                    "consolidation", task=self.task, block=block, adapter=k, alpha=consolidation.alpha,
                    rule=consolidation.rule, drift=report.drift,
                )  # fmt: skip
            self._log_norms(block, modules)
        return "readout"

    def consolidation(self) -> Consolidation:
        """How fast goes into slow at the end of the open task."""
        config, alpha = self.config, self.config.nested_lora_consolidation_alpha
        if config.nested_lora_consolidation_schedule == "mean":
            alpha /= self.task + 1
        return Consolidation(config.nested_lora_consolidation, alpha, config.nested_lora_reset)

    def _log_norms(self, block: int, modules: SEMAModules) -> None:
        """`||theta_fast||` and `||theta_slow||` of a block's adapters as the task leaves them."""
        nested = [
            a.functional.norms() for a in modules.adapters if isinstance(a.functional, NestedLoRAAdapter)
        ]
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
