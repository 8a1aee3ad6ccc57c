"""The classifier that gains rows with every task.

head = IncrementalHead(width=768)
head.grow(10)                 # task 0 brings ten classes
logits = head(features)       # (B, d) -> (B, classes so far)
"""

import math

import torch
from torch import Tensor, nn


class IncrementalHead(nn.Module):
    """One linear classifier over all classes seen, stored as one block of rows a task.

    Only the newest block learns: the rows of other tasks have no gradient, so weight decay and momentum cannot move
    them. Rows start Kaiming-uniform(a = sqrt 5) with zero bias, as the published single `fc` does.

    Args:
        width: d, length of a feature vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.tasks = nn.ModuleList()

    def grow(self, classes: int) -> None:
        """Add the rows of a new task and freeze the older ones."""
        for old in self.tasks:
            for parameter in old.parameters():
                parameter.requires_grad_(False)
        rows = nn.Linear(self.width, classes)
        nn.init.kaiming_uniform_(rows.weight, a=math.sqrt(5))
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
