"""Config of APER (`models/compared/aper.py`)."""

from typing import ClassVar, Literal

from models.vit.config import SCHEDULER, AdapterKeys, ProxyKeys, TrainingKeys
from utils.config.schema import key


class APERConfig(ProxyKeys, AdapterKeys, TrainingKeys):
    """Adapters and their training in the first task."""

    known_as: ClassVar[dict[str, str]] = AdapterKeys.known_as | {"tuned_epoch": "func_epoch"}
    legacy_keys: ClassVar[dict[str, str]] = TrainingKeys.legacy_keys | SCHEDULER

    model_name: Literal["aper"] = key(
        "aper", "APER: nearest class mean on frozen and first-task-adapted features, concatenated."
    )

    def one_class_advice(self, task: int) -> str:
        return super().one_class_advice(task) if task == 0 else ""
