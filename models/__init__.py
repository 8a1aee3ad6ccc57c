"""Front door of the methods: what others import from here by name.

    from models import LEARNERS, METHODS, SCHEMAS, Method     # `models/methods.py`: a new method is one line
    from models import load_run                               # a run as a classifier: `models/saved/`

Modules of this package import from `models.methods` instead. Every file of this folder is a method, except
`base.py` (base class of all methods), `heads.py` (classifiers by config key), `gumbel_growth.py` (pruning and
figures of Gumbel CL-LoRA), `methods.py` and `benchmark.py`.
"""

from importlib import import_module
from typing import Any

from models.methods import LEARNERS, METHODS, SCHEMAS, Method

__all__ = ["LEARNERS", "METHODS", "SCHEMAS", "Method"]


def __getattr__(name: str) -> Any:
    """`load_run`, imported at the first use, as it needs PyTorch."""
    if name == "load_run":
        return import_module("models.saved.prediction").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
