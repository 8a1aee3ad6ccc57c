"""How features moved while a task was learned, as an affine map estimated on that task's images.

    drift = fit_drift(before, after)             # features of the same images, (n, d) each
    means = drift.apply(means)                   # where old class means are now, (C, d)

Class statistics of earlier tasks are kept without images; when the backbone goes on learning they belong to a network
that is no more. Compensating their drift from the current task's features follows Yu et al., *Semantic Drift
Compensation for Class-Incremental Learning*, CVPR 2020; doing it with one linear map, Gomez-Villa et al.,
*Exemplar-free Continual Representation Learning via Learnable Drift Compensation*, ECCV 2024. The ridge towards a
common movement and its choice by leave-one-out are this project's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.analysis.ridge import left_out_error

# Ridge candidates, relative to the largest squared singular value. Weaker ones fit the newest task's images better and
# carry other images anywhere; on DINOv2 features of CIFAR-100 leave-one-out chooses none of them.
STRENGTHS = [10.0**k for k in range(-2, 4)]


class Drift(NamedTuple):
    """after ~ before J + shift, for features as rows.

    Attributes:
        jacobian: J = I + linear part of the movement, (d, d).
        shift: (d,).
        explained: 1 - ||leave-one-out residual||^2 / ||after - before||^2; 1 where nothing moved.
    """

    jacobian: Tensor
    shift: Tensor
    explained: float

    def apply(self, features: Tensor) -> Tensor:
        """Features (n, d) as the new network would give them."""
        return features @ self.jacobian + self.shift


def fit_drift(before: Tensor, after: Tensor) -> Drift:
    """The affine map from old to new features of the same images (n, d); computed and returned in float64.

    It knows the newest task's images alone: where features of older classes move otherwise, it misleads.

    With X = before - mean and Y = after - before - mean movement, J = I + (X^T X + s I)^-1 X^T Y: with little evidence
    (s large against the data) all images are taken to have moved alike. s is the candidate of `STRENGTHS` with the
    smallest leave-one-out error, whose residuals are e_i / (1 - h_ii), h the diagonal of the hat matrix with mean.
    Images that are all alike give J = I; of one image alone nothing is explained, as nothing is left to predict it.
    """
    before, after = before.double(), after.double()
    movement, identity = after - before, torch.eye(before.shape[1], dtype=torch.float64)
    total = float(movement.square().sum())
    if total == 0 or len(before) == 1:
        return Drift(identity, movement.mean(dim=0), float(total == 0))
    centre, common = before.mean(dim=0), movement.mean(dim=0)
    x, y = before - centre, movement - common
    u, s, vt = torch.linalg.svd(x, full_matrices=False)  # (n, k), (k,), (k, d)
    projected = u.T @ y  # (k, d)
    largest = float(s[0].square()) or 1.0  # images that are all alike: any ridge gives the same
    errors = {strength: left_out_error(strength * largest, u, s, projected, y) for strength in STRENGTHS}
    strength = min(errors, key=errors.get)
    inverse = s / (s.square() + strength * largest)
    move = vt.T @ (inverse[:, None] * projected)
    return Drift(identity + move, common - centre @ move, 1 - errors[strength] / total)
