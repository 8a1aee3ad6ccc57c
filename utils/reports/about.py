"""Description of what was run: method, data, tasks, weights, code, machine and dates of a run or a sweep.

facts_of(config, manifest)                          # {"Method": ..., "Data": ..., ...}
what_was_run(results.cells)                         # one text per heading, or one for each group of cells
differing_keys({"nested": config, ...})             # a table of the keys in which cells differ
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd

from utils.config.messages import shown
from utils.config.schema import RunConfig
from utils.metric_catalogue import ABSENT
from utils.reports.results import FinishedRun
from utils.reports.tables import Table, frame_table
from utils.runs.manifest import SHOWN, Manifest, read_manifest
from utils.wording import counted, named_data

LISTED_KEYS = 6  # with more keys, these are the rows of their table and cells its columns


def facts_of(config: Mapping[str, Any], manifest: Manifest) -> dict[str, str]:
    """Method, data, tasks, weights, code and machine of a run; parts that its manifest lacks are left out."""
    session, more = manifest.sessions[-1], manifest.model_extra or {}
    images, weights, method = more.get("images_per_class"), more.get("weights"), more.get("method")
    name = config["model_name"]
    facts = {"Method": f"{method.rstrip('.')} ({name})" if method else name}
    if images:
        facts["Data"] = f"{named_data(config)}: {_images(images)}"
    if images and "data_of_tasks" in more:
        facts["Tasks"] = _tasks(config, len(images["train"]), len(more["data_of_tasks"]["train"]))
    if weights:
        note = f" ({weights['note']})" if weights.get("note") else ""
        sha256 = str(weights.get("sha256"))[:SHOWN]
        facts["Weights"] = f"{weights.get('tag')}{note}, {more.get('image_size')} px, SHA-256 {sha256}"
    versions = [f"{name} {session.versions[name]}" for name in ("torch", "timm") if name in session.versions]
    facts["Code"] = ", ".join([commit_text(session.commit), *versions])
    processes = f", {session.processes} processes" if session.processes > 1 else ""
    threads = counted(session.threads, "thread")
    facts["Machine"] = f"{session.device}, {session.precision}, {threads}{processes}"
    return facts


def commit_text(commit: str | None) -> str:
    """`commit 1a2b3c4d5e6f with uncommitted changes`."""
    name, *changes = (commit or "").split("+")
    return f"commit {name[:SHOWN]}{' with uncommitted changes' * bool(changes)}" if name else "no commit"


def dates(manifests: Sequence[Manifest]) -> str:
    """From the first start to the last end: `28 November 2026, 21:17 to 21:52`."""
    first = min(datetime.fromisoformat(manifest.sessions[0].started) for manifest in manifests)
    ends = [datetime.fromisoformat(manifest.finished) for manifest in manifests if manifest.finished]
    began = f"{first.day} {first:%B %Y, %H:%M}"
    if not ends:
        return f"{began}, not finished"
    last = max(ends).astimezone(first.tzinfo)
    day = "" if first.date() == last.date() else f"{last.day} {last:%B}, "
    return f"{began} to {day}{last:%H:%M}"


def common_facts(facts: Mapping[str, Sequence[Mapping[str, str]]]) -> list[tuple[str, str]]:
    """Facts of all runs as (heading, text): one text where all agree, else one for each group of cells.

    facts: cell -> those of its runs.
    """
    users: dict[str, dict[str, dict[str, None]]] = {}  # heading -> text -> cells
    for cell, runs in facts.items():
        for heading, text in (item for run in runs for item in run.items()):
            users.setdefault(heading, {}).setdefault(text, {})[cell] = None
    with_runs = [cell for cell, runs in facts.items() if runs]
    return [
        (heading, text if list(cells) == with_runs else f"{'; '.join(cells)} – {text}")
        for heading, texts in users.items()
        for text, cells in texts.items()
    ]


def what_was_run(cells: Mapping[str, Mapping[int, FinishedRun]]) -> list[tuple[str, str]]:
    """Methods, data, weights, code, machine and dates of all runs, as (heading, text)."""
    found = {
        cell: [(run, read_manifest(run.folder)) for run in runs.values()] for cell, runs in cells.items()
    }
    facts = {cell: [facts_of(dict(run.config), own) for run, own in runs] for cell, runs in found.items()}
    return [*common_facts(facts), ("Date", dates([own for runs in found.values() for _, own in runs]))]


def differing_keys(configs: Mapping[str, RunConfig]) -> Table | None:
    """The keys in which cells differ: a row per cell, or per key where there are many; None without any.

    Keys that change no number, such as `device`, are left out; those that only some methods have are shown
    if a cell sets another value than the default.
    """
    values: dict[str, dict[str, str]] = {}
    chosen = set()
    for cell, config in configs.items():
        shaping = {*config.experiment(), *config.asset_keys}
        used = {key: value for key, value in config if key in shaping}
        values[cell] = {key: shown(value).strip('"') for key, value in used.items()}
        fields = type(config).model_fields
        chosen |= {key for key, value in used.items() if value != fields[key].default}
    table = pd.DataFrame.from_dict(values, orient="index")
    some = table.isna().any() & table.columns.isin(chosen)
    table = table.loc[:, (table.nunique() > 1) | some].fillna(ABSENT)
    if table.empty:
        return None
    note = f"{ABSENT}: the cell's method has no such key, or it changes nothing there."
    few = len(table.columns) <= LISTED_KEYS
    table = table.rename_axis("cell") if few else table.T.rename_axis("key")
    return frame_table(table, note if (table == ABSENT).any(axis=None) else "")


def _images(images: Mapping[str, Sequence[int]]) -> str:
    """`100 classes; train 2,000 images, 20 per class; test 1,000 images, 10 per class`."""
    texts = [f"{len(images['train'])} classes"]
    for source, counts in images.items():
        fewest, most = min(counts), max(counts)
        each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        texts.append(f"{source} {sum(counts):,} images, {each} per class")
    return "; ".join(texts)


def _tasks(config: Mapping[str, Any], classes: int, number: int) -> str:
    """`10: 10 classes each`, `6: 50 classes, then 10 each`, `4: 30 classes each, 10 in the last`."""
    if number == 1:
        return f"1, with all {classes} classes"
    first, later, added = config["init_cls"], config["increment"], config.get("extra_data") or []
    text = f"{number}: {f'{first} classes, then {later}' if first != later else f'{later} classes'} each"
    if added:
        return f"{text}, the last {len(added)} of extra_data, {classes} classes in all"
    shorter = (classes - first) % later
    return f"{text}, {shorter} in the last" if shorter else text
