"""Views of a run's events: curves for TensorBoard, and `metrics.csv` (tag, step, value) for spreadsheets.

views = MetricViews(run / "tb", run / "metrics.csv")
views.add({"event": "epoch", "task": 0, "phase": "func", "loss": 0.7})       # epoch/func/loss, step 0
"""

import csv
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from utils.files import naming

POSITION_FIELDS = {"task", "epoch", "step"}  # where in the run an event happened: not values to draw
NUMBERED_FIELDS = {"block", "adapter"}  # numbers that say what an event is about: part of its tag


def scalars(event: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Numbers of an event with their tags, such as `epoch/rd/block_09/loss` and `task/accuracy/00`.

    A tag is the event's name, its text fields, block and adapter numbers, and the value's field. Position in
    the run (task, epoch, step) and nulls are left out.
    """
    about = [
        f"{name}_{value:02d}" if name in NUMBERED_FIELDS else str(value)
        for name, value in event.items()
        if (name in NUMBERED_FIELDS and isinstance(value, int)) or isinstance(value, str)
    ]
    values = {name: value for name, value in event.items() if name not in POSITION_FIELDS | NUMBERED_FIELDS}
    return [("/".join([*about, *path]), value) for path, value in _numbers(values)]


class MetricViews:
    """Numbers of events as a table and, with a board, as TensorBoard's file; the step counts per tag."""

    def __init__(self, board: Path | None, table: Path) -> None:
        self._events_path = Path(os.devnull)
        if board is not None:
            board.mkdir(exist_ok=True)
            self._events_path = board / f"events.out.tfevents.{time.time_ns() // 10**9}.{os.getpid()}"
        self._table_path = table
        self._events = open(self._events_path, "wb")  # noqa: SIM115 - closed by close()
        self._records = RecordWriter(self._events)
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._table = open(table, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()
        self._rows = csv.writer(self._table, lineterminator="\n")
        self._rows.writerow(["tag", "step", "value"])
        self._steps: Counter[str] = Counter()

    def add(self, event: Mapping[str, Any]) -> list[tuple[str, int, float]]:
        """The numbers of an event, written: (tag, step, value)."""
        rows = [(tag, self._steps[tag], value) for tag, value in scalars(event)]
        self._steps.update(tag for tag, _, _ in rows)
        with naming(self._events_path):
            for tag, step, value in rows:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                record = Event(wall_time=time.time(), step=step, summary=summary)
                self._records.write(record.SerializeToString())
            self._events.flush()
        with naming(self._table_path):
            self._rows.writerows(rows)
            self._table.flush()
        return rows

    def close(self) -> None:
        with ExitStack() as closing:
            for path, file in ((self._events_path, self._events), (self._table_path, self._table)):
                closing.enter_context(naming(path))
                closing.callback(file.close)


def _numbers(values: Any) -> Iterator[tuple[list[str], float]]:
    """Every number inside nested mappings and lists, with the path to it."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if isinstance(values, bool | int | float):
        yield [], float(values)
    elif isinstance(values, Mapping):
        for key, item in values.items():
            name = str(key).zfill(2) if str(key).isdigit() else str(key)
            yield from (([name, *path], number) for path, number in _numbers(item))
