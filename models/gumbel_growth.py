"""Conditional growth of Gumbel CL-LoRA: which adapters are kept, with its log lines, files and figures.

    decision = decide(task=3, adapters=[0, 1, 3], beta=beta, config=config)   # beta: (K,) or (L, K)
    decision.kept                              # positions of the adapters that stay, such as [0, 2]
    decision.write(folder)                     # beta_values_task_3.pt and beta_values_task_3.json
    gate_figures(events, about)                # of the run's `gate` events

Files and `gate` events hold, for every task so far: `beta_values` (t + 1,), zero where an adapter was pruned
earlier; `pruning_mask` (t + 1,), true where an adapter is kept; with a gate per layer also
`beta_values_by_layer` (L, t + 1).
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from models.config.sdlora import GateKeys
from utils.analysis.figures import Heatmap, HeatmapSpec, heatmaps_figure
from utils.files import replace_file, write_json
from utils.plotting import MAX_NUMBERED_TASKS, VERMILLION, task_axis, titled_figure

UNIFORM_TOLERANCE = 0.1  # weights that all lie within this share of 1 / K around it count as uniform
FEW_SHARE = 1 / 3  # of the adapters of all tasks: as many kept or fewer count as few
COOLED_FACTOR = 1.5  # a task should end at a temperature of at most this many times the final one
Event = Mapping[str, Any]
CAPTIONS = {
    "beta_evolution.png": "Weight that the gate gives the adapter of each task (x), a line after every task; "
    "crosses: pruned.",
    "beta_heatmap.png": "The same as a map: adapters in columns, tasks in rows.",
    "beta_layers.png": "Weight of every adapter in each layer after the last task.",
}


@dataclass(frozen=True)
class GateDecision:
    """Weights of the adapters at the end of a task, and which of them stay.

    Attributes:
        task: the task that ended.
        adapters: the task that grew each of the K adapters; the last is `task`.
        beta: weights in evaluation, (K,) or one row per layer, (L, K).
        kept: positions among the K adapters that stay, ascending.
    """

    task: int
    adapters: list[int]
    beta: Tensor
    kept: list[int]

    @property
    def mean_beta(self) -> list[float]:
        """Weight of each adapter, averaged over layers."""
        return torch.atleast_2d(self.beta).mean(dim=0).tolist()

    def record(self) -> dict[str, Tensor]:
        """The tensors of its files and of its event, by name."""
        mask = torch.zeros(self.task + 1, dtype=torch.bool)
        mask[[self.adapters[k] for k in self.kept]] = True
        tensors = {"beta_values": self._by_task(torch.tensor(self.mean_beta)), "pruning_mask": mask}
        by_layer = {"beta_values_by_layer": self._by_task(self.beta)} if self.beta.dim() == 2 else {}
        return tensors | by_layer

    def write(self, folder: Path) -> None:
        """Write `beta_values_task_{t}.pt` (for `weights_only=True`) and the same as JSON, atomically."""
        tensors, buffer, name = self.record(), io.BytesIO(), f"beta_values_task_{self.task}"
        torch.save(tensors, buffer)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{name}.pt", buffer.getvalue())
        values = {name: tensor.tolist() for name, tensor in tensors.items()}
        write_json(folder / f"{name}.json", {"task": self.task, **values})

    def lines(self, config: GateKeys) -> list[str]:
        """The decision as lines for the log."""
        beta, total, k, limit = self.mean_beta, self.task + 1, config.growth_top_k, config.growth_threshold
        if config.growth == "top_k":
            rule, above, below = f"top_k: {k}", f"among the {k} greatest", f"not among the {k} greatest"
        else:
            rule, above, below = f"threshold: {limit:.4f}", f"> {limit:.4f}", f"<= {limit:.4f}"
        values = " ".join(f"{value:.2f}" for value in self.record()["beta_values"].tolist())
        lines = [f"Task {self.task} - Beta values: [{values}]", f"Current task beta: {beta[-1]:.4f}, {rule}"]
        for position, task in enumerate(self.adapters):
            if position not in self.kept:
                lines.append(f"✗ Pruning adapter for task {task} (beta={beta[position]:.4f} {below})")
        if len(self.adapters) - 1 in self.kept:
            lines.append(f"✓ Keeping adapter for task {self.task} (beta={beta[-1]:.4f} {above})")
        lines.append(f"Active adapters: {len(self.kept)}/{total} ({100 * len(self.kept) / total:.1f}%)")
        return [f"[Conditional Growth] {line}" for line in lines]

    def warnings(self, config: GateKeys, tau: float, steps: int) -> list[str]:
        """Signs that a setting of the gate has no effect or too much of it, each with the key to change.

        Args:
            tau: the temperature at the end of the task.
            steps: optimizer steps of the task.
        """
        found, adapters, total = [], len(self.adapters), self.task + 1
        final, rate = config.gumbel_tau_final, config.gumbel_anneal_rate
        if adapters > 1 and max(abs(adapters * beta - 1) for beta in self.mean_beta) < UNIFORM_TOLERANCE:
            found.append(
                f"beta values are almost uniform: increase lambda_sparsity (now {config.lambda_sparsity:g})"
            )
        if config.growth == "threshold" and total > 2 and len(self.kept) <= FEW_SHARE * total:
            first_only = "all adapters but the first were pruned"
            what = first_only if len(self.kept) == 1 else f"only {len(self.kept)} of {total} are kept"
            found.append(f"{what}: lower growth_threshold (now {config.growth_threshold:g})")
        if adapters > 1 and steps and tau > COOLED_FACTOR * final:
            faster = math.floor(1e4 * (final / config.gumbel_tau_init) ** (1 / steps)) / 1e4
            found.append(
                f"tau = {tau:.3f} at the end of task {self.task}, which should be near {final:g}: lower "
                f"gumbel_anneal_rate (now {rate:g}; {faster:g} gets there in the task's {steps} steps) "
                f"or gumbel_tau_init (now {config.gumbel_tau_init:g})"
            )
        return [f"[Gumbel CL-LoRA] {line}" for line in found]

    def _by_task(self, values: Tensor) -> Tensor:
        """Values of adapters (..., K) at the positions of their tasks (..., t + 1); zero elsewhere."""
        spread = values.new_zeros(*values.shape[:-1], self.task + 1)
        spread[..., self.adapters] = values
        return spread


def decide(task: int, adapters: Sequence[int], beta: Tensor, config: GateKeys) -> GateDecision:
    """The decision at the end of a task.

    "threshold": the task's own adapter stays iff its weight exceeds `growth_threshold`; earlier ones stay.
    "top_k": the `growth_top_k` adapters of greatest weight stay; of equal ones the older.
    """
    every = list(range(len(adapters)))
    decision = GateDecision(task, list(adapters), beta, kept=every)
    weights = decision.mean_beta
    if config.growth == "top_k":
        return replace(decision, kept=sorted(sorted(every, key=lambda k: -weights[k])[: config.growth_top_k]))
    return decision if weights[-1] > config.growth_threshold else replace(decision, kept=every[:-1])


def not_finite_advice(config: GateKeys, tau: float) -> str:
    """The keys to change when gradients are not finite."""
    return (
        f"[Gumbel CL-LoRA] gradients are not finite at tau = {tau:.3f}: "
        f"reduce lambda_sparsity (now {config.lambda_sparsity:g}), "
        f"let tau fall more slowly with a gumbel_anneal_rate nearer to 1 (now {config.gumbel_anneal_rate:g}) "
        f"or a higher gumbel_tau_final (now {config.gumbel_tau_final:g})"
    )


def active_adapters_table(masks: Mapping[int, Sequence[bool]]) -> str:
    """A table with one line per task from 1 on: adapters kept at its end, pruned so far, share of kept ones.

    Args:
        masks: the `pruning_mask` of each task.
    """
    lines = ["Task | Active Adapters | Pruned | Percentage", "-" * 50]
    for task, mask in sorted(masks.items()):
        if task:
            active, total = sum(mask), len(mask)
            lines.append(f"{task:4d} | {active:15d} | {total - active:6d} | {100 * active / total:5.1f}%")
    return "\n".join(lines)


# --- figures ------------------------------------------------------------------------------------------------


def gate_figures(events: Sequence[Event], about: str) -> dict[str, Figure]:
    """Figures of a run's `gate` events, by file name; none without such events. `about` is the subtitle."""
    gates = [event for event in events if event["event"] == "gate"]
    if not gates:
        return {}
    figures = {
        "beta_evolution.png": beta_evolution_figure(gates, about),
        "beta_heatmap.png": beta_heatmap_figure(gates, about),
    }
    if "beta_values_by_layer" in gates[-1]:
        figures["beta_layers.png"] = beta_layers_figure(gates, about)
    return figures


