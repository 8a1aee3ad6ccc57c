"""Config of MoAL (`models/compared/moal.py`)."""

from typing import ClassVar, Literal

from models.vit.config import SCHEDULER, AdapterKeys, RidgeKeys, TrainingKeys
from utils.config.schema import UnusedRule, key


class MoALConfig(AdapterKeys, RidgeKeys, TrainingKeys):
    """Adapters, their moving average, and ridge regression with rumination."""

    legacy_keys: ClassVar[dict[str, str]] = TrainingKeys.legacy_keys | {
        **SCHEDULER,
        "head": "the ridge regression classifies",
        "head_drift": "rumination takes its place",
    }

    model_name: Literal["moal"] = key(
        "moal", "MoAL: a moving average of adapters, ridge regression, and rumination of old classes."
    )
    ema_decay: float = key(0.999, "Decay of the moving average of the adapters' weights.", ge=0, lt=1)
    ema_every: Literal["step", "epoch"] = key(
        "step", "When the average moves: after every step, or after every epoch, as in the published code."
    )
    rumination: bool = key(True, "Pseudo-features of old classes that are misclassified join the regression.")

    def unused_rules(self) -> list[UnusedRule]:
        return [
            (self.func_epoch == 0, "func_epoch is 0", ("ema_decay", "ema_every")),
            (self.ema_decay == 0, "ema_decay is 0", ("ema_every",)),
            *super().unused_rules(),
        ]
