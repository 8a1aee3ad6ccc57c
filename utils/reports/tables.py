"""Tables of a sweep's report, with plain texts that its templates escape.

table = means_table(results)
table.rows[0][2]               # Entry("44.39 ± 1.20", strong=True): the best mean of its column
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from utils.metric_catalogue import ABSENT, MetricSpec, Shown
from utils.reports.answers import CONTRADICTED, SUPPORTED, comparison
from utils.reports.results import OTHER_IMAGES, Results

TONES = {"better": "better", "worse": "worse", SUPPORTED: "better", CONTRADICTED: "worse"}  # of verdicts


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


def plain_table(headings: Sequence[str], rows: Iterable[Iterable[Any]], note: str = "") -> Table:
    """A table of plain texts, its first column the names of the rows."""
    return Table("", list(headings), [[Entry(str(value)) for value in row] for row in rows], note)


def frame_table(frame: pd.DataFrame, note: str = "") -> Table:
    """A table of a frame with a named index, which comes first."""
    return plain_table([frame.index.name, *map(str, frame.columns)], frame.itertuples(name=None), note)


def means_table(results: Results, place: Shown = Shown.MEANS) -> Table:
    """A row per cell: n, then mean ± std of each metric over seeds; the best of a compared metric is strong.

    If fewer than n runs have a number, their number follows. A metric that no run has is left out.
    """
    shown = measured(results, place)
    best = {spec.key: results.best(spec.key) for spec in shown if spec.shown >= Shown.DIFFERENCES}
    rows = []
    for cell, runs in results.cells.items():
        row = [Entry(cell), Entry(str(len(runs)))]
        for spec in shown:
            found = results.summary.loc[cell, spec.key]
            fewer = f" (n = {found['n']})" if 0 < found["n"] < len(runs) else ""
            text = spec.text(found["mean"], found["std"]) + fewer
            row.append(Entry(text, strong=cell in best.get(spec.key, ())))
        rows.append(row)
    return Table("", ["cell", "n", *(spec.heading for spec in shown)], rows)


def difference_tables(results: Results) -> list[Table]:
    """A table per compared metric that some cell shares with the baseline; none without a baseline."""
    headings = ["cell", "n", "difference", "95 % interval", "p (t)", "p (Holm)", "p (Wilcoxon)", "result"]
    tables = []
    for spec in _shown(results, Shown.DIFFERENCES):
        found = results.summary.xs(spec.key, level="metric").loc[results.compared]
        compared = found.dropna(subset="paired_n")
        if compared.empty:
            continue
        rows = []
        for cell, row in compared.to_dict("index").items():
            difference, verdict = _toned([spec.difference_text(row["difference"]), row["verdict"]], row)
            interval = spec.difference_text(row["difference_low95"], row["difference_high95"])
            p_values = [_p(row[key]) for key in ("p_t", "p_holm", "p_wilcoxon")]
            plain = map(Entry, [interval, *p_values])
            rows.append([Entry(cell), Entry(str(row["paired_n"])), difference, *plain, verdict])
        level = results.summary.loc[results.baseline, spec.key]
        baseline = spec.text(level["mean"], level["std"])
        caption = f"{spec.name}, {spec.better} is better; baseline: {baseline}"
        others = found.index.difference(compared.index, sort=False)
        tables.append(Table(caption, headings, rows, not_compared(results, others)))
    return tables


def hypotheses_table(answers: pd.DataFrame, results: Results) -> Table:
    """A row per hypothesis: what it says, the verdict and its number, and what is compared on both sides."""
    headings = ["hypothesis", "verdict", "difference", "95 % interval", "n", "p (Holm)", "compared"]
    rows, missing = [], []
    for answer in answers.to_dict("records"):
        spec = results.spec(answer["metric"])
        texts = [
            spec.difference_text(answer["difference_low95"], answer["difference_high95"]),
            str(answer["n"]),
            _p(answer["p_holm"]),
            comparison(answer, results),
            spec.text(answer["mean"], answer["std"]),
            spec.text(answer["against_mean"], answer["against_std"]),
        ]
        strong = _toned([answer["verdict"], spec.difference_text(answer["difference"])], answer)
        rows.append([Entry(f"{answer['hypothesis']}: {answer['says']}"), *strong, *map(Entry, texts)])
        if not answer["n"]:
            reason = _why_not_compared(results, answer["cell"], answer["against"])
            missing.append(f"{answer['hypothesis']} ({reason})")
    return Table("", [*headings, "cell", "against"], rows, _note("No number", missing))


def runs_table(results: Results) -> Table:
    """A row per finished run."""
    shown, runs = _shown(results, Shown.RUNS), results.runs.to_dict("index")
    rows = ([*run, *(spec.text(numbers[spec.key]) for spec in shown)] for run, numbers in runs.items())
    return plain_table(["cell", "seed", *(spec.heading for spec in shown)], rows)


def measured(results: Results, place: Shown) -> list[MetricSpec]:
    """The catalogue's metrics that are shown in a place and that some run has."""
    found = results.runs.columns[results.runs.notna().any()]
    return [spec for spec in _shown(results, place) if spec.key in found]


def _shown(results: Results, place: Shown) -> list[MetricSpec]:
    """The catalogue's metrics that are shown in a place."""
    return [spec for spec in map(results.spec, results.metric_keys) if spec.shown >= place]


def not_compared(results: Results, cells: Iterable[str]) -> str:
    """A sentence on why cells have no difference from the baseline; "" without a cell."""
    other = results.baseline
    return _note("Not compared", [f"{cell} ({_why_not_compared(results, cell, other)})" for cell in cells])


def _why_not_compared(results: Results, cell: str, other: str) -> str:
    """Reason for the missing difference of a number of two cells."""
    ours, theirs = results.cells[cell], results.cells[other]
    if not (ours and theirs):
        return f"no finished run of {other}" if ours else "no finished run"
    common = ours.keys() & theirs.keys()
    if not common:
        return "no seed in common"
    left_out = results.left_out(cell, other)
    if common <= left_out.keys():
        images = all(OTHER_IMAGES in left_out[seed] for seed in common)
        return "other test images" if images else "no two runs of the same provenance"
    if results.tasks(cell) != results.tasks(other):
        return "another number of tasks"
    if not results.same_tasks(cell, other):
        return "tasks of other sizes"
    return "no seed with a number of both"


def _toned(texts: Sequence[str], compared: Mapping[str, Any]) -> list[Entry]:
    """Fields about a comparison, in the tone of its verdict."""
    tone = TONES.get(compared["verdict"], "")
    return [Entry(text, bool(tone), tone) for text in texts]


def _note(what: str, of: Sequence[str]) -> str:
    return f"{what}: {'; '.join(of)}." if of else ""


def _p(p: float) -> str:
    if math.isnan(p):
        return ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"
