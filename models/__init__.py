"""Front door of the methods: what others import from here by name.

    from models import LEARNERS, METHODS, SCHEMAS, Method     # `models/methods.py`: a new method is one line
    from models import load_run                               # a run as a classifier: `models/saved/`

Files below import from `models.methods` instead. A file of this folder is a method, but for `base.py`, on
which all methods stand, `heads.py`, classifiers by their key, `gumbel_growth.py`, the gate's part of
`sdlora.py`, `methods.py` and `benchmark.py`.
"""

from importlib import import_module
from typing import Any

from models.methods import LEARNERS, METHODS, SCHEMAS, Method

__all__ = ["LEARNERS", "METHODS", "SCHEMAS", "Method"]


def __getattr__(name: str) -> Any:
    """`load_run`, imported when it is asked for: it needs PyTorch."""
    if name == "load_run":
        return import_module("models.saved.prediction").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
