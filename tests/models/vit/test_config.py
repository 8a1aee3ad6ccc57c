"""models.vit.config: what the keys of a class-incremental run say about it."""

from collections.abc import Callable

from utils.config.schema import RunConfig


def test_what_runs_are_tested_on_has_the_order_of_classes_where_it_decides_which_are_learned(
    smoke_config: Callable[..., RunConfig],
) -> None:
    """Of eight classes, in one task: which four they are; of all eight there is nothing to draw."""
    for learned in (4, 8):
        drawn, stored = (
            smoke_config(init_cls=learned, max_tasks=1, shuffle=shuffle).tested_on(1, 8)
            for shuffle in (True, False)
        )
        assert (drawn == stored) == (learned == 8)


def test_what_runs_are_tested_on_counts_the_classes_of_added_data_sets(
    smoke_config: Callable[..., RunConfig],
) -> None:
    """Of all eight classes and three added ones, whatever the tasks; of four of the eight, drawn by seed."""
    for max_tasks in (None, 4):
        split_in_two, split_in_four = (
            smoke_config(
                init_cls=increment, increment=increment, max_tasks=max_tasks and max_tasks // increment
            )
            .model_copy(update={"extra_data": ["birds"]})
            .tested_on((max_tasks or 8) // increment + 1, 11)["classes"]
            for increment in (4, 2)
        )
        assert split_in_two == split_in_four
        assert (split_in_two == 11) == (max_tasks is None)
