"""IncrementalHead: a classifier that gains rows with every task.

head = IncrementalHead(width=768)
head.grow(10)                 # ten classes of task 0
logits = head(features)       # (B, d) -> (B, classes so far)
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Initialisation of new rows: arguments of `kaiming_uniform_`, uniform on [-g sqrt(3 / d), g sqrt(3 / d)]. The
# gain g is sqrt(1 / 3) for the first, as in torch's nn.Linear, and 1 for the second.
ROW_INITS = {"torch_default": {"a": math.sqrt(5)}, "kaiming_linear": {"nonlinearity": "linear"}}


class CosineRows(nn.Module):
    """Rows w_c with logits s cos(f, w_c); the scale s starts at 1 and learns.

    Args:
        width: d, length of a feature vector.
        classes: number of rows.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class IncrementalHead(nn.Module):
    """One classifier over all classes seen, stored as one block of rows per task.

    Only the newest block learns: rows of earlier tasks have no gradient, so weight decay and momentum cannot
    move them. Rows start with zero bias and weights as `init` says; "torch_default" is what published SEMA
    does. The blocks are state: a fresh head takes them from the tensors it loads.

    Args:
        width: d, length of a feature vector.
        init: a key of `ROW_INITS`.
        kind: "linear", or "cosine" for `CosineRows`.
    """

    def __init__(self, width: int, init: str = "torch_default", kind: str = "linear") -> None:
        super().__init__()
        self.width, self.init, self.kind = width, init, kind
        self.tasks = nn.ModuleList()
        self.register_load_state_dict_pre_hook(_take_saved_shape)

    def grow(self, classes: int) -> None:
        """Add the rows of a new task and freeze the older ones."""
        self.tasks.requires_grad_(False)
        rows = (nn.Linear if self.kind == "linear" else CosineRows)(self.width, classes)
        nn.init.kaiming_uniform_(rows.weight, **ROW_INITS[self.init])
        if self.kind == "linear":
            nn.init.zeros_(rows.bias)
        self.tasks.append(rows.to(self.tasks[0].weight.device if self.tasks else "cpu"))

    def forward(self, features: Tensor) -> Tensor:
        """Logits over all classes so far, (B, d) -> (B, C)."""
        return torch.cat([rows(features) for rows in self.tasks], dim=1)

    def newest(self, features: Tensor) -> Tensor:
        """Logits over the newest task's classes only, (B, d) -> (B, C_t): older logits as if -inf."""
        return self.tasks[-1](features)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that learn: the newest rows."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def _take_saved_shape(
    head: IncrementalHead, state: dict[str, Tensor], prefix: str, *hook_args: object
) -> None:
    """Load-state-dict pre-hook: blocks of rows of the saved sizes."""
    while (rows := state.get(f"{prefix}tasks.{len(head.tasks)}.weight")) is not None:
        head.grow(len(rows))
