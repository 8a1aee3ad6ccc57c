"""Config of CODA-Prompt (`models/compared/coda_prompt.py`)."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from models.vit.backbones import BackboneShape
from models.vit.config import SCHEDULER, RowsRules, TrainingKeys
from utils.config.schema import Conflict, Count, CountOrZero, RateOrZero, UnusedRule, distinct, key


def _even(length: int) -> int:
    if length % 2:
        raise ValueError("is odd: half of it are keys, half values")
    return length


class CODAPromptConfig(RowsRules, TrainingKeys):
    """Prompts and their training."""

    legacy_keys: ClassVar[dict[str, str]] = TrainingKeys.legacy_keys | {
        **SCHEDULER,
        "prompt_param": "see prompt_components (the pool divided by tasks), prompt_length and ortho_mu",
    }

    model_name: Literal["coda_prompt"] = key(
        "coda_prompt",
        "CODA-Prompt: prefixes of keys and values, composed per image from prompt components by attention.",
    )
    prompt_components: Count = key(
        10, "Components that a task adds to every prompt; published: 100 for 10 tasks."
    )
    prompt_length: Annotated[int, Field(ge=2, le=1024), AfterValidator(_even)] = key(
        8, "Length of a prompt: half of it are keys, half values.", "an even number from 2 to 1024"
    )
    prompt_blocks: Annotated[list[CountOrZero], Field(min_length=1), AfterValidator(distinct)] = key(
        [0, 1, 2, 3, 4], "Blocks with prompts, counted from 0.", "a list of different blocks, at least one"
    )
    ortho_mu: RateOrZero = key(0.1, "Weight of the penalty on components that are not orthonormal.")
    ortho_reduction: Literal["sum", "mean"] = key(
        "sum",
        "The penalty sums its squares, as the paper writes it, or takes their mean, as published code does.",
    )

    def shape_conflicts(self, shape: BackboneShape) -> Iterator[Conflict]:
        yield from super().shape_conflicts(shape)
        yield from shape.block_conflicts("prompt_blocks", max(self.prompt_blocks))

    def unused_rules(self) -> list[UnusedRule]:
        prompts = ("prompt_components", "prompt_length", "ortho_mu", "ortho_reduction")
        return [
            (self.ortho_mu == 0, "ortho_mu is 0", ("ortho_reduction",)),
            (self.func_epoch == 0, "func_epoch is 0", prompts[2:]),
            *super().unused_rules(),
        ]
