"""Extension: a new run that begins with the learned tasks of a finished run and learns further classes.

    extension = Extension.of(Path("logs/sema/..."), ["max_tasks=4"])          # more tasks of its data set
    extension = Extension.of(Path("logs/sema/..."), [], ["photos/birds"])     # or classes of another one
    tensors, state = extension.check(learner)                                 # a learner of extension.config
    extension.fill(new_folder, learner)                                       # record and checkpoints

The new run starts as a run of the longer sequence would be after the tasks already learned, bit for bit. It
has a folder of its own; the old one is only read.
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.methods import LEARNERS, SCHEMAS
from models.saved.files import read_config
from models.saved.learner import CHECKPOINTS, check_identity, check_precision, load_run_checkpoint
from models.vit.class_incremental import ClassIncrementalLearner
from models.vit.config import ClassIncrementalConfig, OneTaskRules
from utils.config.loading import load_config
from utils.config.schema import with_reasons
from utils.errors import UserError
from utils.files import replace_file, sha256_file
from utils.runs.checkpoint import checkpoint_name, copy_checkpoint
from utils.runs.folder import ACCURACY, CONFIG, METRICS, folder_of, resume_command
from utils.runs.manifest import Manifest, is_complete, read_manifest
from utils.runs.run_log import accuracy_rows, metrics_until, read_metrics


@dataclass(frozen=True)
class Extension:
    """A finished run, the number of tasks it learned, and the configuration of the run that extends it.

    notes: lines worth logging, such as which of the changed keys have no effect.
    """

    folder: Path
    config: ClassIncrementalConfig
    tasks: int
    notes: Sequence[str]

    @classmethod
    def of(cls, folder: Path, overrides: Sequence[str], data: Sequence[str] = ()) -> "Extension":
        """The extension of the run in a folder.

        Args:
            overrides: texts `key=value`, of max_tasks and of keys that change no result.
            data: data sets with new classes, each one task, given like `dataset`.

        Raises UserError: the run is unfinished, cannot be extended, or would not gain a task.
        """
        old = read_config(folder)
        if not isinstance(old, ClassIncrementalConfig) or isinstance(old, OneTaskRules):
            raise UserError(
                f"{folder} cannot be extended: {old.model_name} learns all of its data at once and would "
                "need them again; start a new run with more data"
            )
        if not is_complete(folder):
            raise UserError(f"{folder} is unfinished: finish it first, with {resume_command(folder)}")
        known = {*map(os.path.realpath, [old.dataset, *old.added])}
        for path in data:
            if os.path.realpath(path) in known:
                raise UserError(f"--data {path}: given twice, or part of {folder} already; give new classes")
            known.add(os.path.realpath(path))
        added = {"extra_data": [*old.added, *data]} if data else {}
        loaded = load_config(folder / CONFIG, overrides, SCHEMAS, [("--data", added)])
        new, tasks = loaded.config, len(accuracy_rows(read_metrics(folder))[0])
        refuse_other_changes(old, new, several_seeds=len(loaded.configs) > 1)
        total = check_length(folder, old, new, tasks)
        if new.prefix == old.prefix:
            prefix = re.sub(r"_\d+tasks$", "", old.prefix)
            new = new.model_copy(update={"prefix": f"{prefix}_{total}tasks"})
        if folder_of(new, new.seed).name == folder.name:
            raise UserError(f"prefix {new.prefix!r} names the folder of the run itself: choose another")
        named = {override.partition("=")[0].strip() for override in overrides}
        unused = {name: reason for name, reason in new.without_effect().items() if name in named}
        notes = [f"keys with no effect here: {with_reasons(unused)}"] if unused else []
        return cls(folder, new, tasks, [*notes, *loaded.notes])

    @property
    def place(self) -> Path:
        """Folder of the new run: beside the old one, or below a `logs_root` of its own."""
        place = folder_of(self.config, self.config.seed)
        moved = self.config.logs_root != read_config(self.folder).logs_root
        return place if moved else self.folder.with_name(place.name)

    def manifest(self) -> Manifest:
        """The old run's manifest with its sessions, and "extended_from": the runs before it, oldest first."""
        old = read_manifest(self.folder)
        lineage = (old.model_extra or {}).get("extended_from", [])
        config = sha256_file(self.folder / CONFIG)
        last = {"folder": str(self.folder), "config_sha256": config, "tasks": self.tasks}
        return old.model_copy(update={"finished": None, "extended_from": [*lineage, last]})

    def check(self, learner: ClassIncrementalLearner) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and state of the run's last checkpoint, for a learner of `config`.

        Raises UserError: it is not there or damaged, or it is of other classes, data or weights.
        """
        checkpoint = self.folder / CHECKPOINTS / checkpoint_name(self.tasks - 1)
        tensors, state = load_run_checkpoint(checkpoint)
        added, ours = learner.data.dataset.added, learner.identity()["class_order"]
        known = len(read_config(self.folder).added)
        before = len(state["run"].get("class_order", [])) - sum(added[:known])
        if before != len(ours) - sum(added):
            raise UserError(
                f"{self.folder} cannot be extended: its data set had {before} classes and has "
                f"{len(ours) - sum(added)} now, in another order; put new ones into a folder of their own "
                "and give that with --data"
            )
        check_precision(checkpoint, state, learner)
        check_identity(checkpoint, state | {"run": state["run"] | {"class_order": ours}}, learner)
        return tensors, state | self._changes(learner)

    def fill(self, new: Path, learner: ClassIncrementalLearner, metrics_bytes: int) -> None:
        """Copy the record and the checkpoints of the tasks already learned to the new run's folder."""
        replace_file(new / METRICS, metrics_until(self.folder / METRICS, metrics_bytes))
        for accuracy in self.folder.glob(f"*{ACCURACY}"):
            shutil.copyfile(accuracy, new / accuracy.name)
        for name in LEARNERS[self.config.model_name].task_files:
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, new / name)
        for task in range(0 if learner.keeps_every_task else self.tasks - 1, self.tasks):
            source = self.folder / CHECKPOINTS / checkpoint_name(task)
            if source.is_dir():
                copy_checkpoint(source, new / CHECKPOINTS / source.name, self._changes(learner))

    def _changes(self, learner: ClassIncrementalLearner) -> dict[str, Any]:
        """Parts of a checkpoint's state that name the run it belongs to."""
        return {"run": learner.identity(), "config": learner.config.model_dump(mode="json")}


