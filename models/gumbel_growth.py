"""Conditional growth: which adapters stay when a task ends, what is written about it, and what the gate's weights tell.

    gate = GateState(task=3, adapters=[0, 1, 3], beta=beta)       # beta: (K,) or (L, K), weights in evaluation
    kept = kept_adapters(gate, config)                            # positions among the adapters
    record = GateRecord.of(gate, kept)
    record.write(folder)                                          # beta_values_task_3.pt and .json
    for line in growth_lines(gate, kept, config): ...

A gate's files hold, for every task so far, `beta_values` (t + 1,), zero where an adapter was pruned earlier, and
`pruning_mask` (t + 1,), true where an adapter is kept; of a gate in every layer also `beta_values_by_layer` (L, t + 1).
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.sdlora_config import SDLoRAConfig
from utils.files import replace_file

UNIFORM = 0.1  # weights that all lie closer to 1 / K than this part of it are called uniform
FEW = 1 / 3  # adapters that are kept, of all tasks: fewer or as many are called few
COOLED = 1.5  # times the final temperature: what a task should at least have come down to


@dataclass(frozen=True)
class GateState:
    """A gate as a task leaves it, before anything is pruned.

    Attributes:
        task: the task.
        adapters: for each of the K adapters, the task that grew it; the last is this task's own.
        beta: weights in evaluation, (K,) or a row a layer (L, K).
    """

    task: int
    adapters: list[int]
    beta: Tensor

    @property
    def mean(self) -> list[float]:
        """The weight of each adapter, averaged over layers."""
        return (self.beta.mean(dim=0) if self.beta.dim() == 2 else self.beta).tolist()

    def over_tasks(self, values: Tensor) -> Tensor:
        """Values of adapters (..., K) at their tasks' places, (..., t + 1), zero where a task has none left."""
        spread = values.new_zeros(*values.shape[:-1], self.task + 1)
        spread[..., self.adapters] = values
        return spread


def kept_adapters(gate: GateState, config: SDLoRAConfig) -> list[int]:
    """Positions of the adapters that stay.

    "threshold": this task's adapter goes unless its weight exceeds `growth_threshold`.
    "top_k": the `growth_top_k` of greatest weight; of equal ones the older.
    """
    every = list(range(len(gate.adapters)))
    if config.growth == "top_k":
        return sorted(sorted(every, key=lambda k: -gate.mean[k])[: config.growth_top_k])
    return every if gate.mean[-1] > config.growth_threshold else every[:-1]


def growth_lines(gate: GateState, kept: Sequence[int], config: SDLoRAConfig) -> list[str]:
    """What the log says of a decision."""
    own, top = gate.mean[-1], config.growth == "top_k"
    spread = gate.over_tasks(torch.tensor(gate.mean)).tolist()
    rule = f"top_k: {config.growth_top_k}" if top else f"threshold: {config.growth_threshold:.4f}"
    reason = f"among the {config.growth_top_k} greatest" if top else f"> {config.growth_threshold:.4f}"
    pruned = f"not {reason}" if top else f"<= {config.growth_threshold:.4f}"
    lines = [
        f"Task {gate.task} - Beta values: [{' '.join(f'{value:.2f}' for value in spread)}]",
        f"Current task beta: {own:.4f}, {rule}",
    ]
    for k, task in enumerate(gate.adapters):
        if k not in kept:
            lines.append(f"✗ Pruning adapter for task {task} (beta={gate.mean[k]:.4f} {pruned})")
    if len(gate.adapters) - 1 in kept:
        lines.append(f"✓ Keeping adapter for task {gate.task} (beta={own:.4f} {reason})")
    total = gate.task + 1
    lines.append(f"Active adapters: {len(kept)}/{total} ({100 * len(kept) / total:.1f}%)")
    return [f"[Conditional Growth] {line}" for line in lines]


def symptoms(gate: GateState, kept: Sequence[int], config: SDLoRAConfig, tau: float, steps: int) -> list[str]:
    """Signs that a setting of the gate does not do what it is there for, each with the key to change.

    Args:
        tau: the temperature at the end of the task.
        steps: optimizer steps of the task.
    """
    found, adapters, total = [], len(gate.adapters), gate.task + 1
    if adapters > 1 and max(abs(adapters * beta - 1) for beta in gate.mean) < UNIFORM:
        found.append(
            f"beta values are almost uniform: increase lambda_sparsity (now {config.lambda_sparsity:g})"
        )
    if config.growth == "threshold" and total > 2 and len(kept) <= FEW * total:
        what = (
            "all adapters but the first were pruned"
            if len(kept) == 1
            else f"only {len(kept)} of {total} are kept"
        )
        found.append(f"{what}: lower growth_threshold (now {config.growth_threshold:g})")
    if adapters > 1 and steps and tau > COOLED * config.gumbel_tau_final:
        rate = math.floor(1e4 * (config.gumbel_tau_final / config.gumbel_tau_init) ** (1 / steps)) / 1e4
        found.append(
            f"tau = {tau:.3f} at the end of task {gate.task}, which should be near {config.gumbel_tau_final:g}: lower "
            f"gumbel_anneal_rate (now {config.gumbel_anneal_rate:g}; {rate:g} gets there in the task's {steps} steps) "
            f"or gumbel_tau_init (now {config.gumbel_tau_init:g})"
        )
    return [f"[Gumbel CL-LoRA] {line}" for line in found]


def not_finite_advice(config: SDLoRAConfig, tau: float) -> str:
    """What to look at first where gradients are not finite."""
    return (
        f"[Gumbel CL-LoRA] gradients are not finite at tau = {tau:.3f}: reduce lambda_sparsity (now "
        f"{config.lambda_sparsity:g}), or let tau fall more slowly with a gumbel_anneal_rate nearer to 1 (now "
        f"{config.gumbel_anneal_rate:g}) or a higher gumbel_tau_final (now {config.gumbel_tau_final:g})"
    )


@dataclass(frozen=True)
class GateRecord:
    """A gate's weights and decisions over all tasks so far; see the head of this file for what is in its files."""

    task: int
    beta: Tensor
    mask: Tensor
    by_layer: Tensor | None

    @classmethod
    def of(cls, gate: GateState, kept: Sequence[int]) -> "GateRecord":
        mask = torch.zeros(gate.task + 1, dtype=torch.bool)
        mask[[gate.adapters[k] for k in kept]] = True
        by_layer = gate.over_tasks(gate.beta) if gate.beta.dim() == 2 else None
        return cls(gate.task, gate.over_tasks(torch.tensor(gate.mean)), mask, by_layer)

    def numbers(self) -> dict[str, Any]:
        """The record as plain lists, under the names of its files."""
        plain = {"beta_values": self.beta.tolist(), "pruning_mask": self.mask.tolist()}
        return plain if self.by_layer is None else plain | {"beta_values_by_layer": self.by_layer.tolist()}

    def write(self, folder: Path) -> None:
        """Write `beta_values_task_{t}.pt`, which loads with `weights_only=True`, and the same as .json; each whole."""
        tensors = {"beta_values": self.beta, "pruning_mask": self.mask}
        if self.by_layer is not None:
            tensors["beta_values_by_layer"] = self.by_layer
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        text = json.dumps({"task": self.task, **self.numbers()}, indent=1) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("pt", buffer.getvalue()), ("json", text.encode())):
            replace_file(folder / f"beta_values_task_{self.task}.{suffix}", content)
