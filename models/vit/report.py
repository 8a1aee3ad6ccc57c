"""Report of a class-incremental run: metrics, log lines and tables, from the evaluations of its tasks.

An evaluation holds exact counts of images, as `ClassIncrementalLearner.evaluate` gives them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from models.base import Report
from utils.analysis.calibration import Calibration
from utils.data.tasks import DataManager
from utils.metric_catalogue import keyed
from utils.runs.classes import class_tables
from utils.runs.folder import ACCURACY
from utils.runs.metrics import AccuracyMatrix
from utils.runs.tables import accuracy_table, matrix_frame, summary_table
from utils.wording import spans

Evaluation = Mapping[str, Any]


def report(
    evaluations: Sequence[Evaluation],
    data: DataManager,
    adapters: Mapping[int, int],
    expansions: int,
    parameters: Callable[[], Mapping[str, int]],
    calibration: Calibration | None,
    confusion: np.ndarray | None,
) -> Report:
    """The run's report after its newest task.

    Args:
        adapters, parameters: of the model, by block and by part.
        expansions: the metric of this name.
        confusion: images by true and predicted class (C, C); None where this process has tested nothing yet.
    """
    matrix, newest = AccuracyMatrix(), evaluations[-1]
    for evaluation in evaluations:
        matrix.add(evaluation["correct"], evaluation["total"])
    images, calibrated = newest.get("images", "test"), {key: newest.get(key) for key in ("ece", "nll")}
    metrics = matrix.summary() | {"expansions": expansions, **calibrated}
    running = {key: metrics[key] for key in ("average", "forgetting", "bwt", "plasticity")}
    classes_seen = [data.task_classes(task).stop for task in range(len(evaluations))]

    def measured(values: Mapping[str, Any]) -> dict[str, Any]:
        return {keyed(images, key): value for key, value in values.items()}

    return Report(
        event=measured({"accuracy": matrix.rows[-1], "total": matrix.curve[-1], **calibrated})
        | {"classes_seen": classes_seen[-1], **measured(running)},
        lines=log_lines(matrix, images, adapters if expansions else {}),
        result={
            "metrics": measured(metrics),
            **measured({"accuracy": matrix.rows, "curve": matrix.curve}),
            "classes_seen": classes_seen,
            "adapters": adapters,
            "calibration": calibration and calibration._asdict(),
        },
        tables=lambda: [
            accuracy_table(matrix, images),
            summary_table(matrix, expansions, parameters(), images),
        ],
        csv=measured({ACCURACY: matrix_frame(matrix), **tables_of_classes(confusion, evaluations, data)}),
    )


def log_lines(matrix: AccuracyMatrix, images: str, grown: Mapping[int, int]) -> list[str]:
    """Accuracy after the newest task, its curve, and the adapters of every block where some have grown."""
    task, metrics, of = len(matrix.rows) - 1, matrix.summary(), "" if images == "test" else f"{images} "
    forgetting = "" if metrics["forgetting"] is None else f", forgetting {metrics['forgetting']:z.2f}"
    per_task = f"; per task [{', '.join(f'{value:.2f}' for value in matrix.rows[-1])}]" if task else ""
    curve = [round(value, 2) for value in matrix.curve]
    lines = [
        f"Task {task}: {of}accuracy {curve[-1]:.2f} %{forgetting}{per_task}",
        f"CNN top1 {of}curve: {curve}, Average {of.title()}Accuracy (CNN): {metrics['average']:.2f}",
    ]
    if grown:  # {0: 1, ..., 8: 1, 9: 2} as "1 (0-8), 2 (9)"
        counts = sorted(set(grown.values()))
        blocks = [spans([block for block in grown if grown[block] == count]) for count in counts]
        shown = ", ".join(f"{count} ({where})" for count, where in zip(counts, blocks, strict=True))
        lines.append(f"Task {task}: adapters per block {shown}")
    return lines


def tables_of_classes(
    confusion: np.ndarray | None, evaluations: Sequence[Evaluation], data: DataManager
) -> dict[str, pd.DataFrame]:
    """Tables of the classes seen, by file name."""
    if confusion is None:
        return {}
    tasks = [task for task in range(len(evaluations)) for _ in data.task_classes(task)]
    by_class = [evaluations[task].get("class_correct") for task in tasks]  # earlier versions kept none
    learned = [right and right[label] for label, right in enumerate(by_class)]
    return class_tables(confusion, data.class_names[: len(tasks)], tasks, learned)


def description(evaluation: Evaluation, data: DataManager, calibration: Calibration | None) -> str:
    """One evaluation as text: accuracy on each task seen and on all of them, and the calibration error."""
    images = evaluation.get("images", "test")
    measured = "accuracy" if images == "test" else f"{images} accuracy"
    lines = [f"{measured} (%) on the {images} images of each task seen, class-incremental"]
    counts = list(zip(evaluation["correct"], evaluation["total"], strict=True))
    for task, (right, count) in enumerate(counts):
        classes = data.task_classes(task)
        share = f"{100 * right / count:6.2f}  ({right} of {count})"
        lines.append(f"task {task:>3}  classes {classes.start:>3}-{classes.stop - 1:<3}  {share}")
    right, count = map(sum, zip(*counts, strict=True))
    lines.append(f"{'total':<27}{100 * right / count:6.2f}  ({right} of {count})")
    if "ece" in evaluation:
        temperature = f"temperature {calibration.temperature:.4g}"
        lines.append(f"calibration error {evaluation['ece']:.2f} points ({temperature})")
    return "\n".join(lines)
