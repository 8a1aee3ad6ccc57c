"""Page of a run, `report.html` in its folder: what was run, numbers, figures, tasks, classes, keys, log.

    write_run_report(run_folder, config, captions)

It is made from the files of the run alone, and has only the sections for which these have content: fewer for
a run that is unfinished, of another kind or of an earlier version. Figures are those drawn last.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.config.messages import shown
from utils.config.schema import RunConfig
from utils.files import damaged, replace_file
from utils.metric_catalogue import ABSENT, MetricSpec, Shown, by_key, keyed
from utils.reports.about import commit_text, dates, facts_of
from utils.reports.pages import Picture, render
from utils.reports.tables import Table, frame_table, plain_table
from utils.runs.classes import CONFUSION, PER_CLASS, Classes, read_classes
from utils.runs.folder import (
    ACCURACY,
    CONFIG,
    FIGURES,
    MANIFEST,
    METRICS,
    RESULT,
    TABLE,
    text_log,
)
from utils.runs.manifest import Manifest, read_manifest, timestamp
from utils.runs.metrics import checked_result, numbers_of
from utils.runs.run_log import accuracy_rows, read_metrics

REPORT = "report.html"
LISTED = 10  # classes and confusions
MAX_LINES = 300  # of the log
ALARMS = ("WARNING", "ERROR")
DRIFTS = (  # heading, event and field of what drifts at the end of a task
    ("drift of consolidated adapters (relative)", "consolidation", "drift"),
    ("drift of features (relative)", "feature_drift", "moved"),
)
NAMES_WIDTH = 60  # characters for the classes of a task
FILES = {
    RESULT: "final numbers",
    ACCURACY: "accuracy in percent, row: after task, column: on task",
    PER_CLASS: "accuracy of every class",
    CONFUSION: "images by true and predicted class",
    METRICS: "every event of the run, one line each",
    TABLE: "the same as a table of tags, steps and values",
    CONFIG: "the whole configuration",
    MANIFEST: "versions, commit, hashes of data and weights",
}


def write_run_report(folder: Path, config: RunConfig, captions: Mapping[str, str]) -> Path:
    """Write the page of a run; returns its path.

    Args:
        config: the run's.
        captions: captions of figures, by file name, in the order of the page.

    Raises:
        UserError: a file of the run is damaged.
    """
    with damaged(f"a file of {folder}", f"restore {', '.join(FILES)}"):
        page = page_of(folder, config, captions)
    return replace_file(folder / REPORT, render("run.html", page))


def page_of(folder: Path, config: RunConfig, captions: Mapping[str, str]) -> dict[str, Any]:
    """The values that the template `run.html` shows."""
    manifest, events = read_manifest(folder), read_metrics(folder)
    result = checked_result(folder, config.metrics) if (folder / RESULT).exists() else None
    if result is not None and manifest.finished is None:  # `finished` is written after this page
        manifest = manifest.model_copy(update={"finished": timestamp()})
    classes = read_classes(folder)
    log = text_log(folder)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    facts = facts_of(config.model_dump(), manifest) | {"Seed": str(config.seed), "Date": dates([manifest])}
    keys, defaults = key_tables(config)
    return {
        "title": f"{config.prefix}, seed {config.seed}",
        "description": config.description,
        "facts": list(facts.items()),
        "finished": result is not None,
        "folder": str(folder),
        "numbers": numbers_table(result, config.metrics) if result else None,
        "pictures": list(pictures_of(folder / FIGURES, captions)),
        "analyses": list(pictures_of(folder / "analysis", captions)),
        "tasks": tasks_table(events, classes and classes.per_class, manifest),
        "images": classes.images if classes else "test",
        "class_files": [keyed(classes.images, name) for name in (PER_CLASS, CONFUSION)] if classes else [],
        "hardest": hardest_table(classes) if classes else None,
        "confused": confusions_table(classes) if classes else None,
        "keys": keys,
        "defaults": defaults,
        "sessions": sessions_table(manifest),
        "extended": [dict(run) for run in (manifest.model_extra or {}).get("extended_from", [])],
        "alarms": [line for line in lines if any(f" {alarm}: " in line for alarm in ALARMS)],
        "log": [line for line in lines if " Epoch " not in line][-MAX_LINES:],
        "files": [(path.name, text) for name, text in FILES.items() for path in named_files(folder, name)],
        "log_file": log.name if lines else None,
    }


def named_files(folder: Path, name: str) -> list[Path]:
    """Existing files of a name, for test and for validation images."""
    return [path for images in ("test", "validation") if (path := folder / keyed(images, name)).is_file()]


def numbers_table(result: Mapping[str, Any], metrics: Sequence[MetricSpec]) -> Table:
    """Final numbers with the names, units and definitions of the metric catalogue."""
    specs, rows = by_key(metrics), []
    for key, value in numbers_of(result).items():
        spec = specs.get(key) or MetricSpec(key, key.replace("_", " "))
        direction = f"{spec.better} is better" if spec.shown >= Shown.DIFFERENCES else ""
        meaning = "; ".join(filter(None, [spec.meaning, direction]))
        rows.append([spec.heading, spec.text(value), meaning])
        if spec.key == metrics[0].key and result.get("classes_seen"):
            classes = result["classes_seen"][-1]
            meaning = f"one of {classes} classes at random, to compare"
            rows.append(["chance (%)", f"{100 / classes:.2f}", meaning])
    return plain_table(["number", "value", "meaning"], rows)


def pictures_of(folder: Path, captions: Mapping[str, str]) -> Iterator[Picture]:
    """The PNG files of a folder, those with a caption first."""
    there = {path.name: path for path in sorted(folder.glob("*.png"))}
    for name in [*(name for name in captions if name in there), *(n for n in there if n not in captions)]:
        text = captions.get(name) or Path(name).stem.replace("_", " ")
        yield Picture.of(name, there[name].read_bytes(), text)


def tasks_table(
    events: Sequence[Mapping[str, Any]], per_class: pd.DataFrame | None, manifest: Manifest
) -> Table | None:
    """A row per finished task: classes, images, accuracy when learned and now, growth, drift, time."""
    tasks = [event for event in events if event["event"] == "task"]
    rows, images = accuracy_rows(events)
    if not rows:
        return None
    accuracy = pd.DataFrame([*itertools.zip_longest(*rows, fillvalue=math.nan)]).T  # row: after task
    now = accuracy.iloc[-1]
    adapters = [sum((event.get("adapters") or {}).values()) for event in tasks]
    numbers = {
        "accuracy when learned (%)": np.diagonal(accuracy),
        "accuracy now (%)": now,
        "forgotten (points)": accuracy[:-1].max() - now,
        "all classes seen (%)": [event[keyed(images, "total")] for event in tasks],
    }
    texts = {heading: _texts(values, 2) for heading, values in numbers.items()}
    table = pd.DataFrame(texts).rename_axis("task")
    if any(adapters):
        table["adapters"] = adapters
    for heading, kind, field in DRIFTS:
        found = pd.DataFrame([event for event in events if event["event"] == kind and field in event])
        if len(found):
            table[heading] = _texts(found.groupby("task")[field].mean().reindex(table.index), 3)
    ends = [event["seconds"] for event in tasks]
    table["seconds"] = [f"{seconds:,.0f}" for seconds in np.diff(ends, prepend=0.0)]
    if per_class is not None and per_class["task"].nunique() == len(tasks):
        train = (manifest.model_extra or {}).get("images_per_class", {}).get("train")
        by_task = per_class.groupby("task")
        names = by_task["name"].agg(", ".join)
        table.insert(0, "classes", [textwrap.shorten(text, NAMES_WIDTH, placeholder=" …") for text in names])
        table.insert(1, f"{images} images", by_task["images"].sum())
        if train:
            images = pd.Series(train[: len(per_class)]).groupby(per_class["task"]).sum()
            table.insert(1, "training images", images)
    return frame_table(table, "Forgotten: how far a task fell from its best accuracy.")


def _texts(values: Iterable[float], digits: int) -> list[str]:
    return [ABSENT if math.isnan(value) else f"{value:.{digits}f}" for value in values]


def hardest_table(classes: Classes) -> Table:
    """The classes with the lowest accuracy, each with its most frequent wrong prediction."""
    per_class, counts, images = classes
    wrong, rows = counts - np.diag(counts.diagonal()), []
    for label, row in per_class.sort_values("accuracy", kind="stable").head(LISTED).iterrows():
        other = int(wrong[label].argmax())
        taken = f"{per_class['name'][other]} ({wrong[label, other]})" if wrong[label, other] else ABSENT
        accuracies = _texts(row[["accuracy", "accuracy_when_learned"]], 1)
        rows.append([row["name"], row["task"], row["images"], *accuracies, taken])
    headings = ["class", "task", f"{images} images", "accuracy (%)", "when learned (%)"]
    return plain_table([*headings, "most taken for (images)"], rows)


def confusions_table(classes: Classes) -> Table | None:
    """The most frequent confusions; None where every image is right."""
    per_class, counts, _ = classes
    names, tasks, rows = per_class["name"], per_class["task"], []
    most = pd.DataFrame(counts - np.diag(counts.diagonal())).stack().nlargest(LISTED)
    for (true, predicted), images in most[most > 0].items():
        of = f"{images} of {per_class['images'][true]}"
        rows.append([names[true], names[predicted], of, f"{tasks[true]}, {tasks[predicted]}"])
    return plain_table(["true class", "taken for", "images", "their tasks"], rows) if rows else None


def key_tables(config: RunConfig) -> tuple[Table, Table]:
    """Keys that differ from their default, with it and their meaning; and all others."""
    unused, changed, others = config.without_effect(), [], []
    for name, field in type(config).model_fields.items():
        value, default = getattr(config, name), "required" if field.is_required() else shown(field.default)
        meaning = field.description or ""
        if name in unused:
            meaning = f"No effect here: {unused[name]}."
        if shown(value) != default:
            changed.append([name, shown(value), default, meaning])
        else:
            others.append([name, shown(value), meaning])
    return (
        plain_table(["key", "value", "default", "meaning"], changed),
        plain_table(["key", "value", "meaning"], others),
    )


def sessions_table(manifest: Manifest) -> Table:
    """A row per process that worked on the run."""
    keys = ["started", "device", "precision", "threads", "processes"]
    rows = [[getattr(run, key) for key in keys] + [commit_text(run.commit)] for run in manifest.sessions]
    return plain_table([*keys, "code"], rows)
