"""Metrics of a run on grids: name, unit, meaning and direction of each (`utils/metric_catalogue.py`)."""

from functools import partial

from utils.metric_catalogue import MetricSpec, Shown

MEANS, DIFFERENCES, FIGURES = Shown.MEANS, Shown.DIFFERENCES, Shown.FIGURES
IOU = "|cells filled and right| / |cells filled in either grid|"
SOLVED = "grids with every cell right"
DISTANCE = "Grassmann distance between two tasks' principal subspaces of h, mean over pairs"
CKA = "linear CKA between two tasks in h on the same grids, mean over pairs"
PROBE = "mean average precision of linear maps from h to the primitives, fitted on training compositions"
ALIGNMENT = "largest correlation of a unit of {} with a primitive, mean over primitives"
CHANCE = "95 % quantile of the same for permuted primitives"
ALIGNED = "primitives whose best unit of {} is beyond chance"
STEPS = "steps of adapters at the bottleneck until the target IoU, all steps where it is not reached"
REACHED = "compositions that reach the target"
ADAPTED = "IoU on unseen compositions, mean over those that adapters learn,"
_percent = partial(MetricSpec, unit="%")
_angle = partial(MetricSpec, unit="radians", digits=3)
_ratio = partial(MetricSpec, unit="", digits=3)

GRIDS = (
    _percent("unseen_iou", "unseen IoU", meaning=f"{IOU}, on compositions of unseen length", shown=FIGURES),
    _percent("unseen_solved", "unseen solved", meaning=SOLVED, shown=MEANS),
    _percent("held_out_iou", "held-out IoU", meaning="IoU on pairs absent from training", shown=DIFFERENCES),
    _percent("held_out_solved", "held-out solved", meaning=SOLVED),
    _percent("train_iou", "training IoU", meaning="IoU on new grids of training compositions", shown=MEANS),
    _percent("train_solved", "training solved", meaning=SOLVED),
    _angle(
        "grassmann_shared",
        "distance of sharing tasks",
        meaning=f"{DISTANCE} that share a primitive",
        lower_is_better=True,
        shown=FIGURES,
    ),
    _angle("grassmann_other", "distance of other tasks", meaning="of pairs that share none", shown=MEANS),
    _angle("grassmann_gap", "distance of other less sharing tasks", meaning="difference of these two"),
    _angle("grassmann_chance", "distance of random subspaces", meaning="of as many dimensions in h"),
    _ratio("cka_shared", "CKA of sharing tasks", meaning=f"{CKA} that share a primitive"),
    _ratio("cka_other", "CKA of other tasks", meaning="of pairs that share none"),
    _ratio("unit_alignment", "best |r| of z", meaning=ALIGNMENT.format("the code z"), shown=DIFFERENCES),
    _ratio("unit_chance", "best |r| of z by chance", meaning=CHANCE),
    _percent("unit_aligned", "primitives aligned with z", meaning=ALIGNED.format("z")),
    _ratio("hidden_alignment", "best |r| of h", meaning=ALIGNMENT.format("the bottleneck h"), shown=MEANS),
    _ratio("hidden_chance", "best |r| of h by chance", meaning=CHANCE),
    _percent("hidden_aligned", "primitives aligned with h", meaning=ALIGNED.format("h")),
    _percent("probe_unseen", "probes on unseen", meaning=f"{PROBE}, read on unseen ones", shown=MEANS),
    _percent("probe_held_out", "probes on held-out pairs", meaning="the same, read on held-out pairs"),
    _percent("probe_train", "probes on training", meaning="the same, read on new training grids"),
    _percent("few_shot_before", "IoU before few-shot", meaning=f"{ADAPTED} before"),
    _percent("few_shot_after", "few-shot IoU", meaning=f"{ADAPTED} after", shown=DIFFERENCES),
    _ratio("few_shot_steps", "few-shot steps", meaning=STEPS, digits=1, lower_is_better=True, shown=FIGURES),
    _percent("few_shot_reached", "few-shot reached", meaning=REACHED, digits=1, shown=MEANS),
)
