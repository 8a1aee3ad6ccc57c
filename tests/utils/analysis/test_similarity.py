"""utils.analysis.similarity: explicit formulas, other libraries, and what must not change a measure."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from utils.analysis.similarity import (
    cka_matrix,
    column_space,
    grassmann_distance,
    pca_basis,
    principal_angles,
    rms_angle,
)
from utils.training.random import rng


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng("test", seed), dtype=torch.float64)


def orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def linear_cka(x: Tensor, y: Tensor) -> float:
    return float(cka_matrix([x, y])[0, 1])


def song(x: Tensor, y: Tensor) -> float:
    """The estimator of HSIC as Song et al. 2012 print it."""
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)
    k, l_ = (rows @ rows.T - torch.diag((rows @ rows.T).diag()) for rows in (x, y))
    middle = (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
    return float(((k @ l_).trace() + middle - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3)))


@pytest.mark.parametrize("widths", [(8, 7, 9), (30, 40, 35), (30, 5, 35)], ids=["narrow", "wide", "mixed"])
def test_cka_is_the_normalised_published_estimator(widths: tuple[int, ...]) -> None:
    """Fewer samples than dimensions take another way to the same numbers; a shift is not seen."""
    shared = normal(12, 3)
    found = [torch.cat([shared, normal(12, width - 3, seed=width)], dim=1) for width in widths]
    hsic = np.array([[song(x, y) for y in found] for x in found])
    expected = hsic / np.sqrt(np.outer(hsic.diagonal(), hsic.diagonal()))
    matrix = cka_matrix([x + 20 for x in found])
    np.testing.assert_allclose(matrix.numpy(), expected, rtol=1e-8)
    assert torch.equal(matrix, matrix.T)


def test_what_does_not_vary_has_no_cka() -> None:
    assert math.isnan(linear_cka(normal(10, 3), torch.full((10, 5), 0.1)))


def test_pca_basis_spans_the_strongest_directions() -> None:
    x = normal(50, 6) @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 1.0, 0.5, 0.1]).double()) @ orthogonal(6) + 30
    basis = pca_basis(x, 3)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T))
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    np.testing.assert_allclose((basis @ basis.T).numpy(), vectors[:, 3:] @ vectors[:, 3:].T, atol=1e-10)
    assert float((x @ basis[:, 0]).var()) == pytest.approx(values[-1])


def test_pca_basis_has_no_more_columns_than_the_data_has_directions() -> None:
    flat = normal(20, 2) @ normal(2, 7) + 4
    assert pca_basis(flat, 5).shape == (7, 2) and pca_basis(flat.float(), 5).shape == (7, 2)
    assert pca_basis(torch.full((9, 4), 0.1), 3).shape == (4, 0)
    assert pca_basis(normal(3, 8), 8).shape == (8, 2)


def test_column_space_of_a_product() -> None:
    up, down = normal(20, 5), normal(5, 30, seed=1)
    down[4] = down[3]
    up[:, 4] = -up[:, 3]  # cancels: the product has rank 3
    basis, expected = column_space(up, down), scipy.linalg.orth((up @ down).numpy())
    assert basis.shape == expected.shape == (20, 3)
    np.testing.assert_allclose((basis @ basis.T).numpy(), expected @ expected.T, atol=1e-10)
    assert column_space(torch.zeros(20, 5), down.float()).shape == (20, 0)


def test_angles_are_those_of_an_svd() -> None:
    a, b = normal(12, 3), normal(12, 5, seed=1)
    q_a, q_b = (np.linalg.qr(m.numpy())[0] for m in (a, b))
    expected = np.sort(np.arccos(np.linalg.svd(q_a.T @ q_b, compute_uv=False)))
    np.testing.assert_allclose(principal_angles(a, b).numpy(), expected, atol=1e-9)
    assert grassmann_distance(a, b) == pytest.approx(np.sqrt((expected**2).sum()))
    assert rms_angle(a, b) == pytest.approx(np.degrees(np.sqrt((expected**2).mean())))
    assert math.isnan(rms_angle(a, torch.zeros(12, 0)))


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 0.3, math.pi / 2])
def test_a_known_angle_comes_out_however_small(angle: float) -> None:
    q = orthogonal(9, seed=1)
    turned = torch.stack([math.cos(angle) * q[:, 0] + math.sin(angle) * q[:, 2], q[:, 1]], 1)
    angles = principal_angles(q[:, :2], turned)
    assert float(angles[1]) == pytest.approx(angle, rel=1e-3) and float(angles[0]) < 1e-14
