"""Primitives of 8x8 grids: an example of each, and what holds for all operations."""

import pytest
import torch
from torch import Tensor

from models.shared_subspace.primitives import EMPTY, MAX_COLOURS, PRIMITIVES, SIDE, Operation, operations

COLOURS = 5
EVERY_OPERATION = [one for primitive in PRIMITIVES for one in operations(primitive, COLOURS)]


def operation(primitive: str, *parameters: int | str) -> Operation:
    return Operation(primitive, parameters)


def random_cells(colours: int = COLOURS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, colours, (32, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def grid(**cells: int) -> Tensor:
    """A grid with some cells filled: `grid(c03=2)` has colour 2 in row 0, column 3."""
    empty = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    for place, colour in cells.items():
        empty[int(place[1]), int(place[2])] = colour
    return empty


@pytest.mark.parametrize("one", EVERY_OPERATION, ids=str)
def test_an_operation_changes_grids_but_not_its_input(one: Operation) -> None:
    """It stays within the colours, treats each grid alone and needs no particular type of integers."""
    grids = random_cells()
    before = grids.clone()
    changed = one(grids)
    assert changed.shape == grids.shape and changed.dtype == grids.dtype and not torch.equal(changed, grids)
    assert int(changed.max()) < COLOURS
    assert torch.equal(grids, before) and changed.data_ptr() != grids.data_ptr()
    assert torch.equal(changed, torch.stack([one(grid) for grid in grids]))
    assert torch.equal(one(grids.long()), changed.long())


EXAMPLES: list[tuple[Operation, Tensor, Tensor]] = [
    (operation("rotate", 1), grid(c07=1), grid(c00=1)),
    (operation("rotate", 2), grid(c01=3), grid(c76=3)),
    (operation("reflect", "rows"), grid(c12=1), grid(c62=1)),
    (operation("reflect", "columns"), grid(c12=1), grid(c15=1)),
    (operation("transpose", "main"), grid(c12=1), grid(c21=1)),
    (operation("transpose", "other"), grid(c01=1), grid(c67=1)),
    (operation("shift", "up", 1), grid(c03=2, c50=1), grid(c73=2, c40=1)),
    (operation("shift", "right", 2), grid(c06=2, c51=1), grid(c00=2, c53=1)),
    (operation("shift", "down", 1), grid(c73=2), grid(c03=2)),
    (operation("shift", "left", 1), grid(c40=2), grid(c47=2)),
    (operation("cycle_colours", 1, 4), grid(c00=1, c11=4), grid(c00=2, c11=1)),
    (operation("swap_colours", 1, 3), grid(c00=1, c11=3, c22=2), grid(c00=3, c11=1, c22=2)),
    (operation("erase", 2), grid(c00=1, c11=2), grid(c00=1)),
    (operation("fall", "down"), grid(c03=1, c43=2, c50=3), grid(c63=1, c73=2, c70=3)),
    (operation("fall", "up"), grid(c23=1, c43=2), grid(c03=1, c13=2)),
    (operation("fall", "left"), grid(c35=1, c37=2), grid(c30=1, c31=2)),
    (operation("fall", "right"), grid(c30=1, c32=2), grid(c36=1, c37=2)),
    (operation("mirror", "up"), grid(c11=1, c77=2), grid(c11=1, c61=1)),
    (operation("mirror", "right"), grid(c16=1, c00=2), grid(c16=1, c11=1)),
    (operation("cut", "left"), grid(c33=1, c34=2), grid(c34=2)),
    (operation("cut", "down"), grid(c33=1, c44=2), grid(c33=1)),
    (operation("zoom", 0, 1), grid(c04=3, c70=1), grid(c00=3, c01=3, c10=3, c11=3)),
    (operation("outline", 4), grid(c00=1), grid(c00=1, c01=4, c10=4)),
]


@pytest.mark.parametrize(
    ("example", "before", "after"),
    EXAMPLES,
    ids=lambda value: str(value) if isinstance(value, Operation) else "",
)
def test_examples(example: Operation, before: Tensor, after: Tensor) -> None:
    assert torch.equal(example(before), after)


def test_frame_and_negate() -> None:
    framed = operation("frame", 2)(grid(c33=1, c00=4))
    assert int((framed == 2).sum()) == 28 and framed[3, 3] == 1 and framed[0, 0] == 2
    negated = operation("negate", 3)(grid(c33=1, c00=4))
    assert int((negated == 3).sum()) == 62 and negated[3, 3] == EMPTY and negated[0, 0] == EMPTY


@pytest.mark.parametrize("colours", [3, COLOURS, MAX_COLOURS])
def test_any_number_of_colours(colours: int) -> None:
    """Every primitive has parameters on grids of few and of many colours, and stays within them."""
    grids = random_cells(colours)
    for primitive in PRIMITIVES:
        variants = operations(primitive, colours)
        assert len(set(variants)) == len(variants) > 0
        assert all(int(one(grids).max()) < colours for one in variants)
