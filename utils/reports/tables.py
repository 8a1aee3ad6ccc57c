"""What a sweep's report says in words and tables, as texts that no format has touched yet.

    table = main_table(cells)
    table.rows[0][2]               # Entry("44.39 ± 1.20", strong=True): the best mean of its column

`utils/reports/report.py` writes them as Markdown and as HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from utils.reports.cells import Cell, best_cells
from utils.reports.hypotheses import CONTRADICTED, SUPPORTED, Answer
from utils.reports.metric_catalogue import Quantity
from utils.reports.stats import SAME, Estimate

ABSENT = "–"
ALPHA = 0.05  # p values below it are counted as differences
TONES = {SUPPORTED: "better", CONTRADICTED: "worse"}


class Entry(NamedTuple):
    """One field of a table; tone is "better", "worse" or nothing."""

    text: str
    strong: bool = False
    tone: str = ""


class Table(NamedTuple):
    """A table whose first column names its rows; caption and note may be empty."""

    caption: str
    headings: list[str]
    rows: list[list[Entry]]
    note: str = ""


def main_table(cells: Sequence[Cell]) -> Table:
    """A row for each cell: n, then mean ± std of each quantity over seeds; the best of what is compared is strong.

    Where fewer runs than n have a number, it says how many.
    """
    kind = cells[0].kind
    shown = {quantity: column for quantity, column in kind.quantities.items() if column.in_main}
    best = {metric: best_cells(cells, metric) for metric in kind.compared}
    rows = []
    for cell in cells:
        entries = [Entry(cell.name), Entry(str(len(cell.results)))]
        for quantity, column in shown.items():
            estimate = cell.estimates.get(quantity)
            text = _mean_std(estimate, column)
            text += f" (n = {estimate.n})" if estimate and estimate.n < len(cell.results) else ""
            entries.append(Entry(text, strong=cell.name in best.get(quantity, ())))
        rows.append(entries)
    return Table("", ["cell", "n", *(column.heading for column in shown.values())], rows)


def difference_tables(cells: Sequence[Cell], baseline: str | None) -> list[Table]:
    """A table for each compared metric that some cell shares with the baseline; none without a baseline."""
    reference = next((cell for cell in cells if cell.name == baseline), None)
    if reference is None:
        return []
    headings = ["cell", "n", "difference", "95 % interval", "p (t)", "p (Holm)", "p (Wilcoxon)", "result"]
    tables, kind = [], reference.kind
    for metric, name in kind.compared.items():
        others = [cell for cell in cells if cell is not reference]
        rows = [_difference_row(cell, metric) for cell in others if metric in cell.comparisons]
        if rows:
            level = _mean_std(reference.estimates[metric], kind.quantities[metric])
            caption = f"{name}, {'lower' if kind.lower_is_better(metric) else 'higher'} is better; baseline: {level}"
            left_out = [f"{c.name} ({_why_not(c, reference)})" for c in others if metric not in c.comparisons]
            note = f"Not compared: {'; '.join(left_out)}." if left_out else ""
            tables.append(Table(caption, headings, rows, note))
    return tables


def hypotheses_table(answers: Sequence[Answer]) -> Table:
    """A row for each hypothesis: what it says, the verdict and its number, and what is compared on both sides."""
    headings = [
        "hypothesis",
        "verdict",
        "difference",
        "95 % interval",
        "n",
        "p (Holm)",
        "compared",
        "cell",
        "against",
    ]
    rows = []
    for answer in answers:
        tone = TONES.get(answer.verdict, "")
        difference, limits = answer.difference_text
        rows.append(
            [
                Entry(f"{answer.name}: {answer.hypothesis.says}"),
                Entry(answer.verdict, bool(tone), tone),
                Entry(difference or ABSENT, bool(tone), tone),
                Entry(limits or ABSENT),
                Entry(str(len(answer.pairs))),
                Entry(_p(answer.p_holm)),
                Entry(answer.comparison),
                *(Entry(_mean_std(estimate, answer.quantity)) for estimate in answer.estimates),
            ]
        )
    missing = [f"{answer.name} ({answer.missing})" for answer in answers if answer.missing]
    note = f"No number: {'; '.join(missing)}." if missing else ""
    return Table("", headings, rows, note)


def runs_table(cells: Sequence[Cell]) -> Table:
    """A row for each finished run."""
    rows, columns = [], cells[0].kind.quantities
    for cell in cells:
        for seed, values in cell.quantities.items():
            entries = [Entry(cell.name), Entry(str(seed))]
            for quantity, column in columns.items():
                value = values[quantity]
                decimals = 0 if quantity == "expansions" else column.decimals
                entries.append(Entry(ABSENT if value is None else f"{value / column.unit:,.{decimals}f}"))
            rows.append(entries)
    return Table("", ["cell", "seed", *(column.heading for column in columns.values())], rows)


def facts(
    cells: Sequence[Cell], baseline: str | None, unfinished: Mapping[str, str]
) -> list[tuple[str, str]]:
    """What was compared, on what, and what came out: (name, text) pairs."""
    finished, kind = [cell for cell in cells if cell.results], cells[0].kind
    runs = sum(len(cell.results) for cell in cells)
    found = [("Cells", str(len(cells)) + _in_brackets(len(cells) - len(finished), "without a finished run"))]
    found.append(("Finished runs", str(runs) + _in_brackets(len(unfinished), "not finished")))
    found += [("Seeds", _seeds(finished)), ("Tasks", _tasks(finished))]
    found += [("Weights", text) for text in _weights(finished)]
    best = [cell for cell in cells if cell.name in best_cells(cells, kind.main)]
    if best:
        names, estimate = ", ".join(cell.name for cell in best), best[0].estimates[kind.main]
        level = _mean_std(estimate, kind.quantities[kind.main])
        found.append((f"Best mean {kind.main_name}", f"{names}, {level} (n = {estimate.n})"))
    if baseline is not None:
        found.append(("Baseline", baseline))
        found += [
            (f"{kind.compared[metric]} against the baseline", text)
            for metric in kind.panels
            if (text := _outcome(cells, metric))
        ]
    return found


def reading_notes(cells: Sequence[Cell], baseline: str | None, answers: Sequence[Answer] = ()) -> list[str]:
    """How to read the report, sentence by sentence; only what this report has."""
    notes = [
        "A cell is one configuration, run once with each seed. Numbers are mean ± std over its n finished runs (std "
        "with ddof 1; a single run has none). The best mean of a column is bold.",
        *cells[0].kind.notes,
    ]
    single = [cell.name for cell in cells if cell.tasks == 1]
    if single and any(cell.tasks > 1 for cell in cells):
        notes.append(
            f"{', '.join(single)}: all classes were learned in one task. That is a bound for the others, not a method "
            "beside them: nothing can be forgotten, average and plasticity are A_N, and it is never bold."
        )
    if baseline is not None:
        notes += [
            "Differences are the cell's value minus the baseline's, paired by seed: the same seed means "
            f'{cells[0].kind.pairing}. "better" and "worse" say that the 95 % interval of the mean difference '
            '(Student\'s t) excludes zero; "undecided" does not mean equal, it means that these seeds do not tell.',
            "p (t) is the two-sided paired t-test. p (Holm) is the same, adjusted for all comparisons of that metric "
            "in this report; the intervals are not adjusted. p (Wilcoxon) is the exact signed-rank test, which "
            "supposes no normal distribution; with n seeds it cannot be below 2 / 2^n, 0.0625 for five.",
        ]
    notes += _notes_on_sameness(cells, answers)
    notes += _notes_on_provenance(cells, baseline, answers)
    if answers:
        notes.append(
            "A hypothesis is answered by the metric of its cell minus that of the other side, paired by seed, over the "
            'n seeds that have both. "supported" and "contradicted" say that the 95 % interval of the mean difference '
            "(Student's t) excludes zero on the expected side, or on the other; "
            '"undecided" does not mean equal, it means that these seeds do not tell. p (Holm) is the two-sided paired '
            "t-test, adjusted for all hypotheses of this sweep; the intervals are not adjusted."
        )
    return notes


def _notes_on_sameness(cells: Sequence[Cell], answers: Sequence[Answer]) -> list[str]:
    """Why numbers and differences that no seed changes have no interval and no p; nothing where there are none."""
    notes, names = [], cells[0].kind.compared
    fixed = {
        cell.name: [names[m] for m in names if m in cell.estimates and cell.estimates[m].same]
        for cell in cells
    }
    listed = "; ".join(f"{name} ({', '.join(metrics)})" for name, metrics in fixed.items() if metrics)
    if listed:
        notes.append(
            f"The same number with every seed: {listed}. There ± 0 is no certainty: the seed does not reach that "
            "number, so several runs say no more than one, and its mean has no interval."
        )
    verdicts = [comparison.verdict for cell in cells for comparison in cell.comparisons.values()]
    if SAME in (*verdicts, *(answer.verdict for answer in answers)):
        notes.append(
            f'"{SAME}" says that a difference is one number, to rounding, whatever the seed: nothing in it varies by '
            "chance, so there is nothing to test, no interval and no p, and Holm's adjustment leaves it out."
        )
    return notes


def _notes_on_provenance(cells: Sequence[Cell], baseline: str | None, answers: Sequence[Answer]) -> list[str]:
    """Which runs are not paired, and why; nothing where all that could be are."""
    by_name = {cell.name: cell for cell in cells}
    compared = [(cell.name, baseline) for cell in cells if baseline in by_name and cell.name != baseline]
    compared += [(cell, other) for answer in answers for (cell, _), (other, _) in [answer.hypothesis.sides]]
    left_out = [
        f"{cell} and {other}, seed {seed} ({', '.join(kinds)})"
        for cell, other in dict.fromkeys(compared)
        for seed, kinds in by_name[cell].left_out(by_name[other]).items()
    ]
    if not left_out:
        return []
    return [
        "A difference is over runs of one provenance, of both cells: the same code, libraries, data and weights; where "
        "there are several, that of the most seeds. Left out, with what is not the same: "
        f"{'; '.join(left_out)}. Means are over all finished runs, these too."
    ]


def _difference_row(cell: Cell, metric: str) -> list[Entry]:
    comparison = cell.comparisons[metric]
    paired = comparison.paired
    strong = paired.excludes_zero
    tone = comparison.verdict if strong else ""
    decimals = max(2, cell.kind.quantities[metric].decimals)
    limits = ABSENT if paired.low is None else f"{paired.low:+.{decimals}f} to {paired.high:+.{decimals}f}"
    return [
        Entry(cell.name),
        Entry(str(paired.n)),
        Entry(f"{paired.mean:+.{decimals}f}", strong, tone),
        Entry(limits),
        *(Entry(_p(p)) for p in (paired.p_t, comparison.p_holm, paired.p_wilcoxon)),
        Entry(comparison.verdict, strong, tone),
    ]


def _why_not(cell: Cell, reference: Cell) -> str:
    """Why a cell is not compared with the baseline."""
    if not cell.results:
        return "no finished run"
    common = cell.results.keys() & reference.results.keys()
    if not common:
        return "no seed in common"
    if common <= cell.left_out(reference).keys():
        return "no two runs of the same provenance"
    return "another number of tasks"


def _outcome(cells: Sequence[Cell], metric: str) -> str:
    """How the comparisons of a metric ended, in numbers; empty without comparisons that have an interval."""
    found = [cell.comparisons[metric] for cell in cells if metric in cell.comparisons]
    decided = [comparison for comparison in found if comparison.p_holm is not None]
    same = sum(comparison.verdict == SAME for comparison in found)
    untested = f"{same} {SAME}" if same else ""
    if not decided:
        return untested
    counts = [
        f"{sum(c.verdict == verdict for c in decided)} {verdict}"
        for verdict in ("better", "worse", "undecided")
    ]
    sure = sum(comparison.p_holm < ALPHA for comparison in decided)
    holm = f"{sure} of {len(decided)} differ after Holm's adjustment (p < {ALPHA})"
    return "; ".join(filter(None, [f"{', '.join(counts)} by 95 % interval", holm, untested]))


def _seeds(cells: Sequence[Cell]) -> str:
    every = sorted({seed for cell in cells for seed in cell.results})
    fewer = [f"{c.name}: {', '.join(map(str, c.results))}" for c in cells if list(c.results) != every]
    return ", ".join(map(str, every)) + (f" (only some in {'; '.join(fewer)})" if fewer else "")


def _tasks(cells: Sequence[Cell]) -> str:
    """The number of tasks of most cells, and those that have another."""
    numbers = [cell.tasks for cell in cells]
    usual = max(numbers, key=numbers.count)
    others = [f"{cell.name}: {cell.tasks}" for cell in cells if cell.tasks != usual]
    return str(usual) + (f" ({'; '.join(others)})" if others else "")


def _weights(cells: Sequence[Cell]) -> list[str]:
    """A text for each weight tag with its note, and with its cells where there are several tags."""
    users: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for result in cell.results.values():
            key = (
                str(result["weights"].get("tag") or "not recorded"),
                str(result["weights"].get("note") or ""),
            )
            users.setdefault(key, [])
            if cell.name not in users[key]:
                users[key].append(cell.name)
    texts = []
    for (tag, note), names in users.items():
        about = [note] if note else []
        about += [f"in {', '.join(names)}"] if len(users) > 1 else []
        texts.append(": ".join([tag, "; ".join(about)]) if about else tag)
    return texts


def _mean_std(estimate: Estimate | None, column: Quantity) -> str:
    if estimate is None:
        return ABSENT
    spread = estimate.std is not None and (column.spread or estimate.std > 0)
    whole = not spread and (estimate.mean / column.unit).is_integer() and not column.spread
    parts = [estimate.mean, estimate.std] if spread else [estimate.mean]
    return " ± ".join(f"{part / column.unit:,.{0 if whole else column.decimals}f}" for part in parts)


def _p(p: float | None) -> str:
    if p is None:
        return ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _in_brackets(number: int, text: str) -> str:
    return f" ({number} {text})" if number else ""
