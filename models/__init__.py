"""The learning methods, one file each, and the dict that names them.

A new method is one file and one line here.
"""

from models.base import Learner
from models.finetune import Finetune
from models.joint import Joint
from models.linear_probe import LinearProbe
from models.ranpac import RanPAC
from models.sdlora import SDLoRA
from models.sema import SEMA
from models.shared_subspace.learner import SharedSubspace
from models.simplecil import SimpleCIL

LEARNERS: dict[str, type[Learner]] = {
    "sema": SEMA,
    "finetune": Finetune,
    "ranpac": RanPAC,
    "simplecil": SimpleCIL,
    "linear_probe": LinearProbe,
    "joint": Joint,
    "sdlora": SDLoRA,
    "shared_subspace": SharedSubspace,
}
SCHEMAS = {name: learner.Config for name, learner in LEARNERS.items()}
