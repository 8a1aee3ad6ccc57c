"""Losses of the shared-subspace experiment: the task's, the one that pulls subspaces together, and the sparse code's.

    loss = TASK_LOSSES["ce"](logits, target)                        # (B, C, 8, 8), (B, 8, 8)
    sharing = SharingLoss(labels, width=128, rank=4, generator=generator)
    terms = sharing(hidden, primitives)                             # terms.loss, terms.pairs, terms.fallbacks
    sharing.update(terms)                                           # after the step, where there is an average
    code = sparse_terms(hidden, sparse, rebuilt)                    # code.reconstruction, code.l1, code.activity
    weight = weight_at([[0, 0], [0.2, 1]], progress=0.1)            # 0.5

All are means over samples, and float32 at least.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.shared_subspace.tasks import LEAST_GROUP

LEAST_GAP = (
    1e-3  # between the eigenvalues on both sides of the cut, relative to the largest; below, PCA is unstable
)
RIDGE = (
    1e-3  # of the random projection, relative to the trace: what it falls back on where samples do not vary
)

# ---------------------------------------------------------------------------------------------------------------------
# The task


def iou(colours: Tensor, targets: Tensor, empty: int = 0) -> Tensor:
    """|cells that are filled and right| / |cells that are filled in either grid|; 1 where both grids are empty.

    colours and targets: (B, 8, 8) integers; the result is (B,).
    """
    union = ((colours != empty) | (targets != empty)).sum(dim=(1, 2))
    right = ((colours == targets) & (targets != empty)).sum(dim=(1, 2))
    return torch.where(union > 0, right / union.clamp_min(1), 1.0)


def soft_iou_loss(logits: Tensor, targets: Tensor, empty: int = 0) -> Tensor:
    """1 - `iou`, a cell counting by its probability of the right colour and of being filled; scalar.

    With certain predictions it is 1 - `iou` itself. Where the target is empty there is no right cell to gain, and the
    loss is u / (1 + u) with u the expected number of filled cells: 0 where they are none, as in 1 - `iou`.
    """
    probabilities = _wide(logits).softmax(dim=1)  # (B, C, 8, 8)
    filled = targets != empty
    right = probabilities.gather(1, targets[:, None]).squeeze(1) * filled
    union = torch.where(filled, 1.0, 1 - probabilities[:, empty])
    right, union = right.sum(dim=(1, 2)), union.sum(dim=(1, 2))
    has_cells = filled.flatten(1).any(dim=1)
    return torch.where(has_cells, 1 - right / union.clamp_min(1.0), union / (1 + union)).mean()


def cell_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the colour, mean over cells and samples; scalar."""
    return F.cross_entropy(_wide(logits), targets)


def _wide(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


TASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cell_cross_entropy, "iou": soft_iou_loss}

# ---------------------------------------------------------------------------------------------------------------------
# Subspaces


