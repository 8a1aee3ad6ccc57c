"""Closing words of a sweep for the console: what its table's columns are, and what it says in one sentence.

    print("\n".join(legend(results)))         # "A_N   accuracy over all classes after the last task (%) ..."
    print(finding(results, "nested mean"))    # "nested mean ends 2.00 points above matched adapter ..."

Both are computed from the results, whatever they say.
"""

from collections.abc import Iterable

import pandas as pd

from utils.metric_catalogue import ABSENT, MetricSpec, Shown
from utils.reports.results import Results
from utils.reports.stats import ONE_SEED, SAME, UNDECIDED
from utils.reports.tables import measured

CERTAINTY = {
    ONE_SEED: "one seed cannot tell whether others agree",
    SAME: "the same in every seed",
    UNDECIDED: "these seeds do not decide",
}


def legend(results: Results) -> list[str]:
    """A line on what each column of the console's table is."""
    specs = measured(results, Shown.CONSOLE)
    longest = max(len(spec.name) for spec in specs)
    lines = [f"{spec.name:<{longest}}   {spec.definition}" for spec in specs]
    if chance := results.chance():
        lines[0] += f"; by chance {results.main.text(chance[-1])}"
    return lines


def finding(results: Results, cell: str | None = None) -> str:
    """How a cell ended against the baseline, how sure that is, and what is best: one sentence.

    Both means are over the seeds that are paired, which are named where either cell has others; what is best
    is told over all runs. Cells that are shown with the same mean are equally good; a cell of one task is an
    upper bound and never the best.

    cell: by default the best other than the baseline in the main metric.
    """
    main, shown = results.main, results.ranked.map(results.main.text)
    several = [name for name in shown.index if results.tasks(name) > 1] or list(shown.index)
    winners = [name for name in several if shown[name] == shown[several[0]]]
    seeds = {frozenset(results.values(name, main.key).index) for name in shown.index}
    unequal = " over all finished runs" if len(seeds) > 1 else ""
    best = f"the best {main.name}{unequal} is {shown[several[0]]}, of {_listed(winners)}"
    if cell is None:
        others = [name for name in dict.fromkeys([*several, *shown.index]) if name != results.baseline]
        cell = next(iter(others), None)
    if results.baseline is None or not {cell, results.baseline} <= set(shown.index):
        return f"{best}."
    row = results.summary.loc[(cell, main.key)]
    if pd.isna(row["difference"]):
        return f"{cell} and {results.baseline} have no comparable runs; {best}."
    pairs = results.pairs(cell, main.key, results.baseline, main.key)
    ours, theirs = map(main.text, pairs.mean())
    all_paired = all(len(results.values(name, main.key)) == len(pairs) for name in (cell, results.baseline))
    over = "" if all_paired else f" over seeds {_listed(pairs.index)}"
    parts = [
        f"{cell} ends {_by(main, row['difference'], 'above', 'below', 'level with')} {results.baseline} "
        f"in {main.name} ({ours} against {theirs}{over})"
    ]
    for other in [spec for spec in results.metrics[1:] if spec.shown == Shown.FIGURES][:1]:
        change = results.summary.loc[(cell, other.key), "difference"]
        if pd.notna(change):
            parts.append(f"with {_by(other, change, 'more', 'less', 'as much')} {other.name}")
    interval = main.difference_text(row["difference_low95"], row["difference_high95"])
    sure = [f"95 % interval {interval}"] if interval != ABSENT else []
    sure += [CERTAINTY[row["verdict"]]] if row["verdict"] in CERTAINTY else []
    best = "no other is better" if winners == [cell] and all_paired else best
    return "; ".join(filter(None, [", ".join(parts), ", ".join(sure), best])) + "."


def weights_notes(results: Results) -> list[str]:
    """What must be known of the pretrained weights beside any number, a sentence for each that needs one."""
    every = [result["weights"].get("note") for runs in results.cells.values() for result in runs.values()]
    return [f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(every) if note]


def _by(spec: MetricSpec, difference: float, above: str, below: str, level: str) -> str:
    """A difference in words: `2.00 points above`; what would be shown as zero is level."""
    amount = spec.difference_text(abs(difference)).lstrip("+")
    if not float(amount.replace(",", "")):
        return level
    return " ".join(filter(None, [amount, spec.difference_unit, above if difference > 0 else below]))


def _listed(names: Iterable[object]) -> str:
    """Names in words: `a`, `a and b`, `a, b and c`."""
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last
