"""SD-LoRA and Gumbel CL-LoRA: a low-rank direction per task, learned magnitudes and a sparse gate over them.

    python main.py --config exps/sdlora_c100_baseline.json   # lambda_sparsity 0: SD-LoRA, every beta is 1
    python main.py --config exps/sdlora_c100.json            # lambda_sparsity > 0: a gate and pruning

A task adds an adapter to q and v of every block and trains it with the magnitudes of all adapters, the gate's
logits g and the classifier rows of its classes. Then its direction is frozen, and with a gate its weight beta
decides whether the adapter is kept (`models/gumbel_growth.py`). In training
beta = sparsemax((g + noise) / tau), tau falls after every step and lambda_sparsity * H(beta) is added to the
loss; in evaluation beta = sparsemax(g / gumbel_tau_final).

Sources: SD-LoRA (Wu et al., ICLR 2025); gate and conditional growth as in the project's design.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from backbone.lora import GumbelGate, LoRAVisionTransformer
from models.config.sdlora import SDLoRAConfig
from models.gumbel_growth import CAPTIONS, active_adapters_table, decide, gate_figures, not_finite_advice
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.task_inputs import Batch
from models.vit.training import FunctionalPhase
from utils.analysis.representations import GATE_ANALYSES
from utils.gumbel_utils import gumbel_sparsemax, newcomer_logits, sparsemax, sparsity_loss
from utils.inc_net import IncrementalHead
from utils.runs.figures import CAPTIONS as RUN_CAPTIONS
from utils.runs.figures import class_incremental_figures
from utils.runs.run_log import read_metrics
from utils.training.optim import GroupedOptimizer, ParameterGroup, StepDecay
from utils.training.phase import EpochNote, StepResult
from utils.training.random import rng

logger = logging.getLogger("nested_lora")


class SDLoRA(ClassIncrementalLearner):
    """SD-LoRA: directions and magnitudes of LoRA adapters; with a sparse gate over them Gumbel CL-LoRA.

    `method_state`: "adapters", the task that grew each adapter; "tau", the temperature; "sparsity", the
    penalty summed over the open epoch.
    """

    Config = SDLoRAConfig
    task_files = ("gate",)
    analyses = GATE_ANALYSES
    config: SDLoRAConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        kind = self.config.gate
        head = IncrementalHead(vit.num_features, self.config.row_init)
        modules = {"backbone": LoRAVisionTransformer(vit), "head": head}
        if kind != "off":
            modules["gate"] = GumbelGate(len(vit.blocks) if kind == "layer" else None)
        return nn.ModuleDict(modules)

    captions = RUN_CAPTIONS | CAPTIONS

    @staticmethod
    def figures(events: Sequence[Mapping[str, Any]], about: str) -> dict[str, Figure]:
        return class_incremental_figures(events, about) | gate_figures(events, about)

    def adapter_weights(self) -> dict[int, float]:
        beta = self.beta()
        if beta is None:
            return {}
        return dict(zip(self.adapters, beta.reshape(-1, len(self.adapters)).mean(0).tolist(), strict=True))

    @property
    def epochs(self) -> int:
        return self.config.epochs_of(self.task)

    @property
    def gate(self) -> GumbelGate | None:
        return dict(self.modules.items()).get("gate")

    @property
    def adapters(self) -> list[int]:
        """The task that grew each adapter, oldest first."""
        return self.method_state["adapters"]

    # --- a task ---------------------------------------------------------------------------------------------

    def open_task(self) -> None:
        """Add classifier rows and an adapter with zero output; with a gate its logit is `newcomer_logits`.

        With "carry" and without a gate this changes no feature; a gate gives part of the weight to the new
        adapter.
        """
        super().open_task()
        config = self.config
        self.progress.state = {
            "adapters": self.method_state.get("adapters", []),
            "tau": config.gumbel_tau_init,
            "sparsity": 0.0,
        }
        if config.sdlora_scaling == "reset":
            self.network.reset_magnitudes()
        self.grow()
        if self.task == 0 and self.gate is not None:
            logger.info(
                f"[Gumbel CL-LoRA] tau_init={config.gumbel_tau_init}, tau_final={config.gumbel_tau_final}, "
                f"anneal_rate={config.gumbel_anneal_rate}, lambda_sparsity={config.lambda_sparsity}"
            )

    def grow(self) -> None:
        """Add one adapter of the rank that the schedule gives this task."""
        self.network.grow(self.config.rank_of(self.task))
        self.adapters.append(self.task)
        if self.gate is not None:
            self.gate.grow(newcomer_logits(self.gate.logits, self.config.gumbel_tau_final))

    def learn_task(self) -> None:
        self.once("functional", self.train_functional)
        self.once("close", self.end_of_task_training)

    def train_functional(self) -> None:
        """Train the newest direction, all magnitudes, the gate and the newest classifier rows."""
        self.network.unmerge()
        self.run_phase(LoRAPhase(self) if self.gate is None else GatedPhase(self))

    def learning_groups(self) -> list[ParameterGroup]:
        """Groups lora (newest direction), alpha (magnitudes), gate and head, with the task's one rate."""
        gate = [] if self.gate is None else [self.gate.logits]
        parts = self.network.parameter_groups() | {"gate": gate, "head": self.head.trainable()}
        lr = self.config.lrate if self.task else self.config.init_lr
        return [ParameterGroup(name, parameters, lr=lr) for name, parameters in parts.items()]

    def optimizer_over(self, groups: Sequence[ParameterGroup], num_epoch: int) -> GroupedOptimizer:
        """The configured optimizer of the first task or of a later one."""
        config, first = self.config, self.task == 0
        milestones = config.init_milestones if first else config.milestones
        decay = StepDecay(milestones, config.init_lr_decay if first else config.lrate_decay)
        return GroupedOptimizer(
            config.optimizer,
            groups,
            weight_decay=config.init_weight_decay if first else config.weight_decay,
            epochs=num_epoch,
            min_lr=config.min_lr,
            step_decay={"cosine": None, "constant": StepDecay(), "steplr": decay}[config.scheduler],
        )

    def end_of_task_training(self) -> None:
        """Freeze the task's direction; with a gate, decide which adapters stay."""
        self.network.freeze_newest()
        if self.gate is not None:
            self._conditional_growth_decision(self.gate)
        magnitudes = self.network.magnitudes.detach()
        values = ", ".join(f"{value:.3f}" for value in magnitudes.tolist())
        logger.debug(f"Task {self.task}: magnitudes of the adapters of tasks {self.adapters}: [{values}]")
        self.log.metric("magnitudes", task=self.task, adapters=self.adapters, magnitudes=magnitudes)

    def _conditional_growth_decision(self, gate: GumbelGate) -> None:
        """Keep or prune adapters by their evaluation weights; log and write the decision, with warnings."""
        config, tau = self.config, self.method_state["tau"]
        decision = decide(self.task, self.adapters, self.beta().cpu(), config)
        for line in decision.lines(config):
            logger.info(line)
        for line in decision.warnings(config, tau, self.progress.steps):
            logger.warning(line)
        self.log.metric("gate", task=self.task, tau=tau, **decision.record())
        if self.distributed.is_main:
            for folder in (self.log.folder / "gate", *([Path(config.filepath)] if config.filepath else [])):
                decision.write(folder)
        self.network.keep(decision.kept)
        gate.keep(decision.kept)
        self.method_state["adapters"] = [self.adapters[k] for k in decision.kept]

    def close_run(self) -> None:
        """Log the table of active adapters over tasks, from the run's own record, where there is one."""
        if self.gate is not None and self.context.log is not None and self.distributed.is_main:
            events = [event for event in read_metrics(self.log.folder) if event["event"] == "gate"]
            if len(masks := {event["task"]: event["pruning_mask"] for event in events}) > 1:
                logger.info(f"Adapters that stay, task by task\n{active_adapters_table(masks)}")

    # --- evaluation -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def beta(self) -> Tensor | None:
        """Weights of the adapters in evaluation, (K,) or (L, K); None without a gate, where all are 1."""
        return None if self.gate is None else sparsemax(self.gate.logits / self.config.gumbel_tau_final)

    def before_features(self) -> None:
        """Merge all adapters into the weights of the network."""
        self.network.merge(self.beta())

    def trained_numbers(self) -> int:
        """Numbers in adapters that learned, also pruned ones, their magnitudes and logits, and rows."""
        config, each = self.config, 1 if self.gate is None else 1 + self.gate.logits.shape[:-1].numel()
        trained = [task for task in range(self.task + 1) if config.epochs_of(task)]
        adapters = sum(self.network.directions_of_rank(config.rank_of(task)) + each for task in trained)
        return adapters + sum(p.numel() for task in trained for p in self.head.tasks[task].parameters())


