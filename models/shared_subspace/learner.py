"""Shared-subspace experiment: a loss that pulls the subspaces of tasks with common primitives together.

    python main.py --config exps/shared_subspace_small.json

A network maps a grid and a program of primitives to the changed grid through a bottleneck h. It trains on
compositions of few primitives with

    loss = prediction + alpha sharing + beta (reconstruction + w L1) + gamma auxiliary

where `sharing` pulls together the subspaces of groups of samples that have a primitive in common, and the
auxiliary loss predicts the applied primitives from h. The weights of the best validation IoU are tested on
compositions absent from training; adapters at the bottleneck are fitted to few samples of some of these.
"""

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import Learner, Report, RunContext
from models.shared_subspace.analysis import ANALYSES, AnalysisInputs, analysis_inputs, metrics_of
from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.evaluation import SPLIT_NAMES, Evaluator, report, result_tables, zero_shot
from models.shared_subspace.few_shot import FewShotPhase, few_shot_row, few_shot_task
from models.shared_subspace.figures import CAPTIONS, grid_figures
from models.shared_subspace.losses import TASK_LOSSES, SharingLoss, sparse_terms
from models.shared_subspace.network import GridModel, GridOutput
from models.shared_subspace.tasks import HELD_OUT, TRAIN, GridSamples, GridTasks, GroupedBatchSampler
from utils.analysis.results import ANALYSIS, write_results
from utils.errors import UserError
from utils.training.optim import GroupedOptimizer, ParameterGroup
from utils.training.phase import EpochNote, Phase, StepResult
from utils.training.random import rng, seed_generators
from utils.wording import counted

logger = logging.getLogger("nested_lora")

SHOWN = ("prediction", "sharing", "reconstruction", "active_fraction")  # means in an epoch's log line


class SharedSubspace(Learner):
    """One network for all compositions, with a loss on the subspaces of its bottleneck; one process alone."""

    Config = SharedSubspaceConfig
    figures = staticmethod(grid_figures)
    captions = CAPTIONS
    analyses = ANALYSES
    config: SharedSubspaceConfig

    def __init__(self, config: SharedSubspaceConfig, context: RunContext) -> None:
        super().__init__(config, context)
        if context.distributed.size > 1:
            fault = f"model_name = {config.model_name!r} trains in one process, and there are"
            reason = "the groups of a step are compared with each other; start it without torchrun"
            raise UserError(f"{fault} {context.distributed.size}: {reason}")
        self.tasks = tasks = GridTasks(config)
        context.warnings.extend(self._gaps_in_training())
        seed_generators(self.seed, self.device)
        self.model = GridModel(config, len(tasks.operations))
        self.sharing = SharingLoss(tasks.splits[TRAIN].labels, config)
        self.modules = nn.ModuleDict({"model": self.model, "sharing": self.sharing}).to(self.device)
        self.evaluator = Evaluator(self.model, config)
        self.validation = tasks.draw(TRAIN, config.validation_samples, rng("grid validation", self.seed))

    def _gaps_in_training(self) -> Iterator[str]:
        """What the compositions of training lack that the experiment needs, in sentences."""
        occurrences = self.tasks.splits[TRAIN].labels.sum(dim=0)  # of a primitive, in groups
        if self.config.uses("alpha") and occurrences.max() < 2:
            fault = "no two groups of training have a primitive in common: the sharing loss is always 0"
            yield f"{fault}, and alpha has no effect; add another length to train_lengths"
        absent = [name for name, n in zip(self.tasks.primitives, occurrences.tolist(), strict=True) if not n]
        if absent:
            fault = f"no composition of training has {', '.join(absent)}, which the test needs"
            yield f"{fault}: lower held_out_pairs, or add 1 to train_lengths"

    @property
    def nb_tasks(self) -> int:
        return 1

    # --- the task -------------------------------------------------------------------------------------------

    def open_task(self) -> None:
        empty = {"best_iou": None, "history": None, "analysis": None}
        self.progress.state = {"sums": {}, "few_shot": [], **empty}

    def learn_task(self) -> None:
        self.once("train", lambda: self.run_phase(TrainingPhase(self)))
        self.once("best weights", self.load_best)
        self.once("few-shot", self.adapt)
        self.once("analyses", self.analyse)

    def load_best(self) -> None:
        """Load the weights of the best validation."""
        self.model.load_state_dict(self.method_tensors)
        self.method_tensors = {}
        logger.info(f"Back to the weights with validation IoU {self.method_state['best_iou']:.2f} %")

    def adapt(self) -> None:
        """Train adapters on unseen compositions, one after the other; the network stays as it is."""
        config, state, model = self.config, self.method_state, self.model
        for number in range(len(state["few_shot"]), config.few_shot_tasks):
            task = few_shot_task(self.tasks, config, number)
            if not model.is_adapted:  # otherwise resumed while they learned
                state["history"] = {"iou": [self.evaluator.accuracy(task.query)["iou"]], "seconds": [0.0]}
                model.insert_adapters()
            self.run_phase(FewShotPhase(self.evaluator, task, state["history"]))
            model.remove_adapters()
            row = few_shot_row(task, state["history"], config)
            state["few_shot"].append(row)
            state["history"] = None
            self.log.metric("few_shot", **row)

    def analyse(self) -> None:
        """Write every analysis of the network into the run folder and keep its metrics."""
        inputs = analysis_inputs(self.evaluator, self.tasks)
        found = {name: analyse(inputs) for name, analyse in ANALYSES.items()}
        write_results(self.log.folder / ANALYSIS, found, self.config.figure_format)
        self.method_state["analysis"] = metrics_of(found)

    def analysis_inputs(
        self, checkpoints: Sequence[Path], load: Callable[[Path], None], images_per_class: int | None
    ) -> AnalysisInputs:
        """Inputs of `analyses` for the network in the last checkpoint. UserError: images are to be chosen."""
        if images_per_class is not None:
            fault = "a run on grids has no images, its analyses draw new grids"
            raise UserError(f"--images-per-class: {fault}; leave it out")
        load(checkpoints[-1])
        return analysis_inputs(self.evaluator, self.tasks)

    # --- evaluation and record ------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        state = self.method_state
        found = zero_shot(self.evaluator, self.tasks)
        return {"zero_shot": found, "few_shot": state["few_shot"], "analysis": state["analysis"]}

    def report(self, evaluations: Sequence[dict[str, Any]]) -> Report:
        return report(evaluations[-1])

    def describe_evaluation(self, evaluation: dict[str, Any]) -> str:
        return "\n\n".join(["new grids, and a few of unseen compositions", *result_tables(evaluation)])

    def describe_run(self) -> list[str]:
        operations = f"{len(self.tasks.operations)} with all their parameters"
        colours, primitives = self.tasks.colours, len(self.tasks.primitives)
        return [f"Grids of {colours} colours, {counted(primitives, 'primitive')}, {operations}"]

    def describe_task(self, task: int) -> str:
        counts = (f"{len(self.tasks.splits[split])} {name}" for split, name in SPLIT_NAMES.items())
        return f"Learning on generated grids; compositions: {', '.join(counts)}"

    def weights(self) -> dict[str, str]:
        return {"tag": "trained from scratch", "note": ""}

    def manifest(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        return {"splits_sha256": self.splits_sha256(), "held_out": self.tasks.fingerprint()[HELD_OUT]}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"splits_sha256": self.splits_sha256()}

    def splits_sha256(self) -> str:
        """Hash of the compositions of every split."""
        return hashlib.sha256(json.dumps(self.tasks.fingerprint()).encode()).hexdigest()

    def parameter_counts(self) -> dict[str, int]:
        counts = self.model.parameter_counts()
        weight_of = {"primitive_head": "gamma", "autoencoder": "beta"}  # of the only loss that reaches a part
        idle = sum(counts[part] for part, weight in weight_of.items() if not self.config.uses(weight))
        stored = sum(counts.values())
        return counts | {"trained": stored - idle, "stored": stored}


