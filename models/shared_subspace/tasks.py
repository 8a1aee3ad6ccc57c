"""Tasks on generated 8x8 grids: compositions of primitives in splits for training and tests.

    tasks = GridTasks(config)
    samples = tasks.draw("train", 512, generator)
    samples[0]           # {"input": (8, 8), "target": (8, 8), "program": (S,), "primitives": (P,)}
    for indices in GroupedBatchSampler(samples.primitives, groups=8, group_size=16, generator=generator):
        batch = samples.select(indices)

A composition is a sequence of different primitives; their parameters are drawn anew for every sample. The
multi-hot label "primitives" says which primitives were applied; samples of one label are a *group*. An input
of the model, "program" has S slots, each with the number of an operation (a primitive with its parameters) or
0 for none. The empty slots of a short composition are random, so that all slots are trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.primitives import EMPTY, SIDE, Operation, operations
from utils.training.random import rng

Composition = tuple[int, ...]  # indices of different primitives in the order of application
TRAIN, HELD_OUT, UNSEEN = "train", "held_out", "unseen"
MAX_RECTANGLES, MAX_EDGE = 3, 5  # of an input grid, in number and in cells


@dataclass(frozen=True)
class GridSamples(Dataset):
    """Samples in memory: input and target (N, 8, 8) uint8, program (N, S) int64, primitives (N, P) bool."""

    input: Tensor
    target: Tensor
    program: Tensor
    primitives: Tensor

    def __len__(self) -> int:
        return len(self.input)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in vars(self).items()}

    def select(self, chosen: Sequence[int] | slice) -> "GridSamples":
        return GridSamples(*(tensor[chosen] for tensor in vars(self).values()))

    def to(self, device: torch.device) -> "GridSamples":
        return GridSamples(*(tensor.to(device) for tensor in vars(self).values()))


class Split:
    """Compositions sorted by label.

    Attributes:
        compositions: (M, S), indices of primitives; -1 where a composition is shorter than S.
        labels: (L, P) bool, the different multi-hot labels.
        first, counts: (L,), index of a label's first composition, and how many it has.
        weights: (L,), relative frequency of each label: equal among lengths, and among labels of a length.
    """

    def __init__(self, compositions: Sequence[Composition], primitives: int, slots: int) -> None:
        ordered = sorted(compositions, key=lambda composition: (sorted(composition), composition))
        padded = [[*composition, *[-1] * (slots - len(composition))] for composition in ordered]
        self.compositions = torch.tensor(padded, dtype=torch.int64)
        multi_hot = torch.tensor([[index in own for index in range(primitives)] for own in ordered])
        self.labels, self.counts = multi_hot.unique_consecutive(dim=0, return_counts=True)
        self.first = self.counts.cumsum(0) - self.counts
        lengths = self.labels.sum(dim=1)
        self.weights = 1.0 / (lengths[:, None] == lengths).sum(dim=1)

    def __len__(self) -> int:
        return len(self.compositions)

    def draw_compositions(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A random composition of each label, given by their numbers: (N,) -> (N, S)."""
        return self.compositions[self.first[labels] + _integers_below(self.counts[labels], generator)]


