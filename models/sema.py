"""SEMA, and Nested LoRA on SEMA: class-incremental learning with adapters that grow where the data are new.

Each growing block has a router; there is one classifier.

    python main.py --config exps/sema_cifar.json            # ffn_adapter_type "adaptmlp"
    python main.py --config exps/nested_lora_cifar.json     # ffn_adapter_type "nested_lora"

Task 0 trains adapters, routers and classifier, then the representation descriptors. A later task scans its
training images; the shallowest block that finds a batch novel grows by one adapter, which is trained, then
its descriptor; the scan goes on, and is repeated until a whole one adds nothing. If nothing grew, what is
trainable is trained. At the end of the task nested adapters are consolidated, if the config says so, router
rows are merged, and what was trained is frozen.

A batch is novel if, for every descriptor, its reconstruction errors deviate from those on the descriptor's
own task, on views that it was not trained on. With new views in every epoch these are recorded during
training, as published. Where views are used again (`rd_views`), training errors would be too small: then
errors on further views are recorded after training.

Source: SEMA (Wang et al., CVPR 2025) as its published code computes it; Nested LoRA as in the project's
design.
"""

import functools
import logging
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from backbone.consolidation import Consolidation
from backbone.frozen_block import is_learning
from backbone.sema_block import SEMAModules
from backbone.sema_components import NestedLoRAAdapter
from backbone.vit_sema import SEMAVisionTransformer
from models.config.sema import SEMAConfig
from models.heads import build_heads
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.task_inputs import Batch
from models.vit.training import adapter_spec, train_functional
from utils.console import progress
from utils.training.optim import ParameterGroup, trainable
from utils.training.phase import EpochNote, Phase, StepResult
from utils.training.random import rng
from utils.wording import spans

logger = logging.getLogger("nested_lora")

CONSOLIDATION_IMAGES = 128  # images of the task whose tokens consolidation fits and measures drift on
CONSOLIDATION_TOKENS = 32  # tokens of each of them


