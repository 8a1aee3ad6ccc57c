"""Metrics of a run on grids: what its result is measured and compared by (`utils/metric_catalogue.py`)."""

from utils.metric_catalogue import MetricSpec, Shown

MEANS, DIFFERENCES, FIGURES = Shown.MEANS, Shown.DIFFERENCES, Shown.FIGURES
IOU = "|cells filled and right| / |cells filled in either grid|"
DISTANCE = (
    "Grassmann distance between the subspaces of two tasks in h (first principal directions), mean over pairs"
)
PROBE = "mean average precision of linear maps from h to the primitives, fitted on training compositions"
STEPS = (
    "optimizer steps of adapters at the bottleneck until the target IoU, all steps where it is not reached"
)

GRIDS = (
    MetricSpec(
        "unseen_iou", "unseen IoU", "%", "IoU on compositions longer than any in training", shown=FIGURES
    ),
    MetricSpec("unseen_solved", "unseen solved", "%", "grids with every cell right", shown=MEANS),
    MetricSpec(
        "held_out_iou", "held-out IoU", "%", "IoU on pairs that training never combines", shown=DIFFERENCES
    ),
    MetricSpec("held_out_solved", "held-out solved", "%"),
    MetricSpec(
        "train_iou", "training IoU", "%", f"{IOU}, on new grids of training compositions", shown=MEANS
    ),
    MetricSpec("train_solved", "training solved", "%"),
    MetricSpec(
        "grassmann_shared",
        "distance of sharing tasks",
        "radians",
        f"{DISTANCE} that share a primitive",
        digits=3,
        lower_is_better=True,
        shown=FIGURES,
    ),
    MetricSpec(
        "grassmann_other",
        "distance of other tasks",
        "radians",
        "the same over pairs that share no primitive",
        digits=3,
        shown=MEANS,
    ),
    MetricSpec("grassmann_gap", "distance of other less sharing tasks", "radians", digits=3),
    MetricSpec("grassmann_chance", "distance of random subspaces", "radians", digits=3),
    MetricSpec("cka_shared", "CKA of sharing tasks", digits=3),
    MetricSpec("cka_other", "CKA of other tasks", digits=3),
    MetricSpec(
        "unit_alignment",
        "best |r| of z",
        "",
        "largest correlation of a unit of the sparse code z with a primitive, mean over primitives",
        digits=3,
        shown=DIFFERENCES,
    ),
    MetricSpec("unit_chance", "best |r| of z by chance", "", "its 95 % quantile by chance", digits=3),
    MetricSpec("unit_aligned", "primitives aligned with z", "%"),
    MetricSpec(
        "hidden_alignment", "best |r| of h", "", "the same for the bottleneck h", digits=3, shown=MEANS
    ),
    MetricSpec("hidden_chance", "best |r| of h by chance", digits=3),
    MetricSpec("hidden_aligned", "primitives aligned with h", "%"),
    MetricSpec("probe_unseen", "probes on unseen", "%", f"{PROBE}, read on unseen ones", shown=MEANS),
    MetricSpec("probe_held_out", "probes on held-out pairs", "%"),
    MetricSpec("probe_train", "probes on training", "%"),
    MetricSpec("few_shot_before", "IoU before few-shot", "%"),
    MetricSpec(
        "few_shot_after", "few-shot IoU", "%", "IoU after adaptation to a few samples", shown=DIFFERENCES
    ),
    MetricSpec("few_shot_steps", "few-shot steps", "", STEPS, digits=1, lower_is_better=True, shown=FIGURES),
    MetricSpec(
        "few_shot_reached", "few-shot reached", "%", "compositions that reach the target", 1, shown=MEANS
    ),
)
