"""Metric catalogue: name, unit, digits, better direction and definition of every number of a run.

    catalogue = by_key(config.metrics)      # the metrics of a method, then the costs of every run
    catalogue["final"].heading              # "A_N (%)"
    catalogue["seconds"].text(90.0)         # "1.5", of "wall-clock minutes"

A method's config class names its metrics (`RunConfig.metrics`), the main one first. Logs, CSV files, reports
and figures take names, units and directions from these specs alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

ABSENT = "–"


class Shown(IntEnum):
    """Places in reports that show a metric; each includes those before it."""

    RUNS = 0  # the table of all runs
    MEANS = 1  # the table of means over seeds
    CONSOLE = 2  # the same on the console, and for a paper
    DIFFERENCES = 3  # a table of differences from the baseline
    FIGURES = 4  # a panel in the figure of differences


@dataclass(frozen=True)
class MetricSpec:
    """One metric."""

    key: str  # its name in the "metrics" of a result.json, in CSV files and hypotheses
    name: str  # what sentences call it
    unit: str = ""  # of the value as it is shown
    meaning: str = ""  # its definition, a noun phrase
    digits: int = 2  # decimals shown
    lower_is_better: bool = False
    shown: Shown = Shown.RUNS  # where reports show it
    count: bool = False  # whether a run's value is an integer, shown without decimals
    scale: float = 1.0  # divisor of values where they are shown
    per_task: bool = False  # whether it is a list, a value per task, beside the "metrics" of a result.json

    @property
    def heading(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def definition(self) -> str:
        """Meaning and unit."""
        text = self.meaning or self.name
        return f"{text} ({self.unit})" if self.unit else text

    @property
    def difference_unit(self) -> str:
        """Unit of a difference of two values."""
        return "points" if self.unit == "%" else self.unit

    @property
    def better(self) -> str:
        """Direction in words: "lower" or "higher"."""
        return "lower" if self.lower_is_better else "higher"

    def text(self, mean: float, std: float = math.nan) -> str:
        """`mean` or `mean ± std` as it is shown; of a count without ± 0, and without decimals if integer."""
        if math.isnan(mean):
            return ABSENT
        if math.isnan(std) or (self.count and not std):
            whole = self.count and (mean / self.scale).is_integer()
            return f"{mean / self.scale:z,.{0 if whole else self.digits}f}"
        return f"{mean / self.scale:z,.{self.digits}f} ± {std / self.scale:,.{self.digits}f}"

    def difference_text(self, difference: float, high: float | None = None) -> str:
        """A signed difference, or `low to high` of its interval where both ends are given."""
        if math.isnan(difference):
            return ABSENT
        digits = max(2, self.digits)
        ends = [difference] if high is None else [difference, high]
        return " to ".join(f"{end / self.scale:+.{digits}f}" for end in ends)


THOUSANDS: dict[str, Any] = {"unit": "k", "digits": 1, "count": True, "scale": 1000.0}
COSTS = (  # of every run, beside the metrics of its method
    MetricSpec(
        "parameters_trained",
        "trained parameters",
        meaning="numbers that a gradient ever updated, in thousands",
        shown=Shown.CONSOLE,
        **THOUSANDS,
    ),
    MetricSpec(
        "parameters_stored",
        "stored parameters",
        meaning="numbers kept beside the backbone to predict and to learn on, in thousands",
        shown=Shown.CONSOLE,
        **THOUSANDS,
    ),
    MetricSpec("parameters_adapters", "adapter parameters", **THOUSANDS),
    MetricSpec(
        "seconds",
        "wall-clock minutes",
        meaning="time that a run took; runs at work at the same time share the machine, which lengthens each",
        digits=1,
        shown=Shown.MEANS,
        scale=60.0,
    ),
    MetricSpec("peak_memory_mb", "peak memory", "MiB", digits=0),
)
CLASS_INCREMENTAL = (
    MetricSpec("final", "A_N", "%", "accuracy over all classes after the last task", shown=Shown.FIGURES),
    MetricSpec(
        "average",
        "average",
        "%",
        "mean over tasks of the accuracy over all classes seen",
        shown=Shown.DIFFERENCES,
    ),
    MetricSpec(
        "forgetting",
        "forgetting",
        "points",
        "how far each earlier task fell from its best",
        lower_is_better=True,
        shown=Shown.FIGURES,
    ),
    MetricSpec(
        "bwt", "BWT", "points", "backward transfer, how each earlier task changed since it was learned"
    ),
    MetricSpec(
        "plasticity",
        "plasticity",
        "%",
        "accuracy on each task just after learning it",
        shown=Shown.DIFFERENCES,
    ),
    MetricSpec(
        "expansions",
        "adapters added",
        meaning="adapters, or prompt components, beyond those after the first task, over all blocks",
        digits=1,
        shown=Shown.MEANS,
        count=True,
    ),
    MetricSpec(
        "ece",
        "ECE",
        "points",
        "expected calibration error, |accuracy - confidence| over 15 bins of confidence",
        lower_is_better=True,
    ),
    MetricSpec(
        "nll",
        "NLL",
        "nats",
        "negative log-likelihood of the true class by calibrated scores",
        digits=3,
        lower_is_better=True,
    ),
    MetricSpec("curve", "accuracy", "%", "accuracy over all classes seen so far", per_task=True),
)
UNMEASURED = "expansions"  # does not depend on evaluated images
VALIDATION = tuple(  # the same on validation images, under other keys than on test images
    spec
    if spec.key == UNMEASURED
    else replace(
        spec,
        key=f"validation_{spec.key}",
        name=f"validation {spec.name}",
        meaning=f"validation {spec.meaning}" if spec.per_task else spec.meaning,
    )
    for spec in CLASS_INCREMENTAL
)


def keyed(images: str, key: str) -> str:
    """Key of a number measured on "test" or "validation" images: `final`, `validation_final`."""
    return key if images == "test" or key == UNMEASURED else f"{images}_{key}"


def by_key(metrics: Sequence[MetricSpec]) -> dict[str, MetricSpec]:
    """The single numbers of a run by key: a method's metrics, then `COSTS`."""
    return {spec.key: spec for spec in (*metrics, *COSTS) if not spec.per_task}