class LoRAPhase(FunctionalPhase):
    """`FunctionalPhase` on newly augmented images, with every beta 1."""

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        learner = self.learner
        key = ("training", learner.seed, learner.task, epoch)
        return self.inputs.read(learner.task, self.inputs.fresh(key), key, self.config.batch_size, start)


class GatedPhase(LoRAPhase):
    """`LoRAPhase` with beta = sparsemax((g + noise) / tau) and lambda_sparsity * H(beta) added to the loss.

    After every step tau <- max(gumbel_anneal_rate * tau, gumbel_tau_final).
    """

    tells_epochs = True  # the temperature is watched epoch by epoch

    def __init__(self, learner: SDLoRA) -> None:
        super().__init__(learner)
        self.state = learner.method_state

    def loss(self, batch: Batch) -> StepResult:
        beta = self.step_beta()
        result = super().loss(batch, beta=beta)
        result.loss = result.loss + self.penalty(beta)
        return result

    def step_beta(self) -> Tensor:
        """Noisy weights, the same in all micro-batches of a step and on every rank."""
        learner = self.learner
        generator = rng("gumbel noise", learner.seed, learner.task, learner.progress.steps)
        return gumbel_sparsemax(learner.gate.logits, self.state["tau"], generator=generator)

    def penalty(self, beta: Tensor) -> Tensor:
        """lambda_sparsity * H(beta), a scalar; the mean over layers."""
        return self.config.lambda_sparsity * sparsity_loss(beta)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Add the step's penalty to the epoch's sum; warn where gradients are not finite."""
        self.state["sparsity"] += self.penalty(self.step_beta()).item()
        if not torch.isfinite(self.learner.network.magnitudes.grad).all():
            logger.warning(not_finite_advice(self.config, self.state["tau"]))

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        lowered = self.config.gumbel_anneal_rate * self.state["tau"]
        self.state["tau"] = max(lowered, self.config.gumbel_tau_final)

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        """Means of the epoch's classification loss and penalty, and the temperature it ends with."""
        sparse, tau = self.state["sparsity"] / max(1, steps), self.state["tau"]
        self.state["sparsity"] = 0.0
        numbers = {"clf": loss - sparse, "sparse": sparse, "tau": tau}
        return EpochNote(f" (clf={loss - sparse:.3f}, sparse={sparse:.3f}), tau={tau:.3f}", numbers)
