"""Config of RanPAC (`models/ranpac.py`)."""

from typing import ClassVar, Literal

from models.vit.config import AdapterKeys, BlockKeys, ProxyKeys, RidgeKeys, StepKeys, TrainingKeys
from utils.config.schema import UnusedRule, key


class RanPACConfig(ProxyKeys, AdapterKeys, RidgeKeys, TrainingKeys):
    """Ridge regression; keys of adapters and their training have an effect only with `first_session`."""

    legacy_keys: ClassVar[dict[str, str]] = TrainingKeys.legacy_keys | {
        "head": "the ridge regression classifies",
        "head_drift": "features never move once they have been read",
    }

    model_name: Literal["ranpac"] = key(
        "ranpac", "RanPAC: ridge regression on random features of the frozen, or once adapted, network."
    )
    first_session: bool = key(False, "Train adapters on the first task; false trains nothing.")

    @property
    def trains_adapters(self) -> bool:
        return self.first_session

    def unused_rules(self) -> list[UnusedRule]:
        groups = (ProxyKeys, BlockKeys, AdapterKeys, TrainingKeys, StepKeys)
        training = [name for group in groups for name in group.own_keys()]
        return [(not self.first_session, "first_session is false", training), *super().unused_rules()]

    def one_class_advice(self, task: int) -> str:
        return super().one_class_advice(task) if self.first_session and task == 0 else ""