def refuse_other_changes(
    old: ClassIncrementalConfig, new: ClassIncrementalConfig, several_seeds: bool
) -> None:
    """Refuse changes of keys that shaped what was learned, the seed among them."""
    changed = [name for name in old.differing(new) if name != "max_tasks"]
    changed += ["seed"] if several_seeds or new.seed != old.seed else []
    changed += ["extra_data"] if new.added[: len(old.added)] != old.added else []
    if changed:
        allowed = ", ".join(["max_tasks", *sorted(old.editable_keys)])
        raise UserError(
            f"--extend --set {', '.join(changed)}: these shaped what was learned and cannot change; "
            f"allowed: {allowed}"
        )


def check_length(folder: Path, old: ClassIncrementalConfig, new: ClassIncrementalConfig, tasks: int) -> int:
    """Number of tasks of the new run; 0 where the data set is missing.

    Raises UserError: they are no more than were learned, more than the data set has, or tasks of the data set
    would follow those of `extra_data`.
    """
    every = len(new.model_copy(update={"max_tasks": None, "extra_data": None}).known_tasks())
    own, now = tasks - len(old.added), min(new.max_tasks or every, every)  # tasks of `dataset`
    total = now + len(new.added) if every else 0
    fault = ""
    if old.added and now != own:
        fault = f"the {own} tasks of its data set stand before those of extra_data and stay as many"
    elif new.max_tasks != old.max_tasks and (new.max_tasks or 0) > every:
        fault = f"max_tasks = {new.max_tasks}, and its data set has {every} tasks"
    elif now < own or total <= tasks:
        fault = f"{tasks} tasks are learned, and no further one is asked for"
    if fault and every:
        more = (
            f"--set max_tasks=N with N from {own + 1} to {every}, or "
            if every > own and not old.added
            else ""
        )
        raise UserError(f"{folder} cannot be extended so: {fault}; allowed: {more}--data FOLDER")
    return total
