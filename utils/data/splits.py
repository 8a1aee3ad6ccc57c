"""Split of classes into tasks, as ranges of incremental labels; known before any data are read."""

import itertools
from collections.abc import Sequence


def tasks_of(
    classes: int, init_cls: int, increment: int, max_tasks: int | None, added: Sequence[int] = ()
) -> list[range]:
    """The incremental labels of every task of a sequence; the last task of the data set may be shorter.

    Args:
        added: classes of each data set that follows, which is one task.
    """
    starts = [0, *range(init_cls, classes, increment)]
    tasks = [range(a, b) for a, b in zip(starts, [*starts[1:], classes], strict=True)][:max_tasks]
    stops = itertools.accumulate(added, initial=tasks[-1].stop)
    return [*tasks, *itertools.starmap(range, itertools.pairwise(stops))]
