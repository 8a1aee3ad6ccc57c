"""How features moved while a task was learned, as an affine map estimated on that task's images.

    drift = fit_drift(before, after)             # features of the same images, (n, d) each
    means = drift.apply(means)                   # where old class means are now, (C, d)
    covariance = drift.apply_covariance(covariance)

Class statistics of earlier tasks are kept without images; when the backbone goes on learning they belong to a network
that is no more. Compensating their drift from the current task's features follows Yu et al., *Semantic Drift
Compensation for Class-Incremental Learning*, CVPR 2020; doing it with one linear map, Gomez-Villa et al.,
*Exemplar-free Continual Representation Learning via Learnable Drift Compensation*, ECCV 2024. The ridge towards the
identity, its choice by leave-one-out and the residual covariance are this project's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

STRENGTHS = [10.0**k for k in range(-5, 4)]  # ridge candidates, relative to the largest squared singular value


class Drift(NamedTuple):
    """after ~ before + (before - centre) move + shift, with Gaussian residuals.

    Attributes:
        centre: mean of `before`, (d,).
        shift: mean movement, (d,).
        move: linear part of the movement around the centre, (d, d); zero means that all images moved alike.
        residual: covariance of what the map leaves unexplained, from leave-one-out residuals, (d, d).
        explained: 1 - ||leave-one-out residual||^2 / ||after - before||^2; 1 where nothing moved.
    """

    centre: Tensor
    shift: Tensor
    move: Tensor
    residual: Tensor
    explained: float

    def apply(self, features: Tensor) -> Tensor:
        """Features (n, d) as the new network would give them."""
        return features + (features - self.centre) @ self.move + self.shift

    def apply_covariance(self, covariance: Tensor) -> Tensor:
        """Covariance (d, d) of features after the same map: J^T S J + residual with J = I + move."""
        jacobian = self.move + torch.eye(len(self.move), dtype=self.move.dtype)
        return jacobian.T @ covariance @ jacobian + self.residual


def fit_drift(before: Tensor, after: Tensor) -> Drift:
    """The affine map from old to new features of the same images (n, d), n >= 2; computed and returned in float64.

    With X = before - mean, Y = after - before - mean movement, the linear part is (X^T X + s I)^-1 X^T Y: with little
    evidence (s large against the data) all images are taken to have moved alike. s is the candidate of `STRENGTHS` with
    the smallest leave-one-out error, whose residuals are e_i / (1 - h_ii), h the diagonal of the hat matrix with mean.
    """
    before, after = before.double(), after.double()
    centre, movement = before.mean(dim=0), after - before
    shift = movement.mean(dim=0)
    total = float(movement.square().sum())
    if total == 0:
        zero = before.new_zeros(before.shape[1], before.shape[1])
        return Drift(centre, shift, zero, zero.clone(), 1.0)
    x, y = before - centre, movement - shift
    u, s, vt = torch.linalg.svd(x, full_matrices=False)  # (n, k), (k,), (k, d)
    projected = u.T @ y  # (k, d)
    best: tuple[float, Tensor, Tensor] | None = None
    for strength in STRENGTHS:
        shrink = s.square() / (s.square() + strength * s[0].square())  # (k,)
        leverage = (u.square() * shrink).sum(dim=1) + 1 / len(x)
        left_out = (y - u @ (shrink[:, None] * projected)) / (1 - leverage).clamp_min(1e-6)[:, None]
        error = float(left_out.square().sum())
        if best is None or error < best[0]:
            inverse = s / (s.square() + strength * s[0].square())
            best = error, vt.T @ (inverse[:, None] * projected), left_out
    error, move, left_out = best
    return Drift(centre, shift, move, left_out.T @ left_out / len(x), 1 - error / total)
