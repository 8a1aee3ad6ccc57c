"""Inspection of run folders, as lines of text: accuracy, figures, evaluation of checkpoints, analyses."""

import functools
import textwrap
from collections.abc import Iterator
from pathlib import Path

from models.methods import LEARNERS
from models.saved.files import read_config, read_result, run_folder_of
from models.saved.learner import CHECKPOINTS, load_into, load_learner, make_learner, task_checkpoints
from utils.analysis.results import ANALYSIS, write_results
from utils.errors import UserError
from utils.files import write_json
from utils.metric_catalogue import CLASS_INCREMENTAL, Shown
from utils.reports.renderings import latex_table, markdown_table, markdown_text, terminal_table
from utils.reports.run_report import write_run_report
from utils.reports.sentences import finding
from utils.reports.tables import difference_tables, means_table
from utils.runs.checkpoint import checkpoint_name, latest_checkpoint
from utils.runs.figures import draw_figures
from utils.runs.folder import (
    RESULT,
    TEST_RESULT,
    FolderInUse,
    FolderLock,
    resume_command,
)
from utils.runs.manifest import read_manifest, timestamp
from utils.runs.run_log import accuracy_rows, read_metrics
from utils.runs.seeds import check_one_experiment
from utils.runs.tables import TABLE_WIDTH, seeds_table, weights_notes
from utils.sweeps.comparison import compare_runs, default_folder, write_comparison


def show_run(folder: Path, test: bool) -> Iterator[str]:
    """Recorded accuracy, redrawn figures and page of a run folder; with `test` also its last checkpoint."""
    rows, images = accuracy_rows(read_metrics(folder))
    if rows:
        what = "validation accuracy" if images == "validation" else "accuracy"
        yield f"recorded {what} (%), row: after task, column: on task"
        for task, row in enumerate(rows):
            yield f"task {task:>3}  " + " ".join(f"{value:6.2f}" for value in row)
        yield ""
    yield from draw_again(folder)
    if test:
        checkpoint = latest_checkpoint(folder / CHECKPOINTS)
        if checkpoint is None:
            raise UserError(
                f"{folder} has no checkpoint to test yet: let the run finish a task, or use --recorded"
            )
        yield ""
        yield from show_checkpoint(checkpoint)
    else:
        yield from weights_notes([read_manifest(folder).model_extra])


def draw_again(folder: Path) -> Iterator[str]:
    """Figures and page of a run folder, made again from its files, unless a process is writing them."""
    config, lock = read_config(folder), FolderLock(folder)
    learner = LEARNERS[config.model_name]
    try:
        with lock:
            for path in draw_figures(folder, learner.figures):
                yield f"drew {path}"
            yield f"wrote {write_run_report(folder, config, learner.captions)}"
    except FolderInUse:
        yield f"drew no figures: {folder} is being written by {lock.holder}"


def show_checkpoint(checkpoint: Path) -> Iterator[str]:
    """Evaluation of the model rebuilt from a checkpoint.

    Raises UserError: it lies inside the first task, whose closed-form head knows no class before the end.
    """
    learner = load_learner(checkpoint)
    head = getattr(learner, "closed_form", None)
    if head is not None and not len(head.counts):
        again = resume_command(run_folder_of(checkpoint))
        raise UserError(f"{checkpoint} lies inside the first task and knows no class yet: go on with {again}")
    yield f"{checkpoint}: {learner.describe_evaluation(learner.evaluate())}"
    yield from weights_notes([{"weights": learner.weights()}])
    learner.close_run()


def show_test(folders: list[Path]) -> Iterator[str]:
    """Accuracy on the test images of finished runs that held out validation images, and its mean over seeds.

    Each run gets a `test_result.json`: with the accuracy matrix if the checkpoints of all tasks exist, else
    with A_N alone.

    Raises UserError: a run held out no validation images, is unfinished, or its test images cannot be read;
    or several runs differ in more than their seed.
    """
    configs = [(folder, read_config(folder)) for folder in folders]
    for folder, config in configs:
        if not getattr(config, "validation_share", 0):
            raise UserError(
                f"{folder} held out no validation images (validation_share): its {RESULT} is about test "
                "images, look at it with --run alone"
            )
        if not (folder / RESULT).is_file():
            raise UserError(f"{folder} is unfinished: go on with {resume_command(folder)}, then test")
    notes = check_one_experiment(configs) if len(configs) > 1 else []
    results = []
    for folder, config in configs:
        learner = make_learner(config)
        paths = [folder / CHECKPOINTS / checkpoint_name(task) for task in range(learner.nb_tasks)]
        whole, evaluations = all(path.is_dir() for path in paths), []
        for path in paths if whole else paths[-1:]:
            load_into(learner, path)
            evaluations.append(learner.evaluate("test"))
        learner.close_run()
        yield f"{folder}, on the test images:"
        if whole:
            report = learner.report(evaluations)
            found = {name: report.result[name] for name in ("metrics", "accuracy", "curve")}
            yield from report.tables()
        else:
            right, count = (sum(evaluations[0][name]) for name in ("correct", "total"))
            found = {"metrics": {CLASS_INCREMENTAL[0].key: 100 * right / count}}
            yield learner.describe_evaluation(evaluations[0])
        results.append(
            {
                "seed": learner.seed,
                "tested": timestamp(),
                "data_sha256": learner.data.data_sha256("test"),
                **found,
                "weights": learner.weights(),
            }
        )
        with FolderLock(folder):
            yield f"wrote {write_json(folder / TEST_RESULT, results[-1])}\n"
    yield from (f"note: {note}" for note in notes)
    if len(results) > 1:
        yield seeds_table(results, CLASS_INCREMENTAL)
    yield from weights_notes(results)


