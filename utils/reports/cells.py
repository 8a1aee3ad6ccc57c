"""The numbers of a sweep: every cell's means over seeds, and its difference from the baseline.

    cells = tabulate(runs, baseline="matched adapter")     # runs: cell name -> seed -> result.json
    cells[0].estimates["final"].mean                        # A_N over the cell's seeds
    cells[0].comparisons["final"].paired.low                # lower end of the interval of A_N minus the baseline's

Differences are paired by seed, over runs of one provenance (`utils/runs/manifest.py`).

A *cell* is a named configuration that was run with several seeds. Every table, figure and file of the report is made
from this list and computes nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from utils.errors import UserError
from utils.reports.metric_catalogue import CLASS_INCREMENTAL, COSTS, Kind, kind_of
from utils.reports.stats import SAME, Estimate, Paired, holm, interval, paired
from utils.runs.manifest import Provenance
from utils.runs.metrics import is_number


@dataclass(frozen=True)
class Comparison:
    """One metric of a cell minus the baseline's.

    Attributes:
        paired: the difference over the seeds that both have.
        p_holm: p of the paired t-test, adjusted over all cells compared with the baseline in this metric.
        verdict: "better" or "worse" where the interval excludes zero, "undecided" where it does not; without an
            interval "one seed" or `SAME`.
    """

    paired: Paired
    p_holm: float | None
    verdict: str


@dataclass(eq=False)
class Cell:
    """A named configuration.

    Attributes:
        name: as the sweep's table has it.
        results: seed -> result.json of its finished runs, seeds ascending.
        kind: of its runs, and of all cells.
        origins: seed -> provenance of its run, where it is known, in the order in which the runs ended.
        comparisons: metric -> difference from the baseline; empty for the baseline, and where nothing is comparable.
    """

    name: str
    results: dict[int, Mapping[str, Any]]
    kind: Kind = CLASS_INCREMENTAL
    origins: Mapping[int, Provenance] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    @cached_property
    def quantities(self) -> dict[int, dict[str, float | None]]:
        """seed -> what `measured` says of that run."""
        return {seed: measured(result) for seed, result in self.results.items()}

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """quantity -> its mean over the seeds that have a number; quantities without one are absent."""
        names = dict.fromkeys(name for values in self.quantities.values() for name in values)
        return {name: interval(list(values.values())) for name in names if (values := self.values(name))}

    @property
    def tasks(self) -> int:
        """Number of tasks of each run; 0 without a run."""
        return next((tasks_of(result) for result in self.results.values()), 0)

    def values(self, quantity: str) -> dict[int, float]:
        """seed -> value, for the seeds that have a number."""
        found = {seed: values.get(quantity) for seed, values in self.quantities.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def left_out(self, other: Cell) -> dict[int, list[str]]:
        """seed -> kinds of provenance, for the seeds that are not paired with another cell's.

        All runs of a comparison, of both cells, have one provenance; where there are several, that of the most seeds,
        the latest of equals. The kinds are those that differ between the two runs, or from what is compared.
        """
        common = [seed for seed in self.origins if seed in other.origins]  # in the order of `origins`
        kinds = {seed: self.origins[seed].unlike(other.origins[seed]) for seed in common}
        groups: list[list[int]] = []
        for seed in common:
            if kinds[seed]:
                continue
            for group in groups:
                if not self._changed(other, seed, group[0]):
                    group.append(seed)
                    break
            else:
                groups.append([seed])
        paired = max(reversed(groups), key=len, default=[])
        left_out = [seed for seed in sorted(common) if seed not in paired]
        return {seed: kinds[seed] or self._changed(other, seed, paired[0]) for seed in left_out}

    def _changed(self, other: Cell, seed: int, since: int) -> list[str]:
        """The kinds in which the runs of two cells with a seed differ from their runs with another one."""
        kinds = self.origins[seed].unlike(self.origins[since]) + other.origins[seed].unlike(
            other.origins[since]
        )
        return list(dict.fromkeys(kinds))

    def sides(self, metric: str, other: Cell, other_metric: str) -> tuple[dict[int, float], dict[int, float]]:
        """Own values and another cell's by seed, to be paired; own ones that are `left_out` are absent."""
        left_out = self.left_out(other)
        ours = {seed: value for seed, value in self.values(metric).items() if seed not in left_out}
        return ours, other.values(other_metric)


def tabulate(
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]],
    baseline: str | None,
    origins: Mapping[str, Mapping[int, Provenance]] | None = None,
) -> list[Cell]:
    """The cells in the table's order, compared with the baseline where there is one.

    origins: cell name -> seed -> provenance; runs that have none are taken to be alike.

    Raises:
        UserError: the baseline is no cell, no run is finished, or a result is not readable.
    """
    if baseline is not None and baseline not in runs:
        raise UserError(f'baseline = "{baseline}" is no cell of this sweep; allowed: {_quoted(runs)}')
    if not any(runs.values()):
        raise UserError("no run of this sweep is finished, there is nothing to report: run the sweep first")
    kind = _common_kind(runs)
    for name, results in runs.items():
        _check_results(name, results, kind)
    known = origins or {}
    cells = [
        Cell(name, dict(sorted(results.items())), kind, known.get(name, {})) for name, results in runs.items()
    ]
    reference = next((cell for cell in cells if cell.name == baseline), None)
    if reference is not None:
        others = [cell for cell in cells if cell is not reference]
        for metric in kind.metrics:
            _compare(others, reference, metric)
    return cells


