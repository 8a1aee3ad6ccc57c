"""CODA-Prompt: prefixes of keys and values, composed per image from prompt components by attention.

    python main.py --config exps/methods/coda_prompt_cifar.json

The query q is the class token of the frozen ViT. In every prompted block p = sum_m cos(q * A_m, K_m) P_m is
prepended to keys and values. A task adds components, which learn with the task's classifier rows by
cross-entropy over its classes and `ortho_mu` times a penalty that keeps all components near orthonormal;
those of earlier tasks are frozen. Queries of views that are used again, and of evaluated images, are stored.
Source: Smith et al., *CODA-Prompt*, CVPR 2023. Published code takes the mean of the penalty's squares, and
its scripts have `ortho_mu` 0.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbone.frozen_vit import FrozenViT
from backbone.prompts import PromptedViT
from models.config.coda_prompt import CODAPromptConfig
from models.vit.activations import ActivationStore
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.task_inputs import Batch, Source, TaskInputs
from models.vit.training import FunctionalPhase
from utils.inc_net import IncrementalHead
from utils.training.device import autocast
from utils.training.phase import StepResult
from utils.training.random import Key

# A batch, and the queries (B, d) of its images where they are stored.
QueriedBatch = tuple[Batch, Tensor | None]


class QueryStore(ActivationStore):
    """Activations with the queries of their images beside them, in `queries`.

    Queries depend on no prompt: runs with these weights and views share their files.
    """

    def __init__(self, network: PromptedViT, *args: Any) -> None:
        super().__init__(network, *args)
        self.plain = ActivationStore(FrozenViT(network.vit), *args)
        self.keeps_queries = True

    def at(
        self, depth: int, classes: range, source: str, view: Key | None, label: str = "", **options: Any
    ) -> Source:
        opened = super().at(depth, classes, source, view, label=label, **options)
        if not self.keeps_queries:
            return opened
        title, chosen = f"{label}, queries", options.get("chosen")
        opened.queries = self.plain.at(self.network.depth, classes, source, view, label=title, chosen=chosen)
        return opened


class QueriedInputs(TaskInputs):
    """`TaskInputs` that computes features with stored queries, where there are any."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.store.keeps_queries = self.fast

    @torch.no_grad()
    def batch_features(self, x: Tensor, below: Source, indices: np.ndarray) -> Tensor:
        device = self.context.device
        query = None if below.queries is None else below.queries.take(indices).to(device)
        with autocast(device, self.context.precision):
            return self.network(x.to(device), below.depth, query=query).float().cpu()


class CODAPrompt(ClassIncrementalLearner):
    """Prefixes of keys and values, composed per image from prompt components by attention."""

    Config = CODAPromptConfig
    Store, Inputs = QueryStore, QueriedInputs
    config: CODAPromptConfig

    def build(self, vit: nn.Module) -> nn.ModuleDict:
        network = PromptedViT(vit, self.config.prompt_blocks, self.config.prompt_length)
        return nn.ModuleDict({"backbone": network, "head": IncrementalHead(vit.num_features)})

    @property
    def adapters_of_first_task(self) -> int:
        return self.config.prompt_components

    def open_task(self) -> None:
        super().open_task()
        self.network.grow(self.config.prompt_components)

    def learn_task(self) -> None:
        self.once("functional", lambda: self.run_phase(PromptPhase(self)))
        self.once("freeze", self.network.freeze)
        self.inputs.store.drop_own("train")


class PromptPhase(FunctionalPhase):
    """`FunctionalPhase` with the penalty on prompts, and stored queries where views are used again."""

    def batches(self, epoch: int, start: int) -> Iterator[QueriedBatch]:
        learner, source, size = self.learner, self.source_of_epoch(epoch), self.config.batch_size
        order = learner.data.order(learner.classes, "train", (*self.key, epoch))
        for number, batch in enumerate(super().batches(epoch, start), start):
            group = order[number * size : (number + 1) * size]
            mine = group[learner.distributed.shard(len(group))]
            yield batch, source.queries.take(mine) if source.queries else None

    def micro_batches(self, batch: QueriedBatch) -> list[QueriedBatch]:
        inputs, queries = batch
        parts = inputs.micro_batches(self.config.grad_accumulation)
        if queries is None:
            return [(part, None) for part in parts]
        return list(zip(parts, queries.split([len(part.targets) for part in parts]), strict=True))

    def loss(self, batch: QueriedBatch) -> StepResult:
        inputs, query = batch
        query = None if query is None else query.to(self.learner.device)
        result = super().loss(inputs, query=query)
        penalty = self.learner.network.penalty(self.config.ortho_reduction)
        result.loss = result.loss + self.config.ortho_mu * penalty
        return result
