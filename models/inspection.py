"""Inspection of run folders as lines of text: recorded accuracy, figures, tests of checkpoints, analyses."""

import functools
from collections.abc import Iterator
from pathlib import Path

from models import LEARNERS
from models.run_files import read_config, read_result
from models.saved_run import (
    CHECKPOINTS,
    load_into,
    load_learner,
    make_learner,
    task_checkpoints,
)
from utils.analysis.results import ANALYSIS, write_results
from utils.errors import UserError
from utils.runs.checkpoint import latest_checkpoint
from utils.runs.figures import draw_figures
from utils.runs.folder import ACCURACY, RESULT, FolderInUse, FolderLock
from utils.runs.run_log import read_accuracy_csv
from utils.runs.seeds import check_one_experiment
from utils.runs.tables import seeds_table


def show_run(folder: Path, test: bool) -> Iterator[str]:
    """Recorded accuracy and redrawn figures of a run folder, then its last checkpoint tested."""
    figures = LEARNERS[read_config(folder).model_name].figures
    if (folder / ACCURACY).is_file():
        yield "recorded accuracy (%), row: after task, column: on task"
        for task, row in enumerate(read_accuracy_csv(folder)):
            yield f"task {task:>3}  " + " ".join(f"{value:6.2f}" for value in row)
        yield ""
    lock = FolderLock(folder)
    try:
        with lock:
            for path in draw_figures(folder, figures):
                yield f"drew {path}"
    except FolderInUse:
        yield f"drew no figures: {folder} is being written by {lock.holder}"
    if test:
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        if checkpoint is None:
            raise UserError(
                f"{folder} has no checkpoint to test yet: let the run finish a task, or use --recorded"
            )
        yield ""
        yield from show_checkpoint(checkpoint)


def show_checkpoint(checkpoint: Path) -> Iterator[str]:
    """The model that a checkpoint holds, rebuilt and tested."""
    learner = load_learner(checkpoint)
    yield f"{checkpoint}: {learner.describe_evaluation(learner.evaluate())}"


def show_seeds(folders: list[Path]) -> Iterator[str]:
    """Mean ± std over finished runs of one experiment with different seeds.

    Raises:
        UserError: no run is finished, or the runs differ in more than their seed.
    """
    finished = [folder for folder in folders if (folder / RESULT).is_file()]
    for folder in sorted(set(folders) - set(finished)):
        yield f"left out, no result.json: {folder}"
    if not finished:
        raise UserError("none of the folders holds a finished run (a result.json)")
    for note in check_one_experiment([(folder, read_config(folder)) for folder in finished]):
        yield f"note: {note}"
    metrics = read_config(finished[0]).metrics
    yield seeds_table([read_result(folder) for folder in finished], metrics)


def analyse_run(folder: Path, names: list[str], images_per_class: int | None) -> Iterator[str]:
    """Results of the named analyses of the networks that a finished run left; they are written as well.

    Raises:
        UserError: an unknown analysis, an unfinished run, a damaged checkpoint, or too little to analyse.
    """
    analyses = LEARNERS[read_config(folder).model_name].analyses
    unknown = [name for name in names if name not in analyses]
    if unknown:
        allowed = ", ".join(analyses)
        raise UserError(f"--analyse {' '.join(unknown)}: no such analysis of this run; allowed: {allowed}")
    checkpoints, learner = task_checkpoints(folder), make_learner(read_config(folder))
    load = functools.partial(load_into, learner)
    inputs = learner.analysis_inputs(checkpoints, load, images_per_class)
    results = {name: analyses[name](inputs) for name in dict.fromkeys(names)}
    for result in results.values():
        yield f"\n{result.text}"
    yield ""
    with FolderLock(folder):
        for path in write_results(folder / ANALYSIS, results):
            yield f"wrote {path}"
