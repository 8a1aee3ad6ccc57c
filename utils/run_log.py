"""The record of one run (one seed): its folder, its text log, its numbers, and TensorBoard.

    with RunLog.create(folder_of(config, seed=1993), config=config.model_dump(), overwrite=False) as run:
        run.manifest({...})
        run.metric("epoch", task=0, phase="func", block=None, epoch=0, loss=0.7, train_accuracy=81.0, lr={"fast": 0.01})
        run.accuracy_csv(matrix.rows)
        run.result({...})

`config.json`, `manifest.json`, `result.json` and `accuracy.csv` are replaced as a whole, atomically. `metrics.jsonl`
takes one line an event. `tb/` and `metrics.csv` (tag, step, value) are views of `metrics.jsonl` and nothing else: they
are redrawn when a run is resumed.
The text log lies beside the folder as `<folder>.log`.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.config import RunConfig
from utils.errors import UserError
from utils.files import replace_file

logger = logging.getLogger("nested_lora")

CONFIG = "config.json"
MANIFEST = "manifest.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
ACCURACY = "accuracy.csv"
TENSORBOARD = "tb"
TABLE = "metrics.csv"

_FORMAT = "%(asctime)s [%(filename)s] => %(message)s"
_POSITION_FIELDS = {"task", "epoch", "step"}  # where in the run an event happened: not values to draw
_NUMBERED_FIELDS = {"block", "adapter"}  # numbers that say what an event is about: part of its tag


def folder_of(config: RunConfig, seed: int) -> Path:
    """Where one seed of a configuration is recorded: its `folder_names` below `logs_root`.

    Slashes inside a name become dashes: every name is one level.
    """
    names = config.folder_names(seed)
    return Path(config.logs_root).joinpath(*(name.replace("/", "-").replace("\\", "-") for name in names))


class RunLog:
    """Everything one run writes, apart from its checkpoints and figures. Open one with `create` or `reopen`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_path = _log_path(folder)
        self._handlers = _attach(self.log_path)
        self._metrics = open(folder / METRICS, "ab")  # noqa: SIM115 - closed by close()
        self._views = _Views(folder / TENSORBOARD, folder / TABLE)

    @classmethod
    def create(cls, folder: Path, *, config: Mapping[str, Any], overwrite: bool) -> RunLog:
        """Start the record of a new run and write its `config.json`.

        An existing folder is left alone: the run goes to `<folder>_2` (or `_3`, ...), and an existing run without a
        result is named in the log with the command that continues it. With `overwrite` the existing folder and its log
        are removed first. Raises UserError when the folder cannot be created, or is to be replaced and is no run's.
        """
        folder = Path(folder)
        if overwrite:
            _remove_run(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder, existing = _claim(folder)
        except OSError as error:
            raise UserError(f"cannot create {folder}: {error.strerror}; logs_root must be a writable folder") from error
        run = cls(folder)
        run.write_json(CONFIG, config)
        for other in existing:
            if (other / CONFIG).exists() and not (other / RESULT).exists():
                command = f"python main.py --resume {shlex.quote(str(other))}"
                logger.warning("%s has no %s: unfinished, or still running. To continue it: %s", other, RESULT, command)
        return run

    @classmethod
    def reopen(cls, folder: Path, metrics_bytes: int) -> RunLog:
        """Go on with the record of an interrupted run as it stood when a checkpoint noted `metrics_bytes`.

        Cuts `metrics.jsonl` to that size, redraws its views from what is left, and appends to the text log.
        Raises UserError when the folder is not a run's, or `metrics.jsonl` cannot have had that size.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} is not a run folder: it holds no {CONFIG}")
        _cut_metrics(folder / METRICS, metrics_bytes)
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        run = cls(folder)
        for event in read_metrics(folder):
            run._views.add(event)
        return run

    @property
    def metrics_bytes(self) -> int:
        """Size of `metrics.jsonl` in bytes, all of them on disk, so that a checkpoint can rely on them."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return os.fstat(self._metrics.fileno()).st_size

    def metric(self, event: str, **fields: Any) -> None:
        """Append one line `{"event": event, **fields}` to `metrics.jsonl` and hand it to the operating system.

        Non-finite numbers become null; NumPy and tensor values become plain ones; keys become text.
        A killed process loses at most the line it was writing.
        """
        record = {"event": event, **_plain(fields)}
        self._metrics.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._metrics.flush()
        self._views.add(record)

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write `<folder>/<name>` as a whole or not at all. Non-finite numbers become null."""
        return self._replace(name, json.dumps(_plain(values), indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def manifest(self, values: Mapping[str, Any]) -> Path:
        """Write `manifest.json`: what the run was made with (versions, weights, class order, data, device)."""
        return self.write_json(MANIFEST, values)

    def result(self, values: Mapping[str, Any]) -> Path:
        """Write `result.json`: the final numbers. Its presence says that the run is finished."""
        return self.write_json(RESULT, values)

    def accuracy_csv(self, rows: Sequence[Sequence[float]]) -> Path:
        """Write `accuracy.csv`: the task x task matrix in percent at full precision, without a header.

        Line t is the state after task t; tasks not seen yet are empty cells.
        """
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*row, *[""] * (len(rows) - len(row))] for row in rows)
        return self._replace(ACCURACY, text.getvalue())

    def close(self) -> None:
        """Close the files and take the handlers off the logger. Closing twice is harmless."""
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._handlers = []
        self._views.close()
        self._metrics.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replace(self, name: str, text: str) -> Path:
        return replace_file(self.folder / name, text.encode())


class SilentLog(RunLog):
    """The record as processes other than the first see it: the same calls, nothing written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def metrics_bytes(self) -> int:
        return 0

    def metric(self, event: str, **fields: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def _replace(self, name: str, text: str) -> Path:
        return self.folder / name


def attach_console() -> logging.Handler | None:
    """Show the program's messages on standard output without breaking progress bars.

    Returns the handler, or None where one is attached already: call it at the start of a program; a run calls it too.
    """
    if any(isinstance(handler, _Console) for handler in logger.handlers):
        return None
    handler = _Console()
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events in a run's `metrics.jsonl`, in order. A last line that was never finished is left out.

    Raises UserError when there is no such file or a finished line is not a JSON object.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise UserError(f"{folder} holds no {METRICS}: it is not a run folder")
    *finished, _torn = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(finished, start=1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not valid JSON ({error}): the file is damaged") from error
        if not isinstance(event, dict) or "event" not in event:
            raise UserError(f"{path}, line {number} is not an event: the file is damaged or foreign")
        events.append(event)
    return events


def read_accuracy_csv(folder: Path) -> list[list[float]]:
    """The rows of a run's `accuracy.csv` in percent; row t has t + 1 entries.

    Raises UserError when there is no such file or it is not a lower-triangular matrix of numbers.
    """
    path = Path(folder) / ACCURACY
    if not path.is_file():
        raise UserError(f"{folder} holds no {ACCURACY}: no task of this run has finished, or it is not a run folder")
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    try:
        matrix = [[float(cell) for cell in row[: t + 1]] for t, row in enumerate(rows)]
        triangular = all(len(row) == len(rows) and not any(row[t + 1 :]) for t, row in enumerate(rows))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not triangular:
        raise UserError(f"{path} is damaged: not a lower-triangular matrix of {len(rows)} tasks")
    return matrix


def scalars(event: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What TensorBoard draws of an event: [(tag, value)].

    The tag is the event's name, then what it is about (text fields, block and adapter numbers), then the value's field:
    `epoch/rd/block_09/loss`, `task/accuracy/00`. Position in the run (task, epoch, step) and nulls are not drawn.
    """
    about = [
        f"{name}_{value:02d}" if name in _NUMBERED_FIELDS else str(value)
        for name, value in event.items()
        if (name in _NUMBERED_FIELDS and isinstance(value, int)) or isinstance(value, str)
    ]
    values = {name: value for name, value in event.items() if name not in _POSITION_FIELDS | _NUMBERED_FIELDS}
    return [("/".join([*about, *path]), value) for path, value in _numbers(values)]


class _Views:
    """The numbers of events for TensorBoard and as a table.

    The step is a counter for each tag, so that the same events always give the same curves and lines.
    """

    def __init__(self, board: Path, table: Path) -> None:
        self._writer = SummaryWriter(str(board))
        self._table = open(table, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()
        self._rows = csv.writer(self._table, lineterminator="\n")
        self._rows.writerow(["tag", "step", "value"])
        self._steps: Counter[str] = Counter()

    def add(self, event: Mapping[str, Any]) -> None:
        for tag, value in scalars(event):
            self._writer.add_scalar(tag, value, self._steps[tag])
            self._rows.writerow([tag, self._steps[tag], value])
            self._steps[tag] += 1
        self._table.flush()

    def close(self) -> None:
        self._writer.close()
        self._table.close()


class _Console(logging.Handler):
    """Messages above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except Exception:  # as every logging handler: a message must never end the program
            self.handleError(record)


class _TextLog(logging.FileHandler):
    """The text log of one run; a type of its own so that two runs are never open at once."""


def _attach(log_path: Path) -> list[logging.Handler]:
    """Send the program's messages to the run's text log and to the console; returns the handlers added."""
    if any(isinstance(handler, _TextLog) for handler in logger.handlers):
        raise RuntimeError("another run's log is still open; close it first: one seed, one log")
    console = attach_console()
    text_log = _TextLog(log_path, encoding="utf-8")
    text_log.setFormatter(logging.Formatter(_FORMAT))
    logger.setLevel(logging.INFO)
    logger.addHandler(text_log)
    return [text_log] if console is None else [text_log, console]


def _log_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _claim(folder: Path) -> tuple[Path, list[Path]]:
    """Create the first free of `folder`, `folder_2`, `folder_3`, ...; returns it and the ones that were taken."""
    taken = []
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        if not _log_path(candidate).exists():
            try:
                candidate.mkdir()
                return candidate, taken
            except FileExistsError:  # also when another process has just created it
                pass
        taken.append(candidate)
    raise AssertionError("unreachable: the numbers do not end")


def _remove_run(folder: Path) -> None:
    """Remove a run's folder and text log; refuses a folder that holds other things than a run."""
    if folder.is_dir() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} holds no {CONFIG}, so it is not a run folder: move it away, it is not overwritten")
    if folder.exists():
        shutil.rmtree(folder)
    _log_path(folder).unlink(missing_ok=True)


def _cut_metrics(path: Path, size: int) -> None:
    """Cut `metrics.jsonl` to the first `size` bytes, which must be whole lines."""
    content = path.read_bytes() if path.exists() else b""
    if not 0 <= size <= len(content) or (size and content[size - 1 : size] != b"\n"):
        raise UserError(
            f"{path} has {len(content)} bytes and does not fit the checkpoint, which was made when a line of it ended "
            f"at byte {size}: the file was changed or belongs to another run"
        )
    if path.exists():
        os.truncate(path, size)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: text keys, plain numbers and lists, null for non-finite, text for paths."""
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


def _numbers(values: Any) -> Iterator[tuple[list[str], float]]:
    """Every number inside nested mappings and lists, with the path to it."""
    if isinstance(values, bool | int | float):
        yield [], float(values)
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    for key, item in items:
        for path, number in _numbers(item):
            yield [str(key).zfill(2) if str(key).isdigit() else str(key), *path], number
