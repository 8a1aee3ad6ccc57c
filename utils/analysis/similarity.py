"""Similarity of representations (linear CKA) and distance of subspaces (principal angles).

    cka_matrix([x, y, z])[0, 1]                          # x (n, p), y (n, q): row i of all is the same sample
    a, b = pca_basis(x, rank=8), pca_basis(y, rank=8)    # (d, k), orthonormal columns
    grassmann_distance(a, b)                         # l2 norm of the principal angles, radians

Everything is computed on the CPU in float64, without gradients.

Sources: linear CKA, Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019;
the unbiased estimator of HSIC, Song et al., *Feature Selection via Dependence Maximization*, JMLR 2012; its
use in CKA, Nguyen et al., *Do Wide and Deep Networks Learn the Same Things?*, ICLR 2021; principal angles,
Knyazev & Argentati, SIAM Journal on Scientific Computing 23, 2002, as scipy computes them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_SAMPLES = 4  # that the unbiased estimator needs
ROUNDING = 1e-12  # relative size up to which a variation is the rounding of float64


def cka_matrix(representations: Sequence[Tensor]) -> Tensor:
    """Linear centred kernel alignment of every pair of m representations (n, d_i), (m, m) float64.

    HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)) with the unbiased estimate of the Hilbert-Schmidt independence
    criterion. 1 if y is x up to rotation, reflection, shift and one common scale; about 0, possibly slightly
    negative, if they are independent; NaN if x or y does not vary. Row i of every representation is the same
    sample, of at least `MIN_SAMPLES`.

    With K = X X^T and L = Y Y^T whose diagonals are set to zero (K', L'), the estimate is
        1 / (n (n - 3)) (tr K' L' + 1'K'1 1'L'1 / ((n - 1) (n - 2)) - 2 / (n - 2) 1'K'L'1)
    It does not change when a constant is subtracted from all rows. For centred rows X X^T 1 = 0, and with
    k_i = |x_i|^2 and l_i = |y_i|^2 it needs no n x n matrix:
        1 / (n (n - 3)) (||X^T Y||_F^2 - n / (n - 2) sum_i k_i l_i + sum_i k_i sum_i l_i / ((n - 1) (n - 2)))
    """
    centred = [_centred(x) for x in representations]
    products, squares = _cross_products(centred), [x.square().sum(dim=1) for x in centred]
    own = [_hsic(products[i, i], square, square) for i, square in enumerate(squares)]
    matrix = torch.full((len(own), len(own)), math.nan, dtype=torch.float64)
    for i, x in enumerate(squares):
        for j, y in enumerate(squares[: i + 1]):
            if own[i] > 0 and own[j] > 0:
                matrix[i, j] = matrix[j, i] = _hsic(products[i, j], x, y) / math.sqrt(own[i] * own[j])
    return matrix


def pca_basis(x: Tensor, rank: int) -> Tensor:
    """The first principal directions of rows x (n, d), the strongest first: (d, k) orthonormal columns.

    k is `rank`, or less where the rows vary in fewer directions.
    """
    directions, sizes, _ = torch.linalg.svd(_centred(x).T, full_matrices=False)
    return directions[:, : min(rank, _numerical_rank(sizes, x))]


def column_space(left: Tensor, right: Tensor) -> Tensor:
    """Orthonormal basis (d, k) of the columns of left @ right, for (d, r) and (r, m).

    k = 0 where the product is zero. Directions that the inputs' precision cannot tell from rounding are left
    out.
    """
    basis, rest = torch.linalg.qr(left.detach().cpu().double())
    directions, sizes, _ = torch.linalg.svd(rest @ right.detach().cpu().double(), full_matrices=False)
    return basis @ directions[:, : _numerical_rank(sizes, left)]


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the column spaces of a (d, k) and b (d, m), ascending: (min(k, m),) radians; k, m > 0.

    Tiny angles are as accurate as large ones: they come from sines, not from cosines near 1.
    """
    from scipy.linalg import subspace_angles  # here: a run without analysis does without

    angles = subspace_angles(*(basis.detach().cpu().double().numpy() for basis in (a, b)))
    return torch.from_numpy(angles[::-1].copy())


def grassmann_distance(a: Tensor, b: Tensor) -> float:
    """Length of the shortest path between two subspaces, (sum theta_i^2)^(1/2), radians."""
    return float(principal_angles(a, b).norm())


def rms_angle(a: Tensor, b: Tensor) -> float:
    """(mean theta_i^2)^(1/2) in degrees, comparable over ranks; NaN where a or b has no column."""
    if not a.shape[1] or not b.shape[1]:
        return math.nan
    return math.degrees(float(principal_angles(a, b).square().mean().sqrt()))


def _centred(x: Tensor) -> Tensor:
    """Rows less their mean, float64; exactly zero where only rounding is left."""
    x = x.detach().cpu().double()
    centred = x - x.mean(dim=0)
    return centred if centred.norm() > ROUNDING * x.norm() else torch.zeros_like(x)


def _hsic(product: Tensor, of_x: Tensor, of_y: Tensor) -> float:
    """The estimate of `cka_matrix` from ||X^T Y||_F^2 and the squared lengths k, l (n,) of centred rows."""
    n = len(of_x)
    trace = product - n / (n - 2) * (of_x @ of_y)
    return float(trace + of_x.sum() * of_y.sum() / ((n - 1) * (n - 2))) / (n * (n - 3))


def _cross_products(centred: Sequence[Tensor]) -> Tensor:
    """||X_i^T X_j||_F^2 of every pair, (m, m); of few rows as tr(X_i X_i^T X_j X_j^T)."""
    if len(centred[0]) < min(x.shape[1] for x in centred):
        kernels = torch.stack([(x @ x.T).flatten() for x in centred])
        return kernels @ kernels.T
    products = torch.empty(len(centred), len(centred), dtype=torch.float64)
    for i, x in enumerate(centred):
        for j, y in enumerate(centred[: i + 1]):
            products[i, j] = products[j, i] = (x.T @ y).square().sum()
    return products


def _numerical_rank(sizes: Tensor, like: Tensor) -> int:
    """Numerical rank: descending singular values above the rounding of `like`'s entries."""
    precision = torch.finfo(like.dtype).eps * max(like.shape)
    return int((sizes > precision * sizes[0]).sum()) if sizes.numel() else 0
