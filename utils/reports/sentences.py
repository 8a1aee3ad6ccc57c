"""Sentences about a sweep's results: facts, finding, legend, and notes on how to read the numbers.

    print(finding(results, "nested mean"))    # "nested mean ends 2.00 points above matched adapter ..."
    print("\n".join(legend(results)))         # "A_N   accuracy over all classes after the last task (%) ..."

All of it is computed from the results.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import pandas as pd

from utils.metric_catalogue import ABSENT, MetricSpec, Shown
from utils.reports.results import Results
from utils.reports.stats import ONE_SEED, SAME, UNDECIDED
from utils.reports.tables import measured, not_compared

ALPHA = 0.05  # p values below it are counted as differences
EXCLUDES_ZERO = "the 95 % interval of the mean difference (Student's t) excludes zero"
NOT_EQUAL = '"undecided" does not mean equal, it means that these seeds do not tell'
CERTAINTY = {
    ONE_SEED: "one seed cannot tell whether others agree",
    SAME: "the same in every seed",
    UNDECIDED: "these seeds do not decide",
}


def facts(results: Results, unfinished: Mapping[str, str]) -> list[tuple[str, str]]:
    """Cells, runs, seeds, best cell and outcomes against the baseline: (name, text) pairs."""
    unrun = len(results.cells) - len(results.finished)
    without_run = f" ({unrun} without a finished run)" if unrun else ""
    not_finished = f" ({len(unfinished)} not finished)" if unfinished else ""
    found = [
        ("Cells", f"{len(results.cells)}{without_run}"),
        ("Finished runs", f"{len(results.runs)}{not_finished}"),
        ("Seeds", _seeds(results)),
    ]
    main = results.main
    if best := [cell for cell in results.cells if cell in results.best(main.key)]:
        row = results.summary.loc[best[0], main.key]
        level = f"{main.text(row['mean'], row['std'])} (n = {row['n']})"
        found.append((f"Best mean {main.name}", f"{', '.join(best)}, {level}"))
    if results.baseline is not None:
        found.append(("Baseline", results.baseline))
        for spec in results.metrics:
            if spec.shown == Shown.FIGURES and (outcome := _outcome(results, spec.key)):
                found.append((f"{spec.name} against the baseline", outcome))
    return found


def finding(results: Results, cell: str | None = None) -> str:
    """One sentence: how a cell ended against the baseline, how certain that is, and which cell is best.

    Both means are over the paired seeds, which are named if either cell has others; the best is over all
    runs of cells tested on the baseline's images. Cells that are shown with the same mean are equally good; a
    cell of one task is an upper bound and never the best.

    cell: by default the best other than the baseline in the main metric.
    """
    main, finished, groups = results.main, results.finished, results.by_images
    together = next((group for group in groups if results.baseline in group or len(groups) == 1), None)
    if together is None:
        return "cells were tested on different images, so none is the best of all."
    shown = results.ranked[results.ranked.index.isin(together)].map(main.text)
    several = [name for name in shown.index if results.tasks(name) > 1] or list(shown.index)
    winners = [name for name in several if shown[name] == shown[several[0]]]
    seeds = {frozenset(results.values(name, main.key).index) for name in shown.index}
    unequal = " over all finished runs" if len(seeds) > 1 else ""
    unequal += " tested on the same images" if len(groups) > 1 else ""
    best = f"the best {main.name}{unequal} is {shown[several[0]]}, of {_listed(winners)}"
    if cell is None:
        others = [name for name in dict.fromkeys([*several, *shown.index]) if name != results.baseline]
        cell = next(iter(others), None)
    if results.baseline is None or not {cell, results.baseline} <= set(finished):
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
    best = "no other is better" if winners == [cell] and all_paired and len(groups) == 1 else best
    return "; ".join(filter(None, [", ".join(parts), ", ".join(sure), best])) + "."


def legend(results: Results) -> list[str]:
    """A line that defines each column of the console's table."""
    specs = measured(results, Shown.CONSOLE)
    longest = max(len(spec.name) for spec in specs)
    lines = [f"{spec.name:<{longest}}   {spec.definition}" for spec in specs]
    if chance := results.chance():
        lines[0] += f"; by chance {results.main.text(chance[-1])}"
    return lines


def images_notes(results: Results) -> list[str]:
    """Which cells were tested on other images, in a sentence; nothing where all were tested on the same."""
    groups = results.by_images
    if len(groups) < 2:
        return []
    listed = "; ".join(map(_listed, groups))
    return [f"Tested on different images, comparable only within a group: {listed}."]


