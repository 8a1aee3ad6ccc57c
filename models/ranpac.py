"""RanPAC: ridge regression on random features of the network, task by task equal to all tasks at once.

    python main.py --config exps/baselines/ranpac_cifar.json                                              # training-free
    python main.py --config exps/baselines/ranpac_cifar.json --set first_session=true --set ffn_num=32    # adapts in task 0

scores(x) = relu(f(x) P) (G + lambda I)^-1 Q with f the class token, P a fixed random projection to `ranpac_dim`
numbers, G and Q sums over all training images so far, and lambda chosen on a held-out fifth of every task
(`models.vit.closed_form.RanPACReadout`). With `first_session` the adapters are trained on task 0 and frozen before its features
are read, so that all sums belong to one network. Source: McDonnell et al., *RanPAC: Random Projections and Pre-trained
Models for Continual Learning*, NeurIPS 2023.
"""

from typing import Literal

from pydantic import Field

from backbone.sema_block import freeze
from backbone.vit_sema import SEMAVisionTransformer
from models.vit.config import BATCH_KEYS, AdapterConfig, ViTConfig
from models.vit.frozen_vit import FrozenViT
from models.vit.pretrained import Backbone
from models.vit.tuning import AdapterTuning
from utils.config.schema import IdleRule


class RanPACConfig(AdapterConfig):
    """RanPAC's keys; those of training count only with `first_session`."""

    model_name: Literal["ranpac"] = Field("ranpac", description="The method.")
    first_session: bool = Field(False, description="Train adapters on the first task; false trains nothing.")
    head: Literal["ranpac"] = Field("ranpac", description="RanPAC's ridge regression.")
    head_drift: Literal["none"] = Field("none", description="Features never move once they have been read.")

    @property
    def trains_adapters(self) -> bool:
        return self.first_session

    def idle_rules(self) -> list[IdleRule]:
        """Adds everything about adapters and their training without a first session."""
        training = AdapterConfig.model_fields.keys() - ViTConfig.model_fields.keys() - {"head", "head_drift"}
        return [
            (not self.first_session, "first_session is false", [*BATCH_KEYS, *training]),
            *super().idle_rules(),
        ]

    def one_class_advice(self, task: int) -> str:
        return super().one_class_advice(task) if self.first_session and task == 0 else ""


class RanPAC(AdapterTuning):
    """Random projection and ridge regression on frozen, or once adapted, features."""

    Config = RanPACConfig
    config: RanPACConfig

    def build_network(self, backbone: Backbone) -> SEMAVisionTransformer:
        if self.config.first_session:
            return super().build_network(backbone)
        return FrozenViT.build_network(self, backbone)

    def open_task(self) -> None:
        """Only a first task that trains needs the classifier it trains with."""
        if self.config.first_session and self.task == 0:
            super().open_task()

    def start_task(self) -> str:
        return "functional" if self.config.first_session and self.task == 0 else "readout"

    def after_functional(self) -> str:
        for modules in self.network.modules_by_block.values():
            modules.freeze_functional()
        freeze(self.head)
        return super().after_functional()
