"""The shared-subspace experiment: do tasks that share primitives also share a subspace, and does it help on new ones?

    python main.py --config exps/shared_subspace_small.json

A network reads a grid and a program of primitives and gives the changed grid through a bottleneck h (`GridModel`). It
trains on compositions of few primitives with

    loss = prediction + alpha sharing + beta (reconstruction + w L1) + gamma naming

where sharing pulls together the subspaces of groups of samples that have a primitive in common, the autoencoder's terms
make a sparse code of h, and naming asks h which primitives were applied. alpha, beta and gamma may change in the course
of training; w follows the code's activity. The weights of the best validation IoU are kept. They are then tested on
pairs of primitives and on compositions that training never met, and few samples of some of these train adapters at the
bottleneck, everything else frozen.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import EpochNote, Learner, Phase, Report, RunContext, StepResult
from models.shared_subspace.analysis import ANALYSES, GridMaterial, metrics_of
from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.evaluation import (
    describe_measured,
    grid_report,
    grid_tasks,
    measure,
    splits_sha256,
)
from models.shared_subspace.few_shot import adapt_to_all
from models.shared_subspace.figures import grid_figures
from models.shared_subspace.losses import TASK_LOSSES, SharingLoss, iou, sparse_terms, weight_at
from models.shared_subspace.material import grid_material
from models.shared_subspace.network import GridModel, GridOutput, GridShape
from models.shared_subspace.tables import SPLIT_NAMES
from models.shared_subspace.tasks import HELD_OUT, TRAIN, GridBatch, GridSamples, GroupedBatchSampler
from utils.analysis.results import ANALYSIS, write_results
from utils.errors import UserError
from utils.training.device import predictions
from utils.training.optim import GroupedOptimizer, ParameterGroup
from utils.training.random import rng

logger = logging.getLogger("nested_lora")

SHOWN = ("prediction", "sharing", "reconstruction", "activity")  # of the epoch's means, in its line


class SharedSubspace(Learner):
    """One network for all compositions, with a loss on the subspaces that they take up."""

    Config = SharedSubspaceConfig
    figures = staticmethod(grid_figures)
    analyses = ANALYSES
    config: SharedSubspaceConfig

    def __init__(self, config: SharedSubspaceConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.tasks = grid_tasks(config, self.seed, context.distributed.size)
        torch.manual_seed(self.seed)
        shape = GridShape(
            self.tasks.colours, len(self.tasks.steps), self.tasks.slots, len(self.tasks.primitives)
        )
        model = GridModel(
            shape,
            encoder=config.encoder,
            decoder=config.decoder,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            patch=config.patch,
            hidden=config.hidden,
            units=config.sparse_units,
            activity=config.sparse_activity,
        )
        sharing = SharingLoss(
            self.tasks.splits[TRAIN].labels,
            width=config.hidden,
            rank=config.sharing_rank,
            generator=rng("sharing probes", self.seed),
            ema=config.sharing_ema if config.shares else 0.0,
            detach=config.sharing_detach,
        )
        self.modules = nn.ModuleDict({"model": model, "sharing": sharing}).to(self.device)
        self.validation = self.tasks.draw(TRAIN, config.validation_samples, rng("grid validation", self.seed))

    @property
    def model(self) -> GridModel:
        return self.modules["model"]

    @property
    def sharing(self) -> SharingLoss:
        return self.modules["sharing"]

    def open_task(self) -> None:
        """Nothing has been seen yet."""
        self.progress.state = {"sums": {}, "best_iou": None, "few_shot": [], "looks": None, "analysis": None}

    def learn_task(self) -> None:
        self.once("train", lambda: self.run_phase(TrainingPhase(self)))
        self.once("best", self.return_to_best)
        self.once("few-shot", lambda: adapt_to_all(self))
        self.once("analyse", self.analyse)

    # --- steps of the task --------------------------------------------------------------------------------------------

    def return_to_best(self) -> None:
        """Take the weights of the best validation."""
        self.model.load_state_dict(self.method_tensors)
        self.method_tensors = {}
        logger.info(f"Back to the weights with validation IoU {self.method_state['best_iou']:.2f} %")

    def analyse(self) -> None:
        """Write every analysis of the network into the run folder, and keep the numbers that runs are compared by."""
        material = self.material()
        found = {name: analyse(material) for name, analyse in ANALYSES.items()}
        write_results(self.log.folder / ANALYSIS, found)
        self.method_state["analysis"] = metrics_of(found)

    # --- tests --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, samples: GridSamples) -> Tensor:
        """Colours of the grids that the network gives, (N, 8, 8) on the CPU.

        Raises:
            UserError: a score is not finite.
        """
        found = []
        for batch in samples.batches(self.config.eval_batch_size):
            with self.autocast():
                logits = self.model(batch.input.to(self.device), batch.program.to(self.device)).logits
            found.append(predictions(logits, "grids", self.config.precision).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def layers(self, samples: GridSamples) -> dict[str, Tensor]:
        """What the layers make of samples (`GridModel.layers`), (N, ...) each, float32 on the CPU."""
        found = []
        for batch in samples.batches(self.config.eval_batch_size):
            with self.autocast():
                found.append(self.model.layers(batch.input.to(self.device), batch.program.to(self.device)))
        return {name: torch.cat([batch[name].float().cpu() for batch in found]) for name in found[0]}

    def analysis_inputs(
        self, checkpoints: Sequence[Path], load: Callable[[Path], None], images_per_class: int | None
    ) -> GridMaterial:
        """Layers of the network in the last checkpoint on new grids. UserError: images are to be chosen."""
        if images_per_class is not None:
            raise UserError(
                "--images-per-class: a run on grids has no images, its analyses draw new grids; leave it out"
            )
        load(checkpoints[-1])
        return self.material()

    def material(self) -> GridMaterial:
        """What there is to analyse of the network."""
        return grid_material(self)

    def accuracy(self, samples: GridSamples) -> dict[str, float]:
        """Percent: IoU, cells right, grids solved."""
        colours, target = self.predict(samples), samples.target.long()
        right = (colours == target).flatten(1)
        return {
            "iou": 100 * iou(colours, target).double().mean().item(),
            "cells": 100 * right.double().mean().item(),
            "solved": 100 * right.all(dim=1).double().mean().item(),
        }

    # --- state and record ---------------------------------------------------------------------------------------------

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        own = {f"model.{name}" for name in self.learned_tensors()}
        if not self.model.is_adapted and {name for name in tensors if name.startswith("model.")} - own:
            self.model.insert(self.config.few_shot_method, self.config.few_shot_rank)
        super().load_state(state, tensors)

    @property
    def nb_tasks(self) -> int:
        return 1

    def evaluate(self) -> dict[str, Any]:
        return measure(self)

    def describe_evaluation(self, evaluation: dict[str, Any]) -> str:
        return describe_measured(evaluation)

    def report(self, evaluations: Sequence[dict[str, Any]]) -> Report:
        return grid_report(evaluations[-1])

    def describe_run(self) -> str:
        number, steps = len(self.tasks.primitives), len(self.tasks.steps)
        return (
            f"Grids of {self.tasks.colours} colours, {number} primitives, {steps} with all their parameters"
        )

    def describe_task(self, task: int) -> str:
        counts = (f"{len(self.tasks.splits[split])} {name}" for split, name in SPLIT_NAMES.items())
        return f"Learning on generated grids; compositions: {', '.join(counts)}"

    def weights(self) -> dict[str, str]:
        return {"tag": "trained from scratch", "note": ""}

    def manifest(self) -> dict[str, Any]:
        pairs = [self.tasks.describe(composition) for composition in self.tasks.splits[HELD_OUT].compositions]
        return {"splits_sha256": splits_sha256(self.tasks), "held_out": pairs}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"splits_sha256": splits_sha256(self.tasks)}

    def parameter_counts(self) -> dict[str, int]:
        counts = self.model.parameter_counts()
        return counts | {"stored": sum(counts.values())}


class TrainingPhase(Phase):
    """Training of the whole network."""

    name = "train"

    def __init__(self, learner: SharedSubspace) -> None:
        config = learner.config
        parameters = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
        optimizer = GroupedOptimizer(
            config.optimizer,
            [ParameterGroup("model", parameters, lr=config.init_lr)],
            weight_decay=config.weight_decay,
            epochs=config.epochs,
            min_lr=config.min_lr,
        )
        super().__init__(
            epochs=config.epochs,
            steps_per_epoch=config.steps_per_epoch,
            optimizer=optimizer,
            save_every=config.save_every,
        )
        self.learner, self.config = learner, config
        self._activity: list[float] = []  # of the micro-batches of the open step
        self._clock = 0.0  # when the open step began

    def batches(self, epoch: int, start: int) -> Iterator[GridBatch]:
        """An epoch's batches from number `start` on, out of one buffer of new samples."""
        began = time.perf_counter()
        config, generator = self.config, rng("grid training", self.learner.seed, epoch)
        pieces = config.steps_per_epoch * config.groups
        samples = self.learner.tasks.draw(TRAIN, pieces, generator, group_size=config.group_size)
        sampler = GroupedBatchSampler(
            samples.primitives, groups=config.groups, group_size=config.group_size, generator=generator
        )
        chosen = list(sampler)[start:]
        self._add("data_seconds", time.perf_counter() - began)
        for indices in chosen:
            began = time.perf_counter()
            batch = samples.batch(indices)
            self._add("data_seconds", time.perf_counter() - began)
            yield batch

    def micro_batches(self, batch: GridBatch) -> list[GridBatch]:
        """The batch in `grad_accumulation` parts of whole groups; the sharing loss compares within a part."""
        self._clock = time.perf_counter()
        size = self.config.group_size
        parts = np.array_split(range(len(batch) // size), self.config.grad_accumulation)  # numbers of groups
        return [batch.rows(part[0] * size, (part[-1] + 1) * size) for part in parts]

    def loss(self, part: GridBatch) -> StepResult:
        """The loss of some groups, and its terms for the epoch's line."""
        part = part.to(self.learner.device)
        with self.learner.autocast():
            output = self.learner.model(part.input, part.program)
        share = len(part) / self.config.batch_size
        loss = TASK_LOSSES[self.config.task_loss](output.logits, part.target)
        terms = {"prediction": loss}
        for weight, name, term in self._regularisers(output, part, share):
            terms[name] = term
            loss = loss + weight * term
        for name, term in terms.items():
            self._add(name, share * term.item())
        colours = output.logits.detach().argmax(dim=1)
        return StepResult(loss, len(part), (colours == part.target).flatten(1).all(dim=1).sum())

    def _regularisers(
        self, output: GridOutput, part: GridBatch, share: float
    ) -> list[tuple[float, str, Tensor]]:
        """The other terms of the loss with their weights, those without weight left out: (weight, name, term)."""
        alpha, beta, gamma = self.weights()
        found = []
        if alpha:
            sharing = self.learner.sharing(output.hidden.float(), part.primitives)
            self.learner.sharing.update(sharing)
            self._add("fallbacks", sharing.fallbacks)
            found.append((alpha, "sharing", sharing.loss))
        if output.sparse is not None:
            code = sparse_terms(output.hidden.float(), output.sparse.float(), output.rebuilt.float())
            self._activity.append(share * code.activity.item())
            for name in ("activity", "silent", "explained"):
                self._add(name, share * getattr(code, name).item())
            found.append((beta, "reconstruction", code.reconstruction))
            found.append((beta * self.learner.model.autoencoder.l1_weight.item(), "l1", code.l1))
        if gamma:
            named = F.binary_cross_entropy_with_logits(output.named.float(), part.primitives)
            found.append((gamma, "naming", named))
        return found

    def weights(self) -> tuple[float, float, float]:
        """alpha, beta and gamma at the coming step."""
        config = self.config
        done = min(1.0, self.learner.progress.steps / (config.epochs * config.steps_per_epoch))
        return weight_at(config.alpha, done), weight_at(config.beta, done), weight_at(config.gamma, done)

    def before_step(self, step: int) -> None:
        """Shorten a gradient that is too long."""
        norm = nn.utils.clip_grad_norm_(self.learner.model.parameters(), self.config.clip_norm)
        self._add("gradient", norm.item())

    def after_step(self, step: int, moved: dict[str, bool]) -> None:
        """The weight of L1 follows the activity; the step's time."""
        if self._activity:
            self.learner.model.autoencoder.steer(sum(self._activity))
            self._activity = []
        self._add("step_seconds", time.perf_counter() - self._clock)

    def _add(self, name: str, value: float) -> None:
        """Add to one of the epoch's sums; they are part of the state."""
        sums = self.learner.method_state["sums"]
        sums[name] = sums.get(name, 0.0) + value

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        """Validate, keep the weights where they are the best, and say what the epoch's terms were."""
        memory = self.learner.method_state
        sums, memory["sums"] = memory["sums"], {}
        seconds = {"step": sums.pop("step_seconds"), "data": sums.pop("data_seconds")}
        fallbacks = int(sums.pop("fallbacks", 0))
        means = {name: value / steps for name, value in sums.items()}
        validation = self.learner.accuracy(self.learner.validation)
        is_best = memory["best_iou"] is None or validation["iou"] > memory["best_iou"]
        if is_best:
            memory["best_iou"] = validation["iou"]
            self.learner.method_tensors = {
                name: tensor.detach().clone() for name, tensor in self.learner.model.state_dict().items()
            }
        alpha, beta, gamma = self.weights()
        numbers = means | {f"validation_{name}": value for name, value in validation.items()}
        numbers |= {"alpha": alpha, "beta": beta, "gamma": gamma, "fallbacks": fallbacks, "seconds": seconds}
        shown = [f"{name} {means[name]:.3f}" for name in SHOWN if name in means]
        shown.append(f"validation IoU {validation['iou']:.2f}{' (best)' if is_best else ''}")
        shown.append(
            f"{1000 * seconds['step'] / steps:.0f} ms a step, {1000 * seconds['data'] / steps:.1f} of data"
        )
        if fallbacks:
            shown.append(f"{fallbacks} groups by random projection")
        return EpochNote(f" ({', '.join(shown)})", numbers)
