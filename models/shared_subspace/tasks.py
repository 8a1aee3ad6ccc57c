"""Tasks on generated 8x8 grids: compositions of primitives, split so that some are only met in tests.

    tasks = GridTasks(["rotate", "shift", "frame", "fall"], colours=5, train_lengths=[1, 2], test_length=3,
                      held_out_pairs=1, test_compositions=12, seed=1993)
    samples = tasks.draw("train", 512, generator)        # a Dataset
    samples[0]           # {"input": (8, 8), "target": (8, 8), "primitives": (P,), "program": (S,)}
    for indices in GroupedBatchSampler(samples.primitives, groups=8, group_size=16, generator=generator):
        batch = samples.batch(indices)

A composition is a sequence of different primitives; parameters are drawn anew for every sample. Which primitives were
applied is the multi-hot label "primitives"; samples with the same label are a *group*. The label alone does not say
what to do, so "program" tells the model: S slots, each with the number of a step (a primitive with its parameters), or
0 for a slot at rest. A composition shorter than S rests at random slots, so that short ones train every slot.

Samples are made a whole buffer at a time, each step at once for all grids that it applies to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from models.shared_subspace.primitives import EMPTY, PRIMITIVES, SIDE, Step
from utils.errors import UserError
from utils.training.random import rng

Composition = tuple[
    int, ...
]  # positions in the list of primitives, all different, in the order of application
TRAIN, HELD_OUT, UNSEEN = "train", "held_out", "unseen"
LEAST_GROUP = 2  # samples: those of a single one span no subspace
MOST_RECTANGLES, LONGEST_EDGE = 3, 5  # of an input grid, in number and in cells


@dataclass(frozen=True)
class GridBatch:
    """Samples side by side: input and target (B, 8, 8) and program (B, S), int64; primitives (B, P), float32."""

    input: Tensor
    target: Tensor
    program: Tensor
    primitives: Tensor

    def to(self, device: torch.device) -> "GridBatch":
        """The same on a device."""
        return GridBatch(*(tensor.to(device) for tensor in vars(self).values()))

    def rows(self, start: int, stop: int) -> "GridBatch":
        """Some of the samples."""
        return GridBatch(*(tensor[start:stop] for tensor in vars(self).values()))

    def __len__(self) -> int:
        return len(self.input)


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
        return {name: tensor[0] for name, tensor in vars(self.batch([index])).items()}

    def batch(self, chosen: Sequence[int] | slice) -> GridBatch:
        """Some of the samples, side by side."""
        grids = (tensor[chosen].long() for tensor in (self.input, self.target))
        return GridBatch(*grids, self.program[chosen], self.primitives[chosen].float())

    def batches(self, size: int) -> Iterator[GridBatch]:
        """All samples in order, in batches of at most so many."""
        return (self.batch(slice(start, start + size)) for start in range(0, len(self), size))


class Split:
    """Compositions, sorted by their label.

    Attributes:
        compositions: (M, S), positions in the list of primitives; -1 where a composition is shorter than S.
        labels: (L, P) bool, the different multi-hot labels.
        first, orders: (L,), where the compositions of a label start, and how many there are.
        weights: (L,), how often a label is drawn: lengths equally often, and labels of one length.
    """

    def __init__(self, compositions: Sequence[Composition], primitives: int, slots: int) -> None:
        ordered = sorted(compositions, key=lambda composition: (sorted(composition), composition))
        padded = [[*composition, *[-1] * (slots - len(composition))] for composition in ordered]
        self.compositions = torch.tensor(padded, dtype=torch.int64)
        every = torch.stack([_multi_hot(composition, primitives) for composition in ordered])
        self.labels, self.orders = torch.unique_consecutive(every, dim=0, return_counts=True)
        self.first = self.orders.cumsum(0) - self.orders
        lengths = self.labels.sum(dim=1)
        self.weights = 1.0 / (lengths[:, None] == lengths).sum(dim=1)

    def __len__(self) -> int:
        return len(self.compositions)

    def draw(self, groups: int, group_size: int, generator: torch.Generator) -> Tensor:
        """Compositions of so many groups, (groups * group_size, S); within a group only the order differs."""
        label = torch.multinomial(self.weights, groups, replacement=True, generator=generator)
        return self.draw_labels(label.repeat_interleave(group_size), generator)

    def draw_labels(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """A composition for each of the chosen labels (N,), given by their numbers: (N, S)."""
        return self.compositions[self.first[chosen] + _below(self.orders[chosen], generator)]


class GridTasks:
    """The steps there are, and which compositions of them belong to training and which to tests.

    Attributes:
        primitives: their names; a composition holds positions in this list.
        steps: every primitive with every value of its parameters; number i in a program is `steps[i - 1]`.
        slots: length S of a program.
        splits: "train": the compositions of the training lengths, without the held-out pairs; "held_out": pairs of
            primitives that training never combines, in both orders; "unseen": compositions of the test length.

    Args:
        primitives: names in `PRIMITIVES`.
        colours: C, the background's included.
        train_lengths: numbers of steps of the training compositions.
        test_length: number of steps of the unseen ones.
        held_out_pairs: how many pairs are held out.
        test_compositions: how many of the test length are drawn; all where there are fewer.
        seed: chooses the held-out and the unseen ones.

    Raises:
        UserError: what `split_problems` finds.
    """

    def __init__(
        self,
        primitives: Sequence[str],
        *,
        colours: int,
        train_lengths: Sequence[int],
        test_length: int,
        held_out_pairs: int,
        test_compositions: int,
        seed: int,
    ) -> None:
        for keys, sentence in split_problems(primitives, train_lengths, test_length, held_out_pairs):
            raise UserError(f"{', '.join(keys)}: {sentence}")
        self.primitives, self.colours = tuple(primitives), colours
        self.slots = max(*train_lengths, test_length)
        variants = [PRIMITIVES[name].variants(colours) for name in primitives]
        self.steps: list[Step] = [step for options in variants for step in options]
        self._options = torch.tensor([len(options) for options in variants])
        self._first_number = 1 + self._options.cumsum(0) - self._options
        owner = torch.arange(len(variants)).repeat_interleave(self._options)
        self._owner = torch.cat(
            [torch.tensor([len(variants)]), owner]
        )  # a step's primitive; of 0 a column to cut off
        generator, every = rng("grid splits", seed), range(len(primitives))
        held_out = set(_some(list(combinations(every, 2)), held_out_pairs, generator))
        trained = [composition for length in train_lengths for composition in permutations(every, length)]
        compositions = {
            TRAIN: [c for c in trained if len(c) != 2 or tuple(sorted(c)) not in held_out],
            HELD_OUT: [c for c in permutations(every, 2) if tuple(sorted(c)) in held_out],
            UNSEEN: _some(list(permutations(every, test_length)), test_compositions, generator),
        }
        self.splits = {name: Split(some, len(primitives), self.slots) for name, some in compositions.items()}

    def draw(
        self, split: str, groups: int, generator: torch.Generator, *, group_size: int = 1
    ) -> GridSamples:
        """New samples of a split, in so many groups of one label each."""
        program = self._programs(self.splits[split].draw(groups, group_size, generator), generator)
        return self._apply(program, self._grids(len(program), generator))

    def draw_every_label(self, split: str, group_size: int, generator: torch.Generator) -> GridSamples:
        """New samples of a split, so many of each of its labels, in their order."""
        chosen = torch.arange(len(self.splits[split].labels)).repeat_interleave(group_size)
        program = self._programs(self.splits[split].draw_labels(chosen, generator), generator)
        return self._apply(program, self._grids(len(program), generator))

    def draw_same_grids(self, split: str, count: int, generator: torch.Generator) -> GridSamples:
        """The same new input grids under one program of each label of a split: so many of each, in their order."""
        split = self.splits[split]
        program = self._programs(split.draw_labels(torch.arange(len(split.labels)), generator), generator)
        grids = self._grids(count, generator).repeat(len(program), 1, 1)
        return self._apply(program.repeat_interleave(count, dim=0), grids)

    def draw_task(
        self, composition: Tensor, counts: Sequence[int], generator: torch.Generator
    ) -> list[GridSamples]:
        """Sets of new samples that all follow one program, made of a composition (S,) with its parameters."""
        program = self._programs(composition[None], generator)
        return [self._apply(program.expand(count, -1), self._grids(count, generator)) for count in counts]

    def describe(self, composition: Tensor) -> str:
        """The primitives of a composition (S,) in order: "shift, rotate"."""
        return ", ".join(self.primitives[position] for position in composition.tolist() if position >= 0)

    def describe_program(self, program: Tensor) -> str:
        """The primitives of a program (S,) in order, without their parameters."""
        return ", ".join(self.primitives[self._owner[number]] for number in program.tolist() if number)

    def fingerprint(self) -> dict[str, Any]:
        """What the splits are, for a run's record: equal for equal splits."""
        return {name: [self.describe(c) for c in split.compositions] for name, split in self.splits.items()}

    def _programs(self, compositions: Tensor, generator: torch.Generator) -> Tensor:
        """Compositions (N, S) with parameters drawn for each step, resting at random slots: (N, S)."""
        used = compositions >= 0
        positions = compositions.clamp_min(0)
        numbers = self._first_number[positions] + _below(self._options[positions], generator)
        rank = torch.rand(compositions.shape, generator=generator).argsort(dim=1).argsort(dim=1)
        at_rest = rank >= used.sum(dim=1, keepdim=True)
        slots = at_rest.byte().argsort(dim=1, stable=True)  # the busy ones first
        return torch.zeros_like(compositions).scatter_(1, slots, torch.where(used, numbers, 0))

    def _grids(self, count: int, generator: torch.Generator) -> Tensor:
        return random_grids(count, self.colours, generator)

    def _apply(self, program: Tensor, grids: Tensor) -> GridSamples:
        """Input grids (N, 8, 8) with what their programs (N, S) make of them."""
        target = grids.clone()
        for numbers in program.T:
            order = numbers.argsort()
            for rows in order.split(numbers.bincount(minlength=len(self.steps) + 1).tolist()):
                number = int(numbers[rows[0]]) if len(rows) else 0
                if number:
                    target[rows] = self.steps[number - 1](target[rows])
        return GridSamples(grids, target, program.contiguous(), self._labels(program))

    def _labels(self, program: Tensor) -> Tensor:
        """The multi-hot labels of programs (N, S), (N, P) bool."""
        labels = torch.zeros(len(program), len(self.primitives) + 1, dtype=torch.bool)
        return labels.scatter_(1, self._owner[program], True)[:, :-1]


