"""Results of a sweep as pandas tables: every number of every run, and its statistics per cell.

    runs = {"nested": {1993: FinishedRun.read(run_folder, config)}, "matched adapter": {...}}
    results = Results(runs, config.metrics, baseline="matched adapter")
    results.runs                                # a row per run
    results.values("nested", "final")           # the cell's values by seed
    results.summary.loc["nested", "final"]      # mean, interval, difference from the baseline, verdict

A *cell* is a named configuration that is run with every seed. Differences are paired by seed, over runs of
one provenance (`utils/runs/manifest.py`) that were tested on the same images; those from the baseline in
other metrics than the main one, which are about tasks, need the same ones. Tables, figures and files of the
report only show these numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

import pandas as pd

from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.metric_catalogue import MetricSpec, by_key
from utils.reports.stats import Estimate, holm, mean_over_seeds, paired_difference
from utils.runs.manifest import Provenance, read_manifest, read_provenance
from utils.runs.metrics import checked_result, number_of_tasks, numbers_of

UNLISTED_DIGITS = 3  # of a metric that the catalogue does not have
OTHER_IMAGES = "test images"  # in place of a kind of provenance
SPLIT = {"init_cls", "increment", "shuffle"}  # of what runs are tested on: choose an image's task, no image
HASH = 8  # characters of a hash


@dataclass(frozen=True)
class FinishedRun:
    """A run with a result: its folder, configuration, result.json, provenance, and what it was tested on."""

    folder: Path
    config: RunConfig
    result: Mapping[str, Any]
    origin: Provenance
    tested_on: Mapping[str, Any]  # the hash of its data, then as of `RunConfig.tested_on`

    @classmethod
    def read(cls, folder: Path, config: RunConfig, way_out: str = "restore it") -> "FinishedRun":
        """The run in a folder. UserError: a file is damaged; way_out: what to do if that is its result."""
        result, origin = checked_result(folder, config.metrics, way_out), read_provenance(folder)
        classes = len((read_manifest(folder).model_extra or {}).get("class_order", []))
        seen = (result.get("classes_seen") or [classes])[-1]
        about = config.tested_on(number_of_tasks(result, config.metrics), seen, classes)
        data = origin.hashes.get("data", {}).get("sha256", "")[:HASH]
        return cls(folder, config, result, origin, {"data": data, **about})

    def unlike(self, other: "FinishedRun") -> list[str]:
        """Kinds of provenance in which two runs differ, and test images: such runs are not paired."""
        kinds = self.origin.unlike(other.origin)
        if "data" not in kinds and self.on_other_images(other):
            kinds.append(OTHER_IMAGES)
        return kinds

    def on_other_images(self, other: "FinishedRun") -> bool:
        """Whether two runs were tested on different images, by what is known of both."""
        keys = self.tested_on.keys() & other.tested_on.keys() - SPLIT
        return any(self.tested_on[key] != other.tested_on[key] for key in keys)


@dataclass(eq=False)
class Results:
    """The finished runs of a sweep, at least one.

    Cells are in the table's order, also those without a finished run. UserError: the runs of a cell differ in
    their number of tasks.
    """

    cells: Mapping[str, Mapping[int, FinishedRun]]  # cell -> seed -> run, given in the order of their ends
    metrics: Sequence[MetricSpec]  # of the runs' method, the main metric first
    baseline: str | None = None  # the cell that the others are compared with
    any_provenance: bool = False  # whether runs are paired whatever they were made with

    def __post_init__(self) -> None:
        """Order seeds, count tasks."""
        self._by_end = self.cells
        self.cells = {cell: dict(sorted(runs.items())) for cell, runs in self.cells.items()}
        self._specs = by_key(self.metrics)
        self._tasks = {cell: self._number_of_tasks(cell) for cell in self.cells}

    @property
    def main(self) -> MetricSpec:
        """The metric that every run has, and that ranks cells."""
        return self.metrics[0]

    @property
    def finished(self) -> list[str]:
        """Cells with a finished run."""
        return [cell for cell, runs in self.cells.items() if runs]

    @property
    def every_result(self) -> list[Mapping[str, Any]]:
        """The result.json of every run."""
        return [run.result for runs in self.cells.values() for run in runs.values()]

    @property
    def compared(self) -> list[str]:
        """Cells other than the baseline; none without a baseline."""
        return [cell for cell in self.cells if self.baseline not in (None, cell)]

    def spec(self, metric: str) -> MetricSpec:
        """Specification of a metric; one outside the catalogue is named by its key."""
        return self._specs.get(metric) or MetricSpec(metric, metric, digits=UNLISTED_DIGITS)

    def tasks(self, cell: str) -> int:
        """Number of tasks of each run of a cell; 0 without a run."""
        return self._tasks[cell]

    def same_tasks(self, cell: str, other: str) -> bool:
        """Whether two cells have as many tasks, of as many classes each."""
        seen = (
            [run.result.get("classes_seen") for run in self.cells[name].values()] for name in (cell, other)
        )
        ours, theirs = (next(filter(None, lists), None) for lists in seen)
        return self.tasks(cell) == self.tasks(other) and (None in (ours, theirs) or ours == theirs)

    @cached_property
    def by_images(self) -> list[list[str]]:
        """The finished cells, grouped by the images that runs of theirs were tested on."""

        def alike(cell: str, other: str) -> bool:
            pairs = product(self.cells[cell].values(), self.cells[other].values())
            return not all(ours.on_other_images(theirs) for ours, theirs in pairs)

        groups: dict[str, list[str]] = {}
        for cell in self.finished:
            groups.setdefault(next((other for other in groups if alike(cell, other)), cell), []).append(cell)
        return list(groups.values())

    def chance(self) -> list[float]:
        """Accuracy (%) by chance after each task, with the most tasks of any cell; empty if they differ."""
        every = [result.get("classes_seen") or [] for result in self.every_result]
        longest = max(every, key=len, default=[])
        alike = all(seen[-1:] == longest[-1:] and (len(seen) == 1 or seen == longest) for seen in every)
        return [100 / classes for classes in longest] if alike else []

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row per finished run (cell, seed): every number by its key, tasks, weights."""
        rows = {
            (cell, seed): numbers_of(run.result)
            | {"tasks": self.tasks(cell), "weights": run.result["weights"].get("tag")}
            for cell, runs in self.cells.items()
            for seed, run in runs.items()
        }
        index = pd.MultiIndex.from_tuples(rows, names=["cell", "seed"])
        columns = [*self.metric_keys, "tasks", "weights"]
        return pd.DataFrame(list(rows.values()), index, columns, dtype=object)

    @cached_property
    def metric_keys(self) -> list[str]:
        """Keys of all numbers of runs: the method's metrics, others that a result holds, costs."""
        own = [spec.key for spec in self.metrics if not spec.per_task]
        measured = chain.from_iterable(map(numbers_of, self.every_result))
        return list(dict.fromkeys([*own, *measured, *self._specs]))

    def values(self, cell: str, metric: str) -> pd.Series:
        """Value by seed, for the seeds that have one."""
        if not self.cells[cell] or metric not in self.metric_keys:
            return pd.Series(dtype=float)
        return self.runs[metric].loc[cell].dropna().astype(float)

    def pairs(self, cell: str, metric: str, other: str, other_metric: str) -> pd.DataFrame:
        """Columns "ours" and "theirs", by the seeds that both sides have, without those `left_out`."""
        sides = {"ours": self.values(cell, metric), "theirs": self.values(other, other_metric)}
        return pd.concat(sides, axis=1, join="inner").drop(list(self.left_out(cell, other)), errors="ignore")

    def left_out(self, cell: str, other: str) -> dict[int, list[str]]:
        """seed -> kinds of provenance that differ, for the seeds of two cells that are not paired.

        Test images are one of the kinds. All paired runs, of both cells, have one provenance: of several that
        of the most seeds, of equals the latest. The kinds are those in which the two runs of a seed differ
        or, if they agree, in which they differ from the paired ones.
        """
        if self.any_provenance:
            return {}
        ours, theirs = self._by_end[cell], self._by_end[other]
        unlike = {seed: ours[seed].unlike(theirs[seed]) for seed in ours if seed in theirs}
        pairs = {seed: (ours[seed].origin, theirs[seed].origin) for seed in unlike}
        sound = [seed for seed, kinds in unlike.items() if not kinds]
        groups = [[other for other in sound if pairs[other] == pairs[seed]] for seed in sound]
        kept = max(reversed(groups), key=len, default=[])
        left_out = {}
        for seed in sorted(unlike.keys() - kept):
            changed = unlike[seed] or chain(*map(Provenance.unlike, pairs[seed], pairs[kept[0]]))
            left_out[seed] = list(dict.fromkeys(changed))
        return left_out

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row per (cell, metric): mean over seeds, and difference from the baseline.

        Holm's adjustment is over the cells compared in a metric. The verdict is "better" or "worse" where the
        interval excludes zero, else as `Estimate.verdict` says. Undefined numbers are NaN.
        """
        rows = [self._summary_row(cell, metric) for cell in self.cells for metric in self.metric_keys]
        frame = pd.DataFrame(rows).astype({"paired_n": "Int64"})
        frame["p_holm"] = frame.groupby("metric")["p_t"].transform(holm)
        return frame.set_index(["cell", "metric"])

    def best(self, metric: str) -> set[str]:
        """Cells with the best mean as it is shown; none where fewer than two, or not all, can be compared.

        A cell of one task learned all classes at once: it is an upper bound and left out where others have
        several. Cells of other tasks can be compared in the main metric only, of other test images in none.
        """
        several = [cell for cell in self.finished if self.tasks(cell) > 1] or self.finished
        if len(self.by_images) > 1:
            return set()
        if metric != self.main.key and not all(self.same_tasks(cell, several[0]) for cell in several):
            return set()
        means = self.summary["mean"].xs(metric, level="metric").reindex(several).dropna()
        if len(means) < 2:
            return set()
        spec = self.spec(metric)
        best = means.min() if spec.lower_is_better else means.max()
        return {cell for cell, mean in means.items() if spec.text(mean) == spec.text(best)}

    @cached_property
    def ranked(self) -> pd.Series:
        """The finished cells' means of the main metric, the best first."""
        means = self.summary["mean"].xs(self.main.key, level="metric")[self.finished]
        return means.sort_values(ascending=self.main.lower_is_better, kind="stable")

    def _summary_row(self, cell: str, metric: str) -> dict[str, Any]:
        mean, difference = mean_over_seeds(self.values(cell, metric).to_list()), Estimate()
        comparable = metric in [spec.key for spec in self.metrics] and cell in self.compared
        if comparable and (metric == self.main.key or self.same_tasks(cell, self.baseline)):
            difference = paired_difference(self.pairs(cell, metric, self.baseline, metric))
        better = ("worse", "better") if self.spec(metric).lower_is_better else ("better", "worse")
        return {
            "cell": cell,
            "metric": metric,
            "n": mean.n,
            "mean": mean.mean,
            "std": mean.std,
            "low95": mean.low,
            "high95": mean.high,
            "baseline": self.baseline,
            "paired_n": difference.n or None,
            **difference_columns(difference),
            "p_wilcoxon": difference.p_wilcoxon,
            "verdict": difference.verdict(*better) if difference.n else None,
        }

    def _number_of_tasks(self, cell: str) -> int:
        tasks = {seed: number_of_tasks(run.result, self.metrics) for seed, run in self.cells[cell].items()}
        if len(set(tasks.values())) > 1:
            each = ", ".join(f"{number} with seed {seed}" for seed, number in tasks.items())
            raise UserError(
                f'cell "{cell}": its runs must have the same number of tasks, they have {each}; '
                "remove the folder of those that are wrong and run the sweep again"
            )
        return max(tasks.values(), default=0)


def difference_columns(difference: Estimate) -> dict[str, float]:
    """The columns of a paired difference in the CSV files, its adjusted p still missing."""
    return {
        "difference": difference.mean,
        "difference_std": difference.std,
        "difference_low95": difference.low,
        "difference_high95": difference.high,
        "p_t": difference.p_t,
        "p_holm": math.nan,
    }