def show_seeds(folders: list[Path]) -> Iterator[str]:
    """Mean ± std over finished runs. UserError: none is finished, or they differ in more than their seed."""
    finished = [folder for folder in folders if (folder / RESULT).is_file()]
    for folder in sorted(set(folders) - set(finished)):
        yield f"left out, no result.json: {folder}"
    if not finished:
        raise UserError("none of the folders holds a finished run (a result.json)")
    for note in check_one_experiment([(folder, read_config(folder)) for folder in finished]):
        yield f"note: {note}"
    results = [read_result(folder) for folder in finished]
    yield seeds_table(results, read_config(finished[0]).metrics)
    yield from weights_notes(results)


def show_comparison(
    folders: list[Path], baseline: str | None = None, form: str = "terminal", out: Path | None = None
) -> Iterator[str]:
    """Table that compares runs which differ in more than their seed; a report is written as well.

    form: "terminal"; "latex" or "markdown", output for a document, with remarks as comments or a list.

    Raises UserError: there is nothing to compare, or the runs are not comparable.
    """
    comparison = compare_runs(folders, read_config, baseline)
    results, out = comparison.results, out or default_folder(comparison)
    files = write_comparison(comparison, out)
    remarks = [f"left out, {reason}: {folder}" for folder, reason in comparison.unfinished.items()]
    page = next(path for path in files if path.suffix == ".html")
    notes = [*weights_notes(results.every_result), *comparison.notes]
    remarks += [*notes, f"curves, tests and every run: {page}"]
    means, *differences = (
        table._replace(headings=["experiment", *table.headings[1:]])
        for table in (means_table(results, Shown.CONSOLE), *difference_tables(results)[:1])
    )
    seeds = ", ".join(map(str, sorted({seed for runs in results.cells.values() for seed in runs})))
    title = f"Mean ± std over seeds {seeds}"
    if form == "latex":
        yield f"% {title}; needs \\usepackage{{booktabs}}"
        yield latex_table(means)
        yield from (f"% {remark}" for remark in remarks)
    elif form == "markdown":
        yield f"{title}:\n\n{markdown_table(means)}\n"
        yield from (f"- {markdown_text(remark)}" for remark in remarks)
    else:
        yield f"{title}; * best\n{terminal_table(means)}\n"
        for table in differences:
            yield f"\nDifference from {results.baseline}, paired by seed: {terminal_table(table)}"
        yield "\n" + textwrap.fill(finding(results), TABLE_WIDTH, break_on_hyphens=False) + "\n"
        if comparison.keys:
            yield f"In what they differ\n{terminal_table(comparison.keys)}\n"
        yield from remarks


def analyse_run(folder: Path, names: list[str], images_per_class: int | None) -> Iterator[str]:
    """Results of the named analyses of a finished run's checkpoints; they are written as well.

    Raises UserError: an unknown analysis, an unfinished run, a damaged checkpoint, or too little to analyse.
    """
    config = read_config(folder)
    analyses = LEARNERS[config.model_name].analyses
    unknown = [name for name in names if name not in analyses]
    if unknown:
        allowed = ", ".join(analyses)
        raise UserError(f"--analyse {' '.join(unknown)}: no such analysis of this run; allowed: {allowed}")
    checkpoints, learner = task_checkpoints(folder), make_learner(config)
    load = functools.partial(load_into, learner)
    inputs = learner.analysis_inputs(checkpoints, load, images_per_class)
    results = {name: analyses[name](inputs) for name in dict.fromkeys(names)}
    for result in results.values():
        yield f"\n{result.text}"
    yield "\n".join(["", *weights_notes([{"weights": learner.weights()}])])
    form = "png" if config.figure_format == "none" else config.figure_format  # figures were asked for now
    with FolderLock(folder):
        for path in write_results(folder / ANALYSIS, results, form):
            yield f"wrote {path}"
