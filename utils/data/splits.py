"""Split of classes into tasks, as ranges of incremental labels; known before any data are read."""


def tasks_of(classes: int, init_cls: int, increment: int, max_tasks: int | None) -> list[range]:
    """The incremental labels of every task of a sequence; the last task may be shorter."""
    starts = [0, *range(init_cls, classes, increment)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], classes], strict=True)][:max_tasks]
