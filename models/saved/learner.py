"""Learners rebuilt from the checkpoints of a run, after checks that checkpoint and run belong together.

learner = load_learner(Path("logs/sema/.../checkpoints/task_04"))
learner.evaluate()
"""

import logging
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.base import Learner, RunContext
from models.methods import LEARNERS
from models.saved.files import read_config, run_folder_of
from utils.config.messages import shown
from utils.config.schema import RunConfig
from utils.data.tasks import NO_IMAGES
from utils.errors import UserError, in_one_line, is_out_of_memory
from utils.runs.checkpoint import checkpoint_name, load_checkpoint
from utils.runs.folder import CONFIG, RESULT, folder_of, resume_command
from utils.runs.manifest import is_complete, read_manifest
from utils.runs.run_log import read_metrics
from utils.training.device import resolve_device, resolve_precision
from utils.training.distributed import init_distributed
from utils.wording import as_typed, shortened

logger = logging.getLogger("nested_lora")

CHECKPOINTS = "checkpoints"
LONGEST = 200  # characters of an error in a sentence
NAMED_FILES = {"dataset", "extra_data", "weights"}  # keys that may be edited where the files were moved
STATE = {  # keys of a checkpoint's state
    "run", "data", "config", "learner", "evaluations", "metrics_bytes", "seconds", "peak_memory_mb",
}  # fmt: skip


def find_run(config: RunConfig) -> Path | None:
    """The newest run folder of a configuration, an unfinished one before finished ones; None without one.

    Keys that may be edited (`editable_keys`) may differ, except those that name data and weights.
    """
    place = folder_of(config, config.seed)
    numbered = re.compile(re.escape(place.name) + r"(?:_(\d+))?")
    found = []
    for path in place.parent.glob("*") if place.parent.is_dir() else ():
        name = numbered.fullmatch(path.name)
        if name and (path / CONFIG).is_file():
            theirs = read_config(path)
            same = theirs.seed == config.seed and not theirs.differing(config)
            if same and NAMED_FILES.isdisjoint(theirs.edited(config)):
                found.append((not is_complete(path), int(name[1] or 1), path))
    return max(found)[-1] if found else None


