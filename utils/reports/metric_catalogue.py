"""What runs of a kind are compared by: the one place that knows how a number is called, shown and judged.

    kind = kind_of(result)                      # of a result.json
    kind.quantities["final"].heading            # "A_N (%)"

A `result.json` says its kind under "kind"; without it, it is of a class-incremental run. A new kind is one entry in
`KINDS`. Reports (`utils/reports/report.py`) compute and draw the same for every kind.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from utils.errors import UserError

KIND = "kind"
COSTS = (
    "parameters_adapters",
    "parameters_stored",
    "seconds",
    "peak_memory_mb",
)  # beside the metrics of any kind
UNLISTED_DECIMALS = 3  # of a metric without an entry
BARS, DIFFERENCES, CURVES, TRADE_OFF = (
    "bars.png",
    "differences.png",
    "curves.png",
    "plasticity_forgetting.png",
)


class Quantity(NamedTuple):
    """How a number is shown: heading, decimals, what it is divided by, and whether equal values need a ± 0.

    compared: what tables of differences from a baseline call it; "" where it is in none.
    in_main: whether the table of means has a column for it.
    """

    heading: str
    decimals: int = 2
    unit: float = 1.0
    spread: bool = True
    compared: str = ""
    lower_is_better: bool = False
    in_main: bool = True


class Panel(NamedTuple):
    """A panel of the figure of differences: its title, and the unit of the difference."""

    title: str
    unit: str = "points"


class Kind(NamedTuple):
    """The numbers of a kind of run.

    Attributes:
        main: the metric that every result must have: drawn as bars, and what "best" means.
        main_name: what sentences call it.
        bars: title and axis of the figure of bars.
        metrics: names of all numbers that a run of the kind may have in its "metrics".
        needed: parts of a result.json, with their types.
        quantities: of tables, in their order.
        panels: quantities whose differences are drawn.
        captions: file name -> what stands below a figure.
        notes: how to read the numbers, sentence by sentence.
        pairing: what two runs with the same seed have in common.
    """

    main: str
    main_name: str
    bars: tuple[str, str]
    metrics: tuple[str, ...]
    needed: dict[str, type]
    quantities: dict[str, Quantity]
    panels: dict[str, Panel]
    captions: dict[str, str]
    notes: tuple[str, ...]
    pairing: str

    @property
    def compared(self) -> dict[str, str]:
        """The quantities of tables of differences, and what they are called there."""
        return {name: quantity.compared for name, quantity in self.quantities.items() if quantity.compared}

    @property
    def names(self) -> tuple[str, ...]:
        """Every number of a run by name: what a hypothesis may be about."""
        return (*self.metrics, *COSTS)

    def quantity(self, metric: str) -> Quantity:
        """How a metric is shown; one without an entry by its name."""
        return self.quantities.get(metric, Quantity(metric, UNLISTED_DECIMALS))

    def lower_is_better(self, metric: str) -> bool:
        """Whether a smaller value is the better one."""
        return metric in self.quantities and self.quantities[metric].lower_is_better


COST = {
    "parameters_stored": Quantity("stored parameters", 0, spread=False),
    "seconds": Quantity("minutes a run", 1, unit=60.0),
    "peak_memory_mb": Quantity("peak memory (MB)", 0, in_main=False),
}

CLASS_INCREMENTAL = Kind(
    main="final",
    main_name="A_N",
    bars=("Final accuracy A_N (%)", "accuracy over all classes after the last task (%)"),
    metrics=("final", "average", "forgetting", "bwt", "plasticity", "expansions"),
    needed={"metrics": dict, "curve": list, "parameters": dict, "weights": dict, "cost": dict},
    quantities={
        "final": Quantity("A_N (%)", compared="A_N"),
        "average": Quantity("average (%)", compared="average"),
        "forgetting": Quantity("forgetting (points)", compared="forgetting", lower_is_better=True),
        "bwt": Quantity("BWT (points)", in_main=False),
        "plasticity": Quantity("plasticity (%)", compared="plasticity"),
        "expansions": Quantity("adapters added", 1, spread=False),
        "parameters_adapters": Quantity("adapter parameters", 0, spread=False),
        **COST,
    },
    panels={
        "final": Panel("A_N: right of zero is better"),
        "forgetting": Panel("forgetting: left of zero is better"),
    },
    captions={
        BARS: "Final accuracy A_N of every cell: the bar ends at the mean, the whiskers show ± std, dots are seeds.",
        DIFFERENCES: "Difference of A_N and of forgetting from the baseline, paired by seed, with its 95 % interval. "
        "Where the interval holds zero the seeds do not decide. Cells with another number of tasks are in the tables "
        "alone.",
        CURVES: "Accuracy over all classes seen so far, after each task: mean over seeds, band ± std. A dashed line is "
        "a cell that learned all classes in one task.",
        TRADE_OFF: "How well each task is learned (plasticity) against how much of it is lost later (forgetting). "
        "Better is right and down.",
    },
    notes=(
        "A_N is the accuracy over all classes after the last task; average is the mean of the accuracy over all "
        "classes seen, taken after every task; forgetting is how far each earlier task fell from its best, lower is "
        "better; plasticity is the accuracy on each task just after learning it.",
    ),
    pairing="the same class order and the same images",
)

GRIDS = Kind(
    main="unseen_iou",
    main_name="IoU on unseen compositions",
    bars=("IoU on unseen compositions, zero-shot (%)", "IoU on compositions longer than any in training (%)"),
    metrics=(
        "train_iou",
        "train_solved",
        "held_out_iou",
        "held_out_solved",
        "unseen_iou",
        "unseen_solved",
        "cka_shared",
        "cka_other",
        "grassmann_shared",
        "grassmann_other",
        "grassmann_gap",
        "grassmann_chance",
        "probe_train",
        "probe_held_out",
        "probe_unseen",
        "hidden_alignment",
        "hidden_chance",
        "hidden_aligned",
        "unit_alignment",
        "unit_chance",
        "unit_aligned",
        "few_shot_before",
        "few_shot_after",
        "few_shot_steps",
        "few_shot_reached",
    ),
    needed={"metrics": dict, "parameters": dict, "weights": dict, "cost": dict},
    quantities={
        "train_iou": Quantity("IoU, met (%)"),
        "held_out_iou": Quantity("IoU, held-out pairs (%)", compared="IoU on held-out pairs"),
        "unseen_iou": Quantity("IoU, unseen (%)", compared="IoU on unseen compositions"),
        "unseen_solved": Quantity("solved, unseen (%)"),
        "grassmann_shared": Quantity(
            "distance, sharing tasks",
            3,
            compared="distance of tasks that share a primitive",
            lower_is_better=True,
        ),
        "grassmann_other": Quantity("distance, other tasks", 3),
        "grassmann_gap": Quantity("distance, other less sharing", 3, in_main=False),
        "unit_alignment": Quantity("best |r| of z", 3, compared="best |r| of the sparse code"),
        "unit_chance": Quantity("best |r| of z by chance", 3, in_main=False),
        "hidden_alignment": Quantity("best |r| of h", 3),
        "probe_unseen": Quantity("probes on unseen (%)"),
        "few_shot_after": Quantity("few-shot IoU (%)", compared="few-shot IoU"),
        "few_shot_steps": Quantity("few-shot steps", 1, compared="few-shot steps", lower_is_better=True),
        "few_shot_reached": Quantity("few-shot reached (%)", 1),
        **COST,
    },
    panels={
        "grassmann_shared": Panel("distance of sharing tasks: left is better", "radians"),
        "unseen_iou": Panel("IoU, unseen: right is better"),
        "few_shot_steps": Panel("few-shot steps: left is better", "steps"),
    },
    captions={
        BARS: "IoU on compositions longer than any in training, without adaptation: the bar ends at the mean, the "
        "whiskers show ± std, dots are seeds.",
        DIFFERENCES: "Difference from the baseline in the distance of tasks that share a primitive, in the IoU on "
        "unseen compositions, and in the steps that few-shot adaptation takes, paired by seed, with its 95 % interval. "
        "Where the interval holds zero the seeds do not decide.",
    },
    notes=(
        "IoU is |cells that are filled and right| / |cells that are filled in either grid|, mean over new grids: of "
        "compositions met in training, of pairs of primitives that training never combines, and of unseen "
        "compositions longer than any in training. A grid is solved when all its cells are right.",
        "Distance is the Grassmann distance (radians) between the subspaces of two tasks in the bottleneck h. A task "
        "is a set of primitives, its subspace the first principal directions of new samples; mean over pairs of tasks "
        "that have a primitive in common, and over those that have none.",
        "Best |r| is the largest correlation of a single unit with a primitive, mean over primitives: of the sparse "
        "code z, and of the bottleneck h; by chance it stays below the given value with probability 0.95. Probes are "
        "linear maps from h to the primitives, fitted on compositions of training, read on unseen ones: mean average "
        "precision.",
        "Few-shot steps are those of adapters at the bottleneck on a few samples of an unseen composition until its "
        "IoU on others reaches the target; a task that does not reach it counts all its steps.",
    ),
    pairing="the same compositions in every split and the same grids",
)

KINDS = {"class_incremental": CLASS_INCREMENTAL, "grids": GRIDS}


def kind_of(result: Mapping[str, Any]) -> Kind:
    """The kind of run that a result.json is of.

    Raises:
        UserError: it names a kind that is not known.
    """
    name = result.get(KIND, "class_incremental")
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(
            f"a result.json is of kind {name!r}; allowed: {', '.join(KINDS)}; run it again with this program"
        )
    return KINDS[name]
