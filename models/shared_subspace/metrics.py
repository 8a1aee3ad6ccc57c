"""Metrics of a run on grids: what its result is measured and compared by (`utils/metric_catalogue.py`)."""

from functools import partial

from utils.metric_catalogue import MetricSpec, Shown

MEANS, DIFFERENCES, FIGURES = Shown.MEANS, Shown.DIFFERENCES, Shown.FIGURES
IOU = "|cells filled and right| / |cells filled in either grid|"
DISTANCE = "Grassmann distance between two tasks' principal subspaces of h, mean over pairs"
PROBE = "mean average precision of linear maps from h to the primitives, fitted on training compositions"
ALIGNMENT = "largest correlation of a unit of the sparse code z with a primitive, mean over primitives"
STEPS = (
    "optimizer steps of adapters at the bottleneck until the target IoU, all steps where it is not reached"
)
_percent = partial(MetricSpec, unit="%")
_angle = partial(MetricSpec, unit="radians", digits=3)
_ratio = partial(MetricSpec, digits=3)  # without a unit

GRIDS = (
    _percent(
        "unseen_iou", "unseen IoU", meaning="IoU on compositions longer than in training", shown=FIGURES
    ),
    _percent("unseen_solved", "unseen solved", meaning="grids with every cell right", shown=MEANS),
    _percent("held_out_iou", "held-out IoU", meaning="IoU on pairs absent from training", shown=DIFFERENCES),
    _percent("held_out_solved", "held-out solved"),
    _percent(
        "train_iou", "training IoU", meaning=f"{IOU}, on new grids of training compositions", shown=MEANS
    ),
    _percent("train_solved", "training solved"),
    _angle(
        "grassmann_shared",
        "distance of sharing tasks",
        meaning=f"{DISTANCE} that share a primitive",
        lower_is_better=True,
        shown=FIGURES,
    ),
    _angle(
        "grassmann_other",
        "distance of other tasks",
        meaning="the same over pairs that share none",
        shown=MEANS,
    ),
    _angle("grassmann_gap", "distance of other less sharing tasks"),
    _angle("grassmann_chance", "distance of random subspaces"),
    _ratio("cka_shared", "CKA of sharing tasks"),
    _ratio("cka_other", "CKA of other tasks"),
    _ratio("unit_alignment", "best |r| of z", meaning=ALIGNMENT, shown=DIFFERENCES),
    _ratio("unit_chance", "best |r| of z by chance", meaning="its 95 % quantile by chance"),
    _percent("unit_aligned", "primitives aligned with z"),
    _ratio("hidden_alignment", "best |r| of h", meaning="the same for the bottleneck h", shown=MEANS),
    _ratio("hidden_chance", "best |r| of h by chance"),
    _percent("hidden_aligned", "primitives aligned with h"),
    _percent("probe_unseen", "probes on unseen", meaning=f"{PROBE}, read on unseen ones", shown=MEANS),
    _percent("probe_held_out", "probes on held-out pairs"),
    _percent("probe_train", "probes on training"),
    _percent("few_shot_before", "IoU before few-shot"),
    _percent(
        "few_shot_after", "few-shot IoU", meaning="IoU after adaptation to a few samples", shown=DIFFERENCES
    ),
    MetricSpec("few_shot_steps", "few-shot steps", "", STEPS, digits=1, lower_is_better=True, shown=FIGURES),
    _percent(
        "few_shot_reached",
        "few-shot reached",
        meaning="compositions that reach the target",
        digits=1,
        shown=MEANS,
    ),
)