def load_run_checkpoint(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint. UserError: damaged, or not of this program and version."""
    tensors, state = load_checkpoint(checkpoint)
    if missing := STATE - state.keys():
        raise of_earlier_version(checkpoint, f"it has no {', '.join(sorted(missing))}")
    return tensors, state


def of_earlier_version(checkpoint: Path, evidence: str) -> UserError:
    """Error for an undamaged checkpoint that does not fit, so that other code must have written it."""
    folder = run_folder_of(checkpoint)
    session = read_manifest(folder).sessions[-1]
    made_by = f" (commit {session.commit[:12]})" if session.commit else ""
    return UserError(
        f"{checkpoint} was written by an earlier version of this program, {evidence}: run it again "
        f"with {as_typed('main.py', '--config', folder / CONFIG)}, or go on with the "
        f"version that made it{made_by}"
    )


@contextmanager
def fitting(checkpoint: Path) -> Iterator[None]:
    """Context that turns all errors of a checkpoint that does not fit the run into `of_earlier_version`.

    A lack of memory is none of them.
    """
    try:
        yield
    except UserError as error:
        raise of_earlier_version(checkpoint, str(error)) from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = textwrap.shorten(in_one_line(error), LONGEST, placeholder=" …")
        raise of_earlier_version(checkpoint, f"it does not fit ({reason})") from error


def check_config(checkpoint: Path, state: dict[str, Any], learner: Learner) -> list[str]:
    """Notes about keys that were edited since a checkpoint, of those that change no result.

    A key that the program gained later counts as unchanged while it has its default.

    Raises UserError: another key was edited, so that the run would mix two experiments, or the checkpoint
    lacks a key that differs from its default.
    """
    with fitting(checkpoint):
        before = LEARNERS[state["config"]["model_name"]].Config.model_validate(state["config"])
    mixing = before.differing(learner.config)
    mixing.pop("precision", None)  # as this machine has it
    if unknown := mixing.keys() - before.model_fields_set:
        raise of_earlier_version(checkpoint, f"its config does not say its {shortened(sorted(unknown))}")
    if mixing:
        path = run_folder_of(checkpoint) / CONFIG
        raise UserError(
            f"{path} does not belong to this run any more, {checkpoint.name} was made with another: "
            f"{_was_and_is(mixing)}; set back what was edited, or start a run of its own with "
            + as_typed("main.py", "--config", path)
        )
    edited = before.edited(learner.config)
    return [f"Edited since {checkpoint.name} was saved: {_was_and_is(edited)}"] if edited else []


def _was_and_is(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} was {shown(before)}, is {shown(now)}" for key, (before, now) in changed.items())


def check_precision(checkpoint: Path, state: dict[str, Any], learner: Learner) -> None:
    """Refuse to train on in another precision."""
    before, now = state["config"].get("precision"), learner.config.precision
    if before != now:
        raise UserError(
            f"{checkpoint} was made in {before} and would go on in {now}, as its config.json or this machine "
            f"has it: a run keeps one precision; go on with {before}, on a machine that has it"
        )


def check_identity(checkpoint: Path, state: dict[str, Any], learner: Learner) -> None:
    """Refuse a checkpoint of another run, or one made with other images than there are now."""
    check_same(checkpoint, state, learner.identity())
    read = state["data"]
    sources = list(learner.data_read(0, 0)) or ["train", "test"]
    ours = learner.data_read(*(len(read.get(source, [])) for source in sources))
    finished = len(read.get(sources[-1], []))  # tasks
    way_out = ", or remove this checkpoint to go on from the one before it"
    for source, hashes in ours.items():
        theirs = read.get(source, [])
        if source not in read or len(theirs) != len(hashes):
            raise UserError(
                f"{checkpoint} does not belong to this run: its {source} images are of other tasks"
            )
        changed = [
            task
            for task, (before, now) in enumerate(zip(theirs, hashes, strict=True))
            if now != before != NO_IMAGES
            if now != NO_IMAGES or source != "train" or task >= finished  # learned tasks' may be gone
        ]
        if changed:
            raise UserError(
                f"{checkpoint} does not belong to this run: the {source} images of task {changed[0]}, which "
                f"it has read, have changed since; put the files back that were there"
                f"{way_out if changed[0] >= finished else ''}"
            )


def check_same(checkpoint: Path, state: dict[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run whose identity has other values."""
    if missing := identity.keys() - state["run"].keys():
        raise of_earlier_version(checkpoint, f"it does not say its {', '.join(sorted(missing))}")
    for key, ours in identity.items():
        theirs = state["run"].get(key)
        if theirs != ours:
            raise UserError(
                f"{checkpoint} does not belong to this run: its {key} is {shown(theirs)}, this run's is "
                f"{shown(ours)}; go on with the data, weights and config it was made with"
            )


@contextmanager
def run_context(config: RunConfig) -> Iterator[RunContext]:
    """Run context of a config: device and precision, resolved only here, and the processes of torchrun.

    Raises UserError: the device is absent, or there are fewer GPUs than processes.
    """
    device, device_warning = resolve_device(config.device)
    asked = "fp32" if getattr(config, "engine", None) == "reference" else config.precision
    precision, precision_warning = resolve_precision(asked, device)
    warnings = [warning for warning in (device_warning, precision_warning) if warning]
    with init_distributed(device) as distributed:
        yield RunContext(distributed.device, precision, distributed, warnings=warnings)


def make_learner(config: RunConfig, context: RunContext | None = None) -> Learner:
    """The method that a configuration names, with data, backbone and modules; nothing is written.

    context: where it runs; by default what the configuration asks for, in this process.

    Raises UserError: data or weights cannot be had, or the device is absent.
    """
    if context is None:
        with run_context(config) as context:
            return make_learner(config, context)
    config = config.model_copy(update={"precision": context.precision})
    return LEARNERS[config.model_name](config, replace(context, warnings=[*context.warnings]))


def load_into(learner: Learner, checkpoint: Path) -> None:
    """Load a checkpoint into a learner. UserError: it is damaged, or of another run."""
    tensors, state = load_run_checkpoint(checkpoint)
    check_config(checkpoint, state, learner)
    check_identity(checkpoint, state, learner)
    if (before := state["config"].get("precision")) != learner.config.precision:
        logger.warning(f"{checkpoint} was made in {before}; evaluating it in {learner.config.precision}")
    with fitting(checkpoint):
        learner.load_state(state["learner"], tensors)


def load_learner(checkpoint: Path) -> Learner:
    """The learner that a checkpoint in a run folder holds."""
    learner = make_learner(read_config(run_folder_of(checkpoint)))
    load_into(learner, checkpoint)
    return learner


def task_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints at the ends of all tasks. UserError: the run is unfinished, or one is missing."""
    config = read_config(folder)
    if not (folder / RESULT).is_file():
        raise UserError(
            f"{folder} is unfinished and cannot be analysed yet: go on with {resume_command(folder)}"
        )
    tasks = [event["task"] for event in read_metrics(folder) if event["event"] == "task"]
    if not tasks:
        raise UserError(
            f"{folder} has no task in its metrics.jsonl: the file is damaged, run the experiment again"
        )
    paths = [folder / CHECKPOINTS / checkpoint_name(task) for task in tasks]
    missing = [path.name for path in paths if not path.is_dir()]
    if missing:
        every = " --set checkpoints=all" if getattr(config, "checkpoints", "all") == "last" else ""
        raise UserError(
            f"{folder} has no checkpoint of {shortened(missing)}: an analysis rebuilds the network after "
            f"every task; run it again with {as_typed('main.py', '--config', folder / CONFIG)}{every}"
        )
    return paths
