"""METHODS, the dict that names every method: its config schema and its learner.

A new method is one file and one line here. With the schema in a file of its own, in `models/config/`, configs
are checked before PyTorch is imported; it may also stand in the method's file. Learners are named by import
path, and imported at the first use: `LEARNERS["sema"]`.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from models.config.aper import APERConfig
from models.config.coda_prompt import CODAPromptConfig
from models.config.ease import EASEConfig
from models.config.finetune import FinetuneConfig
from models.config.inflora import InfLoRAConfig
from models.config.joint import JointConfig
from models.config.linear_probe import LinearProbeConfig
from models.config.moal import MoALConfig
from models.config.ranpac import RanPACConfig
from models.config.sdlora import SDLoRAConfig
from models.config.sema import SEMAConfig
from models.config.simplecil import SimpleCILConfig
from models.shared_subspace.config import SharedSubspaceConfig
from utils.config.schema import RunConfig


class Method(NamedTuple):
    """A method: the schema of its configuration, and the import path of its `Learner`."""

    config: type[RunConfig]
    learner: str


METHODS = {
    "sema": Method(SEMAConfig, "models.sema.SEMA"),
    "finetune": Method(FinetuneConfig, "models.finetune.Finetune"),
    "ranpac": Method(RanPACConfig, "models.ranpac.RanPAC"),
    "simplecil": Method(SimpleCILConfig, "models.simplecil.SimpleCIL"),
    "aper": Method(APERConfig, "models.compared.aper.APER"),
    "ease": Method(EASEConfig, "models.compared.ease.EASE"),
    "inflora": Method(InfLoRAConfig, "models.compared.inflora.InfLoRA"),
    "moal": Method(MoALConfig, "models.compared.moal.MoAL"),
    "coda_prompt": Method(CODAPromptConfig, "models.compared.coda_prompt.CODAPrompt"),
    "linear_probe": Method(LinearProbeConfig, "models.linear_probe.LinearProbe"),
    "joint": Method(JointConfig, "models.joint.Joint"),
    "sdlora": Method(SDLoRAConfig, "models.sdlora.SDLoRA"),
    "shared_subspace": Method(SharedSubspaceConfig, "models.shared_subspace.learner.SharedSubspace"),
}


class Learners(Mapping[str, Any]):
    """Method name -> its subclass of `Learner` (`models/base.py`), imported at the first use."""

    def __getitem__(self, name: str) -> Any:
        module, _, learner = METHODS[name].learner.rpartition(".")
        return getattr(import_module(module), learner)

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


LEARNERS = Learners()
SCHEMAS = {name: method.config for name, method in METHODS.items()}
