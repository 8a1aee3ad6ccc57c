"""Config keys of SEMA and of Nested LoRA on it. Defaults are the published values, or the specification's.

config = SEMAConfig(dataset="synthetic", ffn_adapter_type="nested_lora", nested_lora_rank=4)
"""

from typing import ClassVar, Literal

from pydantic import Field

from models.vit.config import AdapterConfig, ClassIncrementalConfig
from utils.config.schema import MOST, Conflict, IdleRule

CONSOLIDATION_KEYS = tuple(
    f"nested_lora_{rule}"
    for rule in ("consolidation", "consolidation_alpha", "consolidation_schedule", "reset")
)
GROWTH_KEYS = ("rd_epoch", "rd_lr", "rd_dim", "rd_views", "buffer_size", "exp_threshold", "detect_batch_size")


class SEMAConfig(AdapterConfig):
    """SEMA (self-expansion, mixture of adapters); `ffn_adapter_type` "nested_lora" gives adapters two time scales."""

    legacy_keys: ClassVar[dict[str, str]] = {
        **ClassIncrementalConfig.legacy_keys,
        "init_epoch": "func_epoch and rd_epoch say how long",
        "epochs": "func_epoch and rd_epoch say how long",
        "tuned_epoch": "func_epoch and rd_epoch say how long",
        "init_lr_decay": "the schedule is a cosine",
        "init_milestones": "the schedule is a cosine",
        "lrate": "init_lr and rd_lr are the learning rates",
        "lrate_decay": "the schedule is a cosine",
        "milestones": "the schedule is a cosine",
        "scheduler": "the schedule is a cosine",
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

    rates: ClassVar[tuple[str, ...]] = (*AdapterConfig.rates, "rd_lr")

    model_name: Literal["sema"] = Field("sema", description="The method.")

    expansion: Literal["novelty", "always", "never"] = Field(
        "novelty",
        description="Growing blocks gain an adapter where data are new, once in every task, or never.",
    )
    rd_epoch: int = Field(20, ge=0, le=MOST, description="Epochs of a representation descriptor phase.")
    rd_lr: float = Field(0.01, gt=0, lt=1e3, description="Learning rate of representation descriptors.")
    rd_dim: int = Field(128, ge=1, le=16384, description="Width of a descriptor's bottleneck.")
    rd_views: int = Field(
        2,
        ge=0,
        le=1000,
        description="Augmented views of an image that descriptors train on in turn; 0 = new ones every epoch, as "
        "published. z-scores compare with errors on other views, so thresholds keep their meaning; with 2 they agreed "
        "better with 0 than with 1 (exps/RESULTS.md).",
    )
    buffer_size: int = Field(
        500, ge=3, le=MOST, description="Reconstruction errors a descriptor's running statistics keep."
    )
    exp_threshold: float = Field(
        2.0, ge=0, le=1e9, description="A block is novel if all adapters' mean z-scores exceed it."
    )
    detect_batch_size: int = Field(128, ge=2, le=MOST, description="Images in a batch of the novelty scan.")

    nested_lora_freeze: Literal["task", "never"] = Field(
        "task",
        description='Adapters freeze with their task (SEMA), or "never": all go on learning in later tasks.',
    )
    nested_lora_use_consolidation: bool = Field(
        False, description="At task ends, move fast into slow; reset fast."
    )
    nested_lora_consolidation: Literal["weights", "function", "interpolate"] = Field(
        "weights",
        description="Add fast's tensors to slow's; refit slow to slow(x) + alpha * fast(x); or move slow's hidden "
        'units a share alpha of the way to those that fast made of them (needs nested_lora_reset "aligned").',
    )
    nested_lora_consolidation_alpha: float = Field(
        0.1, ge=0, le=1, description="Share of fast that moves into slow."
    )
    nested_lora_consolidation_schedule: Literal["constant", "mean"] = Field(
        "constant",
        description="alpha in every task, or alpha / (task + 1): with alpha 1, slow is the mean over tasks.",
    )
    nested_lora_reset: Literal["lora", "zeros", "aligned"] = Field(
        "lora",
        description="Fast restarts as a new LoRA; all zero, after which it cannot learn; or on slow's hidden units "
        '("aligned", where it also starts before the first task).',
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

    def conflicts(self) -> list[Conflict]:
        """Adds that units can be interpolated only where they belong together."""
        found = super().conflicts()
        if self.consolidates and self.nested_lora_consolidation == "interpolate" and not self.aligned:
            sentence = (
                'units of slow and fast do not belong together; allowed with "interpolate": reset "aligned"'
            )
            found.append((("nested_lora_consolidation", "nested_lora_reset"), sentence))
        return found

    def idle_rules(self) -> list[IdleRule]:
        """Adds keys of consolidation while it is off, of growth while nothing grows, of tasks that train no adapter."""
        off = self.nested and not self.nested_lora_use_consolidation
        nothing_moves = self.consolidates and self.nested_lora_consolidation_alpha == 0
        silent = (
            self.consolidates
            and self.nested_lora_lr_fast == 0
            and self.nested_lora_consolidation != "weights"
        )
        shares = ("nested_lora_consolidation_alpha", "nested_lora_consolidation_schedule")
        later = ("head_drift", "nested_lora_consolidation_schedule")
        undescribed = ("rd_lr", "rd_views", "buffer_size", "exp_threshold")
        return [
            (off, "nested_lora_use_consolidation is false", CONSOLIDATION_KEYS),
            (nothing_moves, "nested_lora_consolidation_alpha is 0", ("nested_lora_consolidation_schedule",)),
            (not self.grows, 'expansion is "never"', GROWTH_KEYS),
            (self.expansion == "always", 'expansion is "always"', ("exp_threshold",)),
            (self.rd_epoch == 0, "rd_epoch is 0", undescribed),
            (self.augmentation == "none", 'augmentation is "none"', ("rd_views",)),
            (silent, "nested_lora_lr_fast is 0", shares),
            *super().idle_rules(),
            (not self.grows and self.freezes, "adapters learn in the first task only", later),
        ]

    def remarks(self) -> list[str]:
        """Adds a warning of the reset that ends learning."""
        if self.consolidates and self.nested_lora_reset == "zeros":
            dead = 'nested_lora_reset = "zeros" leaves fast with zero gradients for ever; use "lora"'
            return [*super().remarks(), dead]
        return super().remarks()
