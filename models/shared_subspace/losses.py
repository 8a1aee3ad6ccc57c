"""Losses of the shared-subspace experiment: prediction, sharing of subspaces, sparse autoencoder.

    loss = TASK_LOSSES["ce"](logits, target)                        # (B, C, 8, 8), (B, 8, 8)
    sharing = SharingLoss(labels, config)
    terms = sharing(hidden, primitives)                             # terms.loss, terms.fallbacks
    sharing.update(terms)                                           # moves the running means
    sparse = sparse_terms(hidden, latents, reconstruction)          # sparse["reconstruction"], ...

All are means over samples; give them float32 or wider.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.primitives import EMPTY
from utils.training.random import rng

MIN_GAP = 1e-3  # between eigenvalues `rank` and `rank` + 1, relative to the largest; below it PCA is unstable
RIDGE = 1e-3  # of the random projection, relative to the trace: for samples that do not vary

# --- prediction ---------------------------------------------------------------------------------------------


def iou(colours: Tensor, targets: Tensor) -> Tensor:
    """IoU: |cells filled and right| / |cells filled in either grid|, 1 where both are empty.

    colours and targets: (B, 8, 8) integers; the result is (B,).
    """
    union = ((colours != EMPTY) | (targets != EMPTY)).sum(dim=(1, 2))
    right = ((colours == targets) & (targets != EMPTY)).sum(dim=(1, 2))
    return torch.where(union > 0, right / union.clamp_min(1), 1.0)


def soft_iou_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft 1 - IoU: cells count by their probability of the right colour and of being filled; scalar.

    With certain predictions it is 1 - `iou` itself. Where the target is empty the loss is u / (1 + u) with u
    the expected number of filled cells.
    """
    probabilities = logits.softmax(dim=1)  # (B, C, 8, 8)
    filled = targets != EMPTY
    right = probabilities.gather(1, targets[:, None].long()).squeeze(1) * filled
    union = torch.where(filled, 1.0, 1 - probabilities[:, EMPTY])
    right, union = right.sum(dim=(1, 2)), union.sum(dim=(1, 2))
    has_cells = filled.flatten(1).any(dim=1)
    return torch.where(has_cells, 1 - right / union.clamp_min(1.0), union / (1 + union)).mean()


TASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": lambda logits, targets: F.cross_entropy(logits, targets.long()),  # mean over cells and samples
    "iou": soft_iou_loss,
}

# --- sharing ------------------------------------------------------------------------------------------------


