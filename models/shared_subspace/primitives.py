"""Primitives: small deterministic changes of 8x8 grids, each with a few parameters.

    step = Shift("left", cells=2)
    step(grids)                                  # (..., 8, 8) -> (..., 8, 8)
    step.inverse()(step(grids))                  # the grids again; None where a primitive loses something
    PRIMITIVES["shift"].draw(generator, colours=5)   # parameters at random

A grid is an integer tensor (..., 8, 8) of colours 0 .. C - 1; colour 0 is the empty background. A primitive is a frozen
dataclass of its parameters, and calling it is the function itself: whatever is random is drawn before, from a generator
that is passed. All work on any number of grids at once. A new primitive is one class and one line in `PRIMITIVES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 8  # cells along an edge of a grid
EMPTY = 0  # the background's colour
FEWEST_COLOURS, MOST_COLOURS = (
    3,
    10,
)  # with fewer than two colours beside the background nothing can be exchanged

Direction = Literal["up", "right", "down", "left"]
QUARTERS: dict[Direction, int] = {
    "up": 0,
    "right": 1,
    "down": 2,
    "left": 3,
}  # turns that make a side the upper one
OPPOSITE: dict[Direction, Direction] = {"up": "down", "down": "up", "left": "right", "right": "left"}


class Step(ABC):
    """A primitive with its parameters."""

    @classmethod
    @abstractmethod
    def variants(cls, colours: int) -> list[Self]:
        """Every value its parameters can take on grids of so many colours."""

    @abstractmethod
    def __call__(self, grids: Tensor) -> Tensor:
        """The changed grids, (..., 8, 8) -> (..., 8, 8); the given ones stay as they are."""

    def inverse(self) -> "Step | None":
        """The step that undoes this one; None where something is lost."""
        return None

    @classmethod
    def draw(cls, generator: torch.Generator, colours: int) -> Self:
        """The primitive with parameters at random, all of `variants` being equally likely."""
        options = cls.variants(colours)
        return options[int(torch.randint(len(options), (), generator=generator))]


@dataclass(frozen=True)
class Rotate(Step):
    """Turn by so many quarters, counter-clockwise."""

    quarters: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(quarters) for quarters in (1, 2, 3)]

    def __call__(self, grids: Tensor) -> Tensor:
        return torch.rot90(grids, self.quarters, (-2, -1))

    def inverse(self) -> Step:
        return Rotate(4 - self.quarters)


@dataclass(frozen=True)
class Reflect(Step):
    """Reverse the order of the rows, or of the columns."""

    order: Literal["rows", "columns"]

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls("rows"), cls("columns")]

    def __call__(self, grids: Tensor) -> Tensor:
        return grids.flip(-2 if self.order == "rows" else -1)

    def inverse(self) -> Step:
        return self


@dataclass(frozen=True)
class Transpose(Step):
    """Reflect in the main diagonal, or in the other one."""

    diagonal: Literal["main", "other"]

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls("main"), cls("other")]

    def __call__(self, grids: Tensor) -> Tensor:
        turned = grids.transpose(-2, -1)
        return turned.clone() if self.diagonal == "main" else turned.flip((-2, -1))

    def inverse(self) -> Step:
        return self


@dataclass(frozen=True)
class Shift(Step):
    """Move everything by so many cells; what leaves on one side comes in on the other."""

    towards: Direction
    cells: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(side, cells) for side in QUARTERS for cells in (1, 2)]

    def __call__(self, grids: Tensor) -> Tensor:
        return _as_upper_side(grids, self.towards, lambda upright: upright.roll(-self.cells, -2))

    def inverse(self) -> Step:
        return Shift(OPPOSITE[self.towards], self.cells)


@dataclass(frozen=True)
class CycleColours(Step):
    """Every colour but the background becomes the one `by` places on, in a circle of `circle` colours."""

    by: int
    circle: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(by, colours - 1) for by in range(1, colours - 1)]

    def __call__(self, grids: Tensor) -> Tensor:
        moved = (grids - 1 + self.by) % self.circle + 1
        return torch.where(grids == EMPTY, grids, moved)

    def inverse(self) -> Step:
        return CycleColours(self.circle - self.by, self.circle)


@dataclass(frozen=True)
class SwapColours(Step):
    """Two colours, neither the background, change places."""

    first: int
    second: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(first, second) for first, second in combinations(range(1, colours), 2)]

    def __call__(self, grids: Tensor) -> Tensor:
        swapped = grids.clone()
        swapped[grids == self.first] = self.second
        swapped[grids == self.second] = self.first
        return swapped

    def inverse(self) -> Step:
        return self


@dataclass(frozen=True)
class Erase(Step):
    """Cells of one colour become empty."""

    colour: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(colour) for colour in range(1, colours)]

    def __call__(self, grids: Tensor) -> Tensor:
        return grids.masked_fill(grids == self.colour, EMPTY)


@dataclass(frozen=True)
class Negate(Step):
    """Empty cells take a colour, all others become empty."""

    colour: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(colour) for colour in range(1, colours)]

    def __call__(self, grids: Tensor) -> Tensor:
        return (grids == EMPTY).to(grids.dtype) * self.colour


@dataclass(frozen=True)
class Frame(Step):
    """The cells along the edge take a colour."""

    colour: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(colour) for colour in range(1, colours)]

    def __call__(self, grids: Tensor) -> Tensor:
        framed = torch.full_like(grids, self.colour)
        framed[..., 1:-1, 1:-1] = grids[..., 1:-1, 1:-1]
        return framed


@dataclass(frozen=True)
class Outline(Step):
    """Empty cells that have a filled one above, below, left or right of them take a colour."""

    colour: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(colour) for colour in range(1, colours)]

    def __call__(self, grids: Tensor) -> Tensor:
        filled = F.pad(grids != EMPTY, (1, 1, 1, 1))
        beside = (
            filled[..., :-2, 1:-1] | filled[..., 2:, 1:-1] | filled[..., 1:-1, :-2] | filled[..., 1:-1, 2:]
        )
        return grids.masked_fill(beside & (grids == EMPTY), self.colour)


@dataclass(frozen=True)
class Fall(Step):
    """Filled cells slide to one side of the grid and keep their order."""

    towards: Direction

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(side) for side in QUARTERS]

    def __call__(self, grids: Tensor) -> Tensor:
        return _as_upper_side(grids, self.towards, self._rise)

    @staticmethod
    def _rise(grids: Tensor) -> Tensor:
        order = (grids == EMPTY).to(torch.uint8).argsort(dim=-2, stable=True)
        return grids.gather(-2, order)


@dataclass(frozen=True)
class Mirror(Step):
    """The half at one side is reflected onto the other half."""

    source: Direction

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(side) for side in QUARTERS]

    def __call__(self, grids: Tensor) -> Tensor:
        return _as_upper_side(grids, self.source, self._downwards)

    @staticmethod
    def _downwards(grids: Tensor) -> Tensor:
        upper = grids[..., : SIDE // 2, :]
        return torch.cat([upper, upper.flip(-2)], dim=-2)


@dataclass(frozen=True)
class Cut(Step):
    """The half at one side becomes empty."""

    side: Direction

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(side) for side in QUARTERS]

    def __call__(self, grids: Tensor) -> Tensor:
        return _as_upper_side(grids, self.side, self._without_upper)

    @staticmethod
    def _without_upper(grids: Tensor) -> Tensor:
        rest = grids.clone()
        rest[..., : SIDE // 2, :] = EMPTY
        return rest


@dataclass(frozen=True)
class Zoom(Step):
    """One quarter of the grid, twice as large; row and column say which: 0 the first half, 1 the second."""

    row: int
    column: int

    @classmethod
    def variants(cls, colours: int) -> list[Self]:
        return [cls(row, column) for row in (0, 1) for column in (0, 1)]

    def __call__(self, grids: Tensor) -> Tensor:
        half = SIDE // 2
        quarter = grids[
            ..., self.row * half : (self.row + 1) * half, self.column * half : (self.column + 1) * half
        ]
        return quarter.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


PRIMITIVES: dict[str, type[Step]] = {
    "rotate": Rotate,
    "reflect": Reflect,
    "transpose": Transpose,
    "shift": Shift,
    "cycle_colours": CycleColours,
    "swap_colours": SwapColours,
    "erase": Erase,
    "negate": Negate,
    "frame": Frame,
    "outline": Outline,
    "fall": Fall,
    "mirror": Mirror,
    "cut": Cut,
    "zoom": Zoom,
}


def _as_upper_side(grids: Tensor, side: Direction, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Turn the grids so that a side is the upper one, change them, and turn them back."""
    quarters = QUARTERS[side]
    return torch.rot90(change(torch.rot90(grids, quarters, (-2, -1))), -quarters, (-2, -1))
