"""Record of one run (one seed): its text log and its numbers.

    with RunLog.create(folder_of(config, seed=1993), config=config.model_dump(), overwrite=False) as run:
        run.manifest({...})
        run.metric("epoch", task=0, phase="func", epoch=0, loss=0.7, train_accuracy=81.0, lr={"fast": 0.01})
        run.table("accuracy.csv", matrix_frame(matrix))
        run.result({...})

`config.json`, `manifest.json`, `result.json` and `accuracy.csv` are replaced as a whole, atomically.
`metrics.jsonl` takes one line per event; `tb/` and `metrics.csv` are views of it, written again when a run
is resumed (`utils/runs/metric_views.py`). Other trackers get the same numbers (`utils/runs/trackers.py`). The
text log lies beside the folder as `<folder>.log`. One process at a time writes a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from utils.console import add_handler, attach_console
from utils.errors import Interrupted, UserError, os_error_sentence
from utils.files import damaged, json_bytes, naming, read_json, replace_file
from utils.metric_catalogue import keyed
from utils.runs.folder import (
    CONFIG,
    MANIFEST,
    METRICS,
    RESULT,
    TABLE,
    TENSORBOARD,
    Fill,
    FolderLock,
    claim_folder,
    text_log,
    waiting_notes,
)
from utils.runs.metric_views import MetricViews
from utils.runs.trackers import BOARD, Trackers

logger = logging.getLogger("nested_lora")


class RunLog:
    """Writer of a run's record, apart from checkpoints and figures. Open one with `create` or `reopen`.

    It holds the folder's lock until it is closed. A new run that ends with an error before it has recorded
    anything leaves no folder, and what it was to replace is back in its place.
    """

    def __init__(
        self,
        folder: Path,
        lock: FolderLock,
        abandon: Callable[[], None] = lambda: None,
        notes: Sequence[str] = (),
        events: int = 0,
    ) -> None:
        """Open the record in a folder; where that fails it is abandoned, and its lock given back.

        Args:
            notes: lines to log first.
            events: how many there were in it when its last session ended.
        """
        self.folder, self.log_path, self._abandon = folder, text_log(folder), abandon
        self._closing = ExitStack()  # closes each part, whatever the disk refuses of the others
        self._closing.callback(lock.release)
        self._text_log: _TextLog | None = None
        with ExitStack() as failed:
            failed.push(self)
            if console := attach_console():
                self._closing.callback(logger.removeHandler, console)
            self._text_log = _TextLog(self.log_path, encoding="utf-8", errors="backslashreplace")
            self._closing.callback(self._text_log.close)
            add_handler(self._text_log)
            self._metrics = self._closing.enter_context(open(folder / METRICS, "ab", buffering=0))
            config, record = read_json(folder / CONFIG), read_metrics(folder)
            names = config.get("trackers", [BOARD])
            self._views = MetricViews(folder / TENSORBOARD if BOARD in names else None, folder / TABLE)
            self._closing.callback(self._views.close)
            self._trackers = Trackers(names, folder, config, recorded=events, kept=len(record))
            self._closing.callback(self._trackers.close)
            for note in notes:
                logger.warning(note)
            self._views.hyperparameters(config)
            for event in record:
                self._show(event)
            failed.pop_all()

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        config: Mapping[str, Any],
        overwrite: bool,
        manifest: Mapping[str, Any] = {},
        fill: Fill = lambda prepared: None,
    ) -> RunLog:
        """Start the record of a new run in `folder` or a numbered sibling (see `claim_folder`).

        The folder holds `config.json`, `manifest.json` and what `fill` puts into it from its first moment on.
        """
        files = {CONFIG: config, MANIFEST: manifest}
        contents = {name: json_bytes(_plain(values)) for name, values in files.items()}
        claim = claim_folder(folder, contents, overwrite, fill)
        return cls(claim.folder, claim.lock, claim.abandon, claim.notes)

    @classmethod
    def reopen(cls, folder: Path, metrics_bytes: int, lock: FolderLock | None = None) -> RunLog:
        """Record of an interrupted run, with `metrics.jsonl` cut to its size at a checkpoint.

        Args:
            metrics_bytes: size of `metrics.jsonl` when the checkpoint was saved.
            lock: the folder's, where the caller has taken it; it is released when the record is closed.

        Raises UserError: the folder is being written, or `metrics.jsonl` cannot have had that size.
        """
        lock, path = lock or FolderLock(folder).acquire(), folder / METRICS
        with ExitStack() as failed:
            failed.callback(lock.release)
            before = path.read_bytes() if path.exists() else b""
            if before or metrics_bytes:
                os.truncate(path, len(metrics_until(path, metrics_bytes)))
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
            failed.pop_all()
        return cls(folder, lock, events=before.count(b"\n"))

    @property
    def metrics_bytes(self) -> int:
        """Size of `metrics.jsonl`, all of it on disk, for a checkpoint."""
        with naming(self.folder / METRICS):
            os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

    def metric(self, event: str, **fields: Any) -> None:
        """Append `{"event": event, **fields}` to `metrics.jsonl`, in plain JSON; non-finite numbers are null.

        A killed process loses at most the line it was writing. OSError: the disk does not take it; no part of
        the line stays.
        """
        record = {"event": event, **_plain(fields)}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._metrics.fileno()).st_size
        with naming(self.folder / METRICS):
            try:
                while line:
                    line = line[self._metrics.write(line) :]
            except OSError:
                self._metrics.truncate(size)
                raise
        self._show(record)

    def manifest(self, values: Mapping[str, Any]) -> None:
        """Write `manifest.json`: code, libraries, data and sessions of the run."""
        self._replace(MANIFEST, json_bytes(_plain(values)))

    def result(self, values: Mapping[str, Any]) -> None:
        """Write `result.json`: the final numbers. Its presence says that the run is finished."""
        self._replace(RESULT, json_bytes(_plain(values)))

    def show_result(self, metrics: Mapping[str, Any], pictures: Sequence[Path]) -> None:
        """Show the final numbers, and the figures that are PNG files, in TensorBoard and other trackers."""
        pngs = [path for path in pictures if path.suffix == ".png"]
        self._trackers.add(self._views.result(metrics))
        self._views.figures(pngs)
        self._trackers.figures(pngs)

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV file at full precision: missing values are empty fields, unnamed columns no header."""
        header = not isinstance(table.columns, pd.RangeIndex)
        self._replace(name, table.to_csv(header=header, index=False, lineterminator="\n").encode())

    def close(self) -> None:
        """Close the files, detach the log handlers, give the lock back. Closing twice is harmless."""
        if self._text_log:
            logger.removeHandler(self._text_log)  # first: messages of closing are not part of the run
        self._closing.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        with ExitStack() as closing:
            closing.callback(self.close)
            if kind is not None:
                self._log_failure(error)
                self._abandon()
                for note in waiting_notes(self.folder):
                    logger.warning(note)

    def _show(self, event: Mapping[str, Any]) -> None:
        self._trackers.add(self._views.add(event))

    def _log_failure(self, error: BaseException) -> None:
        """Write an error that ends the run to the text log: its sentence, or a traceback."""
        if self._text_log is None or isinstance(error, Interrupted) or not isinstance(error, Exception):
            return
        text, trace = str(error), None
        if isinstance(error, OSError):
            text = os_error_sentence(error)
        elif not isinstance(error, UserError):
            text, trace = "the run failed", (type(error), error, error.__traceback__)
        record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), trace)
        with suppress(OSError):  # the disk may be what failed
            self._text_log.handle(record)

    def _replace(self, name: str, content: bytes) -> None:
        replace_file(self.folder / name, content)


