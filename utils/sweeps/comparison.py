"""Comparison of run folders: the table of a sweep, made from finished runs wherever they lie.

    comparison = compare_runs([Path("logs/sema"), Path("logs/ranpac/mnist_5k/0/2/run_1993_...")], read_config)
    comparison.results                    # as of a sweep: its cells are the groups
    write_comparison(comparison, Path("logs/comparisons/sema-ranpac"))

A group is the runs whose configurations differ only in the seed and in keys that change no result
(`RunConfig.experiment`). It is named by few keys that tell it from the others of its method. Groups are
paired by seed. Code and libraries may differ between runs, which is reported; data and tasks may not.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from utils.config.messages import no_such
from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.files import write_json
from utils.reports.about import differing_keys, what_was_run
from utils.reports.report import write_report
from utils.reports.results import HASH, FinishedRun, Results
from utils.reports.tables import Table
from utils.runs.folder import CONFIG, REPLACED, RESULT
from utils.runs.manifest import changes
from utils.runs.seeds import both_values
from utils.sweeps.spec import bare, slug_of
from utils.wording import as_typed, counted, named_data

RECORD = "comparison.json"
METHOD = "model_name"


class Comparison(NamedTuple):
    """Results of groups of runs, which are as the cells of a sweep."""

    results: Results
    keys: Table | None  # in which groups differ
    unfinished: Mapping[str, str]  # folder -> why it is left out
    notes: Sequence[str]  # about code and libraries that differ


def compare_runs(
    folders: Sequence[Path], read_config: Callable[[Path], RunConfig], baseline: str | None = None
) -> Comparison:
    """The finished runs in folders, grouped by what they differ in besides their seed.

    Args:
        folders: run folders, or folders that hold some at any depth, such as a sweep's.
        baseline: a group's name, or a run folder of it; without it the group of the first run.

    Raises UserError: fewer than two groups, a seed twice in a group, runs of different tasks or metrics, or a
    damaged run.
    """
    found = runs_below(folders)
    way_out = "restore it, or leave the run out"
    finished = [
        FinishedRun.read(folder, read_config(folder), way_out)
        for folder in found
        if (folder / RESULT).is_file()
    ]
    unfinished = {str(folder): "no result.json" for folder in found if not (folder / RESULT).is_file()}
    if not finished:
        raise UserError(f"none of the {len(found)} runs is finished: --compare needs runs with a {RESULT}")
    _check_comparable(finished)
    by_experiment: dict[str, dict[int, FinishedRun]] = {}
    for run in finished:
        seeds = by_experiment.setdefault(json.dumps(_experiment(run), sort_keys=True), {})
        if run.config.seed in seeds:
            both = f"{seeds[run.config.seed].folder} and {run.folder}"
            raise UserError(f"{both} are one experiment with one seed, {run.config.seed}: give one of them")
        seeds[run.config.seed] = run
    firsts = [next(iter(seeds.values())) for seeds in by_experiment.values()]
    if len(firsts) == 1:
        mean = as_typed("eval.py", "--run", *(run.folder for run in finished))
        left_out = f" (left out as unfinished: {', '.join(unfinished)})" if unfinished else ""
        raise UserError(
            f"there is nothing to compare: {counted(len(finished), 'finished run')}, of one experiment but "
            f"for the seed{left_out}; for the mean over seeds, {mean}"
        )
    names = group_names(list(map(_experiment, firsts)))
    groups, metrics = dict(zip(names, by_experiment.values(), strict=True)), finished[0].config.metrics
    results = Results(groups, metrics, _baseline(baseline, groups), any_provenance=True)
    keys = differing_keys({name: run.config for name, run in zip(names, firsts, strict=True)})
    notes = changes({str(run.folder): run.origin for run in finished})
    return Comparison(results, keys, unfinished, notes)


def runs_below(folders: Iterable[Path]) -> list[Path]:
    """The run folders among and below folders, each once. UserError: a folder is not there, or holds none."""
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = list(_runs_in(folder))
        if not runs:
            raise UserError(
                f"{folder} holds no run: give run folders, or folders that hold some, such as logs/sema or a "
                "sweep's"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(folder: Path) -> Iterator[Path]:
    """The folder itself if it is a run's, else run folders in it; none inside runs, and no replaced one."""
    for place, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if REPLACED not in name and not name.startswith("."))
        if CONFIG in files:
            yield Path(place)
            names.clear()