def reading_notes(results: Results, answers: pd.DataFrame | None = None) -> list[str]:
    """Definitions and statistics that a reader of this report needs, one note per item."""
    notes = [
        "A cell is one configuration, run once with each seed. Numbers are mean ± std over its n finished "
        "runs (std with ddof 1; a single run has none). The best mean of a column is bold.",
    ]
    if results.main.key.startswith("validation_"):
        notes.append(
            "Accuracy was measured on validation images, training images that were held out "
            "(validation_share), and cells are ranked by it. No test image was read: when the settings are "
            "chosen, python eval.py --run FOLDER... --test tests the runs of one cell."
        )
    for spec in measured(results, Shown.MEANS):
        if spec.meaning:
            direction = f"; {spec.better} is better" if spec.shown >= Shown.DIFFERENCES else ""
            notes.append(f"{spec.name}: {spec.meaning}{direction}.")
    single = [cell for cell in results.finished if results.tasks(cell) == 1]
    if 0 < len(single) < len(results.finished):
        notes.append(
            f"{', '.join(single)}: all classes were learned in one task. This is an upper bound for the "
            "other cells: nothing can be forgotten, average and plasticity are A_N, and it is never bold."
        )
    notes += images_notes(results)
    if results.compared and results.summary["paired_n"].isna().all():
        notes.append(f"No cell has a difference from the baseline. {not_compared(results, results.compared)}")
    elif results.baseline is not None:
        notes += [
            "Differences are the cell's value minus the baseline's, paired by seed: the same seed means the "
            f'same tasks and the same samples. "better" and "worse" say that {EXCLUDES_ZERO}; {NOT_EQUAL}.',
            "p (t) is the two-sided paired t-test. p (Holm) is the same, adjusted for all comparisons of "
            "that metric in this report; the intervals are not adjusted. p (Wilcoxon) is the signed-rank "
            "test, which supposes no normal distribution; with n seeds it cannot be below 2 / 2^n, 0.0625 "
            "for five.",
        ]
    notes += _notes_on_sameness(results, answers)
    notes += _notes_on_provenance(results, answers)
    if answers is not None:
        notes.append(
            "A hypothesis is answered by the metric of its cell minus that of the other side, paired by "
            'seed, over the n seeds that have both. "supported" and "contradicted" say that '
            f"{EXCLUDES_ZERO} on the expected side, or on the other; {NOT_EQUAL}. p (Holm) is the two-sided "
            "paired t-test, adjusted for all hypotheses of this sweep; the intervals are not adjusted."
        )
    return notes


def _notes_on_sameness(results: Results, answers: pd.DataFrame | None) -> list[str]:
    """Note on values that are the same with every seed: no interval, no p; empty without any."""
    notes, fixed = [], []
    names = {spec.key: spec.name for spec in results.metrics if spec.shown >= Shown.DIFFERENCES}
    summary = results.summary.reset_index()
    summary = summary[summary["metric"].isin(list(names))]
    for cell, metrics in summary[summary["std"] == 0].groupby("cell", sort=False)["metric"]:
        fixed.append(f"{cell} ({', '.join(map(names.get, metrics))})")
    if fixed:
        notes.append(
            f"The same number with every seed: {'; '.join(fixed)}. There ± 0 is no certainty: either the "
            "seed does not change that number, or a few images came out alike by chance. Its mean has no "
            "interval."
        )
    if SAME in (*summary["verdict"], *(() if answers is None else answers["verdict"])):
        notes.append(
            f'"{SAME}" says that a difference is one number, to rounding, with every seed run: nothing in '
            "it varied, so it has no interval and no p, and Holm's adjustment leaves it out."
        )
    return notes


def _notes_on_provenance(results: Results, answers: pd.DataFrame | None) -> list[str]:
    """Which runs are not paired, and why; empty where all that could be are."""
    compared = [(cell, results.baseline) for cell in results.compared]
    compared += [] if answers is None else zip(answers["cell"], answers["against"], strict=True)
    left_out = [
        f"{cell} and {other}, seed {seed} ({', '.join(kinds)})"
        for cell, other in dict.fromkeys(compared)
        for seed, kinds in results.left_out(cell, other).items()
    ]
    if not left_out:
        return []
    return [
        "A difference is over runs of one provenance, of both cells: the same code, libraries, data and "
        "weights, tested on the same images; where there are several, that of the most seeds. Left out, with "
        "what is not the same: "
        f"{'; '.join(left_out)}. Means are over all finished runs, these too."
    ]


def _outcome(results: Results, metric: str) -> str:
    """Numbers of better, worse and undecided comparisons of a metric; empty where none has an interval."""
    found = results.summary.xs(metric, level="metric")
    counts, decided = Counter(found["verdict"]), found["p_holm"].dropna()
    texts = []
    if len(decided):
        each = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("better", "worse", UNDECIDED))
        sure = f"{(decided < ALPHA).sum()} of {len(decided)} differ after Holm's adjustment (p < {ALPHA})"
        texts = [f"{each} by 95 % interval", sure]
    return "; ".join([*texts, *([f"{counts[SAME]} {SAME}"] if counts[SAME] else [])])


def _seeds(results: Results) -> str:
    every = sorted({seed for runs in results.cells.values() for seed in runs})
    others = [cell for cell in results.finished if list(results.cells[cell]) != every]
    fewer = [f"{cell}: {', '.join(map(str, results.cells[cell]))}" for cell in others]
    return ", ".join(map(str, every)) + (f" (only some in {'; '.join(fewer)})" if fewer else "")


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