class GridTasks:
    """All operations, and the compositions of training and tests.

    Attributes:
        primitives: names; a composition holds indices of this list.
        operations: every primitive with every value of its parameters; number i of a program is entry i - 1.
        splits: "held_out": pairs of primitives, in both orders; "train": the compositions of the training
            lengths that combine no such pair; "unseen": compositions of the test length.

    The seed chooses the held-out pairs and the unseen compositions.
    """

    def __init__(self, config: SharedSubspaceConfig) -> None:
        self.primitives, self.colours = tuple(config.primitives), config.colours
        variants = [operations(name, self.colours) for name in self.primitives]
        self.operations: list[Operation] = [operation for own in variants for operation in own]
        self._variants = torch.tensor([len(own) for own in variants])
        self._first = 1 + self._variants.cumsum(0) - self._variants  # number of a primitive's first operation
        primitive_of = [self.primitives.index(operation.primitive) for operation in self.operations]
        self._primitive_of = torch.tensor([-1, *primitive_of])  # of an operation's number; 0: none
        generator, every = rng("grid splits", config.seed), range(len(variants))
        held_out = set(_choose(list(combinations(every, 2)), config.held_out_pairs, generator))
        trained = [c for length in config.train_lengths for c in permutations(every, length)]
        unseen = list(permutations(every, config.test_length))
        compositions = {
            TRAIN: [c for c in trained if held_out.isdisjoint(combinations(sorted(c), 2))],
            HELD_OUT: [c for c in permutations(every, 2) if tuple(sorted(c)) in held_out],
            UNSEEN: _choose(unseen, config.test_compositions, generator),
        }
        self.splits = {name: Split(own, len(variants), config.slots) for name, own in compositions.items()}

    def draw(
        self, split: str, groups: int, generator: torch.Generator, *, group_size: int = 1
    ) -> GridSamples:
        """Samples of a split in groups of one random label each, (groups * group_size)."""
        weights = self.splits[split].weights
        labels = torch.multinomial(weights, groups, replacement=True, generator=generator)
        return self._draw_of(split, labels.repeat_interleave(group_size), generator)

    def draw_every_label(self, split: str, group_size: int, generator: torch.Generator) -> GridSamples:
        """`group_size` samples of every label of a split, in the order of its labels."""
        labels = torch.arange(len(self.splits[split].labels)).repeat_interleave(group_size)
        return self._draw_of(split, labels, generator)

    def draw_same_grids(self, split: str, count: int, generator: torch.Generator) -> GridSamples:
        """The same `count` input grids under one program per label of a split, in the order of its labels."""
        labels = torch.arange(len(self.splits[split].labels))
        programs = self._programs(self.splits[split].draw_compositions(labels, generator), generator)
        grids = random_grids(count, self.colours, generator).repeat(len(programs), 1, 1)
        return self._apply(programs.repeat_interleave(count, dim=0), grids)

    def draw_task(
        self, composition: Tensor, counts: Sequence[int], generator: torch.Generator
    ) -> list[GridSamples]:
        """Sets of samples that all follow one program: a composition (S,) with parameters drawn once."""
        program = self._programs(composition[None], generator)
        grids = [random_grids(count, self.colours, generator) for count in counts]
        return [self._apply(program.expand(len(own), -1), own) for own in grids]

    def describe(self, composition: Tensor) -> str:
        """The primitives of a composition (S,) in order: "shift, rotate"."""
        return ", ".join(self.primitives[index] for index in composition.tolist() if index >= 0)

    def describe_program(self, program: Tensor) -> str:
        """The primitives of a program (S,) in order, without their parameters."""
        return self.describe(self._primitive_of[program])

    def fingerprint(self) -> dict[str, Any]:
        """The compositions of every split in words: equal for equal splits."""
        return {name: [self.describe(c) for c in split.compositions] for name, split in self.splits.items()}

    def _draw_of(self, split: str, labels: Tensor, generator: torch.Generator) -> GridSamples:
        """A sample of each label, given by their numbers (N,)."""
        program = self._programs(self.splits[split].draw_compositions(labels, generator), generator)
        return self._apply(program, random_grids(len(program), self.colours, generator))

    def _programs(self, compositions: Tensor, generator: torch.Generator) -> Tensor:
        """Programs of compositions, (N, S) -> (N, S): parameters and empty slots are random."""
        used = compositions >= 0
        primitives = compositions.clamp_min(0)
        numbers = self._first[primitives] + _integers_below(self._variants[primitives], generator)
        rank = torch.rand(compositions.shape, generator=generator).argsort(dim=1).argsort(dim=1)
        is_empty = rank >= used.sum(dim=1, keepdim=True)
        slots = is_empty.byte().argsort(dim=1, stable=True)  # filled ones first
        return torch.zeros_like(compositions).scatter_(1, slots, torch.where(used, numbers, 0))

    def _apply(self, program: Tensor, grids: Tensor) -> GridSamples:
        """Input grids (N, 8, 8) with the targets and labels that follow from their programs (N, S)."""
        target = grids.clone()
        for numbers in program.T:
            for number in numbers.unique().tolist():
                if number:
                    rows = numbers == number
                    target[rows] = self.operations[number - 1](target[rows])
        labels = torch.zeros(len(program), len(self.primitives) + 1, dtype=torch.bool)
        labels = labels.scatter_(1, self._primitive_of[program] + 1, True)[:, 1:]
        return GridSamples(grids, target, program.contiguous(), labels)


class GroupedBatchSampler(Sampler[list[int]]):
    """Batches of indices in which every label (N, P) that occurs does so at least `group_size` times.

    The samples of each label are shuffled and cut into pieces of `group_size`; the rest is not used. A batch
    is `groups` pieces in random order; what is left at the end makes no batch.
    """

    def __init__(self, labels: Tensor, *, groups: int, group_size: int, generator: torch.Generator) -> None:
        self.groups, self.group_size, self._generator = groups, group_size, generator
        numbers = (labels.long() << torch.arange(labels.shape[1])).sum(dim=1)  # multi-hot bits
        self._label_of = numbers.unique(return_inverse=True)[1]

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = torch.randperm(len(self._label_of), generator=self._generator)
        by_label = shuffled[self._label_of[shuffled].argsort(stable=True)]
        pieces = [
            piece
            for members in by_label.split(self._label_of.bincount().tolist())
            for piece in members.split(self.group_size)
            if len(piece) == self.group_size
        ]
        order = torch.randperm(len(pieces), generator=self._generator)
        for chosen in order.split(self.groups)[: len(pieces) // self.groups]:
            yield torch.cat([pieces[i] for i in chosen]).tolist()


def random_grids(count: int, colours: int, generator: torch.Generator) -> Tensor:
    """Input grids, (count, 8, 8) uint8: up to `MAX_RECTANGLES` filled rectangles, later ones on top."""
    cells = torch.arange(SIDE)
    grids = torch.full((count, SIDE, SIDE), EMPTY, dtype=torch.uint8)
    present = torch.randint(1, MAX_RECTANGLES + 1, (count,), generator=generator)
    for number in range(MAX_RECTANGLES):
        edges = torch.randint(1, MAX_EDGE + 1, (2, count, 1), generator=generator)
        starts = _integers_below(SIDE + 1 - edges, generator)
        rows, columns = (starts <= cells) & (cells < starts + edges)  # (count, 8) each
        inside = rows[:, :, None] & columns[:, None, :] & (number < present)[:, None, None]
        colour = torch.randint(1, colours, (count, 1, 1), generator=generator, dtype=torch.uint8)
        grids = torch.where(inside, colour, grids)
    return grids


def _integers_below(bounds: Tensor, generator: torch.Generator) -> Tensor:
    """A random integer from 0 to bound - 1 for each bound."""
    return (torch.rand(bounds.shape, generator=generator, dtype=torch.float64) * bounds).long()


def _choose(items: list[Any], count: int, generator: torch.Generator) -> list[Any]:
    """`count` random items in their order; all where there are no more."""
    chosen = torch.randperm(len(items), generator=generator)[:count].sort().values
    return [items[i] for i in chosen.tolist()]