class SEMA(ClassIncrementalLearner):
    """SEMA: adapters that grow where data are new, mixed by routers; with nested adapters Nested LoRA."""

    Config = SEMAConfig
    config: SEMAConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        config = self.config
        adapted = config.adapted_blocks(len(vit.blocks))
        growing = range(config.adapt_start_layer, config.adapt_end_layer + 1) if config.grows else ()
        described = {"rd_dim": config.rd_dim, "buffer_size": config.buffer_size, "aligned": config.aligned}
        spec = adapter_spec(config, vit.embed_dim, **described)
        network = SEMAVisionTransformer(vit, spec, growing=growing, adapted=adapted)
        return nn.ModuleDict({"backbone": network, **build_heads(config, vit.num_features)})

    def open_task(self) -> None:
        super().open_task()
        self.progress.state = {
            "block": None,  # the block whose new adapter is in training
            "grown": [],  # blocks that have grown in this task
            "scan": 0,  # whole scans before this one
            "batch": 0,  # batches of this scan that are done
            "grown_in_scan": False,
            "highest_z": {},  # by block, since the last growth in this task
        }

    # --- the story of a task --------------------------------------------------------------------------------

    def learn_task(self) -> None:
        self.once("remember features", self.remember_features)
        if self.task == 0 or not self.network.growing:
            self.once("functional", lambda: train_functional(self))
            if self.network.growing:
                self.once("descriptors", lambda: self.run_phase(DescriptorPhase(self)))
                self.once("records", self.record_errors)
        else:
            self.once("growth", self.grow_where_novel)
            if not self.method_state["grown"]:
                self.once("functional", lambda: train_functional(self))
        self.once("close", self.end_of_task_training)
        self.once("views", lambda: self.inputs.drop_drawn(self.task))
        self.once("head", self.fit_head)

    def grow_where_novel(self) -> None:
        """Scan the task's images; train what grows; scan on, until a whole scan adds nothing."""
        while (block := self.scan()) is not None:
            self.once(f"functional, block {block}", functools.partial(train_functional, self, block))
            self.once(f"descriptors, block {block}", lambda: self.run_phase(DescriptorPhase(self)))
            self.once(f"records, block {block}", self.record_errors)
            modules = self.network.modules_by_block[block]
            modules.freeze_functional(adapters=self.config.freezes)
            modules.freeze_rd()
            self.method_state["block"] = None

    def shared_views(self) -> int:
        """Views that functional phases and also a scan or descriptors read; if more may grow, all of them."""
        config, growing = self.config, len(self.network.growing)
        trained = config.func_epoch
        described = min(config.distinct_rd_views or config.rd_epoch, config.rd_epoch)
        if not growing or config.augmentation == "none":
            return 0
        if self.task == 0:
            return min(trained, described)
        if not self.method_state["grown"]:
            return 1
        return max(1, max(trained, described) if growing > 1 else min(trained, described))

    # --- scan -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scan(self) -> int | None:
        """Scan the task's training images until a block grows; returns it, or None at the end of the scans.

        The next call goes on with the batch after the growth. After a whole scan that added an adapter,
        another scan follows.
        """
        state, size = self.method_state, self.config.detect_batch_size
        if state["block"] is not None:  # resumed while the new adapter of this block was in training
            return state["block"]
        while len(state["grown"]) < len(self.network.growing):
            key = ("scan", self.seed, self.task, state["scan"])
            source = self.inputs.view(self.task, state["scan"])
            batches = self.inputs.read(self.task, source, key, size, start=state["batch"])
            left = self.inputs.batch_count(self.task, size) - state["batch"]
            for batch in progress(batches, total=left, desc=f"Task {self.task} scan", unit="batch"):
                self.context.check_stop()
                state["batch"] += 1
                self.progress.steps += 1
                state["block"] = self._grow_if_novel(batch)
                if state["block"] is not None:
                    return state["block"]
            self._log_scan()
            if not state["grown_in_scan"]:
                break
            state.update(scan=state["scan"] + 1, batch=0, grown_in_scan=False)
        return None

    def _grow_if_novel(self, batch: Batch) -> int | None:
        """Grow the shallowest block that finds the batch novel and has not grown in this task.

        Returns it, or None if there is none.
        """
        state = self.method_state
        candidates = [block for block in self.network.growing if block not in state["grown"]]
        means = self.inputs.token_means(batch, candidates)
        for block in candidates:
            modules = self.network.modules_by_block[block]
            z = modules.novelty(means[block])
            state["highest_z"][str(block)] = max(z, state["highest_z"].get(str(block), 0.0))
            if z > self.config.exp_threshold or self.config.expansion == "always":
                modules.grow()
                state.update(grown=[*state["grown"], block], grown_in_scan=True, highest_z={})
                newest = len(modules.adapters) - 1
                logger.info(f"Adapter {block}.{newest} added at block {block} (z-score {z:.2f})")
                self.log.metric("growth", task=self.task, block=block, adapters=newest + 1, z=z)
                return block
        return None

    def _log_scan(self) -> None:
        """Log the highest z-score of every block that could still grow: how near it came to growing."""
        highest, threshold = self.method_state["highest_z"], self.config.exp_threshold
        if not highest:
            return  # every growing block has grown in this task
        shown = ", ".join(f"block {block}: {z:.2f}" for block, z in highest.items())
        logger.info(f"Task {self.task} scan: highest z-score {shown} (threshold {threshold:g})")
        self.log.metric("scan", task=self.task, scan=self.method_state["scan"], highest_z=highest)

    # --- descriptors ----------------------------------------------------------------------------------------

    def described_blocks(self) -> list[int]:
        """The blocks whose newest descriptor is learning."""
        newest = {block: self.network.modules_by_block[block].adapters[-1] for block in self.network.growing}
        return [block for block, adapter in newest.items() if is_learning(adapter.rd)]

    def functional_parameters(self) -> list[nn.Parameter]:
        """All parameters that learn now except those of descriptors, which have a phase of their own."""
        described = {id(parameter) for parameter in self.network.descriptor_parameters()}
        return [parameter for parameter in super().functional_parameters() if id(parameter) not in described]

    def record_errors(self) -> None:
        """Record the errors of trained descriptors, unless they were recorded in training.

        As many as training would have recorded: min(`buffer_size`, images of the task * `rd_epoch`), on views
        that are new to the descriptors, one view of all images after the other, in a drawn order.
        """
        config, blocks = self.config, self.described_blocks()
        if config.repeats_rd_views:
            key = ("records", self.seed, self.task, self.progress.phases)
            errors = min(config.buffer_size, config.rd_epoch * self.data.count(self.classes, "train"))
            seen = config.distinct_rd_views
            self.network.observe(self.inputs.new_means(self.task, key, blocks, after=seen, count=errors))
        self._log_records(blocks)

    def _log_records(self, blocks: list[int]) -> None:
        """Log line on errors behind z-scores of the newest descriptors: number, views, mean, deviation."""
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
            logger.debug(f"Task {self.task} rd: errors recorded on {views} views: {'; '.join(shown)}")

    # --- close ----------------------------------------------------------------------------------------------

    def end_of_task_training(self) -> None:
        """Consolidate if the config says so, freeze, record the branches' norms before and after."""
        config = self.config
        consolidation = self.consolidation() if config.consolidates else None
        tokens = self._task_tokens() if consolidation else {}
        drifts: dict[int, float] = {}  # the largest of each block
        alphas: set[float] = set()
        norms: list[tuple[dict[str, float], dict[str, float]]] = []  # before and after, of what learned
        for block, modules in self.network.modules_by_block.items():
            learned = modules.adapters_of_task(every=not config.freezes)
            reports = modules.end_of_task_training(config.freezes, consolidation, tokens.get(block))
            for k, report in reports.items():
                drifts[block] = max(report.drift, drifts.get(block, 0.0))
                alphas.add(report.alpha)
                logger.debug(
                    f"Consolidated Nested LoRA at layer {block} with alpha={report.alpha:g}: "
                    f"task {self.task}, adapter {k}, {consolidation.rule}, drift {report.drift:.3f}, "
                    f"fast {report.before['fast']:.3f} -> {report.after['fast']:.3f}, "
                    f"slow {report.before['slow']:.3f} -> {report.after['slow']:.3f}"
                )
                self.log.metric(
                    "norms", task=self.task, block=block, adapter=k, when="before", **report.before
                )
                self.log.metric(
                    "consolidation", task=self.task, block=block, adapter=k, alpha=report.alpha,
                    rule=consolidation.rule, drift=report.drift,
                )  # fmt: skip
            after = self._record_norms(block, modules)
            norms += [(reports[k].before if k in reports else after[k], after[k]) for k in learned if after]
        if drifts:
            *others, last = drifts
            also = f" (also {spans(others)})" if others else ""
            listed = ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
            logger.info(
                f"Consolidated Nested LoRA at layer {last} with alpha={listed}{also}: "
                f"task {self.task}, {consolidation.rule}, drift {max(drifts.values()):.3f}"
            )
        elif consolidation:
            logger.info(f"Nothing to consolidate in task {self.task}: adapters are frozen and none was added")
        if norms:
            logger.info(_norms_line(norms))

    def consolidation(self) -> Consolidation:
        """Consolidation of fast into slow at the end of the open task."""
        config = self.config
        return Consolidation(
            config.nested_lora_consolidation,
            config.nested_lora_consolidation_alpha,
            config.nested_lora_reset,
            mean=config.nested_lora_consolidation_schedule == "mean",
        )

    def _record_norms(self, block: int, modules: SEMAModules) -> list[dict[str, float]]:
        """`||theta_fast||` and `||theta_slow||` of a block's nested adapters as the task leaves them."""
        nested = [
            a.functional.norms() for a in modules.adapters if isinstance(a.functional, NestedLoRAAdapter)
        ]
        for k, norms in enumerate(nested):
            self.log.metric("norms", task=self.task, block=block, adapter=k, when="after", **norms)
        if nested:
            norms = ", ".join(f"{n['fast']:.3f} / {n['slow']:.3f}" for n in nested)
            effects = ", ".join(f"{n['fast_effect']:.3f} / {n['slow_effect']:.3f}" for n in nested)
            logger.debug(
                f"Task {self.task}: block {block} ||theta_fast|| / ||theta_slow|| {norms}; "
                f"||W_up W_down|| {effects}"
            )
        return nested

    @torch.no_grad()
    def _task_tokens(self) -> dict[int, Tensor]:
        """Inputs of every block's adapters on some of the task's images: {block: (tokens, d)}, float32.

        A block's are the same tokens of every image.
        """

        def pick(x: Tensor) -> Tensor:
            chosen = torch.randperm(x.shape[1], generator=generator)[:CONSOLIDATION_TOKENS]
            return x[:, chosen.to(x.device)].float().flatten(0, 1)

        key = ("consolidation images", self.seed, self.task)
        chosen = self.data.order(self.classes, "train", key)[:CONSOLIDATION_IMAGES]
        images = self.inputs.fresh(key)
        blocks = self.network.modules_by_block
        parts: dict[int, list[Tensor]] = {block: [] for block in blocks}
        for start in range(0, len(chosen), self.config.eval_batch_size):
            generator = rng("consolidation tokens", self.seed, self.task)  # for `pick`, anew in every batch
            x = images.take(chosen[start : start + self.config.eval_batch_size])
            with self.network.capture_inputs(blocks, pick) as inputs, self.autocast():
                self.network(x.to(self.device))
            for block, tokens in inputs.items():
                parts[block].append(tokens)
        return {block: torch.cat(tokens) for block, tokens in parts.items()}

    def trained_numbers(self) -> int:
        untrained = 0 if self.config.rd_epoch else self.network.parameter_counts()["descriptors"]
        return super().trained_numbers() - untrained


