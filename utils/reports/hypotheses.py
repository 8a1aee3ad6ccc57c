"""Hypotheses of a sweep, stated in its file before anything runs, and their checks.

    "H1": {"says": "nesting raises the final accuracy", "cell": "nested", "metric": "final",
           "expected": "higher", "against": "matched adapter"}

    hypotheses, problems = read_hypotheses({"H1": {...}}, ["nested", "matched adapter"])

A hypothesis is about a difference: the metric of `cell` minus that of `against`, or minus `against_metric`,
paired by seed. `utils/reports/answers.py` answers it from the results.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from utils.config.loading import check_object
from utils.config.messages import no_such, shown
from utils.config.schema import Text
from utils.metric_catalogue import MetricSpec, by_key


class Hypothesis(BaseModel):
    """The keys of a hypothesis. Unknown keys are refused, types are strict, values frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    says: Text  # the statement, in words
    cell: Text  # name of the cell it is about
    metric: Text  # what is measured, as a result.json calls it
    expected: Literal["higher", "lower"]  # how the cell's metric is expected to be
    against: Text | None = None  # name of the other cell; the same one where it is left out
    against_metric: Text | None = None  # of the other cell; the same where it is left out

    @property
    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """(cell, metric) of the side the hypothesis is about, and of the other."""
        return (self.cell, self.metric), (self.against or self.cell, self.against_metric or self.metric)


def read_hypotheses(
    given: Mapping[str, Mapping[str, Any]], cells: Sequence[str]
) -> tuple[dict[str, Hypothesis], list[str]]:
    """The "hypotheses" of a sweep file by name, those with mistakes left out; a sentence for each mistake."""
    hypotheses, problems = {}, []
    for name, values in given.items():
        checked = check_object(values, Hypothesis)
        found = [*checked.problems, *_conflicts(checked.sound, checked.faulty, cells)]
        problems += [f"hypothesis {shown(name)}: {problem}" for problem in found]
        if not name.strip():
            problems.append("hypotheses: a name is empty; allowed: any other text")
        if not found:
            hypotheses[name] = Hypothesis(**checked.sound)
    return hypotheses, problems


def unknown_metrics(
    hypotheses: Mapping[str, Hypothesis], metrics: Mapping[str, Sequence[MetricSpec]]
) -> Iterator[str]:
    """A sentence for each metric that the method of its cell lacks; metrics: cell -> specs of its method."""
    for name, hypothesis in hypotheses.items():
        for key, (cell, metric) in zip(("metric", "against_metric"), hypothesis.sides, strict=True):
            known = list(by_key(metrics.get(cell, ())))
            if getattr(hypothesis, key) and cell in metrics and metric not in known:
                problem = no_such("metric", metric, known)
                yield f"hypothesis {shown(name)}: {key} = {shown(metric)}: {problem}"


def _conflicts(sound: Mapping[str, Any], faulty: set[str], cells: Sequence[str]) -> Iterator[str]:
    """Mistakes in the combination of values that are valid one by one; keys already reported are left out."""
    for key in ("cell", "against"):
        if sound.get(key) is not None and cells and sound[key] not in cells:
            yield f"{key} = {shown(sound[key])}: {no_such('cell', sound[key], cells)}"
    if faulty.isdisjoint(("against", "against_metric")):
        if sound.get("against") is None and sound.get("against_metric") is None:
            yield "against, against_metric: both are missing; allowed: at least one of them"
        elif {"cell", "metric"} <= sound.keys():
            (cell, metric), other = Hypothesis.model_construct(**sound).sides
            if (cell, metric) == other:
                both = f"{metric} of {cell} on both sides; allowed: another cell or metric"
                yield f"against, against_metric: {both}"
