"""Hypotheses of a sweep: stated in its file before anything runs, answered with a number by what ran.

    "H1": {"says": "nesting raises the final accuracy", "cell": "nested", "metric": "final", "expected": "higher",
           "against": "matched adapter"}

    hypotheses, problems = read_hypotheses({"H1": {...}}, ["nested", "matched adapter"])
    answer(hypotheses, tabulate(runs, baseline))[0].verdict             # "supported"

A hypothesis is about a difference: the metric of `cell` minus that of `against`, or minus `against_metric`, paired by
seed, where both runs have the same provenance. The verdict follows from its 95 % interval:

    supported       the interval excludes zero on the expected side
    contradicted    it excludes zero on the other side
    undecided       it holds zero: these seeds do not tell
    one seed        a difference without an interval
    same in every seed   the difference is one number, which no seed changes: there is no interval
    no number       no seed has both sides
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from utils.config.loading import check_object, no_such
from utils.config.schema import Text
from utils.reports.cells import Cell
from utils.reports.metric_catalogue import Kind, Quantity
from utils.reports.stats import SAME, Estimate, Paired, holm, interval, paired

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
ONE_SEED, NO_NUMBER = "one seed", "no number"


class Hypothesis(BaseModel):
    """The keys of a hypothesis. Unknown keys are refused, types are strict, values frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    says: Text = Field(description="The statement, in words.")
    cell: Text = Field(description="Name of the cell it is about.")
    metric: Text = Field(description="What is measured, as a result.json calls it.")
    expected: Literal["higher", "lower"] = Field(description="How the cell's metric is expected to be.")
    against: Text | None = Field(
        None, description="Name of the other cell; the same one where it is left out."
    )
    against_metric: Text | None = Field(
        None, description="The other cell's metric; the same where it is left out."
    )

    @property
    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """(cell, metric) of the side the hypothesis is about, and of the other."""
        return (self.cell, self.metric), (self.against or self.cell, self.against_metric or self.metric)


@dataclass(frozen=True)
class Answer:
    """What a sweep says about a hypothesis.

    Attributes:
        name, hypothesis: as the sweep's file has them.
        quantity: how the metric is called and shown; its unit and decimals are those of both sides.
        other_heading: what the other side's metric is called.
        pairs: seed -> (value of the cell's side, of the other), for the seeds that have both.
        difference: the cell's side minus the other; None without pairs.
        p_holm: p of the paired t-test, adjusted over all hypotheses of the sweep; None where there is no p.
        verdict: "supported", "contradicted", "undecided", "one seed", `SAME` or "no number".
        missing: why there is no number; "" where there is one.
    """

    name: str
    hypothesis: Hypothesis
    quantity: Quantity
    other_heading: str
    pairs: Mapping[int, tuple[float, float]]
    difference: Paired | None
    p_holm: float | None
    verdict: str
    missing: str

    @property
    def estimates(self) -> tuple[Estimate | None, Estimate | None]:
        """Means of the cell's side and of the other over the seeds that have both."""
        if not self.pairs:
            return None, None
        ours, theirs = zip(*self.pairs.values(), strict=True)
        return interval(ours), interval(theirs)

    @property
    def comparison(self) -> str:
        """What is compared: `A_N (%), nested against matched adapter`."""
        (cell, metric), (other, other_metric) = self.hypothesis.sides
        if metric == other_metric:
            return f"{self.quantity.heading}, {cell} against {other}"
        if cell == other:
            return f"{self.quantity.heading} against {self.other_heading}, {cell}"
        return f"{self.quantity.heading}, {cell} against {self.other_heading}, {other}"

    @property
    def difference_text(self) -> tuple[str, str]:
        """The difference and its interval as they are shown; "" for what there is not."""
        if self.difference is None:
            return "", ""
        decimals, unit = max(2, self.quantity.decimals), self.quantity.unit
        mean, low, high = self.difference.mean, self.difference.low, self.difference.high
        limits = (
            ""
            if low is None or high is None
            else f"{low / unit:+.{decimals}f} to {high / unit:+.{decimals}f}"
        )
        return f"{mean / unit:+.{decimals}f}", limits


def read_hypotheses(
    given: Mapping[str, Mapping[str, Any]], cells: Sequence[str]
) -> tuple[dict[str, Hypothesis], list[str]]:
    """Check what a sweep file says under "hypotheses".

    Args:
        given: hypothesis name -> its keys and values.
        cells: names of the sweep's cells.

    Returns:
        The hypotheses by name, those with mistakes left out, and one sentence for each mistake.
    """
    hypotheses, problems = {}, []
    for name, values in given.items():
        checked = check_object(values, Hypothesis)
        found = [*checked.problems, *_conflicts(checked.sound, checked.faulty, cells)]
        problems += [f"hypothesis {_quoted(name)}: {problem}" for problem in found]
        if not name.strip():
            problems.append("hypotheses: a name is empty; allowed: any other text")
        if not found:
            hypotheses[name] = Hypothesis(**checked.sound)
    return hypotheses, problems


