"""Leave-one-out errors of ridge regressions, from one singular value decomposition."""

from torch import Tensor


def left_out_error(ridge: float, u: Tensor, s: Tensor, projected: Tensor, y: Tensor) -> float:
    """Sum of squared leave-one-out residuals of the regression of y on x with a free mean.

    Its residuals are e_i / (1 - h_ii) with the residuals e of the fit to all rows and h the diagonal of the
    hat matrix, mean included, so no regression is fitted again.

    Args:
        ridge: added to the diagonal of x^T x.
        u, s: of x = u diag(s) v^T, rows less their mean; (n, k) and (k,).
        projected: u^T y, (k, C).
        y: rows less their mean, (n, C).
    """
    shrink = s.square() / (s.square() + ridge)  # (k,)
    leverage = (u.square() * shrink).sum(dim=1) + 1 / len(y)
    residuals = (y - u @ (shrink[:, None] * projected)) / (1 - leverage).clamp_min(1e-6)[:, None]
    return float(residuals.square().sum())
