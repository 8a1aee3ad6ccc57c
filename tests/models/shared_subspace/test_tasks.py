"""Tasks on grids: splits that do not leak, samples that are what their programs say, groups, and bad input."""

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from models.shared_subspace.primitives import PRIMITIVES
from models.shared_subspace.tasks import (
    GridTasks,
    GroupedBatchSampler,
    group_numbers,
    random_grids,
    split_problems,
)
from utils.errors import UserError

SPLITS = ("train", "held_out", "unseen")


def make(**changes: Any) -> GridTasks:
    settings = {
        "primitives": list(PRIMITIVES),
        "colours": 5,
        "train_lengths": [1, 2],
        "test_length": 3,
        "held_out_pairs": 6,
        "test_compositions": 40,
        "seed": 1,
    }
    settings |= changes
    return GridTasks(settings.pop("primitives"), **settings)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TASKS = make()


def compositions(tasks: GridTasks, split: str) -> list[tuple[int, ...]]:
    return [tuple(p for p in row if p >= 0) for row in tasks.splits[split].compositions.tolist()]


def test_no_composition_leaks_from_training_into_tests() -> None:
    train, held_out, unseen = (set(compositions(TASKS, split)) for split in SPLITS)
    assert len(train) + len(held_out) + len(unseen) == sum(len(TASKS.splits[split]) for split in SPLITS)
    assert not train & held_out and not train & unseen and not held_out & unseen
    assert (
        {len(c) for c in train} == {1, 2}
        and {len(c) for c in held_out} == {2}
        and {len(c) for c in unseen} == {3}
    )
    assert not {frozenset(c) for c in train} & {frozenset(c) for c in held_out}  # in neither order
    assert not {frozenset(c) for c in train} & {frozenset(c) for c in unseen}


def test_every_composition_that_is_not_held_out_is_trained() -> None:
    number, pairs = len(PRIMITIVES), len(PRIMITIVES) * (len(PRIMITIVES) - 1)
    assert len(TASKS.splits["train"]) == number + pairs - 12
    assert len(TASKS.splits["held_out"]) == 12 and len(TASKS.splits["unseen"]) == 40
    assert len(make(test_compositions=10**6).splits["unseen"]) == pairs * (number - 2)


def test_the_seed_chooses_the_splits() -> None:
    assert make(seed=1).fingerprint() == TASKS.fingerprint() != make(seed=2).fingerprint()


@pytest.mark.parametrize("split", SPLITS)
def test_targets_follow_from_programs_and_labels_from_both(split: str) -> None:
    """Step by step, one sample after the other, against what was made all at once."""
    samples = TASKS.draw(split, 100, generator())
    known = set(compositions(TASKS, split))
    owners = [type(step) for step in TASKS.steps]
    for i in range(len(samples)):
        sample, grid = samples[i], samples.input[i]
        steps = [number for number in sample["program"].tolist() if number]
        for number in steps:
            grid = TASKS.steps[number - 1](grid)
        assert torch.equal(sample["target"], grid.long()) and torch.equal(
            sample["input"], samples.input[i].long()
        )
        composition = tuple(list(PRIMITIVES.values()).index(owners[number - 1]) for number in steps)
        assert composition in known
        assert sample["primitives"].nonzero().flatten().tolist() == sorted(composition)


def test_lengths_labels_orders_parameters_and_slots_are_all_met() -> None:
    samples = TASKS.draw("train", 6000, generator())
    lengths = (samples.program > 0).sum(dim=1)
    assert 0.45 < (lengths == 1).float().mean() < 0.55
    assert len(samples.primitives.unique(dim=0)) == len(TASKS.splits["train"].labels)
    assert samples.program.unique().tolist() == list(range(len(TASKS.steps) + 1))
    assert ((samples.program > 0).float().mean(dim=0) > 0.4).all()  # each of three slots: expected one half
    single = samples.primitives[lengths == 1].sum(dim=0)
    assert (single > 0.6 * single.float().mean()).all() and (single < 1.4 * single.float().mean()).all()
    pair = samples.primitives.sum(dim=1) == 2
    first = samples.program[pair].gather(1, (samples.program[pair] > 0).byte().argmax(dim=1, keepdim=True))
    assert len(first.unique()) == len(TASKS.steps)  # both orders


