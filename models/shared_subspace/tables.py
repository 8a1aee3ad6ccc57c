"""Plain-text tables of a run on grids: how well compositions are done that were met, and that were not.

    print(zero_shot_table({"train": {"iou": 71.3, ...}, "held_out": {...}, "unseen": {...}}))
    print(few_shot_table(rows))

Numbers are percent. IoU is defined in `models/shared_subspace/losses.py`; a grid is solved when all its cells are right.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from models.shared_subspace.tasks import HELD_OUT, TRAIN, UNSEEN

SPLIT_NAMES = {TRAIN: "met in training", HELD_OUT: "held-out pairs", UNSEEN: "unseen length"}
ZERO_SHOT = {
    "iou": "IoU",
    "cells": "cells right",
    "solved": "grids solved",
    "copied": "IoU of the input itself",
}


def zero_shot_table(lines: Mapping[str, Mapping[str, float]]) -> str:
    """A line a split: IoU, cells right, grids solved, and the IoU of who hands the input back, percent."""
    widths = [max(8, len(heading)) + 2 for heading in ZERO_SHOT.values()]
    first = max(map(len, SPLIT_NAMES.values())) + 2
    headings = "".join(
        f"{heading:>{width}}" for heading, width in zip(ZERO_SHOT.values(), widths, strict=True)
    )
    table = ["New grids (%), no adaptation", f"{'compositions':<{first}}{headings}"]
    for split, values in lines.items():
        numbers = "".join(f"{values[key]:>{width}.2f}" for key, width in zip(ZERO_SHOT, widths, strict=True))
        table.append(f"{SPLIT_NAMES[split]:<{first}}{numbers}")
    return "\n".join(table)


def few_shot_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line an unseen composition: IoU before and after, steps and seconds until it reached the target, percent."""
    target = rows[0]["target"]
    first = max(len("mean"), *(len(row["composition"]) for row in rows)) + 2
    heading = f"{'composition':<{first}}{'before':>8}{'after':>8}{'steps':>8}{'seconds':>9}"
    table = [f"IoU (%) of unseen compositions before and after adapters, and what {target:g} % took", heading]
    for row in rows:
        reached = (f"{row['steps']}", f"{row['seconds']:.2f}") if row["steps"] is not None else ("-", "-")
        table.append(
            f"{row['composition']:<{first}}{row['before']:>8.2f}{row['after']:>8.2f}{reached[0]:>8}{reached[1]:>9}"
        )
    before, after = (statistics.fmean(row[key] for row in rows) for key in ("before", "after"))
    done = sum(row["steps"] is not None for row in rows)
    table.append(f"{'mean':<{first}}{before:>8.2f}{after:>8.2f}  {done} of {len(rows)} reached it")
    return "\n".join(table)
