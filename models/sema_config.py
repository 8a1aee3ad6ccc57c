"""Config keys of SEMA and of Nested LoRA on it. Defaults are the published values, or the specification's.

config = SEMAConfig(dataset="synthetic", ffn_adapter_type="nested_lora", nested_lora_rank=4)
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from utils.config import Conflict, RunConfig, with_reason


def _tiny_for_null(value: Any) -> Any:
    return 1e-8 if value is None else value


def _number_in_quotes(value: Any) -> Any:
    """`"0.1"` -> 0.1: published tuning configs quote this number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


class SEMAConfig(RunConfig):
    """SEMA (self-expansion, mixture of adapters); `ffn_adapter_type` "nested_lora" gives adapters two time scales."""

    legacy_keys: ClassVar[dict[str, str]] = {
        **RunConfig.legacy_keys,
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

    model_name: Literal["sema"] = Field("sema", description="The method.")

    func_epoch: int = Field(5, ge=0, description="Epochs of a functional phase (adapters, router, classifier).")
    rd_epoch: int = Field(20, ge=0, description="Epochs of a representation descriptor phase.")
    init_lr: float = Field(0.005, gt=0, description="Learning rate of functional phases.")
    rd_lr: float = Field(0.01, gt=0, description="Learning rate of representation descriptors.")
    weight_decay: float = Field(0.0005, ge=0, description="Weight decay of both phases.")
    min_lr: Annotated[float, Field(ge=0), BeforeValidator(_tiny_for_null)] = Field(
        0.0,
        description="Where the cosine schedule ends; null is read as 1e-8, as published.",
        json_schema_extra={"allowed": "a number >= 0, or null for 1e-8"},
    )
    optimizer: Literal["sgd", "adam"] = Field("sgd", description='SGD with momentum 0.9; "adam" means AdamW.')

    ffn_adapter_type: Literal["adaptmlp", "nested_lora"] = Field(
        "adaptmlp", description="One bottleneck adapter, or a fast and a slow one summed."
    )
    ffn_num: int = Field(16, ge=1, description='Bottleneck width of an "adaptmlp" adapter.')
    ffn_adapter_scalar: Annotated[float, BeforeValidator(_number_in_quotes)] = Field(
        1.0, description="Factor on an adapter's output; the published code names 0.1 and applies 1."
    )
    adapter_blocks: Literal["all", "growing"] = Field(
        "all", description="Blocks that carry adapters: all, as published, or only those that may grow."
    )
    adapt_start_layer: int = Field(9, ge=0, description="First block that may grow, counted from 0.")
    adapt_end_layer: int = Field(11, ge=0, description="Last block that may grow, inclusive.")
    rd_dim: int = Field(128, ge=1, description="Width of a descriptor's bottleneck.")
    engine: Literal["fast", "reference"] = Field(
        "fast", description='"reference" stores no activations and stacks no adapters: slow and plain, fp32 only.'
    )
    cache_views: int = Field(
        0, ge=0, description="Fixed augmented views of an image for training; 0 = new ones every epoch, as published."
    )
    rd_views: int = Field(
        1, ge=0, description="Augmented views of an image for the descriptors; 0 = new ones every epoch, as published."
    )
    buffer_size: int = Field(500, ge=3, description="Reconstruction errors a descriptor's running statistics keep.")
    exp_threshold: float = Field(2.0, ge=0, description="A block is novel if all adapters' mean z-scores exceed it.")
    detect_batch_size: int = Field(128, ge=2, description="Images in a batch of the novelty scan.")

    nested_lora_rank: int = Field(16, ge=1, description="Rank of each of the two branches.")
    nested_lora_lr_fast: float = Field(0.01, gt=0, description="Learning rate of fast branches.")
    nested_lora_lr_slow: float = Field(0.001, gt=0, description="Learning rate of slow branches.")
    nested_lora_update_interval_slow: int = Field(
        1, ge=0, description="Slow branches step on every k-th step only; 0 and 1 mean every step."
    )
    nested_lora_slow_grad: Literal["discard", "accumulate"] = Field(
        "discard", description="Between slow steps, drop the gradients or use their mean at the k-th step."
    )
    nested_lora_freeze: Literal["task", "never"] = Field(
        "task", description='Adapters freeze with their task (SEMA), or "never": all go on learning in later tasks.'
    )
    nested_lora_use_consolidation: bool = Field(False, description="At task ends, move fast into slow; reset fast.")
    nested_lora_consolidation: Literal["weights", "function"] = Field(
        "weights", description="Add fast's tensors to slow's, or refit slow to slow(x) + alpha * fast(x)."
    )
    nested_lora_consolidation_alpha: float = Field(0.1, gt=0, le=1, description="Share of fast that moves into slow.")
    nested_lora_reset: Literal["lora", "zeros"] = Field(
        "lora", description="Fast restarts as a new LoRA, or all its tensors are zeroed, after which it cannot learn."
    )

    def conflicts(self) -> list[Conflict]:
        """Adds the order of the growing blocks and the depth of the backbone."""
        found = super().conflicts()
        if self.adapt_start_layer > self.adapt_end_layer:
            sentence = "the first growing block comes after the last; allowed: adapt_start_layer <= adapt_end_layer"
            found.append((("adapt_start_layer", "adapt_end_layer"), sentence))
        if self.engine == "reference" and self.precision != "fp32":
            found.append((("engine", "precision"), 'the reference computes in fp32; allowed with it: precision "fp32"'))
        shape = self.known_backbone()
        if shape is not None:
            found += self._beyond_depth(shape.depth)
        return found

    def _beyond_depth(self, depth: int) -> list[Conflict]:
        return [
            ((key, "backbone_type"), f"the backbone has {depth} blocks; allowed: {key} from 0 to {depth - 1}")
            for key in ("adapt_start_layer", "adapt_end_layer")
            if getattr(self, key) >= depth
        ]

    def no_effect(self) -> list[str]:
        """Adapter keys that were set and belong to the other adapter type or to consolidation while it is off."""
        given = [key for key in type(self).model_fields if key in self.model_fields_set]
        nested = [key for key in given if key.startswith("nested_lora_")]
        if self.ffn_adapter_type != "nested_lora":
            return with_reason(dict.fromkeys(nested, f'ffn_adapter_type is "{self.ffn_adapter_type}"'))
        idle = dict.fromkeys([key for key in given if key == "ffn_num"], "nested_lora_rank is the width")
        if not self.nested_lora_use_consolidation:
            rules = ("nested_lora_consolidation", "nested_lora_consolidation_alpha", "nested_lora_reset")
            idle |= dict.fromkeys([key for key in nested if key in rules], "nested_lora_use_consolidation is false")
        if self.nested_lora_update_interval_slow <= 1 and "nested_lora_slow_grad" in nested:
            idle["nested_lora_slow_grad"] = "slow steps every step"
        return with_reason(idle)

    def remarks(self) -> list[str]:
        """Warns of a scale that the published code names but does not apply, and of the reset that ends learning."""
        found = []
        if self.ffn_adapter_scalar != 1.0:
            scale = f"ffn_adapter_scalar = {self.ffn_adapter_scalar:g} is applied here"
            found.append(f"{scale}; the published code names such a scale and applies 1")
        resets = self.ffn_adapter_type == "nested_lora" and self.nested_lora_use_consolidation
        if resets and self.nested_lora_reset == "zeros":
            found.append('nested_lora_reset = "zeros" leaves fast with zero gradients for ever; use "lora"')
        return found