class GroupedBatchSampler(Sampler[list[int]]):
    """Batches of indices in which every label that occurs does so at least `group_size` times.

    The samples of each label are shuffled and cut into pieces of `group_size`; what is left over is not used. A batch
    is `groups` pieces in random order; the last pieces, where they are fewer, make no batch.

    Args:
        labels: multi-hot labels of the samples, (N, P).
        groups: pieces in a batch.
        group_size: samples of one label in a piece.
        generator: shuffles.

    Raises:
        UserError: a group of one sample is asked for, or no label has enough samples for a batch.
    """

    def __init__(self, labels: Tensor, *, groups: int, group_size: int, generator: torch.Generator) -> None:
        if group_size < LEAST_GROUP:
            fault = f"group_size = {group_size}: a group of {group_size} spans no subspace"
            raise UserError(f"{fault}; allowed: {LEAST_GROUP} or more")
        self._group = group_numbers(labels)
        self.groups, self.group_size, self._generator = groups, group_size, generator
        self._pieces = int((self._group.bincount() // group_size).sum()) if len(labels) else 0
        if not len(self):
            fault = f"{len(labels)} samples have {self._pieces} pieces of {group_size} with one label"
            raise UserError(
                f"{fault}, a batch needs {groups}; draw more samples, or ask for smaller or fewer groups"
            )

    def __len__(self) -> int:
        """Batches."""
        return self._pieces // self.groups

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = torch.randperm(len(self._group), generator=self._generator)
        by_group = shuffled[self._group[shuffled].argsort(stable=True)]
        pieces = [
            piece
            for members in by_group.split(self._group.bincount().tolist())
            for piece in members.split(self.group_size)
            if len(piece) == self.group_size
        ]
        order = torch.randperm(len(pieces), generator=self._generator).tolist()
        for batch in range(len(self)):
            chosen = order[batch * self.groups : (batch + 1) * self.groups]
            yield torch.cat([pieces[i] for i in chosen]).tolist()


def split_problems(
    primitives: Sequence[str], train_lengths: Sequence[int], test_length: int, held_out_pairs: int
) -> list[tuple[tuple[str, ...], str]]:
    """Why there are no such splits: the settings involved, and one sentence that says what is allowed."""
    found: list[tuple[tuple[str, ...], str]] = []
    unknown = [name for name in primitives if name not in PRIMITIVES]
    if unknown:
        found.append(
            (("primitives",), f"no such primitive: {', '.join(unknown)}; allowed: {', '.join(PRIMITIVES)}")
        )
    number, pairs = len(primitives), len(primitives) * (len(primitives) - 1) // 2
    within = f"a composition holds different primitives, and there are {number}; allowed: lengths from 1 to {number}"
    if not all(1 <= length <= number for length in train_lengths):
        found.append((("train_lengths", "primitives"), within))
    if not 1 <= test_length <= number:
        found.append((("test_length", "primitives"), within))
    if test_length in train_lengths:
        found.append(
            (("test_length", "train_lengths"), "it would not be unseen; allowed: a length not in training")
        )
    most = pairs - (list(train_lengths) == [2])
    if not 1 <= held_out_pairs <= most:
        made = f"{pairs} pair{'' if pairs == 1 else 's'}"
        fault = f"{number} primitives make {made}, and neither training nor the held-out set may be empty"
        found.append((("held_out_pairs", "primitives"), f"{fault}; allowed: from 1 to {most}"))
    return found


def group_numbers(labels: Tensor) -> Tensor:
    """A number for each multi-hot label, the same for the same label: (N, P) -> (N,), from 0 on."""
    bits = 2 ** torch.arange(labels.shape[1], device=labels.device)
    return torch.unique((labels.long() * bits).sum(dim=1), return_inverse=True)[1]


def random_grids(count: int, colours: int, generator: torch.Generator) -> Tensor:
    """Up to `MOST_RECTANGLES` filled rectangles on the background, later ones on top: (count, 8, 8) uint8."""
    cells = torch.arange(SIDE)
    grids = torch.full((count, SIDE, SIDE), EMPTY, dtype=torch.uint8)
    present = torch.randint(1, MOST_RECTANGLES + 1, (count,), generator=generator)
    for number in range(MOST_RECTANGLES):
        edges = torch.randint(1, LONGEST_EDGE + 1, (2, count, 1), generator=generator)
        starts = _below(SIDE + 1 - edges, generator)
        rows, columns = (starts <= cells) & (cells < starts + edges)  # (count, 8) each
        inside = rows[:, :, None] & columns[:, None, :] & (number < present)[:, None, None]
        colour = torch.randint(1, colours, (count, 1, 1), generator=generator, dtype=torch.uint8)
        grids = torch.where(inside, colour, grids)
    return grids


def _below(bounds: Tensor, generator: torch.Generator) -> Tensor:
    """A random integer from 0 to bound - 1 for each bound."""
    return (torch.rand(bounds.shape, generator=generator, dtype=torch.float64) * bounds).long()


def _some(items: list[Any], count: int, generator: torch.Generator) -> list[Any]:
    """So many of the items at random, in their order; all where there are no more."""
    chosen = torch.randperm(len(items), generator=generator)[:count].sort().values
    return [items[i] for i in chosen.tolist()]


def _multi_hot(composition: Composition, primitives: int) -> Tensor:
    """Which primitives occur, (P,) bool."""
    label = torch.zeros(primitives, dtype=torch.bool)
    label[list(composition)] = True
    return label
