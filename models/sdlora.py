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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.lora import GumbelGate, LoRAVisionTransformer
from models.base import EpochNote, Learner, Phase, StepResult
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
from models.sdlora_costs import SDLoRACosts
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.pretrained import Backbone
from models.vit.representations import class_tokens
from utils.gumbel_utils import gumbel_sparsemax, newcomer_logits, sparsemax, sparsity_loss
from utils.inc_net import IncrementalHead
from utils.runs.figures import class_incremental_figures
from utils.runs.metrics import active_adapters_table
from utils.runs.run_log import read_metrics
from utils.training.device import seeded_generator
from utils.training.optim import GroupedOptimizer, ParameterGroup, StepDecay

logger = logging.getLogger("nested_lora")

Batch = tuple[Tensor, Tensor]  # images (B, 3, S, S) and incremental labels (B,)

# What a key of random numbers is for, beside the seed, the task and a counter.
TRAINING, NOISE = range(2)


class SDLoRA(ClassIncrementalLearner):
    """Decoupled directions and magnitudes; with a gate, sparse weights over them."""

    Config = SDLoRAConfig
    config: SDLoRAConfig

    def build(self, backbone: Backbone) -> nn.ModuleDict:
        vit, kind = backbone.vit, self.config.gate
        self.adapters: list[int] = []  # the task that grew each adapter
        head = IncrementalHead(vit.num_features, self.config.row_init)
        parts = {"backbone": LoRAVisionTransformer(vit), "head": head}
        if kind != "off":
            parts["gate"] = GumbelGate(len(vit.blocks) if kind == "layer" else None)
        return nn.ModuleDict(parts)

    @staticmethod
    def figures(
        events: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[float]], about: str
    ) -> dict[str, Figure]:
        return class_incremental_figures(events, rows, about) | gate_figures(events, about)

    @property
    def network(self) -> LoRAVisionTransformer:
        return self.modules["backbone"]

    @property
    def head(self) -> IncrementalHead:
        return self.modules["head"]

    @property
    def gate(self) -> GumbelGate | None:
        return dict(self.modules.items()).get("gate")

    def open_task(self) -> None:
        """Room for the classes and a new, silent adapter, which joins the gate on equal terms.

        With "carry" and without a gate nothing changes for old data: a gate's weights are shared with the newcomer.
        """
        self.head.grow(len(self.classes))
        if self.config.sdlora_scaling == "reset":
            self.network.reset_magnitudes()
        self.grow()
        self.progress.memory = {
            "tau": self.config.gumbel_tau_init,
            "sparse": 0.0,
        }  # sparse: sum over the open epoch

    def grow(self) -> None:
        """One more adapter, with the rank that is due."""
        self.network.grow(self.config.rank_of(self.task))
        self.adapters.append(self.task)
        if self.gate is not None:
            self.gate.grow(newcomer_logits(self.gate.logits, self.config.gumbel_tau_final))

    @property
    def stages(self) -> dict[str, Callable[[], str]]:
        return {
            "start": self.announce,
            "functional": self.train_functional,
            "close": self.end_of_task_training,
        }

    def features(self, images: Tensor) -> Tensor:
        """Class token of the network with all adapters merged into its weights, (B, 3, S, S) -> (B, d), float32."""
        self.network.merge(self.beta())
        with self.autocast():
            return self.network(images).float()

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)

    def class_tokens(self, images: Tensor) -> Tensor:
        return class_tokens(self.network.vit.blocks, lambda: self.features(images))

    def costs(self, build: Callable[[Mapping[str, Any]], Learner]) -> SDLoRACosts:
        return SDLoRACosts(self)

    # --- the gate -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def beta(self) -> Tensor | None:
        """Weights of the adapters in evaluation, (K,) or (L, K); None without a gate, where all are 1."""
        return None if self.gate is None else sparsemax(self.gate.logits / self.config.gumbel_tau_final)

    def noisy_beta(self) -> Tensor | None:
        """Weights in the coming training step: the same in all its parts and on every rank."""
        if self.gate is None:
            return None
        generator = seeded_generator(self.seed, self.task, NOISE, self.progress.steps)
        return gumbel_sparsemax(self.gate.logits, self.progress.memory["tau"], generator=generator)

    def penalty(self, beta: Tensor | None) -> Tensor:
        """What the gate adds to the loss: lambda_sparsity * H(beta), over layers the mean; a scalar."""
        nothing = torch.zeros((), device=self.device)
        return nothing if beta is None else self.config.lambda_sparsity * sparsity_loss(beta)

    # --- stage: functional --------------------------------------------------------------------------------------------

    def announce(self) -> str:
        """Say once what the gate is set to."""
        config = self.config
        if self.task == 0 and self.gate is not None:
            logger.info(
                f"[Gumbel CL-LoRA] tau_init={config.gumbel_tau_init}, tau_final={config.gumbel_tau_final}, "
                f"anneal_rate={config.gumbel_anneal_rate}, lambda_sparsity={config.lambda_sparsity}"
            )
        return "functional"

    def train_functional(self) -> str:
        """Train the newest direction, all magnitudes, the gate and the newest classifier rows."""
        self.network.unmerge()
        self.run_phase(self.functional_phase())
        return "close"

    def functional_phase(self) -> Phase:
        """The one phase of a task."""
        config = self.config
        epochs = config.init_epoch if self.task == 0 else config.epochs
        phase = Phase(
            name="func",
            epochs=epochs,
            optimizer=self.update_optimizer_and_scheduler(epochs),
            batches=self._batches,
            steps_per_epoch=-(-self.data.count(self.classes, "train") // config.batch_size),
            observe=self._classify,
            parts=self._parts,
        )
        if self.gate is not None:
            phase.before_step, phase.after_step, phase.after_epoch = (
                self._before_step,
                self._anneal,
                self._note,
            )
        return phase

    def _batches(self, epoch: int, start: int) -> Iterable[Batch]:
        """This rank's shares of an epoch's batches, newly augmented; every block learns, so no activation is kept."""
        key, size = (self.seed, self.task, TRAINING, epoch), self.config.batch_size
        return self.data.batches(
            self.classes, source="train", mode="train", batch_size=size, key=key, start=start
        )

    def _parts(self, batch: Batch) -> list[Batch]:
        """The batch in `grad_accumulation` parts of nearly equal size, without empty ones."""
        images, targets = (tensor.tensor_split(self.config.grad_accumulation) for tensor in batch)
        return [(x, y) for x, y in zip(images, targets, strict=True) if len(y)]

    def _classify(self, batch: Batch) -> StepResult:
        """Cross-entropy over the current task's classes, and the gate's penalty."""
        images, targets = (tensor.to(self.device) for tensor in batch)
        targets = targets - self.classes.start
        beta = self.noisy_beta()
        with self.autocast():
            features = self.network(images, beta).float()
        logits = self.head.newest(features)
        loss = F.cross_entropy(logits, targets) + self.penalty(beta)
        return StepResult(loss, len(targets), (logits.argmax(dim=1) == targets).sum())

    @torch.no_grad()
    def _before_step(self, step: int) -> None:
        """Add the step's penalty to the epoch's sum; say where to look when gradients are not finite."""
        memory = self.progress.memory
        memory["sparse"] += self.penalty(self.noisy_beta()).item()
        if not torch.isfinite(self.network.magnitudes.grad).all():
            logger.warning(not_finite_advice(self.config, memory["tau"]))

    def _anneal(self, step: int, moved: dict[str, bool]) -> None:
        """tau <- max(rate * tau, tau_final)."""
        config, memory = self.config, self.progress.memory
        memory["tau"] = max(config.gumbel_anneal_rate * memory["tau"], config.gumbel_tau_final)

    def _note(self, loss: float, steps: int) -> EpochNote:
        """Means of the epoch's classification loss and penalty, and the temperature it ends with."""
        memory = self.progress.memory
        sparse = memory["sparse"] / max(1, steps)
        memory["sparse"] = 0.0
        numbers = {"clf": loss - sparse, "sparse": sparse, "tau": memory["tau"]}
        return EpochNote(f" (clf={loss - sparse:.3f}, sparse={sparse:.3f}), tau={memory['tau']:.3f}", numbers)

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
        learning = {id(p) for p in self.modules.parameters() if p.requires_grad}
        if learning != {id(p) for parameters in parts.values() for p in parameters}:
            raise RuntimeError("the optimizer groups are not the parameters that learn")
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
            [ParameterGroup(name, parameters, lr=rate) for name, parameters in parts.items()],
            weight_decay=config.init_weight_decay if first else config.weight_decay,
            epochs=num_epoch,
            min_lr=config.min_lr,
            step_decay=step_decay,
        )

    # --- stage: close -------------------------------------------------------------------------------------------------

    def end_of_task_training(self) -> str:
        """Freeze the task's direction; with a gate, decide what stays."""
        self.network.freeze_newest()
        if self.gate is not None:
            self._conditional_growth_decision(self.gate)
        values = ", ".join(f"{value:.3f}" for value in self.network.magnitudes.tolist())
        logger.info(f"Task {self.task}: magnitudes of the adapters of tasks {self.adapters}: [{values}]")
        self.log.metric(
            "magnitudes", task=self.task, adapters=self.adapters, magnitudes=self.network.magnitudes.detach()
        )
        return "done"

    def _conditional_growth_decision(self, gate: GumbelGate) -> None:
        """Keep or prune by the weights in evaluation; log it, write it down, warn of settings that do not work."""
        config, tau = self.config, self.progress.memory["tau"]
        state = GateState(self.task, list(self.adapters), self.beta().cpu())
        kept = kept_adapters(state, config)
        record = GateRecord.of(state, kept)
        for line in growth_lines(state, kept, config):
            logger.info(line)
        for line in symptoms(state, kept, config, tau, self.progress.steps):
            logger.warning(line)
        self.log.metric("gate", task=self.task, tau=tau, **record.numbers())
        if self.world.is_main:
            for folder in (self.log.folder / "gate", *([Path(config.filepath)] if config.filepath else [])):
                record.write(folder)
        self.network.keep(kept)
        gate.keep(kept)
        self.adapters = [self.adapters[k] for k in kept]

    def close_run(self) -> None:
        """The table of active adapters over tasks, from the run's own record."""
        if self.gate is not None and self.world.is_main:
            masks = {
                e["task"]: e["pruning_mask"] for e in read_metrics(self.log.folder) if e["event"] == "gate"
            }
            if len(masks) > 1:
                logger.info("\n" + active_adapters_table(masks))

    # --- state --------------------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        network = self.network
        return {
            "adapters": self.adapters,
            "ranks": network.ranks,
            "open": network.is_open,
            "classes": [rows.out_features for rows in self.head.tasks],
        }

    def rebuild(self, structure: dict[str, Any]) -> None:
        self.adapters = list(structure["adapters"])
        self.network.rebuild(structure["ranks"], structure["open"])
        if self.gate is not None:
            self.gate.rebuild(len(self.adapters))
        for classes in structure["classes"]:
            self.head.grow(classes)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = self.network.tensors() | {
            f"head.{name}": tensor for name, tensor in self.head.state_dict().items()
        }
        return tensors if self.gate is None else tensors | {"gate.logits": self.gate.logits}

    def summary(self) -> dict[str, Any]:
        counts = self.network.parameter_counts()
        counts["gate"] = 0 if self.gate is None else self.gate.logits.numel()
        counts["head"] = sum(parameter.numel() for parameter in self.head.parameters())
        counts["stored"] = sum(counts.values())
        return {"adapters": self.network.adapters_per_block(), "parameters": counts}
