"""Closing words of a sweep for the console: a table of means, and what it says in one sentence.

    print("\n".join(closing_table(results)))
    print(finding(results, "nested mean"))    # "nested mean ends 2.00 points above matched adapter ..."

Both are computed from the results, whatever they say.
"""

import pandas as pd

from utils.metric_catalogue import ABSENT, MetricSpec, Shown
from utils.reports.results import Results
from utils.reports.stats import ONE_SEED, SAME, UNDECIDED

CERTAINTY = {
    ONE_SEED: "one seed cannot tell whether others agree",
    SAME: "the same in every seed",
    UNDECIDED: "these seeds do not decide",
}


def closing_table(results: Results) -> list[str]:
    """A row per cell with the means of what is compared, then a line on what each column is."""
    specs = [spec for spec in results.metrics if spec.shown >= Shown.DIFFERENCES]
    rows = [["", *(spec.name for spec in specs)]]
    for cell in results.cells:
        found = [results.summary.loc[(cell, spec.key)] for spec in specs]
        means = (spec.text(row["mean"], row["std"]) for spec, row in zip(specs, found, strict=True))
        rows.append([cell, *means])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[name.ljust(widths[0]), *map(str.rjust, texts, widths[1:])] for name, *texts in rows]
    longest = max(len(spec.name) for spec in specs)
    legend = [f"{spec.name:<{longest}}   {spec.definition}" for spec in specs]
    if chance := results.chance():
        legend[0] += f"; by chance {results.main.text(chance[-1])}"
    return [*("   ".join(row).rstrip() for row in aligned), "", *legend]


def finding(results: Results, cell: str | None = None) -> str:
    """How a cell ended against the baseline, how sure that is, and what is best: one sentence.

    cell: by default the best other than the baseline in the main metric.
    """
    main = results.main
    means = results.summary["mean"].xs(main.key, level="metric")[results.finished]
    ranked = list(means.sort_values(ascending=main.lower_is_better, kind="stable").index)
    best = f"the best {main.name} is {main.text(means[ranked[0]])}, of {ranked[0]}"
    if cell is None:
        cell = next((name for name in ranked if name != results.baseline), None)
    if results.baseline is None or not {cell, results.baseline} <= set(ranked):
        return f"{best}."
    row = results.summary.loc[(cell, main.key)]
    if pd.isna(row["difference"]):
        return f"{cell} and {results.baseline} have no comparable runs; {best}."
    parts = [
        f"{cell} ends {_by(main, row['difference'], 'above', 'below', 'level with')} {results.baseline} "
        f"in {main.name} ({main.text(means[cell])} against {main.text(means[results.baseline])})"
    ]
    for other in [spec for spec in results.metrics[1:] if spec.shown == Shown.FIGURES][:1]:
        change = results.summary.loc[(cell, other.key), "difference"]
        if pd.notna(change):
            parts.append(f"with {_by(other, change, 'more', 'less', 'as much')} {other.name}")
    interval = main.difference_text(row["difference_low95"], row["difference_high95"])
    sure = [f"95 % interval {interval}"] if interval != ABSENT else []
    sure += [CERTAINTY[row["verdict"]]] if row["verdict"] in CERTAINTY else []
    best = "no other is better" if ranked[0] == cell else best
    return f"{', '.join(parts)}; {', '.join(sure)}; {best}."


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