def test_samples_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (TASKS.draw("train", 50, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.target, same.target) and torch.equal(one.program, same.program)
    assert not torch.equal(one.input, other.input)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_are_a_dataset() -> None:
    samples = TASKS.draw("train", 10, generator())
    assert len(samples) == 10 and set(samples[0]) == {"input", "target", "primitives", "program"}
    batch = next(iter(DataLoader(samples, batch_size=4)))
    assert batch["input"].shape == (4, 8, 8) and torch.equal(
        batch["target"], samples.batch(slice(0, 4)).target
    )
    assert [len(part) for part in samples.batches(4)] == [4, 4, 2]


def test_a_task_has_one_program_for_all_its_sets() -> None:
    composition = TASKS.splits["unseen"].compositions[5]
    support, query = TASKS.draw_task(composition, (8, 20), generator())
    assert len(support) == 8 and len(query) == 20
    assert len(torch.cat([support.program, query.program]).unique(dim=0)) == 1
    assert not torch.equal(support.input, query.input[:8])
    assert TASKS.describe(composition).count(",") == 2


def test_every_label_can_be_drawn_equally_often() -> None:
    samples = TASKS.draw_every_label("train", 3, generator())
    labels = TASKS.splits["train"].labels
    assert torch.equal(samples.primitives, labels.repeat_interleave(3, dim=0))


def test_the_same_grids_meet_one_program_of_every_label() -> None:
    samples = TASKS.draw_same_grids("train", 6, generator())
    labels = TASKS.splits["train"].labels
    assert torch.equal(samples.primitives, labels.repeat_interleave(6, dim=0))
    grids = samples.input.unflatten(0, (-1, 6))
    assert (grids == grids[0]).all() and len(grids[0].unique(dim=0)) == 6
    programs = samples.program.unflatten(0, (-1, 6))
    assert (programs == programs[:, :1]).all() and len(programs[:, 0].unique(dim=0)) == len(labels)
    for row in (0, 100, len(samples) - 1):
        expected = samples.input[row]
        for number in samples.program[row].tolist():
            expected = TASKS.steps[number - 1](expected) if number else expected
        assert torch.equal(samples.target[row], expected)


def test_a_program_in_words_has_its_primitives_in_order() -> None:
    kinds = {kind: name for name, kind in PRIMITIVES.items()}
    for program in TASKS.draw("unseen", 20, generator()).program:
        names = [kinds[type(TASKS.steps[number - 1])] for number in program.tolist()]
        assert TASKS.describe_program(program) == ", ".join(names)
    resting = next(program for program in TASKS.draw("train", 50, generator()).program if program[0] == 0)
    assert 1 <= len(TASKS.describe_program(resting).split(", ")) <= 2
    assert TASKS.describe_program(torch.zeros(3, dtype=torch.int64)) == ""


def test_inputs_are_neither_empty_nor_full_and_use_all_colours() -> None:
    grids = random_grids(5000, 5, generator())
    filled = (grids > 0).flatten(1).sum(dim=1)
    assert (filled > 0).all() and (filled < 64).all() and grids.unique().tolist() == [0, 1, 2, 3, 4]
    reached = (grids > 0).float().mean(dim=0)
    assert (reached > 0.05).all()  # rectangles lie everywhere


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def test_groups_of_a_drawn_buffer_fill_every_batch() -> None:
    samples = TASKS.draw("train", 60, generator(), group_size=4)
    sampler = GroupedBatchSampler(samples.primitives, groups=6, group_size=4, generator=generator())
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10 and all(len(batch) == 24 for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(240))


def test_every_label_in_a_batch_occurs_at_least_group_size_times() -> None:
    samples = TASKS.draw("train", 1500, generator())
    sampler = GroupedBatchSampler(samples.primitives, groups=4, group_size=5, generator=generator())
    for batch in sampler:
        _, counts = group_numbers(samples.primitives[batch]).unique(return_counts=True)
        assert counts.min() >= 5 and counts.sum() == 20
    assert len({i for batch in sampler for i in batch}) == 20 * len(sampler)  # none twice


def test_the_sampler_shuffles_anew_and_reproducibly() -> None:
    samples = TASKS.draw("train", 60, generator(), group_size=4)

    def epochs(seed: int) -> list[list[list[int]]]:
        sampler = GroupedBatchSampler(samples.primitives, groups=6, group_size=4, generator=generator(seed))
        return [list(sampler), list(sampler)]

    first, again, other = epochs(1), epochs(1), epochs(2)
    assert first == again and first != other and first[0] != first[1]


@pytest.mark.parametrize(
    ("count", "groups", "group_size", "expected"),
    [
        (60, 2, 1, "group_size = 1.*allowed: 2 or more"),
        (0, 2, 4, "0 samples have 0"),
        (20, 500, 2, "a batch needs 500"),
    ],
)
def test_groups_that_cannot_be_had(count: int, groups: int, group_size: int, expected: str) -> None:
    labels = TASKS.draw("train", max(count, 1), generator()).primitives[:count]
    with pytest.raises(UserError, match=expected):
        GroupedBatchSampler(labels, groups=groups, group_size=group_size, generator=generator())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

FEW = ["rotate", "shift", "frame", "fall"]
BAD = {
    "unknown primitive": (
        {"primitives": ["rotate", "spin", "fall"]},
        ("primitives",),
        "no such primitive: spin",
    ),
    "training length beyond the set": (
        {"train_lengths": [1, 5]},
        ("train_lengths", "primitives"),
        "from 1 to 4",
    ),
    "test length beyond the set": ({"test_length": 5}, ("test_length", "primitives"), "there are 4"),
    "test length met in training": ({"test_length": 2}, ("test_length", "train_lengths"), "not be unseen"),
    "empty held-out split": ({"held_out_pairs": 0}, ("held_out_pairs", "primitives"), "from 1 to 6"),
    "empty training split": (
        {"train_lengths": [2], "held_out_pairs": 6},
        ("held_out_pairs", "primitives"),
        "from 1 to 5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_splits_that_cannot_be_had(name: str) -> None:
    changes, keys, expected = BAD[name]
    settings = {"primitives": FEW, "train_lengths": [1, 2], "test_length": 3, "held_out_pairs": 1} | changes
    found = split_problems(**settings)
    assert [problem[0] for problem in found] == [keys] and expected in found[0][1]
    with pytest.raises(UserError, match=expected):
        make(**settings)


def test_good_splits_have_no_problem() -> None:
    assert split_problems(FEW, [1, 2], 3, 6) == [] and split_problems(FEW, [2], 3, 5) == []


def test_a_label_number_is_the_label_and_nothing_else() -> None:
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0]])
    numbers = group_numbers(labels)
    same = [bool(numbers[i] == numbers[j]) for i, j in combinations(range(5), 2)]
    assert same == [torch.equal(labels[i], labels[j]) for i, j in combinations(range(5), 2)]
    assert all(b - a == 1 for a, b in pairwise(sorted(set(numbers.tolist())))) and int(numbers.min()) == 0