class SilentLog(RunLog):
    """Record of the processes other than the first: nothing is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def metrics_bytes(self) -> int:
        return 0

    def metric(self, event: str, **fields: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def _replace(self, name: str, content: bytes) -> None:
        pass


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events in a run's `metrics.jsonl`, except a torn last line. UserError: it is absent or damaged."""
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"{folder} holds no {METRICS}: it is not a run folder")
    *finished, _torn = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(finished, start=1):
        with damaged(f"{path}, line {number},"):
            event = json.loads(line)
            if not isinstance(event["event"], str) or not isinstance(event.get("task", 0), int):
                raise ValueError("it is no event")
        events.append(event)
    return events


def accuracy_rows(events: Iterable[Mapping[str, Any]]) -> tuple[list[list[float]], str]:
    """The accuracy matrix (%) of a run's task events, t + 1 entries in row t, and its images.

    No rows where the method has none; the images are "test" or "validation".
    """
    tasks = [event for event in events if event["event"] == "task"]
    images = "validation" if any(keyed("validation", "accuracy") in event for event in tasks) else "test"
    name = keyed(images, "accuracy")
    return [event[name] for event in tasks if name in event], images


class _TextLog(logging.FileHandler):
    """Text log of one run, which raises OSError on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        with naming(Path(self.baseFilename)):
            raise error


def metrics_until(path: Path, size: int) -> bytes:
    """The first `size` bytes of a `metrics.jsonl`. UserError: they are not there, or no whole lines."""
    content = path.read_bytes() if path.exists() else b""
    if not 0 <= size <= len(content) or (size and content[size - 1 : size] != b"\n"):
        raise UserError(
            f"{path} has {len(content)} bytes and does not fit the checkpoint, which was made when a line "
            f"of it ended at byte {size}: the file was changed or belongs to another run"
        )
    return content[:size]


def _plain(value: Any) -> Any:
    """The value for JSON: text keys, plain numbers and lists, null for non-finite, text for paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return _plain(value.tolist())
    return value
