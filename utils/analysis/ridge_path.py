"""RidgePath: ridge regressions on one Gram matrix for many ridges, from one factorization of it.

    path = RidgePath(gram)                                   # (M, M); 4/3 M^3 operations, once
    weights, solved = path.solve(cross, [1.0, 10.0, 100.0])  # (M, C) -> (3, M, C), bool (3,)

G = U B U^T, with U orthogonal and B a band matrix. Then

    (G + r I)^-1 Q = U (B + r I)^-1 U^T Q

costs little more per ridge r than the product with U, whereas a Cholesky factorization of each G + r I takes
M^3 / 3 operations.

Sources: reduction to a band by blocks of Householder reflections, Bischof, Lang and Sun, *A Framework for
Symmetric Band Reduction*, ACM TOMS 26, 2000; products of reflections as I - V T V^T, Schreiber and Van Loan,
*A Storage-Efficient WY Representation for Products of Householder Transformations*, SIAM J. Sci. Stat.
Comput. 10, 1989.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64  # diagonals of the band on either side of the main one
COLUMNS = 1024  # columns of a triangle that are processed at once


class RidgePath:
    """A Gram matrix reduced to a band matrix of square blocks on the diagonal and triangles below them.

    Args:
        gram: symmetric, (M, M) float64; left as it is. A copy of its size is kept.
        block: rows of a block.
    """

    def __init__(self, gram: Tensor, block: int = BLOCK) -> None:
        rest, self.block = gram.clone(), block
        self.diagonal: list[Tensor] = []
        self.below: list[Tensor] = []
        self.reflections: list[tuple[Tensor, Tensor]] = []  # V (m, k) and T (k, k) of the last m rows
        while len(rest) > block:
            v, t, triangle = _reflections(rest[block:, :block])
            self.diagonal.append(rest[:block, :block].clone())
            self.below.append(triangle)
            self.reflections.append((rest[block:, : v.shape[1]].copy_(v), t))  # where zeros are now
            rest = rest[block:, block:]
            _reflect_both_sides(rest, v, t)
        self.diagonal.append(rest)

    def solve(self, cross: Tensor, ridges: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(G + r I)^-1 Q for every ridge r: (M, C) -> (R, M, C).

        And whether each G + r I is positive definite to working precision, bool (R,); if not, its solution is
        meaningless.
        """
        shifts = torch.tensor(ridges, dtype=cross.dtype)[:, None, None]
        rotated = cross.clone()
        for below, v, t in self._parts(rotated):
            below.addmm_(v, t.T @ (v.T @ below), alpha=-1)
        banded, solved = self._solve_band(rotated, shifts)
        solutions = banded.movedim(0, 1).flatten(1)  # (M, R C)
        for below, v, t in reversed(self._parts(solutions)):
            below.addmm_(v, t @ (v.T @ below), alpha=-1)
        return solutions.view(len(cross), len(ridges), -1).movedim(1, 0), solved

    def _parts(self, rows: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The rows (M, ...) that each block of reflections acts on, with its V and T."""
        return [(rows[-len(v) :], v, t) for v, t in self.reflections]

    def _solve_band(self, rows: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """(B + r I)^-1 X: (M, C), (R, 1, 1) -> (R, M, C), bool (R,); by B + r I = L L^T, block by block."""
        solved = torch.ones(len(shifts), dtype=torch.bool)
        factors, couplings, found = [], [], []
        for number, (block, right) in enumerate(zip(self.diagonal, rows.split(self.block), strict=True)):
            pivot = block + shifts * torch.eye(len(block), dtype=block.dtype)
            if number:
                beside = self.below[number - 1].T.expand(len(shifts), -1, -1)
                coupling = torch.linalg.solve_triangular(factors[-1], beside, upper=False).mT
                couplings.append(coupling)
                pivot = pivot - coupling @ coupling.mT
                right = right - coupling @ found[-1]
            factor, failed = torch.linalg.cholesky_ex(pivot)
            solved &= failed == 0
            factors.append(factor)
            found.append(torch.linalg.solve_triangular(factor, right, upper=False))
        for number in reversed(range(len(found))):
            if number + 1 < len(found):
                found[number] = found[number] - couplings[number].mT @ found[number + 1]
            found[number] = torch.linalg.solve_triangular(factors[number].mT, found[number], upper=True)
        return torch.cat(found, dim=1), solved


def symmetric_(matrix: Tensor) -> Tensor:
    """Mirror the lower triangle of a matrix above its diagonal, in place; returns it."""
    for start in range(0, len(matrix), COLUMNS):
        stop = start + COLUMNS
        square = matrix[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).mT)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].mT
    return matrix


def add_gram_(gram: Tensor, rows: Tensor) -> None:
    """Add X^T X of rows X (n, M) to the lower triangle of a matrix (M, M), in place."""
    for start in range(0, len(gram), COLUMNS):
        columns = slice(start, start + COLUMNS)
        gram[start:, columns].addmm_(rows[:, start:].T, rows[:, columns])


def _reflections(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V (m, k), T (k, k) and R (k, b) with H^T panel = [R; 0], H = I - V T V^T; of a panel (m, b)."""
    packed, scales = torch.geqrf(panel)
    kept = scales != 0  # a column of zeros is reflected by nothing
    v = packed[:, : len(scales)].tril(-1)
    v.diagonal().fill_(1)
    v *= kept
    inverse = (v.T @ v).triu(1) + torch.diag(1 / torch.where(kept, scales, 1))
    t = torch.linalg.solve_triangular(inverse, torch.eye(len(scales), dtype=panel.dtype), upper=True)
    return v, t, packed[: len(scales)].triu()


def _reflect_both_sides(matrix: Tensor, v: Tensor, t: Tensor) -> None:
    """A -> H^T A H = A - V Y^T - Y V^T with H = I - V T V^T, in the lower triangle of A and in squares on it.

    The squares end where they did when A was larger, COLUMNS from each other.
    """
    product = torch.zeros(v.shape[1], len(matrix), dtype=v.dtype)  # (A V)^T
    first = len(matrix) % COLUMNS or COLUMNS
    stops = range(first, len(matrix) + 1, COLUMNS)
    stripes = [(max(0, stop - COLUMNS), stop) for stop in stops]
    for start, stop in stripes:
        product[:, start:stop] += v[start:].T @ matrix[start:, start:stop]
        product[:, stop:] += v[start:stop].T @ matrix[stop:, start:stop].T
    y = product.T @ t
    y -= v @ (t.T @ (v.T @ y)) / 2
    left, right = torch.cat([v, y], dim=1), torch.cat([y, v], dim=1).T
    for start, stop in stripes:
        matrix[start:, start:stop].addmm_(left[start:], right[:, start:stop], alpha=-1)
