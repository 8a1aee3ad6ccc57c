"""utils.analysis.ridge_path: solutions for many ridges against one solution each."""

import pytest
import torch
from torch import Tensor

from utils.analysis.ridge_path import COLUMNS, RidgePath, add_gram_, symmetric_
from utils.training.random import rng

RIDGES = [1e-3, 1.0, 1e3]


def rows(images: int, dim: int) -> Tensor:
    """Features of which a third is zero in every image."""
    x = torch.randn(images, dim, generator=rng("test rows", images, dim), dtype=torch.float64).relu()
    x[:, ::3] = 0
    return x


@pytest.mark.parametrize("images", [1, 10, 200])
@pytest.mark.parametrize(("dim", "block"), [(1, 4), (4, 4), (5, 4), (21, 4), (50, 8), (30, 64)])
def test_every_solution_is_that_of_its_own_system(dim: int, block: int, images: int) -> None:
    """Blocks that divide the matrix or not; fewer images than features, features that are never there."""
    x = rows(images, dim)
    cross = torch.randn(dim, 3, generator=rng("test cross", dim), dtype=torch.float64)
    gram = x.T @ x
    solutions, solved = RidgePath(gram, block).solve(cross, RIDGES)
    assert solved.all()
    for ridge, solution in zip(RIDGES, solutions, strict=True):
        expected = torch.linalg.solve(gram + ridge * torch.eye(dim, dtype=torch.float64), cross)
        torch.testing.assert_close(solution, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    torch.testing.assert_close(gram, x.T @ x, rtol=0, atol=0)


def test_systems_that_are_not_positive_definite_are_told() -> None:
    x = rows(10, 40)
    least = -torch.linalg.eigvalsh(x.T @ x)[-1].item()
    _, solved = RidgePath(x.T @ x, block=8).solve(torch.ones(40, 1).double(), [-1.0, least, -1e-3, 1e-3])
    assert solved.tolist() == [False, False, False, True]


def test_gram_matrices_are_added_in_one_triangle_and_mirrored() -> None:
    x = rows(20, COLUMNS + 30)
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(7):
        add_gram_(gram, part)
    assert symmetric_(gram) is gram and torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, x.T @ x)
