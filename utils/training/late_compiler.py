"""Late import of PyTorch's compiler (`torch._dynamo`): only where something is compiled.

    import_networks()                                # timm and torchvision
    optimizer = late(torch.optim.SGD)(parameters, lr=0.1)

torchvision imports it for one function that only RoI pooling calls, timm to mark functions as not to be
compiled, PyTorch's optimizers to mark where graphs end: 1.3 CPU seconds of imports at every start.
"""

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

ASKED_BY_TORCHVISION = "torch._dynamo.utils"


class _Later(ModuleType):
    """Stand-in for a module, which is imported at the first use of one of its attributes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        if name == "is_compile_supported":  # a function: what it needs is imported when it is called
            return lambda device: getattr(importlib.import_module(self.__name__), name)(device)
        return getattr(importlib.import_module(self.__name__), name)


def import_networks() -> None:
    """Import timm, and torchvision with it; the compiler follows at the first call that needs it."""
    if "timm" in sys.modules:
        return
    import torch

    disable = torch.compiler.disable
    sys.modules.setdefault(ASKED_BY_TORCHVISION, _Later(ASKED_BY_TORCHVISION))
    torch.compiler.disable = getattr(torch, "_disable_dynamo", disable)
    try:
        importlib.import_module("timm")
    finally:
        torch.compiler.disable = disable
        if isinstance(sys.modules.get(ASKED_BY_TORCHVISION), _Later):  # nobody asked
            del sys.modules[ASKED_BY_TORCHVISION]


@functools.cache
def late(optimizer: type) -> type:
    """Subclass of a PyTorch optimizer whose methods compute the same without importing the compiler."""
    import torch

    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
    plain = {name: getattr(method := getattr(optimizer, name), "__wrapped__", method) for name in names}
    return type(optimizer.__name__, (optimizer,), plain | {"step": torch.no_grad()(plain["step"])})
