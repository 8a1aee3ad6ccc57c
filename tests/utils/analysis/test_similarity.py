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


def related(n: int = 30) -> tuple[Tensor, Tensor]:
    """Two representations that share half of what they are, far from the origin."""
    common = normal(n, 4)
    x = torch.cat([common, normal(n, 4, seed=1)], 1) + 20
    return x, torch.cat([2 * common, normal(n, 3, seed=2)], 1) - 7


def song(x: Tensor, y: Tensor) -> float:
    """The estimator of HSIC as Song et al. 2012 print it."""
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)
    k, l_ = (rows @ rows.T - torch.diag((rows @ rows.T).diag()) for rows in (x, y))
    middle = (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
    return float(((k @ l_).trace() + middle - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3)))


def test_cka_does_not_see_rotation_scale_shift_or_the_order_of_samples() -> None:
    x, y = related()
    value, order = linear_cka(x, y), torch.randperm(len(x), generator=rng("test", 5))
    assert 0.2 < value < 0.95
    padded = torch.cat([y, torch.zeros(len(y), 2)], 1)
    for changed in (y @ orthogonal(7), -3 * y, y + normal(7, seed=9), padded):
        assert linear_cka(x, changed) == pytest.approx(value, rel=1e-9)
    assert linear_cka(x[order], y[order]) == pytest.approx(value, rel=1e-9)
    assert abs(linear_cka(x[order], y)) < 0.3  # broken pairs
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12) == linear_cka(x, 2 * x @ orthogonal(8))
    stretched = y @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1, 1]).double())
    assert linear_cka(x, stretched) != pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("widths", [(8, 7, 9), (30, 40, 35), (30, 5, 35)], ids=["narrow", "wide", "mixed"])
def test_cka_is_the_normalised_published_estimator(widths: tuple[int, ...]) -> None:
    """Fewer samples than dimensions take another way to the same numbers."""
    shared = normal(12, 3)
    found = [torch.cat([shared, normal(12, width - 3, seed=width)], dim=1) for width in widths]
    hsic = np.array([[song(x, y) for y in found] for x in found])
    expected = hsic / np.sqrt(np.outer(hsic.diagonal(), hsic.diagonal()))
    matrix = cka_matrix(found)
    np.testing.assert_allclose(matrix.numpy(), expected, rtol=1e-8)
    assert torch.equal(matrix, matrix.T)


def test_what_does_not_vary_has_no_cka() -> None:
    matrix = cka_matrix([normal(10, 3), torch.full((10, 5), 0.1)])
    assert torch.isnan(matrix).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("shapes", [((3, 2), (3, 2)), ((8, 2), (7, 2)), ((8,), (8, 2))])
def test_what_cannot_be_compared_is_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="same at least 4 samples"):
        linear_cka(*(normal(*shape) for shape in shapes))


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
    with pytest.raises(ValueError, match="at least 1"):
        pca_basis(flat, 0)


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


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 0.3, math.pi / 2])
def test_a_known_angle_comes_out_however_small(angle: float) -> None:
    q = orthogonal(9, seed=1)
    turned = torch.stack([math.cos(angle) * q[:, 0] + math.sin(angle) * q[:, 2], q[:, 1]], 1)
    angles = principal_angles(q[:, :2], turned)
    assert float(angles[1]) == pytest.approx(angle, rel=1e-3) and float(angles[0]) < 1e-14


def test_angles_belong_to_spaces_not_to_bases() -> None:
    a, b, turn = normal(10, 3), normal(10, 3, seed=1), orthogonal(10, seed=2)
    value = grassmann_distance(a, b)
    assert grassmann_distance(a @ normal(3, 3, seed=4), -5 * b) == pytest.approx(value)
    assert grassmann_distance(turn @ a, turn @ b) == pytest.approx(value) == grassmann_distance(b, a)
    assert grassmann_distance(a, a @ normal(3, 3, seed=4)) < 1e-12
    assert grassmann_distance(turn[:, :2], turn[:, 2:4]) == pytest.approx(math.pi / math.sqrt(2))


def test_an_empty_space_has_no_angles() -> None:
    assert math.isnan(rms_angle(torch.zeros(5, 0), normal(5, 2)))
    for other in (torch.zeros(5, 0), normal(6, 2)):
        with pytest.raises(ValueError, match="no angles"):
            principal_angles(other, normal(5, 2))
