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
