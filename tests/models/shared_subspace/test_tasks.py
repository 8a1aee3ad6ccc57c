"""Tasks on grids: splits that do not leak, samples that follow from their programs, and groups."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.shared_subspace.config import SharedSubspaceConfig
from models.shared_subspace.primitives import PRIMITIVES
from models.shared_subspace.tasks import GridSamples, GridTasks, GroupedBatchSampler, random_grids

SPLITS = ("train", "held_out", "unseen")


def make(**changes: Any) -> GridTasks:
    return GridTasks(SharedSubspaceConfig(held_out_pairs=6, **{"test_compositions": 40, "seed": 1} | changes))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TASKS = make()
LABELS = TASKS.splits["train"].labels


def compositions(tasks: GridTasks, split: str) -> list[tuple[int, ...]]:
    return [tuple(index for index in row if index >= 0) for row in tasks.splits[split].compositions.tolist()]


def applied(program: Tensor, grid: Tensor) -> tuple[Tensor, list[str]]:
    """The grid that a program makes, operation by operation, and the names of its primitives."""
    operations = [TASKS.operations[number - 1] for number in program.tolist() if number]
    for operation in operations:
        grid = operation(grid)
    return grid, [operation.primitive for operation in operations]


# --- splits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "longer"), [((1, 2), 3), ((1, 3), 4), ((3,), 1)], ids=str)
def test_no_composition_leaks_from_training_into_tests(trained: tuple[int, ...], longer: int) -> None:
    """In no order, and no held-out pair as a part of a longer composition."""
    tasks = make(train_lengths=list(trained), test_length=longer)
    train, held_out, unseen = (set(compositions(tasks, split)) for split in SPLITS)
    assert len(train) + len(held_out) + len(unseen) == sum(len(tasks.splits[split]) for split in SPLITS)
    lengths = [{len(composition) for composition in split} for split in (train, held_out, unseen)]
    assert lengths == [set(trained), {2}, {longer}]
    assert not any(set(pair) <= set(composition) for pair in held_out for composition in train)
    assert not set(map(frozenset, train)) & set(map(frozenset, unseen))


def test_every_composition_that_is_not_held_out_is_trained() -> None:
    number, pairs = len(PRIMITIVES), len(PRIMITIVES) * (len(PRIMITIVES) - 1)
    assert [len(TASKS.splits[split]) for split in SPLITS] == [number + pairs - 12, 12, 40]
    assert len(make(test_compositions=10**6).splits["unseen"]) == pairs * (number - 2)


def test_the_seed_chooses_the_splits() -> None:
    assert make(seed=1).fingerprint() == TASKS.fingerprint() != make(seed=2).fingerprint()


def test_what_runs_are_tested_on_says_whether_their_samples_are_the_same() -> None:
    """A longer composition in training makes longer programs, and so draws other samples."""
    lengths = ([1], [1, 2], [1, 2, 4])
    configs = [SharedSubspaceConfig(train_lengths=own, seed=1) for own in lengths]
    about = [config.tested_on(1, 0, 0) for config in configs]
    targets = [GridTasks(config).draw("unseen", 50, generator()).target for config in configs]
    assert about[0] == about[1] != about[2]
    assert torch.equal(targets[0], targets[1]) and not torch.equal(targets[1], targets[2])


# --- samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_targets_labels_and_words_follow_from_programs(split: str) -> None:
    """One sample after the other, against samples made all at once."""
    samples = TASKS.draw(split, 100, generator())
    known = set(compositions(TASKS, split))
    for sample in (samples[i] for i in range(len(samples))):
        target, names = applied(sample["program"], sample["input"])
        assert torch.equal(sample["target"], target)
        assert TASKS.describe_program(sample["program"]) == ", ".join(names)
        composition = tuple(TASKS.primitives.index(name) for name in names)
        assert composition in known
        assert sample["primitives"].nonzero().flatten().tolist() == sorted(composition)


def test_lengths_labels_orders_parameters_and_slots_all_occur() -> None:
    samples = TASKS.draw("train", 6000, generator())
    lengths = (samples.program > 0).sum(dim=1)
    assert 0.45 < (lengths == 1).float().mean() < 0.55
    assert len(samples.primitives.unique(dim=0)) == len(LABELS)
    assert samples.program.unique().tolist() == list(range(len(TASKS.operations) + 1))
    assert ((samples.program > 0).float().mean(dim=0) > 0.4).all()  # each of three slots: expected one half
    single = samples.primitives[lengths == 1].sum(dim=0)
    assert (single > 0.6 * single.float().mean()).all() and (single < 1.4 * single.float().mean()).all()
    pairs = samples.program[lengths == 2]
    first = pairs.gather(1, (pairs > 0).byte().argmax(dim=1, keepdim=True))
    assert len(first.unique()) == len(TASKS.operations)  # both orders


def test_samples_are_a_dataset() -> None:
    samples = TASKS.draw("train", 10, generator())
    batch = next(iter(DataLoader(samples, batch_size=4)))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input": (4, 8, 8), "target": (4, 8, 8), "program": (4, 3), "primitives": (4, 14),
    }  # fmt: skip
    assert torch.equal(batch["target"], samples.select(slice(0, 4)).target)


def test_a_few_shot_task_has_one_program_for_all_its_sets() -> None:
    composition = TASKS.splits["unseen"].compositions[5]
    support, query = TASKS.draw_task(composition, (8, 20), generator())
    assert len(support) == 8 and len(query) == 20
    assert len(torch.cat([support.program, query.program]).unique(dim=0)) == 1
    assert not torch.equal(support.input, query.input[:8])
    assert TASKS.describe_program(support.program[0]) == TASKS.describe(composition)


def test_every_label_is_drawn_equally_often_on_its_own_grids_or_on_the_same() -> None:
    for draw in (TASKS.draw_every_label, TASKS.draw_same_grids):
        assert torch.equal(draw("train", 6, generator()).primitives, LABELS.repeat_interleave(6, dim=0))
    samples = TASKS.draw_same_grids("train", 6, generator())
    grids, programs = (tensor.unflatten(0, (-1, 6)) for tensor in (samples.input, samples.program))
    assert (grids == grids[0]).all() and len(grids[0].unique(dim=0)) == 6
    assert (programs == programs[:, :1]).all() and len(programs[:, 0].unique(dim=0)) == len(LABELS)
    for row in (0, 100, len(samples) - 1):
        assert torch.equal(samples.target[row], applied(samples.program[row], samples.input[row])[0])


def test_inputs_are_neither_empty_nor_full_and_use_all_colours() -> None:
    grids = random_grids(5000, 5, generator())
    filled = (grids > 0).flatten(1).sum(dim=1)
    assert (filled > 0).all() and (filled < 64).all() and grids.unique().tolist() == [0, 1, 2, 3, 4]
    assert ((grids > 0).float().mean(dim=0) > 0.05).all()  # rectangles lie everywhere


# --- groups -------------------------------------------------------------------------------------------------


def sampler(samples: GridSamples, groups: int, group_size: int, seed: int = 0) -> GroupedBatchSampler:
    sizes = {"groups": groups, "group_size": group_size}
    return GroupedBatchSampler(samples.primitives, **sizes, generator=generator(seed))


def test_groups_of_a_drawn_buffer_fill_every_batch_anew_and_reproducibly() -> None:
    samples = TASKS.draw("train", 60, generator(), group_size=4)
    samplers = (sampler(samples, 6, 4, seed) for seed in (1, 1, 2))
    first, again, other = ([list(batches), list(batches)] for batches in samplers)
    assert first == again and first != other and first[0] != first[1]
    for batches in (*first, *other):
        assert [len(batch) for batch in batches] == 10 * [24]
        assert sorted(index for batch in batches for index in batch) == list(range(240))


def test_every_label_in_a_batch_occurs_at_least_group_size_times() -> None:
    samples = TASKS.draw("train", 1500, generator())
    batches = list(sampler(samples, groups=4, group_size=5))
    for batch in batches:
        counts = samples.primitives[batch].unique(dim=0, return_counts=True)[1]
        assert counts.min() >= 5 and counts.sum() == 20
    assert len({index for batch in batches for index in batch}) == 20 * len(batches) > 0  # none twice