class _PrincipalProjector(torch.autograd.Function):
    """Projector P = V V^T, V the first k right singular vectors of X (n, d), whose columns have mean 0.

    With eigenvalues l and eigenvectors v of X^T X, and G the gradient of P (symmetric part),
        dL/dX = 2 X (M + M^T),   M = sum over i <= k < j of  v_i (v_i^T G v_j) v_j^T / (l_i - l_j).
    Only differences across the cut occur, so equal eigenvalues on one side of it do no harm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, directions: Tensor, eigenvalues: Tensor, rank: int) -> Tensor:
        ctx.save_for_backward(x, directions, eigenvalues)
        ctx.rank = rank
        return directions[:, :rank] @ directions[:, :rank].T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, directions, eigenvalues = ctx.saved_tensors
        kept, rest = directions[:, : ctx.rank], directions[:, ctx.rank :]
        above, below = eigenvalues[: ctx.rank, None], eigenvalues[None, ctx.rank :]
        g = kept.T @ ((gradient + gradient.T) / 2)  # (k, d)
        inside = (g @ rest) / (above - below)  # (k, r - k)
        outside = (g - (g @ directions) @ directions.T) / above  # (k, d): beyond the span of X
        m = kept @ (inside @ rest.T + outside)
        return 2 * x @ (m + m.T), None, None, None


def group_projector(x: Tensor, rank: int, probe: Tensor) -> tuple[Tensor, bool]:
    """Projector (d, d) onto the first principal directions of x (n, d), and whether it is a fallback.

    Differentiable in x; NaN where samples are not finite. Where the gap between eigenvalue `rank` and the
    next is below `MIN_GAP` of the largest, or samples span fewer directions, the subspace is that of
    (C / tr C + RIDGE I) `probe`: random directions (d, rank) multiplied by the covariance C, always defined.
    Source: Halko, Martinsson and Tropp, *Finding Structure with Randomness*, 2011.
    """
    x = x - x.mean(dim=0)
    if not x.isfinite().all():
        return x.new_full((x.shape[1], x.shape[1]), torch.nan), True
    _, sizes, directions = torch.linalg.svd(x.detach(), full_matrices=False)
    eigenvalues = F.pad(sizes.square(), (0, max(0, rank + 1 - len(sizes))))
    gap = eigenvalues[rank - 1] - eigenvalues[rank]
    if bool(gap > MIN_GAP * eigenvalues[0]):
        return _PrincipalProjector.apply(x, directions.T, sizes.square(), rank), False
    trace = x.square().sum().clamp_min(torch.finfo(x.dtype).eps)  # samples that do not vary have no gradient
    basis, _ = torch.linalg.qr(x.T @ (x @ probe.to(x)) / trace + RIDGE * probe.to(x))
    return basis @ basis.T, True


class SharingTerms(NamedTuple):
    """The sharing loss of a batch."""

    loss: Tensor  # scalar
    fallbacks: int  # groups whose PCA was unstable
    targets: Tensor  # (G, d, d), Q_j, detached
    groups: Tensor  # (G,), indices of their labels


class SharingLoss(nn.Module):
    """Mean distance between the subspaces of groups that share a primitive.

        loss = mean over ordered pairs (i, j) of  ||P_i - Q_j||_F^2 / (2 k),   Q_j = m A_j + (1 - m) P_j

    P_i projects onto the first k principal directions of group i in the batch, A_j is a running mean of P_j
    over batches, or the parts that `grad_accumulation` cuts them into (decay m = `sharing_ema`; with m = 0,
    and without a mean yet, Q_j = P_j). A group is the samples of one label. Between two subspaces of
    dimension k the value is 1 - mean cos^2 of their principal angles: 0 where they agree, 1 where they are
    orthogonal. With `sharing_detach` Q_j has no gradient: with m = 0 that halves the gradient and changes
    nothing else, since both directions of a pair occur.

    Args:
        labels: the multi-hot labels that occur, (M, P), each once.
    """

    def __init__(self, labels: Tensor, config: SharedSubspaceConfig) -> None:
        super().__init__()
        self.rank, self.detach = config.sharing_rank, config.sharing_detach
        self.ema = config.sharing_ema if config.uses("alpha") else 0.0
        width = config.hidden
        directions = torch.randn(width, self.rank, generator=rng("sharing probes", config.seed))
        self.register_buffer("labels", labels.bool())
        self.register_buffer("probe", torch.linalg.qr(directions)[0])  # of the fallback
        averaged = len(labels) if self.ema else 0
        self.register_buffer("averages", torch.zeros(averaged, width, width))
        self.register_buffer("seen", torch.zeros(averaged, dtype=torch.bool))

    def forward(self, hidden: Tensor, labels: Tensor) -> SharingTerms:
        """Loss of hidden (B, d) whose multi-hot labels (B, P) are among those that the loss was made for."""
        group_of = (labels[:, None].bool() == self.labels).all(dim=2).float().argmax(dim=1)
        groups = group_of.unique()
        found = [group_projector(hidden[group_of == group], self.rank, self.probe) for group in groups]
        projectors = torch.stack([projector for projector, _ in found])
        own = self.labels[groups].float()
        shared = (own @ own.T > 0).fill_diagonal_(False)
        targets = projectors
        if self.ema:
            mixed = self.ema * self.averages[groups] + (1 - self.ema) * projectors
            targets = torch.where(self.seen[groups][:, None, None], mixed, projectors)
        p, q = projectors.flatten(1), (targets.detach() if self.detach else targets).flatten(1)
        squares = p.square().sum(dim=1)[:, None] + q.square().sum(dim=1) - 2 * p @ q.T  # ||P_i - Q_j||_F^2
        distances = squares / (2 * self.rank)  # (G, G)
        loss = distances[shared].mean() if shared.any() else hidden.new_zeros(())
        fallbacks = sum(is_fallback for _, is_fallback in found)
        return SharingTerms(loss, fallbacks, targets.detach(), groups)

    def update(self, terms: SharingTerms) -> None:
        """Move the running means: A_j <- Q_j for the groups of a batch."""
        if self.ema:
            self.averages[terms.groups] = terms.targets
            self.seen[terms.groups] = True


# --- sparse autoencoder -------------------------------------------------------------------------------------


def sparse_terms(hidden: Tensor, latents: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """Losses and measures (scalars) of hidden (B, d), its latents (B, k) and their reconstruction (B, d)."""
    active = latents.detach() > 0
    error = (reconstruction - hidden).square().mean()
    variance = (hidden - hidden.mean(dim=0)).square().mean().clamp_min(torch.finfo(hidden.dtype).tiny)
    return {
        "reconstruction": error,
        "l1": latents.abs().sum(dim=1).mean(),  # sum over units of |z|, mean over samples
        "active_fraction": active.float().mean(),  # of units with z > 0, mean over samples
        "dead_fraction": 1 - active.any(dim=0).float().mean(),  # of units that are active on no sample
        "explained": (1 - error / variance).detach(),
    }