def measured(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Every number of a run by name: its metrics, parameters of adapters and in all, seconds, peak memory in MB.

    What is absent, or no finite number, is None.
    """
    parameters, cost = result["parameters"], result["cost"]
    costs = (
        parameters.get("adapters"),
        parameters.get("stored"),
        cost.get("seconds"),
        cost.get("peak_memory_mb"),
    )
    values = {
        **dict.fromkeys(kind_of(result).metrics),
        **result["metrics"],
        **dict(zip(COSTS, costs, strict=True)),
    }
    return {name: value if is_number(value) else None for name, value in values.items()}


def tasks_of(result: Mapping[str, Any]) -> int:
    """Tasks of a finished run: as many as its curve has points, one where its kind has no curve."""
    return len(result["curve"]) if "curve" in result else 1


def quantity_names(cells: Sequence[Cell]) -> list[str]:
    """The names of `measured` over all runs, each once."""
    return list(
        dict.fromkeys(name for cell in cells for values in cell.quantities.values() for name in values)
    )


def best_cells(cells: Sequence[Cell], metric: str) -> set[str]:
    """Names of the cells with the best mean of a metric; none where fewer than two can be compared.

    A cell of one task learned all classes at once: it is a bound for the others and does not take part.
    """
    several = [cell for cell in cells if cell.tasks > 1] or cells
    means = {cell.name: cell.estimates[metric].mean for cell in several if metric in cell.estimates}
    if len(means) < 2:
        return set()
    best = (min if cells[0].kind.lower_is_better(metric) else max)(means.values())
    return {name for name, mean in means.items() if math.isclose(mean, best, rel_tol=1e-12)}


def _compare(cells: Sequence[Cell], reference: Cell, metric: str) -> None:
    """Add one metric's comparison to every cell that has it; together they are the family of Holm's adjustment.

    Only the main metric means the same whatever the number of tasks: the others are compared at equal numbers.
    """
    found = {}
    for cell in cells:
        difference = paired(*cell.sides(metric, reference, metric))
        if difference is not None and (metric == reference.kind.main or cell.tasks == reference.tasks):
            found[cell.name] = difference
    adjusted = dict(zip(found, holm([difference.p_t for difference in found.values()]), strict=True))
    for cell in cells:
        if difference := found.get(cell.name):
            lower_is_better = reference.kind.lower_is_better(metric)
            cell.comparisons[metric] = Comparison(
                difference, adjusted[cell.name], _verdict(difference, lower_is_better)
            )


def _verdict(difference: Paired, lower_is_better: bool) -> str:
    if difference.n == 1:
        return "one seed"
    if difference.same:
        return SAME
    if not difference.excludes_zero:
        return "undecided"
    return "better" if (difference.mean < 0) == lower_is_better else "worse"


def _common_kind(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Kind:
    """The kind of all finished runs. Raises UserError where they are of several."""
    kinds = {name: kind_of(result) for name, results in runs.items() for result in results.values()}
    first, kind = next(iter(kinds.items()))
    other = next((name for name, its in kinds.items() if its is not kind), None)
    if other is not None:
        both = f'cells "{first}" and "{other}" measure different things'
        raise UserError(
            f"{both}, there is nothing to compare: give each kind of experiment a sweep of its own"
        )
    return kind


def fault_of(result: Mapping[str, Any], kind: Kind) -> str | None:
    """What a finished run's result.json lacks to be reported on, or None; kind: what it should be of."""
    if kind_of(result) is not kind:
        return "it is of another kind of experiment"
    lacking = next((key for key, form in kind.needed.items() if not isinstance(result.get(key), form)), None)
    if lacking is not None:
        return f'it has no "{lacking}"'
    if not is_number(result["metrics"].get(kind.main)):
        return f"it has no {kind.main_name}"
    if "curve" in kind.needed and not (result["curve"] and all(map(is_number, result["curve"]))):
        return 'its "curve" holds something else than numbers'
    return None


def _check_results(name: str, results: Mapping[int, Mapping[str, Any]], kind: Kind) -> None:
    """Refuse results that lack a part, and a cell whose runs differ in their number of tasks."""
    advice = "remove that run's folder and run the sweep again"
    for seed, result in results.items():
        if fault := fault_of(result, kind):
            raise UserError(f'cell "{name}", seed {seed}: result.json is damaged, {fault}; {advice}')
    tasks = {seed: tasks_of(result) for seed, result in results.items()}
    if len(set(tasks.values())) > 1:
        each = ", ".join(f"{number} with seed {seed}" for seed, number in tasks.items())
        raise UserError(
            f'cell "{name}": its runs must have the same number of tasks, they have {each}; {advice}'
        )


def _quoted(names: Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in names)