class _PrincipalProjector(torch.autograd.Function):
    """P = V V^T with V the first k right singular vectors of X (n, d), whose columns have mean 0.

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
        kept, left = directions[:, : ctx.rank], directions[:, ctx.rank :]
        above, below = eigenvalues[: ctx.rank, None], eigenvalues[None, ctx.rank :]
        turned = kept.T @ ((gradient + gradient.T) / 2)  # (k, d)
        inside = (turned @ left) / (above - below)  # (k, r - k)
        outside = (
            turned - (turned @ directions) @ directions.T
        ) / above  # (k, d): directions X says nothing about
        m = kept @ (inside @ left.T + outside)
        return 2 * x @ (m + m.T), None, None, None


class Projector(NamedTuple):
    """The projector (d, d) onto a group's subspace, and whether it had to be a random projection's."""

    matrix: Tensor
    is_fallback: bool


def group_projector(x: Tensor, rank: int, probe: Tensor) -> Projector:
    """The projector onto the first `rank` principal directions of x (n, d), differentiable in x.

    Where the gap between eigenvalue `rank` and the next is below `LEAST_GAP` of the largest, or samples do not span so
    many directions, these directions are not determined. Then the subspace is that of (C / tr C + RIDGE I) `probe`, a
    few random directions (d, rank) seen through the covariance C, which is always defined. Source: Halko, Martinsson
    and Tropp, *Finding Structure with Randomness*, 2011. Of samples that are no numbers the projector is none either.
    """
    x = x - x.mean(dim=0)
    if not x.isfinite().all():
        return Projector(x.new_full((x.shape[1], x.shape[1]), torch.nan), True)
    _, sizes, directions = torch.linalg.svd(x.detach(), full_matrices=False)
    eigenvalues = F.pad(sizes.square(), (0, max(0, rank + 1 - len(sizes))))
    gap = eigenvalues[rank - 1] - eigenvalues[rank]
    if bool(gap > LEAST_GAP * eigenvalues[0]):
        return Projector(_PrincipalProjector.apply(x, directions.T, sizes.square(), rank), False)
    trace = x.square().sum().clamp_min(torch.finfo(x.dtype).eps)  # samples that do not vary have no gradient
    basis, _ = torch.linalg.qr(x.T @ (x @ probe.to(x)) / trace + RIDGE * probe.to(x))
    return Projector(basis @ basis.T, True)


def sharing_pairs(labels: Tensor) -> Tensor:
    """Which of the multi-hot labels (G, P) have a primitive in common with which others, (G, G) bool."""
    return (labels.float() @ labels.float().T > 0).fill_diagonal_(False)


def projector_distances(ours: Tensor, theirs: Tensor, rank: int) -> Tensor:
    """||P_i - Q_j||_F^2 / (2 k) for every pair of matrices (G, d, d) and (H, d, d): (G, H)."""
    p, q = ours.flatten(1), theirs.flatten(1)
    squares = p.square().sum(dim=1)[:, None] + q.square().sum(dim=1) - 2 * p @ q.T
    return squares / (2 * rank)


class SharingTerms(NamedTuple):
    """What the sharing loss saw in a batch.

    loss: scalar; pairs: of groups that share a primitive, each in both directions; fallbacks: groups whose PCA was
    unstable; projectors (G, d, d), detached; groups (G,), their numbers among the labels the loss knows.
    """

    loss: Tensor
    pairs: int
    fallbacks: int
    projectors: Tensor
    groups: Tensor


class SharingLoss(nn.Module):
    """How far apart the subspaces are of groups that share a primitive.

        loss = mean over ordered pairs (i, j) of  ||P_i - Q_j||_F^2 / (2 k),   Q_j = m A_j + (1 - m) P_j

    P_i projects onto the first k principal directions of group i in the batch, A_j is a running mean of P_j over steps
    (decay m; with m = 0, and at first sight, Q_j = P_j). A group is the samples of one label. Between two subspaces of
    dimension k the value is 1 - mean cos^2 of their principal angles: 0 where they agree, 1 where they are orthogonal.

    Args:
        labels: the multi-hot labels that occur, (M, P), each once.
        width: d.
        rank: k.
        generator: draws the random directions of the fallback.
        ema: m.
        detach: Q_j has no gradient: every group is pulled towards others that stand still. With m = 0 that halves the
            gradient and changes nothing else, since both directions of a pair are there.
    """

    probe: Tensor
    averages: Tensor
    seen: Tensor

    def __init__(
        self,
        labels: Tensor,
        *,
        width: int,
        rank: int,
        generator: torch.Generator,
        ema: float = 0.0,
        detach: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.ema, self.detach = rank, ema, detach
        probe, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator))
        self.register_buffer("labels", labels.bool())
        self.register_buffer("probe", probe)
        kept = len(labels) if ema else 0  # only an average needs to be kept
        self.register_buffer("averages", torch.zeros(kept, width, width))
        self.register_buffer("seen", torch.zeros(kept, dtype=torch.bool))

    def forward(self, hidden: Tensor, labels: Tensor) -> SharingTerms:
        """hidden (B, d) and the multi-hot labels (B, P) of its samples; single samples of a label are left out."""
        group_of = self.numbers(labels)
        present, counts = group_of.unique(return_counts=True)
        present = present[counts >= LEAST_GROUP]
        found = [group_projector(hidden[group_of == group], self.rank, self.probe) for group in present]
        fallbacks = sum(projector.is_fallback for projector in found)
        if not found:
            empty = hidden.new_zeros(0, hidden.shape[1], hidden.shape[1])
            return SharingTerms(hidden.new_zeros(()), 0, 0, empty, present)
        projectors = torch.stack([projector.matrix for projector in found])
        shared = sharing_pairs(self.labels[present])
        pairs = int(shared.sum())
        distances = projector_distances(projectors, self._targets(projectors, present), self.rank)
        loss = distances[shared].mean() if pairs else hidden.new_zeros(())
        return SharingTerms(loss, pairs, fallbacks, projectors.detach(), present)

    def numbers(self, labels: Tensor) -> Tensor:
        """Which of the known labels each one is, (B, P) -> (B,)."""
        agree = (labels[:, None].bool() == self.labels).all(dim=2)
        if not bool(agree.any(dim=1).all()):
            raise ValueError("a sample has a label that the sharing loss was not made for")
        return agree.float().argmax(dim=1)

    def _targets(self, projectors: Tensor, groups: Tensor) -> Tensor:
        """Q of each group."""
        targets = projectors
        if self.ema:
            mixed = self.ema * self.averages[groups] + (1 - self.ema) * projectors
            targets = torch.where(self.seen[groups][:, None, None], mixed, projectors)
        return targets.detach() if self.detach else targets

    @torch.no_grad()
    def update(self, terms: SharingTerms) -> None:
        """Take a batch's projectors into the running means."""
        if self.ema and len(terms.groups):
            before = torch.where(
                self.seen[terms.groups][:, None, None], self.averages[terms.groups], terms.projectors
            )
            self.averages[terms.groups] = self.ema * before + (1 - self.ema) * terms.projectors
            self.seen[terms.groups] = True


# ---------------------------------------------------------------------------------------------------------------------
# The sparse code, and weights that change


class SparseTerms(NamedTuple):
    """Losses and measures of a sparse autoencoder on a batch, scalars.

    reconstruction: mean squared error of the rebuilt vectors; l1: sum over units of |z|, mean over samples;
    activity: share of units with z > 0, mean over samples; silent: share of units that no sample made active;
    explained: 1 - squared error / variance.
    """

    reconstruction: Tensor
    l1: Tensor
    activity: Tensor
    silent: Tensor
    explained: Tensor


def sparse_terms(hidden: Tensor, sparse: Tensor, rebuilt: Tensor) -> SparseTerms:
    """`SparseTerms` of hidden (B, d), its code (B, k) and what was rebuilt from it (B, d)."""
    active = sparse.detach() > 0
    error = (rebuilt - hidden).square()
    variance = (hidden - hidden.mean(dim=0)).square().mean().clamp_min(torch.finfo(hidden.dtype).tiny)
    return SparseTerms(
        reconstruction=error.mean(),
        l1=sparse.abs().sum(dim=1).mean(),
        activity=active.float().mean(),
        silent=1 - active.any(dim=0).float().mean(),
        explained=(1 - error.mean() / variance).detach(),
    )


def weight_at(points: Sequence[Sequence[float]], progress: float) -> float:
    """The weight at a share of training, straight lines between points [share, weight], constant beyond them."""
    shares, weights = zip(*points, strict=True)
    return float(np.interp(progress, shares, weights))
