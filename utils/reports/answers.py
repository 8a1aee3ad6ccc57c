"""Answers of a sweep to its hypotheses: the paired difference of both sides, and a verdict.

    answers = answer(hypotheses, results)           # a row per hypothesis
    answers["verdict"]                              # "supported", ...

The difference is the hypothesis's metric of its cell minus that of the other side, paired by seed, where both
runs have the same provenance and test images. The verdict follows from its 95 % interval:

    supported            the interval excludes zero on the expected side
    contradicted         it excludes zero on the other side
    undecided            it contains zero: these seeds do not decide
    one seed             a difference without an interval
    same in every seed   the difference is the same with every seed: there is no interval
    no number            no seed has both sides
"""

from collections.abc import Mapping

import pandas as pd

from utils.reports.hypotheses import Hypothesis
from utils.reports.results import Results, difference_columns
from utils.reports.stats import holm, mean_over_seeds, paired_difference

SUPPORTED, CONTRADICTED = "supported", "contradicted"
SIDES = ["cell", "metric", "against", "against_metric"]


def answer(hypotheses: Mapping[str, Hypothesis], results: Results) -> pd.DataFrame:
    """A row per hypothesis: its keys, means of both sides over the seeds that have both, difference, verdict.

    Holm's adjustment is over all hypotheses that have a p value.
    hypotheses: name -> hypothesis, about cells of the sweep.
    """
    rows = []
    for name, hypothesis in hypotheses.items():
        sides = dict(zip(SIDES, (part for side in hypothesis.sides for part in side), strict=True))
        pairs = results.pairs(*sides.values())
        ours, theirs = (mean_over_seeds(pairs[side].to_list()) for side in ("ours", "theirs"))
        difference, words = paired_difference(pairs), (SUPPORTED, CONTRADICTED)
        rows.append(
            {
                "hypothesis": name,
                "says": hypothesis.says,
                **sides,
                "expected": hypothesis.expected,
                "n": difference.n,
                "mean": ours.mean,
                "std": ours.std,
                "against_mean": theirs.mean,
                "against_std": theirs.std,
                **difference_columns(difference),
                "verdict": difference.verdict(*(words if hypothesis.expected == "higher" else words[::-1])),
            }
        )
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p_t"])
    return table


def comparison(answer: Mapping[str, str], results: Results) -> str:
    """Both sides of an answer in words: `A_N (%), nested against matched adapter`."""
    cell, metric, other, other_metric = (answer[side] for side in SIDES)
    ours, theirs = results.spec(metric).heading, results.spec(other_metric).heading
    if metric == other_metric:
        return f"{ours}, {cell} against {other}"
    if cell == other:
        return f"{ours} against {theirs}, {cell}"
    return f"{ours}, {cell} against {theirs}, {other}"
