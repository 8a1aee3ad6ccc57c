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

from utils.config.messages import shown
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


def why_no_number(answer: Mapping[str, str], results: Results) -> str:
    """Reason for a missing difference, with the metrics of a cell that lacks the one asked for."""
    cell, metric, other, other_metric = (answer[side] for side in SIDES)
    lacking: dict[str, list[str]] = {}
    for name, key in dict.fromkeys([(cell, metric), (other, other_metric)]):
        if not results.cells[name]:
            lacking.setdefault("has finished", []).append(shown(name))
        elif results.values(name, key).empty:
            there = ", ".join(known for known in results.metric_keys if len(results.values(name, known)))
            lacking.setdefault(f'has a number "{key}", there are {there}', []).append(shown(name))
    reasons = [f"no run of {' or '.join(names)} {lack}" for lack, names in lacking.items()]
    if not reasons and results.left_out(cell, other):
        return "no seed has both sides from runs of the same provenance and test images"
    return "; ".join(reasons) or "no seed has both sides"
