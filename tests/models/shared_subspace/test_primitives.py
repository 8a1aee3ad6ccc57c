"""Primitives of 8x8 grids: what each does on an example, and what holds for all of them."""

import pytest
import torch
from torch import Tensor

from models.shared_subspace.primitives import (
    EMPTY,
    MOST_COLOURS,
    PRIMITIVES,
    SIDE,
    Cut,
    CycleColours,
    Erase,
    Fall,
    Frame,
    Mirror,
    Negate,
    Outline,
    Reflect,
    Rotate,
    Shift,
    Step,
    SwapColours,
    Transpose,
    Zoom,
)

COLOURS = 5


def every_step() -> list[Step]:
    return [step for primitive in PRIMITIVES.values() for step in primitive.variants(COLOURS)]


def some_grids(count: int = 32, colours: int = COLOURS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, colours, (count, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def grid(**cells: int) -> Tensor:
    """A grid with some cells filled: `grid(c03=2)` has colour 2 in row 0, column 3."""
    empty = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    for place, colour in cells.items():
        empty[int(place[1]), int(place[2])] = colour
    return empty


def test_there_are_at_least_ten_and_each_has_parameters() -> None:
    assert len(PRIMITIVES) >= 10
    for primitive in PRIMITIVES.values():
        variants = primitive.variants(COLOURS)
        assert len(variants) >= 2 and len(set(variants)) == len(variants)


@pytest.mark.parametrize("step", every_step(), ids=str)
def test_a_step_gives_grids_of_the_same_colours_and_leaves_its_input_alone(step: Step) -> None:
    grids = some_grids()
    before = grids.clone()
    changed = step(grids)
    assert changed.shape == grids.shape and changed.dtype == grids.dtype
    assert int(changed.max()) < COLOURS
    assert torch.equal(grids, before) and changed.data_ptr() != grids.data_ptr()


@pytest.mark.parametrize("step", every_step(), ids=str)
def test_a_step_does_something_and_the_same_to_one_grid_as_to_many(step: Step) -> None:
    grids = some_grids()
    assert not torch.equal(step(grids), grids)
    assert torch.equal(step(grids), torch.stack([step(one) for one in grids]))
    assert torch.equal(step(grids.long()), step(grids).long())


@pytest.mark.parametrize("step", every_step(), ids=str)
def test_the_inverse_gives_the_grids_back_where_there_is_one(step: Step) -> None:
    grids, undo = some_grids(), step.inverse()
    if undo is None:  # then different grids become the same
        plain = nearly_plain_grids()
        assert len(step(plain).unique(dim=0)) < len(plain)
    else:
        assert torch.equal(undo(step(grids)), grids) and torch.equal(step(undo(grids)), grids)


def nearly_plain_grids() -> Tensor:
    """Every grid of one colour with one cell of another."""
    grids = (
        torch.arange(COLOURS, dtype=torch.uint8)
        .repeat_interleave(SIDE * SIDE * COLOURS)[:, None]
        .repeat(1, SIDE * SIDE)
    )
    cells = torch.arange(SIDE * SIDE).repeat_interleave(COLOURS).repeat(COLOURS)[:, None]
    colours = torch.arange(COLOURS, dtype=torch.uint8).repeat(SIDE * SIDE * COLOURS)[:, None]
    return grids.scatter(1, cells, colours).unique(dim=0).unflatten(1, (SIDE, SIDE))


EXAMPLES: list[tuple[Step, Tensor, Tensor]] = [
    (Rotate(1), grid(c07=1), grid(c00=1)),
    (Rotate(2), grid(c01=3), grid(c76=3)),
    (Reflect("rows"), grid(c12=1), grid(c62=1)),
    (Reflect("columns"), grid(c12=1), grid(c15=1)),
    (Transpose("main"), grid(c12=1), grid(c21=1)),
    (Transpose("other"), grid(c01=1), grid(c67=1)),
    (Shift("up", 1), grid(c03=2, c50=1), grid(c73=2, c40=1)),
    (Shift("right", 2), grid(c06=2, c51=1), grid(c00=2, c53=1)),
    (Shift("down", 1), grid(c73=2), grid(c03=2)),
    (Shift("left", 1), grid(c40=2), grid(c47=2)),
    (CycleColours(1, 4), grid(c00=1, c11=4), grid(c00=2, c11=1)),
    (SwapColours(1, 3), grid(c00=1, c11=3, c22=2), grid(c00=3, c11=1, c22=2)),
    (Erase(2), grid(c00=1, c11=2), grid(c00=1)),
    (Fall("down"), grid(c03=1, c43=2, c50=3), grid(c63=1, c73=2, c70=3)),
    (Fall("up"), grid(c23=1, c43=2), grid(c03=1, c13=2)),
    (Fall("left"), grid(c35=1, c37=2), grid(c30=1, c31=2)),
    (Fall("right"), grid(c30=1, c32=2), grid(c36=1, c37=2)),
    (Mirror("up"), grid(c11=1, c77=2), grid(c11=1, c61=1)),
    (Mirror("right"), grid(c16=1, c00=2), grid(c16=1, c11=1)),
    (Cut("left"), grid(c33=1, c34=2), grid(c34=2)),
    (Cut("down"), grid(c33=1, c44=2), grid(c33=1)),
    (Zoom(0, 1), grid(c04=3, c70=1), grid(c00=3, c01=3, c10=3, c11=3)),
    (Outline(4), grid(c00=1), grid(c00=1, c01=4, c10=4)),
]


@pytest.mark.parametrize(
    ("step", "before", "after"), EXAMPLES, ids=lambda value: str(value) if isinstance(value, Step) else ""
)
def test_examples(step: Step, before: Tensor, after: Tensor) -> None:
    assert torch.equal(step(before), after)


def test_frame_and_negate() -> None:
    framed = Frame(2)(grid(c33=1, c00=4))
    assert int((framed == 2).sum()) == 28 and framed[3, 3] == 1 and framed[0, 0] == 2
    negated = Negate(3)(grid(c33=1, c00=4))
    assert int((negated == 3).sum()) == 62 and negated[3, 3] == EMPTY and negated[0, 0] == EMPTY


def test_parameters_come_from_the_generator_that_is_passed() -> None:
    before = torch.get_rng_state()
    for primitive in PRIMITIVES.values():
        drawn = [
            primitive.draw(torch.Generator().manual_seed(seed), COLOURS) for seed in (1, 1, *range(2, 40))
        ]
        assert drawn[0] == drawn[1] and set(drawn) == set(primitive.variants(COLOURS))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("colours", [3, MOST_COLOURS])
def test_any_number_of_colours(colours: int) -> None:
    """Every primitive has parameters on grids of few and of many colours, and stays within them."""
    grids = some_grids(colours=colours)
    for primitive in PRIMITIVES.values():
        for step in primitive.variants(colours):
            assert int(step(grids).max()) < colours
