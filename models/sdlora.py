"""SD-LoRA, and Gumbel CL-LoRA on it: one low-rank direction a task, magnitudes of all, a sparse gate over them.

    python main.py --config exps/sdlora_c100_baseline.json   # lambda_sparsity 0: SD-LoRA, all weights are 1
    python main.py --config exps/sdlora_c100.json            # lambda_sparsity > 0: a gate, and adapters are pruned

A task adds an adapter to q and v of every block and trains it, the magnitudes of all adapters, the gate's logits and
the classifier rows of its classes. Then its direction freezes, and with a gate the task's weight decides whether the
adapter stays. In training the gate is beta = sparsemax((g + noise) / tau), tau falling from step to step, and
lambda_sparsity * H(beta) is added to the loss; in evaluation beta = sparsemax(g / gumbel_tau_final).

Sources: SD-LoRA (Wu et al., ICLR 2025); the gate and conditional growth as in the project's design.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.lora import GumbelGate, LoRAVisionTransformer
from models.base import EpochNote, Phase, StepResult
from models.gate_figures import gate_figures
from models.gumbel_growth import (
    GateRecord,
    GateState,
    growth_lines,
    kept_adapters,
    not_finite_advice,
    symptoms,
)
from models.sdlora_config import SDLoRAConfig
from models.vit.class_incremental import ClassIncrementalLearner
from utils.console import progress
from utils.errors import Interrupted
from utils.gumbel_utils import gumbel_sparsemax, newcomer_logits, sparsemax, sparsity_loss
from utils.inc_net import IncrementalHead
from utils.runs.figures import class_incremental_figures
from utils.runs.run_log import read_metrics
from utils.runs.tables import active_adapters_table
from utils.training.optim import GroupedOptimizer, ParameterGroup, StepDecay, assert_complete, trainable
from utils.training.random import rng

logger = logging.getLogger("nested_lora")

Batch = tuple[Tensor, Tensor]  # images (B, 3, S, S) and incremental labels (B,)


class SDLoRA(ClassIncrementalLearner):
    """Decoupled directions and magnitudes; with a gate, sparse weights over them."""

    Config = SDLoRAConfig
    config: SDLoRAConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        kind = self.config.gate
        head = IncrementalHead(vit.num_features, self.config.row_init)
        modules = {"backbone": LoRAVisionTransformer(vit), "head": head}
        if kind != "off":
            modules["gate"] = GumbelGate(len(vit.blocks) if kind == "layer" else None)
        return nn.ModuleDict(modules)

    @staticmethod
    def figures(
        events: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[float]], about: str
    ) -> dict[str, Figure]:
        return class_incremental_figures(events, rows, about) | gate_figures(events, about)

    @property
    def head(self) -> IncrementalHead:
        return self.modules["head"]

    @property
    def adapters(self) -> list[int]:
        """The task that grew each adapter."""
        return self.method_state["adapters"]

    @property
    def gate(self) -> GumbelGate | None:
        return dict(self.modules.items()).get("gate")

    def open_task(self) -> None:
        """Room for the classes and a new, silent adapter, which joins the gate on equal terms.

        With "carry" and without a gate nothing changes for old data: a gate's weights are shared with the newcomer.
        """
        super().open_task()
        if self.config.sdlora_scaling == "reset":
            self.network.reset_magnitudes()
        self.progress.state = {
            "adapters": self.method_state.get("adapters", []),
            "tau": self.config.gumbel_tau_init,
            "sparsity": 0.0,  # penalty summed over the open epoch
        }
        self.grow()

    def grow(self) -> None:
        """One more adapter, with the rank that is due."""
        self.network.grow(self.config.rank_of(self.task))
        self.adapters.append(self.task)
        if self.gate is not None:
            self.gate.grow(newcomer_logits(self.gate.logits, self.config.gumbel_tau_final))

    def learn_task(self) -> None:
        self.once("announce", self.announce)
        self.once("functional", self.train_functional)
        self.once("close", self.end_of_task_training)

    def features(self, images: Tensor) -> Tensor:
        """Class token of the network with all adapters merged into its weights, (B, 3, S, S) -> (B, d), float32."""
        self.network.merge(self.beta())
        with self.autocast():
            return self.network(images).float()

    def features_of(self, task: int, source: str) -> Tensor:
        """Computed from images whenever asked for: every block has learned since, so nothing is stored."""
        classes, size = self.data.task_classes(task), self.config.eval_batch_size
        batches = self.data.batches(classes, source=source, mode="test", batch_size=size)
        left, parts = self.data.count(classes, source), []
        for images, _ in progress(batches, desc=f"Features of {source} images of task {task}", unit="batch"):
            if self.stopping():
                raise Interrupted
            with torch.no_grad():
                features = self.features(images.to(self.device))
            parts.append(self.distributed.all_gather(features, min(size, left)))
            left -= size
        return torch.cat(parts)

    # --- the gate -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def beta(self) -> Tensor | None:
        """Weights of the adapters in evaluation, (K,) or (L, K); None without a gate, where all are 1."""
        return None if self.gate is None else sparsemax(self.gate.logits / self.config.gumbel_tau_final)

    def noisy_beta(self) -> Tensor | None:
        """Weights in the coming training step: the same in all its parts and on every rank."""
        if self.gate is None:
            return None
        generator = rng("gumbel noise", self.seed, self.task, self.progress.steps)
        return gumbel_sparsemax(self.gate.logits, self.method_state["tau"], generator=generator)

    def penalty(self, beta: Tensor | None) -> Tensor:
        """What the gate adds to the loss: lambda_sparsity * H(beta), over layers the mean; a scalar."""
        nothing = torch.zeros((), device=self.device)
        return nothing if beta is None else self.config.lambda_sparsity * sparsity_loss(beta)

    # --- stage: functional --------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Say once what the gate is set to."""
        config = self.config
        if self.task == 0 and self.gate is not None:
            logger.info(
                f"[Gumbel CL-LoRA] tau_init={config.gumbel_tau_init}, tau_final={config.gumbel_tau_final}, "
                f"anneal_rate={config.gumbel_anneal_rate}, lambda_sparsity={config.lambda_sparsity}"
            )

    def train_functional(self) -> None:
        """Train the newest direction, all magnitudes, the gate and the newest classifier rows."""
        self.network.unmerge()
        self.run_phase(LoRAPhase(self))

    def update_optimizer_and_scheduler(self, num_epoch: int) -> GroupedOptimizer:
        """The task's optimizer: groups lora (the newest direction), alpha (magnitudes), gate and head, at one rate.

        Raises:
            RuntimeError: the groups are not exactly the parameters that learn.
        """
        config, first = self.config, self.task == 0
        rate = config.init_lr if first else config.lrate
        parts = {
            "lora": self.network.directions(),
            "alpha": [self.network.magnitudes],
            "gate": [] if self.gate is None else [self.gate.logits],
            "head": self.head.trainable(),
        }
        groups = [ParameterGroup(name, parameters, lr=rate) for name, parameters in parts.items()]
        assert_complete(groups, trainable(self.modules.parameters()))
        step_decay = {
            "cosine": None,
            "constant": StepDecay(),
            "steplr": StepDecay(
                config.init_milestones if first else config.milestones,
                config.init_lr_decay if first else config.lrate_decay,
            ),
        }[config.scheduler]
        return GroupedOptimizer(
            config.optimizer,
            groups,
            weight_decay=config.init_weight_decay if first else config.weight_decay,
            epochs=num_epoch,
            min_lr=config.min_lr,
            step_decay=step_decay,
        )

    # --- stage: close -------------------------------------------------------------------------------------------------

    def end_of_task_training(self) -> None:
        """Freeze the task's direction; with a gate, decide what stays."""
        self.network.freeze_newest()
        if self.gate is not None:
            self._conditional_growth_decision(self.gate)
        values = ", ".join(f"{value:.3f}" for value in self.network.magnitudes.tolist())
        logger.info(f"Task {self.task}: magnitudes of the adapters of tasks {self.adapters}: [{values}]")
        self.log.metric(
            "magnitudes", task=self.task, adapters=self.adapters, magnitudes=self.network.magnitudes.detach()
        )

    def _conditional_growth_decision(self, gate: GumbelGate) -> None:
        """Keep or prune by the weights in evaluation; log it, write it down, warn of settings that do not work."""
        config, tau = self.config, self.method_state["tau"]
        state = GateState(self.task, list(self.adapters), self.beta().cpu())
        kept = kept_adapters(state, config)
        record = GateRecord.of(state, kept)
        for line in growth_lines(state, kept, config):
            logger.info(line)
        for line in symptoms(state, kept, config, tau, self.progress.steps):
            logger.warning(line)
        self.log.metric("gate", task=self.task, tau=tau, **record.numbers())
        if self.distributed.is_main:
            for folder in (self.log.folder / "gate", *([Path(config.filepath)] if config.filepath else [])):
                record.write(folder)
        self.network.keep(kept)
        gate.keep(kept)
        self.method_state["adapters"] = [self.adapters[k] for k in kept]

    def close_run(self) -> None:
        """The table of active adapters over tasks, from the run's own record."""
        if self.gate is not None and self.distributed.is_main:
            masks = {
                e["task"]: e["pruning_mask"] for e in read_metrics(self.log.folder) if e["event"] == "gate"
            }
            if len(masks) > 1:
                logger.info("\n" + active_adapters_table(masks))

    # --- record -------------------------------------------------------------------------------------------------------

    def parameter_counts(self) -> dict[str, int]:
        counts = super().parameter_counts()
        del counts["stored"]
        counts["gate"] = 0 if self.gate is None else self.gate.logits.numel()
        return counts | {"stored": sum(counts.values())}


