"""Merging of the weights that adapters reach in each task into the weights that are deployed.

    merging = Merging(adapter_parameters, rule="ema", start="carried", alpha=0.15)
    merging.begin()      # a task begins: the parameters are set to its start weights
    ...                  # training
    merging.end()        # the task's weights are merged; the parameters become the merged ones

Sources: running mean, ACMap (Fukuda et al., *Adapter Merging with Centroid Prototype Mapping for Scalable
Class-Incremental Learning*, CVPR 2025); largest magnitude, MagMax (Marczak et al., ECCV 2024); orthogonal
projection, OPCM (Tang et al., *Merging Models on the Fly Without Retraining*, 2025).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

STARTS = {"mean": "first", "ema": "carried", "max_magnitude": "carried", "orthogonal": "initial"}
FROM_INITIAL = {"max_magnitude", "orthogonal"}  # rules that need w_init; means can be taken of weights alone


class WeightVector(nn.Module):
    """Parameters of other modules, in their order, as one vector (P,), read and written in place."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._parameters_read = tuple(parameters)  # a tuple: their state is not this module's

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self._parameters_read])

    @torch.no_grad()
    def write(self, weights: Tensor) -> None:
        for parameter, values in zip(self._parameters_read, self.split(weights), strict=True):
            parameter.copy_(values)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector (P,) as tensors of the parameters' shapes."""
        parts = vector.split([parameter.numel() for parameter in self._parameters_read])
        return [part.view_as(p) for part, p in zip(parts, self._parameters_read, strict=True)]


class Merging(WeightVector):
    """Merged weights m_t of the weights w_t that training has reached in tasks 0 to t.

    With d_t = w_t - w_init and M_t the merged difference, m_t = w_init + M_t and M_0 = d_0; for t > 0

        "mean"            M_t = (t M_(t-1) + d_t) / (t + 1)
        "ema"             M_t = M_(t-1) + alpha (d_t - M_(t-1))
        "max_magnitude"   each number of M_t is that of d_0 ... d_t with the largest magnitude; of ties the
                          latest
        "orthogonal"      M_t = (l_(t-1) M_(t-1) + P(d_t)) / l_t with P as in `orthogonal_part`. l_0 = 1, and
                          l_t is such that ||M_t|| over all parameters is the mean of ||d_0|| ... ||d_t||.

    Task t > 0 starts from "carried": w_(t-1), "merged": m_(t-1), "first": w_0 or "initial": w_init.

    Args:
        parameters: read and written in place; their values now are w_init.
        rule, alpha: as above.
        start: where later tasks start from; None for what the rule's paper does (`STARTS`).
    """

    initial: Tensor  # (P,)
    merged: Tensor  # (P,): M_t
    start_weights: Tensor  # (P,): where the next task starts from
    tasks: Tensor  # tasks so far
    scale: Tensor  # l_t, float64
    norms: Tensor  # sum of ||d_t||, float64

    def __init__(
        self, parameters: Sequence[nn.Parameter], rule: str, start: str | None = None, alpha: float = 1.0
    ) -> None:
        super().__init__(parameters)
        self.rule, self.start, self.alpha = rule, start or STARTS[rule], alpha
        self.register_buffer("initial", self.weights())
        self.register_buffer("merged", torch.zeros_like(self.initial))
        self.register_buffer("start_weights", self.initial.clone())
        self.register_buffer("tasks", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("norms", torch.tensor(0.0, dtype=torch.float64))

    def begin(self) -> None:
        """Set the parameters to the task's start weights, which in the first task they have already."""
        self.write(self.start_weights)

    def end(self) -> None:
        """Merge the weights that the task has reached, and deploy the result."""
        trained, tasks = self.weights(), int(self.tasks)
        difference = trained - self.initial
        self.norms += difference.double().norm()
        self.merged = self._merge(difference, tasks) if tasks else difference
        self.tasks += 1
        self.write(self.initial + self.merged)
        if self.start == "merged":
            self.start_weights = self.weights()
        elif self.start == "carried" or (self.start == "first" and not tasks):
            self.start_weights = trained

    def _merge(self, difference: Tensor, tasks: int) -> Tensor:
        """M_t from M_(t-1) and d_t, t = `tasks`."""
        merged = self.merged
        if self.rule == "mean":
            return (tasks * merged + difference) / (tasks + 1)
        if self.rule == "ema":
            return merged + self.alpha * (difference - merged)
        if self.rule == "max_magnitude":
            return torch.where(difference.abs() >= merged.abs(), difference, merged)
        pairs = zip(self.split(merged), self.split(difference), strict=True)
        added = torch.cat([orthogonal_part(new, old).flatten() for old, new in pairs])
        total = self.scale * merged.double() + added
        mean = self.norms / (tasks + 1)
        if not mean or not total.any():  # no task has moved anything, or all cancels out
            return torch.zeros_like(difference)
        self.scale = total.norm() / mean
        return (total / self.scale).to(difference)

    def stored_numbers(self) -> int:
        """Numbers stored beside the deployed weights m_t: start weights, and w_init for some rules."""
        needed = {self.start} - {"merged"} | ({"initial"} if self.rule in FROM_INITIAL else set())
        return len(needed) * len(self.initial)


class MovingAverage(WeightVector):
    """Exponential moving average a <- decay a + (1 - decay) w of the weights w in training; it is deployed.

    The average starts as the weights after the first task, which are deployed as they are. A later task
    trains on from the weights w, not from the average.
    """

    average: Tensor  # (P,)
    trained: Tensor  # (P,): w at the end of the newest task

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters)
        self.register_buffer("average", self.weights())
        self.register_buffer("trained", self.weights())

    def begin(self) -> None:
        """Set the parameters to the weights that training goes on from."""
        self.write(self.trained)

    def update(self, decay: float) -> None:
        """Move the average towards the weights as they are now."""
        self.average = decay * self.average + (1 - decay) * self.weights()

    def end(self, first: bool) -> None:
        """Deploy the average, or after the first task the weights themselves."""
        self.trained = self.weights()
        if first:
            self.average = self.trained
        self.write(self.average)

    def stored_numbers(self) -> int:
        """Numbers stored beside the deployed average: the weights that training goes on from."""
        return len(self.trained)


def orthogonal_part(new: Tensor, merged: Tensor) -> Tensor:
    """P(D) of a new difference D (m, n): its part outside the main directions of the merged one M.

    With M = U S V^T (U and V square) and k the first index at which the singular values up to it make up more
    than half of their sum,

        P(D) = U Z V^T,   Z = U^T D V without its diagonal and the block of its first k rows and columns.

    A vector D (n,), or any D where M is zero, is returned unchanged. Computed in float64.
    """
    new, merged = new.double(), merged.double()
    if new.dim() < 2 or not merged.any():
        return new
    left, values, right = torch.linalg.svd(merged, full_matrices=True)
    rank = int((values.cumsum(0) <= values.sum() / 2).sum()) + 1
    coefficients = left.T @ new @ right.T
    coefficients.fill_diagonal_(0)
    coefficients[:rank, :rank] = 0
    return left @ coefficients @ right