def group_names(experiments: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each of several different experiments: few keys that tell those of its method apart.

    The method comes first, by its value alone, where there are several: `ranpac`, `sema, init_lr=0.01`. Keys
    that all experiments of the method have are preferred, the first of the configs among them.
    """
    values = pd.DataFrame([{key: bare(value) for key, value in one.items()} for one in experiments])
    names = pd.Series("", values.index)
    for method, alike in values.groupby(METHOD):
        keys = [key for key in alike if alike[key].nunique(dropna=False) > 1]
        for key in sorted(reversed(keys), key=lambda key: alike[key].notna().all()):
            fewer = alike[[other for other in keys if other != key]]
            if not (fewer.duplicated() | fewer.isna().all(axis=1)).any():
                keys = list(fewer)
        for row, own in alike[keys].iterrows():
            told = [f"{key}={value}" for key, value in own.dropna().items()]
            names[row] = ", ".join([method, *told] if values[METHOD].nunique() > 1 else told)
    return list(names)


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write a sweep's report of a comparison, and the record of what is compared; returns the files.

    Raises UserError: the folder holds something else.
    """
    if folder.exists() and not (
        folder.is_dir() and ((folder / RECORD).is_file() or not any(folder.iterdir()))
    ):
        raise UserError(f"--out {folder}: it holds something else than a comparison; give a new folder")
    results, commands = comparison.results, {}
    for name, runs in results.cells.items():
        seeds = json.dumps(list(runs), separators=(",", ":"))
        config = next(iter(runs.values())).folder / CONFIG
        commands[name] = as_typed("main.py", "--config", config, "--set", f"seed={seeds}")
    record = {
        name: {seed: str(run.folder) for seed, run in runs.items()} for name, runs in results.cells.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    marker = write_json(folder / RECORD, {"baseline": results.baseline, "groups": record})  # it is ours now
    report = write_report(
        folder,
        f"Comparison with {results.baseline}",
        "\n".join(comparison.notes),
        results,
        commands=commands,
        unfinished=comparison.unfinished,
        about=what_was_run(results.cells),
        keys=comparison.keys,
    )
    return [marker, *report]


def default_folder(comparison: Comparison) -> Path:
    """`logs/comparisons/<groups>-<hash of the runs>`: the same for the same runs and baseline."""
    cells = comparison.results.cells
    runs = sorted(str(run.folder.resolve()) for runs in cells.values() for run in runs.values())
    digest = hashlib.sha256("\n".join([comparison.results.baseline, *runs]).encode()).hexdigest()[:HASH]
    return Path("logs/comparisons") / f"{slug_of(' '.join(cells))}-{digest}"


def _experiment(run: FinishedRun) -> dict[str, Any]:
    """Key -> value by which runs are grouped: the run's experiment, with weights by name and hash."""
    sha256 = run.origin.hashes.get("weights", {}).get("sha256", "")[:HASH]
    weights = {"weights": f"{run.result['weights'].get('tag')} {sha256}"} if sha256 else {}
    return run.config.experiment() | weights


def _check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Refuse runs of other metrics, data or tasks; one task of all classes may stand beside several."""
    most = max(runs, key=lambda run: len(run.tested_on))  # it says how classes are split into tasks
    for run in runs:
        ours, theirs = ({"metric": one.config.metrics[0].name} | one.tested_on for one in (most, run))
        unlike = [key for key in theirs if ours.get(key) != theirs[key]]
        if unlike:
            shown = unlike[:1] if unlike[0] in ("metric", "data") else unlike  # the others follow
            values = {key: (ours.get(key), theirs[key]) for key in shown}
            if "data" in values:
                values["dataset"] = tuple(named_data(dict(one.config)) for one in (most, run))
            raise UserError(
                f"{most.folder} and {run.folder} are about different data or tasks and cannot be paired: "
                f"{both_values(values)}; compare each kind in a command of its own"
            )


def _baseline(given: str | None, groups: Mapping[str, Mapping[int, FinishedRun]]) -> str:
    """The group that a name or a run folder stands for."""
    if given is None:
        return next(iter(groups))
    for name, runs in groups.items():
        if given == name or any(run.folder.resolve() == Path(given).resolve() for run in runs.values()):
            return name
    raise UserError(f"--baseline {given}: {no_such('group', given, list(groups))}")
