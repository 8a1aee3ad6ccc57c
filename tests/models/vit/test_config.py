"""models.vit.config: what the keys of a class-incremental run say about it."""

from collections.abc import Callable

import pytest

from utils.config.schema import RunConfig


def test_what_runs_are_tested_on_has_the_order_of_classes_where_it_decides_which_are_learned(
    smoke_config: Callable[..., RunConfig],
) -> None:
    """Of eight classes, in one task: which four they are; of all eight there is nothing to draw."""
    for learned in (4, 8):
        drawn, stored = (
            smoke_config(init_cls=learned, max_tasks=1, shuffle=shuffle).tested_on(1, learned, 8)
            for shuffle in (True, False)
        )
        assert (drawn == stored) == (learned == 8)


@pytest.mark.parametrize("seen", [7, 11])
def test_what_runs_are_tested_on_counts_the_classes_of_added_data_sets(
    seen: int, smoke_config: Callable[..., RunConfig]
) -> None:
    """Of all eight classes and three added ones, or of four drawn by the seed and the three, in any tasks."""
    runs = [(4, 2), (2, 4)] if seen == 11 else [(4, 1), (2, 2)]
    about = [
        smoke_config(init_cls=increment, increment=increment, max_tasks=most)
        .model_copy(update={"extra_data": ["birds"]})
        .tested_on(tasks + 1, seen, 11)["classes"]
        for increment, tasks in runs
        for most in ([None, tasks] if seen == 11 else [tasks])
    ]
    assert len(set(about)) == 1 and (about[0] == 11) == (seen == 11)
