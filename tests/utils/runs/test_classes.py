"""Test images by class: exact counts of a run, any name read back, figures for few and for many classes."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from tests.drawn import assert_readable, drawn_texts
from trainer import train
from utils.plotting import STYLE
from utils.runs.classes import CONFUSION, PER_CLASS, class_tables, confusion_counts, read_classes
from utils.runs.figures import confusion_figure
from utils.runs.run_log import RunLog, accuracy_rows, read_metrics


def invented(classes: int) -> tuple[pd.DataFrame, np.ndarray]:
    """(table per class, counts) of 20 images per class, of which about every third is mistaken."""
    draw = np.random.default_rng(classes)
    targets = np.repeat(np.arange(classes), 20)
    predicted = np.where(draw.random(len(targets)) < 0.3, draw.integers(0, classes, len(targets)), targets)
    counts = confusion_counts(targets, predicted, classes)
    names = [f"a photographed thing, no. {number}" if number % 3 else "fox" for number in range(classes)]
    tasks = [number // 10 for number in range(classes)]
    return class_tables(counts, names, tasks, [18] * classes)[PER_CLASS], counts


def test_the_counts_of_a_run_are_those_of_its_accuracy(smoke_config, tmp_path):
    """Three tasks of two classes: rows sum to the test images, blocks to the accuracy on each task."""
    train(smoke_config(max_tasks=3, figure_format="svg"))
    (folder,) = (path.parent for path in tmp_path.rglob(PER_CLASS))
    per_class, counts, images = read_classes(folder)
    rows, _ = accuracy_rows(read_metrics(folder))
    assert images == "test" and counts.shape == (6, 6) and (counts.sum(axis=1) == per_class["images"]).all()
    assert (counts.diagonal() == per_class["correct"]).all() and (per_class["images"] == 8).all()
    by_task = per_class.groupby("task")
    assert by_task["accuracy"].mean().tolist() == pytest.approx(rows[-1])
    assert by_task["accuracy_when_learned"].mean().tolist() == pytest.approx([row[-1] for row in rows])
    header = (folder / CONFUSION).read_text().splitlines()[0].split(",")
    assert header[1:] == per_class["name"].tolist()
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert {"confusion.png", "confusion.svg", "accuracy_curves.svg"} <= drawn


def test_any_name_comes_back(tmp_path):
    counts = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 4]])
    names = ["NA", 'a "b", c', "NA"]
    with RunLog.create(tmp_path / "run", config={}, overwrite=False) as run:
        for name, table in class_tables(counts, names, [0, 0, 1], [4, None, 4]).items():
            run.table(name, table)
    per_class, read, _ = read_classes(run.folder)
    assert (read == counts).all() and per_class["name"].tolist() == names
    assert per_class["accuracy"].tolist() == [75.0, 50.0, 100.0]
    assert per_class["accuracy_when_learned"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("classes", [2, 10, 100, 200])
def test_the_confusion_figure_can_be_read_with_few_and_many_classes(classes):
    per_class, counts = invented(classes)
    with mpl.rc_context(STYLE):
        figure = confusion_figure(per_class, counts, "test", "run · method · data · seed 1")
        assert_readable(figure)
    texts = {text for text, _ in drawn_texts(figure)}
    assert ("task 3" in texts) == (classes == 100 or classes == 200)
    assert len(figure.axes[0].lines) == 2 * (classes // 10 - 1 if classes > 10 else 0)  # borders of tasks