class TrainingPhase(Phase):
    """Training of the whole network; the sums of an epoch's terms are part of the learner's state."""

    name = "train"

    def __init__(self, learner: SharedSubspace) -> None:
        config = learner.config
        group = ParameterGroup("model", list(learner.model.parameters()), lr=config.init_lr)
        decay = {"weight_decay": config.weight_decay, "min_lr": config.min_lr}
        optimizer = GroupedOptimizer(config.optimizer, [group], epochs=config.epochs, **decay)
        steps = {"epochs": config.epochs, "steps_per_epoch": config.steps_per_epoch}
        super().__init__(**steps, optimizer=optimizer, save_every=config.save_every)
        self.learner, self.config = learner, config
        self.model, self.sharing = learner.model, learner.sharing
        self.active_fractions: list[float] = []  # of the micro-batches of the open step
        self.step_began = 0.0

    def batches(self, epoch: int, start: int) -> Iterator[GridSamples]:
        """Batches of whole groups, drawn from one buffer of new samples per epoch."""
        began = time.perf_counter()
        config, generator = self.config, rng("grid training", self.learner.seed, epoch)
        groups = config.steps_per_epoch * config.groups
        samples = self.learner.tasks.draw(TRAIN, groups, generator, group_size=config.group_size)
        sampler = GroupedBatchSampler(
            samples.primitives, groups=config.groups, group_size=config.group_size, generator=generator
        )
        for indices in list(sampler)[start:]:
            batch = samples.select(indices)
            self._add("data_seconds", time.perf_counter() - began)
            yield batch
            began = time.perf_counter()

    def micro_batches(self, batch: GridSamples) -> list[GridSamples]:
        """`grad_accumulation` parts of whole groups; the sharing loss compares the groups within a part."""
        self.step_began = time.perf_counter()
        size = self.config.group_size
        parts = np.array_split(range(len(batch) // size), self.config.grad_accumulation)  # numbers of groups
        return [batch.select(slice(part[0] * size, (part[-1] + 1) * size)) for part in parts]

    def loss(self, micro_batch: GridSamples) -> StepResult:
        """The weighted sum of all terms; "correct" are solved grids."""
        batch = micro_batch.to(self.learner.device)
        with self.learner.autocast():
            output = self.model(batch.input, batch.program)
        share = len(batch) / self.config.batch_size
        loss = TASK_LOSSES[self.config.task_loss](output.logits.float(), batch.target)
        self._add("prediction", loss.item(), share)
        for weight, name, term in self._regularisers(output, batch, share):
            self._add(name, term.item(), share)
            loss = loss + weight * term
        solved = (output.logits.detach().argmax(dim=1) == batch.target).flatten(1).all(dim=1).sum()
        return StepResult(loss, len(batch), solved)

    def _regularisers(
        self, output: GridOutput, batch: GridSamples, share: float
    ) -> list[tuple[float, str, Tensor]]:
        """The other terms of the loss: (weight, name, term); the autoencoder's also with weight 0."""
        alpha, beta, gamma = self.term_weights().values()
        found = []
        if alpha:
            sharing = self.sharing(output.hidden.float(), batch.primitives)
            self.sharing.update(sharing)
            self._add("fallbacks", sharing.fallbacks)
            found.append((alpha, "sharing", sharing.loss))
        if output.latents is not None:
            vectors = (output.hidden, output.latents, output.reconstruction)
            sparse = sparse_terms(*(tensor.float() for tensor in vectors))
            if beta:  # otherwise no weight of L1 changes the fraction
                self.active_fractions.append(share * sparse["active_fraction"].item())
            for name in ("active_fraction", "dead_fraction", "explained"):
                self._add(name, sparse[name].item(), share)
            found.append((beta, "reconstruction", sparse["reconstruction"]))
            found.append((beta * self.model.autoencoder.l1_weight.item(), "l1", sparse["l1"]))
        if gamma:
            logits, labels = output.primitive_logits.float(), batch.primitives.float()
            found.append((gamma, "auxiliary", F.binary_cross_entropy_with_logits(logits, labels)))
        return found

    def term_weights(self) -> dict[str, float]:
        """alpha, beta and gamma at the coming step: linear between points, constant beyond them."""
        done = self.learner.progress.steps / (self.config.epochs * self.config.steps_per_epoch)
        weights = {}
        for name in ("alpha", "beta", "gamma"):
            shares, values = zip(*getattr(self.config, name), strict=True)
            weights[name] = float(np.interp(done, shares, values))
        return weights

    def before_step(self, step: int) -> None:
        """Clip the gradient's norm."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._add("gradient", norm.item())

    def after_step(self, step: int, moved: Mapping[str, bool]) -> None:
        """Update the weight of L1 once per step with a positive beta, however many micro-batches it had."""
        if self.active_fractions:
            self.model.autoencoder.update_l1_weight(sum(self.active_fractions))
            self.active_fractions = []
        self._add("step_seconds", time.perf_counter() - self.step_began)

    def after_epoch(self, loss: float, steps: int) -> EpochNote:
        """Validate, keep the best weights, and report the epoch's mean terms."""
        learner, state = self.learner, self.learner.method_state
        sums, state["sums"] = state["sums"], {}
        seconds = {name: sums.pop(f"{name}_seconds")[0] for name in ("step", "data")}
        fallbacks = int(sums.pop("fallbacks", [0])[0])
        means = {name: value / share for name, (value, share) in sums.items()}
        validation = learner.evaluator.accuracy(learner.validation)
        is_best = state["best_iou"] is None or validation["iou"] > state["best_iou"]
        if is_best:
            state["best_iou"] = validation["iou"]
            learner.method_tensors = copy.deepcopy(self.model.state_dict())
        numbers = means | {f"validation_{name}": value for name, value in validation.items()}
        numbers |= self.term_weights() | {"fallbacks": fallbacks, "seconds": seconds}
        shown = [f"{name} {means[name]:.3f}" for name in SHOWN if name in means]
        shown.append(f"validation IoU {validation['iou']:.2f}{' (best)' if is_best else ''}")
        milliseconds = {name: 1000 * value / steps for name, value in seconds.items()}
        shown.append(f"{milliseconds['step']:.0f} ms per step, {milliseconds['data']:.1f} of data")
        if fallbacks:
            shown.append(f"{counted(fallbacks, 'group')} by random projection")
        return EpochNote(f" ({', '.join(shown)})", numbers)

    def _add(self, name: str, value: float, share: float = 1.0) -> None:
        """Add a value of a step, or of a share of its samples, to the epoch's sum; shares are summed too."""
        total, shares = self.learner.method_state["sums"].get(name, (0.0, 0.0))
        self.learner.method_state["sums"][name] = [total + share * value, shares + share]
