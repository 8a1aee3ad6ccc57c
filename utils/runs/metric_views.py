"""Views of a run's record: TensorBoard, and `metrics.csv` (tag, step, value) for spreadsheets.

    views = MetricViews(run / "tb", run / "metrics.csv")
    views.hyperparameters(config)                                         # once, in the same TensorBoard run
    views.add({"event": "task", "task": 3, "total": 81.5})                # task/total at step 3
    views.add({"event": "epoch", "task": 3, "phase": "func", "steps_in_task": 120, "loss": 0.7})
    views.result({"final": 81.5})                                         # result/final
    views.figures([run / "figures" / "norms.png"])

Numbers per task have the task as their step, numbers per epoch the batches that the whole run has processed
in training and scans so far, without scans after a task's last epoch; other tags count their own values.
"""

import csv
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_BOOL, DATA_TYPE_FLOAT64, DATA_TYPE_STRING
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from utils.files import naming

POSITION_FIELDS = {"task", "epoch", "step", "steps_in_task"}  # position of an event in the run: no values
NUMBERED_FIELDS = {"block", "adapter"}  # numbers that say what an event is about: part of its tag
TYPES = {bool: DATA_TYPE_BOOL, int: DATA_TYPE_FLOAT64, float: DATA_TYPE_FLOAT64, str: DATA_TYPE_STRING}


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
    """Numbers of a run as a table and, with a board, as TensorBoard's file."""

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
        self._counts: Counter[str] = Counter()
        self._steps = self._steps_before_task = 0  # batches processed in the whole run
        self._config: dict[str, bool | int | float | str] = {}

    def add(self, event: Mapping[str, Any]) -> list[tuple[str, int, float]]:
        """Write the numbers of an event; returns them as (tag, step, value)."""
        step = self._step_of(event)
        rows = [(tag, self._counts[tag] if step is None else step, value) for tag, value in scalars(event)]
        self._counts.update(tag for tag, _, _ in rows)
        for tag, at, value in rows:
            self._write(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), at)
        with naming(self._table_path):
            self._rows.writerows(rows)
            self._table.flush()
        return rows

    def hyperparameters(self, config: Mapping[str, Any]) -> None:
        """The configuration, for TensorBoard's table of hyper-parameters; other than plain values as text."""
        self._config = {
            key: value if type(value) in TYPES else str(value)
            for key, value in config.items()
            if value is not None
        }
        self._write(hparams_pb(self._config, trial_id=str(self._events_path.parent.parent)))

    def result(self, metrics: Mapping[str, Any]) -> list[tuple[str, int, float]]:
        """Write the final numbers as `add` does, each also as a column in the table of hyper-parameters."""
        rows = self.add({"event": "result", **metrics})
        columns = [Metric(f"result/{key}") for key in metrics]
        summary = hparams_config_pb(hparams=[HParam(key) for key in self._config], metrics=columns)
        about = summary.value[0].metadata.plugin_data
        table = HParamsPluginData.FromString(about.content)
        for key in table.experiment.hparam_infos:  # without its type TensorBoard filters by no key
            key.type = TYPES[type(self._config[key.name])]
        about.content = table.SerializeToString()
        self._write(summary)
        return rows

    def figures(self, paths: Sequence[Path]) -> None:
        """PNG files, for TensorBoard's images."""
        for path in paths:
            image = Summary.Image(encoded_image_string=path.read_bytes())
            self._write(Summary(value=[Summary.Value(tag=f"figures/{path.stem}", image=image)]))

    def _step_of(self, event: Mapping[str, Any]) -> int | None:
        """Where an event stands on the axis of its tags; None: its tags count their own values."""
        if "steps_in_task" in event:
            self._steps = self._steps_before_task + event["steps_in_task"]
            return self._steps
        if event["event"] == "task":
            self._steps_before_task = self._steps
        return None if "epoch" in event or "step" in event else event.get("task")

    def _write(self, summary: Summary, step: int = 0) -> None:
        with naming(self._events_path):
            self._records.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
            self._events.flush()

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