class LoRAPhase(Phase):
    """The one phase of a task: cross-entropy over its classes, plus the gate's penalty; images are newly augmented."""

    name = "func"

    def __init__(self, learner: SDLoRA) -> None:
        config = learner.config
        epochs = config.init_epoch if learner.task == 0 else config.epochs
        super().__init__(
            epochs=epochs,
            steps_per_epoch=-(-learner.data.count(learner.classes, "train") // config.batch_size),
            optimizer=learner.update_optimizer_and_scheduler(epochs),
        )
        self.learner, self.config, self.state = learner, config, learner.method_state

    def batches(self, epoch: int, start: int) -> Iterable[Batch]:
        learner, size = self.learner, self.config.batch_size
        key = ("training", learner.seed, learner.task, epoch)
        return learner.data.batches(
            learner.classes, source="train", mode="train", batch_size=size, key=key, start=start
        )

    def micro_batches(self, batch: Batch) -> list[Batch]:
        images, targets = (tensor.tensor_split(self.config.grad_accumulation) for tensor in batch)
        return [(x, y) for x, y in zip(images, targets, strict=True) if len(y)]

    def loss(self, micro_batch: Batch) -> StepResult:
        learner = self.learner
        images, targets = (tensor.to(learner.device) for tensor in micro_batch)
        targets = targets - learner.classes.start
        beta = learner.noisy_beta()
        with learner.autocast():
            features = learner.network(images, beta).float()
        logits = learner.head.newest(features)
        loss = F.cross_entropy(logits, targets) + learner.penalty(beta)
        return StepResult(loss, len(targets), (logits.argmax(dim=1) == targets).sum())

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Add the step's penalty to the epoch's sum; warn where gradients are not finite."""
        learner = self.learner
        if learner.gate is None:
            return
        self.state["sparsity"] += learner.penalty(learner.noisy_beta()).item()
        if not torch.isfinite(learner.network.magnitudes.grad).all():
            logger.warning(not_finite_advice(self.config, self.state["tau"]))

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        """tau <- max(rate * tau, tau_final)."""
        if self.learner.gate is not None:
            lowered = self.config.gumbel_anneal_rate * self.state["tau"]
            self.state["tau"] = max(lowered, self.config.gumbel_tau_final)

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        """Means of the epoch's classification loss and penalty, and the temperature it ends with."""
        if self.learner.gate is None:
            return EpochNote()
        sparse, tau = self.state["sparsity"] / max(1, steps), self.state["tau"]
        self.state["sparsity"] = 0.0
        numbers = {"clf": loss - sparse, "sparse": sparse, "tau": tau}
        return EpochNote(f" (clf={loss - sparse:.3f}, sparse={sparse:.3f}), tau={tau:.3f}", numbers)