def beta_evolution_figure(events: Sequence[Event], subtitle: str) -> Figure:
    """Weights after each task (one line each) over the tasks that grew the adapters, pruned ones crossed."""
    tasks = 1 + max(event["task"] for event in events)
    height = max(4.4, 1.3 + 0.22 * min(tasks, MAX_NUMBERED_TASKS))
    figure = titled_figure(8.4, height, "Beta Evolution During Continual Learning", subtitle)
    axes = figure.subplots()
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.92, tasks))
    crosses = {"color": VERMILLION, "marker": "x", "ms": 7, "mew": 1.8, "ls": "none"}
    pruned, handles = pruned_adapters(events), []
    for event in events:
        beta, gone = event["beta_values"], pruned[event["task"]]
        style = {"color": colours[event["task"]], "marker": "o", "ms": 4, "lw": 1.4}
        axes.plot(range(len(beta)), beta, **style)
        axes.plot(gone, [beta[k] for k in gone], zorder=5, **crosses)
        handles.append(Line2D([], [], label=f"After Task {event['task']}", **style))
    if len(handles) > MAX_NUMBERED_TASKS:
        handles = handles[:: math.ceil(len(handles) / 20)]
    if any(pruned.values()):
        handles.append(Line2D([], [], label="pruned", **crosses))
    axes.set_ylim(-0.03, 1.06)
    task_axis(axes, tasks, label="Task Index")
    axes.set_ylabel("Beta Value")
    axes.grid(True)
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def beta_heatmap_figure(events: Sequence[Event], subtitle: str) -> Figure:
    """Weight of each adapter (column) after each task (row), crossed out if pruned then, empty if earlier."""
    tasks = 1 + max(event["task"] for event in events)
    beta, pruned = np.full((tasks, tasks), np.nan), pruned_adapters(events)
    for event in events:
        t = event["task"]
        present = np.array(event["pruning_mask"])
        present[pruned[t]] = True
        beta[t, : t + 1] = np.where(present, event["beta_values"], np.nan)
    cells = [(t, k) for t, gone in pruned.items() for k in gone]
    return _heatmap(beta, cells, "Weight of each task's adapter after each task", subtitle, "after task")


