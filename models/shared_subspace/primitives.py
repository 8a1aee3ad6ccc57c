"""Primitives on 8x8 grids: deterministic functions with a few discrete parameters.

    shift(grids, "left", 2)                      # (..., 8, 8) -> (..., 8, 8)
    Operation("shift", ("left", 2))(grids)       # the same
    operations("shift", colours=5)               # every value of its parameters: [Operation(...), ...]

A grid is an integer tensor (..., 8, 8) of colours 0 .. C - 1; colour 0 is the empty background. Primitives
return new memory and work on any number of grids at once. Nothing is random here: parameters are drawn in
`tasks.py`. A new primitive is one function and one line in `PRIMITIVES`. Functions use tensors' own methods:
the config names the primitives, and is checked before PyTorch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 8  # cells along an edge of a grid
EMPTY = 0  # the background's colour
MIN_COLOURS, MAX_COLOURS = 3, 10  # swapping needs two colours beside the background

Side = Literal["up", "right", "down", "left"]
SIDES: tuple[Side, ...] = get_args(Side)  # by the number of quarter turns that bring a side to the top


def rotate(grids: Tensor, quarters: int) -> Tensor:
    """Counter-clockwise rotation by quarter turns."""
    return grids.rot90(quarters, (-2, -1))


def reflect(grids: Tensor, order: Literal["rows", "columns"]) -> Tensor:
    """Reversed order of the rows, or of the columns."""
    return grids.flip(-2 if order == "rows" else -1)


def transpose(grids: Tensor, diagonal: Literal["main", "other"]) -> Tensor:
    """Reflection in the main diagonal, or in the other one."""
    transposed = grids.transpose(-2, -1)
    return transposed.clone() if diagonal == "main" else transposed.flip((-2, -1))


def shift(grids: Tensor, side: Side, cells: int) -> Tensor:
    """Cyclic shift by some cells towards a side."""
    return _at_top(grids, side, lambda upright: upright.roll(-cells, -2))


def cycle_colours(grids: Tensor, by: int, circle: int) -> Tensor:
    """Cyclic shift of colours 1 .. circle by `by`; the background stays."""
    return grids.where(grids == EMPTY, (grids - 1 + by) % circle + 1)


def swap_colours(grids: Tensor, first: int, second: int) -> Tensor:
    """Exchange of two colours, neither the background."""
    return grids.masked_fill(grids == first, second).masked_fill(grids == second, first)


def erase(grids: Tensor, colour: int) -> Tensor:
    """Removal of one colour."""
    return grids.masked_fill(grids == colour, EMPTY)


def negate(grids: Tensor, colour: int) -> Tensor:
    """Exchange of background and foreground; the new foreground has one colour."""
    return (grids == EMPTY).to(grids.dtype) * colour


def frame(grids: Tensor, colour: int) -> Tensor:
    """Border of the grid in a colour."""
    framed = grids.new_full(grids.shape, colour)
    framed[..., 1:-1, 1:-1] = grids[..., 1:-1, 1:-1]
    return framed


def outline(grids: Tensor, colour: int) -> Tensor:
    """Outline of the foreground: empty cells beside a filled one (4-neighbourhood) get a colour."""
    inner = grids != EMPTY
    filled = inner.new_zeros(*grids.shape[:-2], SIDE + 2, SIDE + 2)
    filled[..., 1:-1, 1:-1] = inner
    vertical = filled[..., :-2, 1:-1] | filled[..., 2:, 1:-1]
    horizontal = filled[..., 1:-1, :-2] | filled[..., 1:-1, 2:]
    return grids.masked_fill((vertical | horizontal) & (grids == EMPTY), colour)


def fall(grids: Tensor, side: Side) -> Tensor:
    """Gravity towards a side: filled cells slide there and keep their order."""

    def rise(upright: Tensor) -> Tensor:
        order = (upright == EMPTY).byte().argsort(dim=-2, stable=True)
        return upright.gather(-2, order)

    return _at_top(grids, side, rise)


def mirror(grids: Tensor, side: Side) -> Tensor:
    """Mirror image of the half at a side, in place of the other half."""

    def reflect_down(upright: Tensor) -> Tensor:
        mirrored = upright.clone()
        mirrored[..., SIDE // 2 :, :] = upright[..., : SIDE // 2, :].flip(-2)
        return mirrored

    return _at_top(grids, side, reflect_down)


def cut(grids: Tensor, side: Side) -> Tensor:
    """Removal of the half at a side."""

    def empty_upper(upright: Tensor) -> Tensor:
        emptied = upright.clone()
        emptied[..., : SIDE // 2, :] = EMPTY
        return emptied

    return _at_top(grids, side, empty_upper)


def zoom(grids: Tensor, row: int, column: int) -> Tensor:
    """One quarter of the grid enlarged to all of it; row and column: 0 the first half, 1 the second."""
    quarter = grids.unflatten(-2, (2, -1)).unflatten(-1, (2, -1))[..., row, :, column, :]
    return quarter.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def _at_top(grids: Tensor, side: Side, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to the grids, rotated so that a side is on top, and rotate back."""
    turns = SIDES.index(side)
    return change(grids.rot90(turns, (-2, -1))).rot90(-turns, (-2, -1))


def _colours(colours: int) -> list[tuple[int]]:
    return [(colour,) for colour in range(1, colours)]


class Primitive(NamedTuple):
    """A function (grids, *parameters) -> grids, and its parameters' values by number of colours."""

    apply: Callable[..., Tensor]
    parameters: Callable[[int], list[tuple[Any, ...]]]


PRIMITIVES: dict[str, Primitive] = {
    "rotate": Primitive(rotate, lambda colours: [(1,), (2,), (3,)]),
    "reflect": Primitive(reflect, lambda colours: [("rows",), ("columns",)]),
    "transpose": Primitive(transpose, lambda colours: [("main",), ("other",)]),
    "shift": Primitive(shift, lambda colours: list(product(SIDES, (1, 2)))),
    "cycle_colours": Primitive(cycle_colours, lambda n: [(by, n - 1) for by in range(1, n - 1)]),
    "swap_colours": Primitive(swap_colours, lambda colours: list(combinations(range(1, colours), 2))),
    "erase": Primitive(erase, _colours),
    "negate": Primitive(negate, _colours),
    "frame": Primitive(frame, _colours),
    "outline": Primitive(outline, _colours),
    "fall": Primitive(fall, lambda colours: list(product(SIDES))),
    "mirror": Primitive(mirror, lambda colours: list(product(SIDES))),
    "cut": Primitive(cut, lambda colours: list(product(SIDES))),
    "zoom": Primitive(zoom, lambda colours: list(product((0, 1), repeat=2))),
}


@dataclass(frozen=True)
class Operation:
    """A primitive with its parameters."""

    primitive: str
    parameters: tuple[Any, ...]

    def __call__(self, grids: Tensor) -> Tensor:
        return PRIMITIVES[self.primitive].apply(grids, *self.parameters)


def operations(primitive: str, colours: int) -> list[Operation]:
    """A primitive with every value of its parameters, on grids of `colours` colours."""
    return [Operation(primitive, parameters) for parameters in PRIMITIVES[primitive].parameters(colours)]