def unknown_metrics(hypotheses: Mapping[str, Hypothesis], kinds: Mapping[str, Kind]) -> Iterator[str]:
    """A sentence for each metric that no run of its cell has; kinds: cell name -> kind, of the cells that have one."""
    for name, hypothesis in hypotheses.items():
        (cell, metric), (other, _) = hypothesis.sides
        named = {"metric": (cell, metric), "against_metric": (other, hypothesis.against_metric)}
        for key, (its, given) in named.items():
            if its in kinds and given is not None and given not in kinds[its].names:
                problem = no_such("metric", given, kinds[its].names)
                yield f"hypothesis {_quoted(name)}: {key} = {_quoted(given)}: {problem}"


def answer(hypotheses: Mapping[str, Hypothesis], cells: Sequence[Cell]) -> list[Answer]:
    """Answer each hypothesis from the finished runs; all that have a p are the family of Holm's adjustment.

    Args:
        hypotheses: name -> hypothesis, about cells that there are.
        cells: every cell of the sweep, of one kind.
    """
    by_name, kind = {cell.name: cell for cell in cells}, cells[0].kind
    values = {}
    for name, hypothesis in hypotheses.items():
        (cell, metric), (other, other_metric) = hypothesis.sides
        values[name] = by_name[cell].sides(metric, by_name[other], other_metric)
    differences = {name: paired(ours, theirs) for name, (ours, theirs) in values.items()}
    adjusted = holm([difference and difference.p_t for difference in differences.values()])
    answers = []
    for (name, hypothesis), p_holm in zip(hypotheses.items(), adjusted, strict=True):
        (_, metric), (_, other_metric) = hypothesis.sides
        ours, theirs = values[name]
        answers.append(
            Answer(
                name=name,
                hypothesis=hypothesis,
                quantity=kind.quantity(metric),
                other_heading=kind.quantity(other_metric).heading,
                pairs={seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())},
                difference=differences[name],
                p_holm=p_holm,
                verdict=_verdict(differences[name], hypothesis.expected),
                missing="" if differences[name] else _why_no_number(hypothesis, by_name),
            )
        )
    return answers


def _conflicts(sound: Mapping[str, Any], faulty: set[str], cells: Sequence[str]) -> Iterator[str]:
    """What is wrong with values that are right one by one; keys already reported are left out."""
    for key in ("cell", "against"):
        if sound.get(key) is not None and cells and sound[key] not in cells:
            yield f"{key} = {_quoted(sound[key])}: {no_such('cell', sound[key], cells)}"
    if faulty.isdisjoint(("against", "against_metric")):
        other, other_metric = sound.get("against"), sound.get("against_metric")
        if other is None and other_metric is None:
            yield "against, against_metric: both are missing; allowed: at least one of them"
        elif {"cell", "metric"} <= sound.keys():
            cell, metric = sound["cell"], sound["metric"]
            if (other or cell, other_metric or metric) == (cell, metric):
                yield f"against, against_metric: {metric} of {cell} on both sides; allowed: another cell or metric"


def _verdict(difference: Paired | None, expected: str) -> str:
    if difference is None:
        return NO_NUMBER
    if difference.n == 1:
        return ONE_SEED
    if difference.same:
        return SAME
    if not difference.excludes_zero:
        return UNDECIDED
    return SUPPORTED if (difference.mean > 0) == (expected == "higher") else CONTRADICTED


def _why_no_number(hypothesis: Hypothesis, cells: Mapping[str, Cell]) -> str:
    """What is missing for a difference; the metrics there are, where one is not among them."""
    lacking: dict[str, list[str]] = {}
    for name, metric in dict.fromkeys(hypothesis.sides):
        cell = cells[name]
        if not cell.results:
            lacking.setdefault("has finished", []).append(name)
        elif metric not in cell.estimates:
            there = f"has a number {_quoted(metric)}, there are {', '.join(cell.estimates)}"
            lacking.setdefault(there, []).append(name)
    reasons = [f"no run of {' or '.join(map(_quoted, names))} {lack}" for lack, names in lacking.items()]
    if not reasons and cells[hypothesis.cell].left_out(cells[hypothesis.sides[1][0]]):
        return "no seed has both sides from runs of the same provenance"
    return "; ".join(reasons) or "no seed has both sides"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