def beta_layers_figure(events: Sequence[Event], subtitle: str) -> Figure:
    """Weight of each adapter (column) in each layer (row) after the last task, crossed out if pruned then."""
    last = events[-1]
    beta = np.array(last["beta_values_by_layer"])  # (layers, tasks)
    cells = [(layer, k) for k in pruned_adapters(events)[last["task"]] for layer in range(len(beta))]
    title = f"Weight of each task's adapter in each layer after task {last['task']}"
    return _heatmap(beta, cells, title, subtitle, "layer")


def pruned_adapters(events: Sequence[Event]) -> dict[int, list[int]]:
    """For each task, the adapters pruned at its end, named by the tasks that grew them."""
    pruned, before = {}, []
    for event in events:
        kept = event["pruning_mask"]
        pruned[event["task"]] = [k for k, was in enumerate([*before, True]) if was and not kept[k]]
        before = kept
    return pruned


def _heatmap(
    beta: np.ndarray, crossed_out: Sequence[tuple[int, int]], title: str, subtitle: str, rows: str
) -> Figure:
    """Heat map of weights (rows, tasks); NaN stays empty, cells (row, task) may be crossed out."""
    spec = HeatmapSpec(rows, "adapter of task", "beta", (0.0, 1.0), colours="Blues")
    figure = heatmaps_figure([Heatmap("", beta)], spec, title, subtitle)
    for row, task in crossed_out:
        corners = [task - 0.42, task + 0.42], [row + 0.42, row - 0.42]
        figure.axes[0].plot(*corners, color=VERMILLION, lw=1.6)
    return figure
