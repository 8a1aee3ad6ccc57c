"""Config of EASE (`models/compared/ease.py`)."""

from typing import ClassVar, Literal

from models.vit.config import SCHEDULER, AdapterKeys, ProxyKeys, TrainingKeys
from utils.config.schema import Rate, UnusedRule, key


class EASEConfig(ProxyKeys, AdapterKeys, TrainingKeys):
    """Adapters, their training, and the reweighted prototypes."""

    known_as: ClassVar[dict[str, str]] = AdapterKeys.known_as | {
        "init_epochs": "func_epoch",
        "later_epochs": "func_epoch",
        "later_lr": "init_lr",
    }
    legacy_keys: ClassVar[dict[str, str]] = TrainingKeys.legacy_keys | {
        **SCHEDULER,
        "adapter_num": "an adapter per task",
        "recalc_sim": "prototypes are reconstructed once, as with false",
        "use_reweight": "subspaces of other tasks have the weight alpha",
        "use_diagonal": "all subspaces are used",
        "use_old_data": "no exemplar memory",
        "use_init_ptm": "the ViT without adapters is no subspace",
        "beta": "the ViT without adapters is no subspace",
        "moni_adam": "nothing is logged in the middle of training",
    }

    model_name: Literal["ease"] = key(
        "ease", "EASE: an adapter per task, and prototypes in the subspaces of all adapters."
    )
    alpha: float = key(0.1, "Weight of the other tasks' subspaces, divided by their number.", ge=0, le=1e3)
    ease_temperature: Rate = key(
        1.0, "Temperature of the similarities that reconstruct prototypes; published: none, which is 1."
    )

    def unused_rules(self) -> list[UnusedRule]:
        return [(self.alpha == 0, "alpha is 0", ("ease_temperature",)), *super().unused_rules()]
