"""Config of SEMA and of Nested LoRA on it (`models/sema.py`)."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from models.vit.config import SCHEDULER, AdapterKeys, HeadKeys, TrainingKeys
from utils.config.schema import Conflict, CountOrZero, Rate, UnusedRule, key


class SEMAConfig(AdapterKeys, HeadKeys, TrainingKeys):
    """Config of SEMA and of Nested LoRA on it; defaults are the published values, or the specification's."""

    legacy_keys: ClassVar[dict[str, str]] = TrainingKeys.legacy_keys | {
        **SCHEDULER,
        "init_epoch": "func_epoch and rd_epoch say how long",
        "epochs": "func_epoch and rd_epoch say how long",
        "tuned_epoch": "func_epoch and rd_epoch say how long",
        "init_lr_decay": "the schedule is a cosine",
        "init_milestones": "the schedule is a cosine",
        "lrate": "init_lr and rd_lr are the learning rates",
        "lrate_decay": "the schedule is a cosine",
        "milestones": "the schedule is a cosine",
        "init_weight_decay": "weight_decay is used in every task",
        "ffn_adapt": "every block carries adapters",
        "ffn_option": "adapters are parallel to the MLP",
        "ffn_adapter_init_option": "adapters start at zero, down-projections Kaiming-uniform",
        "ffn_adapter_layernorm_option": "adapters have no layer norm",
        "dropout": "adapters have no dropout, as in the published code",
        "d_model": "read from the backbone",
        "vpt_on": "no prompts",
        "vpt_num": "no prompts",
    }
    lr_keys: ClassVar[tuple[str, ...]] = (*AdapterKeys.lr_keys, "rd_lr")

    model_name: Literal["sema"] = key(
        "sema",
        "SEMA: adapters that grow where data are new, mixed by routers; with nested adapters Nested LoRA.",
    )

    expansion: Literal["novelty", "always", "never"] = key(
        "novelty", "Growing blocks gain an adapter where data are new, once in every task, or never."
    )
    rd_epoch: CountOrZero = key(20, "Epochs of a representation descriptor phase.")
    rd_lr: Rate = key(0.01, "Learning rate of representation descriptors.")
    rd_dim: int = key(128, "Width of a descriptor's bottleneck.", ge=1, le=16384)
    rd_views: int = key(
        2,
        "Augmented views per image that descriptors train on in turn; 0 = new ones every epoch, as "
        "published. Error statistics come from further views, so that thresholds keep their meaning; z-scores"
        " with 2 agreed better with those of 0 than with 1 (docs/experiment_log.md).",
        ge=0,
        le=1000,
    )
    buffer_size: int = key(
        500, "Newest reconstruction errors that a descriptor's statistics are over.", ge=3, le=10**6
    )
    exp_threshold: float = key(
        2.0, "A block is novel if all adapters' mean z-scores exceed it.", ge=0, le=1e9
    )
    detect_batch_size: int = key(128, "Images in a batch of the novelty scan.", ge=2, le=10**6)

    nested_lora_freeze: Literal["task", "never"] = key(
        "task", 'Adapters freeze with their task (SEMA), or "never": all go on learning in later tasks.'
    )
    nested_lora_use_consolidation: bool = key(False, "At task ends, move fast into slow; reset fast.")
    nested_lora_consolidation: Literal["weights", "function", "interpolate"] = key(
        "weights",
        "Add alpha times fast's tensors to slow's; refit slow to slow(x) + alpha * fast(x); or move slow's "
        'hidden units by alpha towards those of slow and fast merged (needs nested_lora_reset "aligned").',
    )
    nested_lora_consolidation_alpha: float = key(0.1, "Share of fast that moves into slow.", ge=0, le=1)
    nested_lora_consolidation_schedule: Literal["constant", "mean"] = key(
        "constant",
        "alpha in every task, or alpha / (t + 1) after t earlier tasks of the adapter: with alpha 1 and "
        "nested_lora_lr_slow 0, slow is the mean over tasks.",
    )
    nested_lora_reset: Literal["lora", "zeros", "aligned"] = key(
        "lora",
        "Fast restarts as a new LoRA; all zero, after which only its output bias can learn; or on slow's "
        'hidden units ("aligned", where it also starts before the first task).',
    )

    @property
    def distinct_rd_views(self) -> int:
        """Views of an image that descriptors train on in turn, at most as many as there are; 0 = new ones."""
        if self.augmentation == "none":
            return 1
        return min(self.rd_views, self.cache_views) if self.cache_views else self.rd_views

    @property
    def repeats_rd_views(self) -> bool:
        """Whether descriptors train on a view more than once though an image has others."""
        return 0 < self.distinct_rd_views < self.rd_epoch and self.augmentation != "none"

    @property
    def consolidates(self) -> bool:
        """Whether there are two branches and fast moves into slow at task ends."""
        return self.nested and self.nested_lora_use_consolidation

    @property
    def aligned(self) -> bool:
        """Whether fast starts every task on the hidden units of slow."""
        return self.consolidates and self.nested_lora_reset == "aligned"

    @property
    def grows(self) -> bool:
        return self.expansion != "never"

    @property
    def trains(self) -> bool:
        return super().trains or (self.grows and self.rd_epoch > 0)

    @property
    def freezes(self) -> bool:
        """Whether adapters freeze with their task (SEMA's rule)."""
        return not (self.nested and self.nested_lora_freeze == "never")

    def conflicts(self) -> Iterator[Conflict]:
        """Interpolation of hidden units that are not aligned."""
        yield from super().conflicts()
        if self.consolidates and self.nested_lora_consolidation == "interpolate" and not self.aligned:
            fault = "units of slow and fast do not belong together"
            sentence = f'{fault}; allowed with "interpolate": reset "aligned"'
            yield ("nested_lora_consolidation", "nested_lora_reset"), sentence

    def unused_rules(self) -> list[UnusedRule]:
        descriptors = ("rd_lr", "rd_views", "buffer_size", "exp_threshold")
        growth = ("rd_epoch", "rd_dim", "detect_batch_size", *descriptors)
        schedule = "nested_lora_consolidation_schedule"
        shares = ("nested_lora_consolidation_alpha", schedule)
        consolidation = ("nested_lora_consolidation", "nested_lora_reset", *shares)
        off = self.nested and not self.nested_lora_use_consolidation
        nothing_moves = self.consolidates and self.nested_lora_consolidation_alpha == 0
        fast_is_zero = self.nested_lora_lr_fast == 0 and self.nested_lora_consolidation == "function"
        return [
            (off, "nested_lora_use_consolidation is false", consolidation),
            (nothing_moves, "nested_lora_consolidation_alpha is 0", (schedule,)),
            (not self.grows, 'expansion is "never"', growth),
            (self.expansion == "always", 'expansion is "always"', ("exp_threshold",)),
            (self.rd_epoch == 0, "rd_epoch is 0", (*descriptors, "detect_batch_size")),
            (self.augmentation == "none", 'augmentation is "none"', ("rd_views",)),
            (self.consolidates and fast_is_zero, "nested_lora_lr_fast is 0", shares),
            *super().unused_rules(),
            (self.freezes, "an adapter learns in one task only", (schedule,)),
            (not self.grows and self.freezes, "adapters learn in the first task only", ("head_drift",)),
        ]

    def warnings(self, nb_seeds: int = 1) -> Iterator[str]:
        """The reset after which fast cannot learn, and a rule that undoes what slow itself learned."""
        yield from super().warnings(nb_seeds)
        if self.consolidates and self.nested_lora_consolidation == "interpolate" and self.nested_lora_lr_slow:
            share = f"a share {self.nested_lora_consolidation_alpha:g}"
            undone = f"undoes {share} of what slow's down-projections learned in the task"
            yield f'"interpolate" {undone}; use nested_lora_lr_slow = 0'
        if self.consolidates and self.nested_lora_reset == "zeros":
            fault = "leaves fast's projections with zero gradients for ever"
            yield f'nested_lora_reset = "zeros" {fault}; use "lora"'