class DescriptorPhase(Phase):
    """Training of the newest descriptors on token means, which do not change meanwhile.

    The loss is the mean reconstruction error, summed over blocks. If no view is used twice, the errors of
    every step are recorded.
    """

    name = "rd"
    replicated = True  # every rank has the token means of all images
    classifies = False

    def __init__(self, learner: SEMA) -> None:
        config, inputs, task = learner.config, learner.inputs, learner.task
        learning = trainable(learner.network.descriptor_parameters())
        super().__init__(
            epochs=config.rd_epoch,
            steps_per_epoch=inputs.batch_count(task, config.batch_size),
            optimizer=learner.optimizer_over([ParameterGroup("rd", learning, config.rd_lr)], config.rd_epoch),
            block=learner.method_state["block"],
        )
        self.network, self.records = learner.network, not config.repeats_rd_views
        self.means = inputs.means_by_epoch(
            task,
            ("descriptors", learner.seed, task, learner.progress.phases),
            learner.described_blocks(),
            views=config.distinct_rd_views,
            epochs=config.rd_epoch,
            size=config.batch_size,
        )

    def batches(self, epoch: int, start: int) -> Iterator[dict[int, Tensor]]:
        return self.means(epoch, start)

    def loss(self, means: dict[int, Tensor]) -> StepResult:
        if self.records:
            self.network.observe(means)
        return StepResult(self.network.descriptor_loss(means), len(next(iter(means.values()))))

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        return EpochNote(remark="representation descriptors")


def _norms_line(norms: Sequence[tuple[dict[str, float], dict[str, float]]]) -> str:
    """Means over adapters of the branches' norms before and after the end of a task."""

    def shown(name: str) -> str:
        sides = zip(*[(before[name], after[name]) for before, after in norms], strict=True)
        before, after = (f"{statistics.fmean(side):.3f}" for side in sides)
        return after if before == after else f"{before} -> {after}"

    sizes = f"||theta_fast|| {shown('fast')}, ||theta_slow|| {shown('slow')}"
    return f"{sizes}, effects {shown('fast_effect')}, {shown('slow_effect')}"
