"""Ridge regression with a ridge chosen by leave-one-out error, from one singular value decomposition."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RidgeFit(NamedTuple):
    """A ridge regression y ~ x W for rows less their means, W = left @ right."""

    left: Tensor  # (d, k), k the lesser of n and d
    right: Tensor  # (k, C)
    error: float  # sum of squared leave-one-out residuals


def fit_ridge(x: Tensor, y: Tensor, strengths: Sequence[float], unit: float | None = None) -> RidgeFit:
    """W = (X^T X + strength unit I)^-1 X^T Y with the strength of the smallest squared leave-one-out error.

    x (n, d) and y (n, C) are rows less their means. Residuals of leave-one-out are e_i / (1 - h_ii) with the
    residuals e of the fit to all rows and h the diagonal of the hat matrix, mean included, so no regression
    is fitted again. unit: None for the largest squared singular value of x.
    """
    u, s, vt = torch.linalg.svd(x, full_matrices=False)  # (n, k), (k,), (k, d)
    unit = unit or float(s[0].square()) or 1.0  # rows that are all alike: any ridge gives the same
    projected = u.T @ y  # (k, C)

    def left_out_error(ridge: float) -> float:
        shrink = s.square() / (s.square() + ridge)  # (k,)
        leverage = (u.square() * shrink).sum(dim=1) + 1 / len(y)
        residuals = (y - u @ (shrink[:, None] * projected)) / (1 - leverage).clamp_min(1e-6)[:, None]
        return float(residuals.square().sum())

    errors = {strength: left_out_error(strength * unit) for strength in strengths}
    strength = min(errors, key=errors.get)
    right = (s / (s.square() + strength * unit))[:, None] * projected
    return RidgeFit(vt.T, right, errors[strength])
