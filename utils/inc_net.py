"""The classifier that gains rows with every task.

head = IncrementalHead(width=768)
head.grow(10)                 # task 0 brings ten classes
logits = head(features)       # (B, d) -> (B, classes so far)
"""

import math

import torch
from torch import Tensor, nn

# How new rows are drawn, as arguments of Kaiming's uniform distribution on [-g sqrt(3 / d), g sqrt(3 / d)]: its gain g
# is sqrt(1 / 3) for the first, with which torch fills an nn.Linear, and 1 for the second.
ROW_INITS = {"torch_default": {"a": math.sqrt(5)}, "kaiming_linear": {"nonlinearity": "linear"}}


class IncrementalHead(nn.Module):
    """One linear classifier over all classes seen, stored as one block of rows a task.

    Only the newest block learns: the rows of other tasks have no gradient, so weight decay and momentum cannot move
    them. Rows start with zero bias and weights as `init` says; "torch_default" is what published SEMA does.

    Args:
        width: d, length of a feature vector.
        init: a key of `ROW_INITS`.
    """

    def __init__(self, width: int, init: str = "torch_default") -> None:
        super().__init__()
        self.width, self.init = width, init
        self.tasks = nn.ModuleList()
        self.register_load_state_dict_pre_hook(_grow_as_saved)

    def grow(self, classes: int) -> None:
        """Add the rows of a new task and freeze the older ones."""
        for old in self.tasks:
            for parameter in old.parameters():
                parameter.requires_grad_(False)
        rows = nn.Linear(self.width, classes)
        nn.init.kaiming_uniform_(rows.weight, **ROW_INITS[self.init])
        nn.init.zeros_(rows.bias)
        device = self.tasks[0].weight.device if self.tasks else rows.weight.device
        self.tasks.append(rows.to(device))

    def forward(self, features: Tensor) -> Tensor:
        """Logits over all classes so far, (B, d) -> (B, C)."""
        return torch.cat([rows(features) for rows in self.tasks], dim=1)

    def newest(self, features: Tensor) -> Tensor:
        """Logits over the newest task's classes only, (B, d) -> (B, C_t): older logits as if -inf."""
        return self.tasks[-1](features)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that learn: the newest rows."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def _grow_as_saved(head: IncrementalHead, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before loading: the blocks of rows that the tensors are of. torch refuses what does not fit then."""
    while (rows := state.get(f"{prefix}tasks.{len(head.tasks)}.weight")) is not None:
        head.grow(len(rows))
