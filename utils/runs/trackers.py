"""Experiment trackers: Weights & Biases and MLflow as optional sinks of a run's numbers and figures.

    require_trackers(config.trackers)                 # before anything is written
    trackers = Trackers(["wandb"], folder, config)
    trackers.add([("task/total", 3, 81.5)])           # the numbers of one event: (name, step, value)
    trackers.figures([folder / "figures/norms.png"])
    trackers.close()

TensorBoard's files are a view of the record (`utils/runs/metric_views.py`). A tracker is opened at the first
number; its run's id goes to the folder's `trackers.json`, so that a resumed run continues it. If one fails,
the run warns and goes on without it; once the run is resumed it gets what it lacks.
"""

import importlib.util
import json
import logging
import os
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from utils.command_line import as_set
from utils.errors import UserError, in_one_line
from utils.files import read_json, write_json
from utils.runs.folder import RESULT, SWEEP

TRACKERS = "trackers.json"  # name -> id of the run there, and EVENTS
EVENTS = "events"  # name -> number of the run's first events that it has, where the record has fewer or more
PROJECT = "nested-lora"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set
BOARD = "tensorboard"
SECONDS = 60  # for a tracker to answer when it is opened
MLFLOW_BATCH, MLFLOW_TEXT = 100, 6000  # values of a request, characters of a parameter
MLFLOW_SETTINGS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing is sent anywhere
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a dead server costs half a minute, not four
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(SECONDS),
}
Row = tuple[str, int, float]  # name, step, value

logger = logging.getLogger("nested_lora")


class WandbTracker:
    """A run of Weights & Biases, found again by its `id`; the axis of its curves is the step of each number.

    Every tracker has these methods, which may raise any exception.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], group: str, id: str | None) -> None:
        """Open the run in a folder, known there as `id`, None if new; group: see `Trackers`."""
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(silent=True, console="off", init_timeout=SECONDS, login_timeout=SECONDS)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=id,
            resume="allow",
            name=folder.name,
            group=group,
            config=dict(config),
            dir=os.environ.get("WANDB_DIR", folder),
            settings=settings,
        )
        self.id = self._run.id
        self._run.define_metric("*", step_metric="at")

    def add(self, rows: Sequence[Row]) -> None:
        for step, same in groupby(rows, key=lambda row: row[1]):
            self._run.log({"at": step, **{name: value for name, _, value in same}})

    def figures(self, paths: Sequence[Path]) -> None:
        self._run.log({f"figures/{path.stem}": self._wandb.Image(str(path)) for path in paths})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MlflowTracker:
    """A run of MLflow, at MLFLOW_TRACKING_URI or, without that, in the files of `<logs_root>/mlruns`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], group: str, id: str | None) -> None:
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient, entities

        self._entities = entities
        files = Path(config.get("logs_root", folder.parent)).absolute() / "mlruns"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or files.as_uri())
        if id is not None:
            self.id = id
            self._client.update_run(self.id, status="RUNNING")
            return
        tags = {"group": group, "folder": str(folder)}
        self.id = self._client.create_run(self._experiment(), run_name=folder.name, tags=tags).info.run_id
        params = [entities.Param(key, str(value)[:MLFLOW_TEXT]) for key, value in config.items()]
        for start in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self.id, params=params[start : start + MLFLOW_BATCH])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        try:
            return found.experiment_id if found else self._client.create_experiment(name)
        except Exception:  # another run has just made it
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def add(self, rows: Sequence[Row]) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._entities.Metric(re.sub(r"[^\w\-./ :]", "_", name), value, now, step)
            for name, step, value in rows
        ]
        for start in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self.id, metrics=metrics[start : start + MLFLOW_BATCH])

    def figures(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._client.log_artifact(self.id, str(path), "figures")

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


Tracker = WandbTracker | MlflowTracker
CLASSES: dict[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed. UserError: it says which, and what to do."""
    names = list(dict.fromkeys(names))
    missing = [name for name in names if name in CLASSES and importlib.util.find_spec(name) is None]
    if missing:
        left = json.dumps([name for name in names if name not in missing])
        raise UserError(
            f"trackers: {', '.join(missing)} is not installed; python -m pip install -r "
            f"requirements-trackers.txt, or leave it out with {as_set('trackers', [left])}"
        )


class Trackers:
    """The trackers of a run other than TensorBoard.

    The seeds of an experiment share a group there: its prefix, or for a sweep's cell `<sweep>/<cell>`.
    """

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        config: Mapping[str, Any],
        recorded: int = 0,
        kept: int = 0,
    ) -> None:
        """Trackers by name, none opened yet.

        Args:
            recorded: events of the run when its last session ended.
            kept: how many of them are still in its record, cut to its last checkpoint; they are added first.
        """
        self._folder, self._config, self._events, self._kept = folder, config, 0, kept
        sweep, self._group = Path(config.get("logs_root", "")).parent, config.get("prefix", "run")
        if os.path.isfile(sweep / SWEEP):  # False where it may not be looked at
            self._group = f"{sweep.name}/{self._group}"
        self._ids = read_json(folder / TRACKERS) if (folder / TRACKERS).is_file() else {}
        self._open: dict[str, Tracker | None] = {name: None for name in names if name in CLASSES}
        saved = self._ids.pop(EVENTS, {})
        self._sent = dict.fromkeys(CLASSES, 0) | dict.fromkeys(self._ids, recorded) | saved
        self._apart = {  # what the length of the record does not tell
            name: self._sent[name] for name in self._ids if self._sent[name] != kept or name not in self._open
        }
        if self._apart != saved:
            self._save()

    def add(self, rows: Sequence[Row]) -> None:
        """The numbers of the next event of the run, in the order of its record."""
        self._events += 1
        for name in list(self._open):
            if not rows or self._events <= self._sent[name]:
                continue
            self._do(name, lambda tracker: tracker.add(rows))
            if name in self._open:
                self._sent[name] = self._events
                if name in self._apart and self._events >= self._kept:
                    del self._apart[name]
                    with suppress(OSError):  # then it is told some of it again
                        self._save()

    def figures(self, paths: Sequence[Path]) -> None:
        """Send PNG files to every tracker."""
        for name in list(self._open):
            self._do(name, lambda tracker: tracker.figures(paths))

    def close(self) -> None:
        """Close open trackers; they mark the run as finished if it has its result."""
        finished = (self._folder / RESULT).exists()
        for name, tracker in list(self._open.items()):
            if tracker is not None:
                self._do(name, lambda tracker: tracker.close(finished))
        self._open.clear()

    def _do(self, name: str, act: Callable[[Tracker], None]) -> None:
        """Call a tracker, opening it first if needed; if that fails, warn and go on without it."""
        try:
            tracker = self._open[name]
            if tracker is None:
                where = self._folder, self._config, self._group, self._ids.get(name)
                tracker = self._open[name] = CLASSES[name](*where)
                self._ids[name] = tracker.id
                self._save()
            act(tracker)
        except Exception as error:  # the disk, the network, whatever a tracker raises
            del self._open[name]
            reason = textwrap.shorten(in_one_line(error), 200, placeholder=" ...")
            logger.warning(f"{name} gets nothing more of this run, which goes on: {reason}")
            if name in self._ids:
                self._apart[name] = self._sent[name]
                with suppress(OSError):  # the disk may be what failed
                    self._save()

    def _save(self) -> None:
        write_json(self._folder / TRACKERS, self._ids | ({EVENTS: self._apart} if self._apart else {}))
