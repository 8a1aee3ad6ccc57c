"""Config of InfLoRA (`models/compared/inflora.py`)."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from models.vit.backbones import BackboneShape
from models.vit.config import SCHEDULER, BlockKeys, RowsRules, TrainingKeys
from utils.config.schema import Conflict, key


class InfLoRAConfig(RowsRules, BlockKeys, TrainingKeys):
    """Low-rank terms of k and v, and the bases that they are orthogonal to."""

    known_as: ClassVar[dict[str, str]] = TrainingKeys.known_as | {
        "rank": "lora_rank",
        "init_epoch": "func_epoch",
        "epochs": "func_epoch",
        "lrate": "init_lr",
        "optim": "optimizer",
    }
    legacy_keys: ClassVar[dict[str, str]] = TrainingKeys.legacy_keys | {
        **SCHEDULER,
        "EPSILON": "nothing is divided by it",
        "total_sessions": "counted in the data",
    }

    model_name: Literal["inflora"] = key(
        "inflora", "InfLoRA: low-rank terms of k and v in directions orthogonal to older tasks' inputs."
    )
    lora_rank: int = key(10, "Rank of a task's terms.", ge=1, le=4096)
    lamb: float = key(0.95, "Share of the inputs' energy that the first task's basis holds.", ge=0, le=1)
    lame: float = key(
        1.0,
        "The same share of a task after the data set's last; in between it is linear in the task.",
        ge=0,
        le=1,
    )
    threshold_on: Literal["energy", "squared_energy"] = key(
        "energy",
        "What the share is of: energies along directions, or their squares, as in published code.",
    )

    def shape_conflicts(self, shape: BackboneShape) -> Iterator[Conflict]:
        yield from super().shape_conflicts(shape)
        yield from shape.rank_conflicts("lora_rank", self.lora_rank)
