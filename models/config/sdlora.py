"""Config of SD-LoRA and, with a gate over its adapters, of Gumbel CL-LoRA (`models/sdlora.py`)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from models.vit.backbones import BackboneShape
from models.vit.config import ClassIncrementalConfig, RowsRules, StepKeys
from utils.config.schema import Conflict, Count, CountOrZero, PathText, Rate, RateOrZero, UnusedRule, key

GATE_KEYS = (
    "gumbel_tau_init", "gumbel_tau_final", "gumbel_anneal_rate", "growth", "growth_threshold", "growth_top_k",
    "filepath",
)  # fmt: skip
STEPLR_KEYS = ("init_milestones", "init_lr_decay", "milestones", "lrate_decay")
FIRST_TASK_KEYS = ("init_lr", "init_milestones", "init_lr_decay", "init_weight_decay")
LATER_TASK_KEYS = ("lrate", "milestones", "lrate_decay", "weight_decay")
TRAINING_KEYS = ("optimizer", "scheduler", "min_lr", "batch_size", "grad_accumulation", "augmentation")


class GateKeys(StepKeys):
    """The gate over the adapters, and the rule of conditional growth."""

    editable_keys: ClassVar[frozenset[str]] = ClassIncrementalConfig.editable_keys | {"filepath"}

    gumbel_gate: Literal["auto", "off", "global", "layer"] = key(
        "auto", 'One gate, or one per layer; "auto" is "global" where lambda_sparsity > 0, else "off".'
    )
    lambda_sparsity: RateOrZero = key(0.0, "Weight of the gate's entropy in the loss.")
    gumbel_tau_init: float = key(5.0, "Temperature of the gate at the start of every task.", ge=1e-6, le=1e6)
    gumbel_tau_final: float = key(0.5, "Lowest temperature, also used in evaluation.", ge=1e-6, le=1e6)
    gumbel_anneal_rate: float = key(0.999, "Factor on the temperature after every step.", gt=0, le=1)
    growth: Literal["threshold", "top_k"] = key(
        "threshold", "Kept after a task: its adapter if its weight exceeds a threshold, or the k best of all."
    )
    growth_threshold: float = key(0.1, "Weight above which a task's adapter is kept.", ge=0, lt=1)
    growth_top_k: Count = key(5, 'Adapters that "top_k" keeps.')
    filepath: PathText | None = key(None, "Folder for a second copy of the files in the run folder's gate/.")

    @property
    def gate(self) -> str:
        """Kind of gate that `gumbel_gate` resolves to: "off", "global" or "layer"."""
        if self.gumbel_gate != "auto":
            return self.gumbel_gate
        return "global" if self.lambda_sparsity > 0 else "off"

    def conflicts(self) -> Iterator[Conflict]:
        """Temperatures out of order, a folder that cannot be written."""
        yield from super().conflicts()
        if self.gumbel_tau_init < self.gumbel_tau_final:
            sentence = "the temperature only falls; allowed: gumbel_tau_init >= gumbel_tau_final"
            yield ("gumbel_tau_init", "gumbel_tau_final"), sentence
        if self.filepath is not None:
            place = Path(self.filepath).absolute()
            there = next(path for path in (place, *place.parents) if os.path.exists(path))
            if not os.path.isdir(there) or not os.access(there, os.W_OK):
                fault = f"{there} is no folder that can be written to"
                yield ("filepath",), f"{fault}; allowed: a folder, which is made where there is none"

    def unused_rules(self) -> list[UnusedRule]:
        growth, at_rest = f'growth is "{self.growth}"', self.gumbel_tau_init == self.gumbel_tau_final
        return [
            (self.gumbel_gate == "off", 'gumbel_gate is "off"', ("lambda_sparsity", *GATE_KEYS)),
            (self.gate == "off", "no gate where lambda_sparsity is 0", GATE_KEYS),
            (self.growth == "top_k", growth, ("growth_threshold",)),
            (self.growth == "threshold", growth, ("growth_top_k",)),
            (at_rest, "gumbel_tau_init is gumbel_tau_final", ("gumbel_anneal_rate",)),
            *super().unused_rules(),
        ]

    def warnings(self, nb_seeds: int = 1) -> Iterator[str]:
        """A folder that several seeds write to."""
        yield from super().warnings(nb_seeds)
        if self.gate != "off" and self.filepath is not None and nb_seeds > 1:
            own = "each seed's own are in its run folder's gate/"
            yield f"filepath = {self.filepath} will hold the gate's files of the last seed; {own}"


def _ascending(pairs: list[list[int]]) -> list[list[int]]:
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("holds an item that is no [task, rank]")
    tasks = [task for task, _ in pairs]
    if tasks != sorted(set(tasks)):
        raise ValueError("tasks are not in ascending order")
    return pairs


RankSchedule = Annotated[list[list[Count]], AfterValidator(_ascending)]


class SDLoRAConfig(RowsRules, GateKeys):
    """Config of SD-LoRA, and with a gate of Gumbel CL-LoRA.

    `init_*` keys are for the first task, their counterparts for later tasks, as in the published files.
    """

    legacy_keys: ClassVar[dict[str, str]] = ClassIncrementalConfig.legacy_keys | {
        "tuned_epoch": "a schedule spans the epochs of its task",
    }

    known_as: ClassVar[dict[str, str]] = ClassIncrementalConfig.known_as | {
        "gumbel_cl_lora": "lambda_sparsity=0.01"
    }
    engine: ClassVar[str] = "fast"  # no keys: every block learns
    cache_views: ClassVar[int] = 0

    model_name: Literal["sdlora"] = key(
        "sdlora", "SD-LoRA: directions and magnitudes of LoRA adapters; with a gate over them Gumbel CL-LoRA."
    )

    init_epoch: CountOrZero = key(20, "Epochs of the first task.")
    init_lr: Rate = key(0.008, "Learning rate of the first task.")
    init_milestones: list[Count] = key([], 'Epochs after which "steplr" lowers the first task\'s rate.')
    init_lr_decay: float = key(0.1, "Factor on the rate at each of init_milestones.", ge=0, le=1)
    init_weight_decay: RateOrZero = key(0.0, "Weight decay of the first task.")
    epochs: CountOrZero = key(20, "Epochs of every later task.")
    lrate: Rate = key(0.008, "Learning rate of later tasks.")
    milestones: list[Count] = key([], 'Epochs after which "steplr" lowers a later task\'s rate.')
    lrate_decay: float = key(0.1, "Factor on the rate at each of milestones.", ge=0, le=1)
    weight_decay: RateOrZero = key(0.0, "Weight decay of later tasks.")
    scheduler: Literal["cosine", "steplr", "constant"] = key(
        "cosine", "Schedule of learning rates, by epoch."
    )
    min_lr: RateOrZero = key(0.0, 'Where "cosine" ends.')

    lora_rank: int = key(10, "Rank of an adapter; 10 as published.", ge=1, le=4096)
    lora_rank_schedule: RankSchedule = key(
        [],
        "[[task, rank], ...]: from this task on (counted from 0) adapters have this rank; SD-LoRA-RR.",
        "a list of [task, rank], such as [[4, 8], [8, 6]], from task 1 on, ascending",
    )
    sdlora_scaling: Literal["carry", "reset"] = key(
        "carry", 'Earlier adapters at a new task: unchanged, or "reset" to equal magnitudes, as published.'
    )
    classifier_init: Literal["auto", "torch_default", "kaiming_linear"] = key(
        "auto",
        'How new classifier rows of d weights are drawn: uniformly up to 1 / sqrt(d) ("torch_default") or '
        'sqrt(3 / d) ("kaiming_linear", as published); "auto" is the latter where sdlora_scaling is "reset".',
    )

    @property
    def row_init(self) -> str:
        """Initialisation of classifier rows by `classifier_init`: "torch_default" or "kaiming_linear"."""
        if self.classifier_init != "auto":
            return self.classifier_init
        return "kaiming_linear" if self.sdlora_scaling == "reset" else "torch_default"

    def epochs_of(self, task: int) -> int:
        """Epochs of a task."""
        return self.epochs if task else self.init_epoch

    def rank_of(self, task: int) -> int:
        """Rank of the adapter that a task adds."""
        return next(
            (rank for first, rank in reversed(self.lora_rank_schedule) if task >= first), self.lora_rank
        )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from self.min_lr_conflicts(("init_lr", "lrate"))

    def shape_conflicts(self, shape: BackboneShape) -> Iterator[Conflict]:
        yield from super().shape_conflicts(shape)
        yield from shape.rank_conflicts("lora_rank", self.lora_rank)
        scheduled = max((rank for _, rank in self.lora_rank_schedule), default=1)
        yield from shape.rank_conflicts("lora_rank_schedule", scheduled)

    def unused_rules(self) -> list[UnusedRule]:
        scheduler = f'scheduler is "{self.scheduler}"'
        return [
            (self.scheduler != "steplr", scheduler, STEPLR_KEYS),
            (self.scheduler != "cosine", scheduler, ("min_lr",)),
            (not self.init_milestones, "no init_milestones", ("init_lr_decay",)),
            (not self.milestones, "no milestones", ("lrate_decay",)),
            (
                min(self.init_milestones, default=0) >= self.init_epoch,
                f"init_epoch is {self.init_epoch}",
                STEPLR_KEYS[:2],
            ),
            (min(self.milestones, default=0) >= self.epochs, f"epochs is {self.epochs}", STEPLR_KEYS[2:]),
            (self.init_epoch == 0, "init_epoch is 0", FIRST_TASK_KEYS),
            (self.epochs == 0, "epochs is 0", LATER_TASK_KEYS),
            (self.init_epoch == self.epochs == 0, "no epoch trains anything", TRAINING_KEYS),
            *super().unused_rules(),
        ]

    def warnings(self, nb_seeds: int = 1) -> Iterator[str]:
        """An optimizer that the published code does not use."""
        yield from super().warnings(nb_seeds)
        if self.optimizer == "adam":
            yield (
                'optimizer = "adam" is honoured as AdamW; published SD-LoRA files name it, and the published '
                'code trains with SGD whatever they say: use "sgd" to compare with it'
            )
