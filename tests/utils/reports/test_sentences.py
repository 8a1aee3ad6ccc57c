"""The closing table and sentence of a sweep say what the results say, whichever way they came out."""

import pytest

from tests.utils.reports.test_report import results_of
from utils.metric_catalogue import Shown
from utils.reports.renderings import terminal_table
from utils.reports.results import Results
from utils.reports.sentences import finding, legend
from utils.reports.tables import means_table


def results(
    levels: dict[str, list[tuple[float, float]]], baseline: str | None = "adapter", **more: list[int]
) -> Results:
    """Cells with an (A_N, forgetting) for each of their seeds; "joint" has one task."""

    def result(cell: str, final: float, lost: float) -> dict:
        metrics = {"final": final, "average": 60.0, "forgetting": lost, "plasticity": 90.0}
        curve = [final] if cell == "joint" else [100.0, final]
        return {"metrics": metrics, "curve": curve, "parameters": {}, "weights": {}, "cost": {}, **more}

    runs = {
        cell: {seed: result(cell, *numbers) for seed, numbers in enumerate(values)}
        for cell, values in levels.items()
    }
    return results_of(runs, baseline)


ADAPTER = {"adapter": [(70.0, 20.0)]}
RIDGE = {"ridge": [(84.0, 5.0)]}


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ({"nested": [(84.2, 8.0)]}, ["nested ends 14.20 points above adapter", "12.00 points less forgetting",
                                     "one seed", "no other is better"]),
        ({"nested": [(69.5, 20.5)]}, ["0.50 points below", "0.50 points more forgetting",
                                      "best A_N is 70.00, of adapter"]),
        ({"nested": [(70.001, 20.0)]}, ["ends level with adapter", "as much forgetting"]),
        ({"nested": [(80.0, 8.0)], **RIDGE}, ["10.00 points above", "best A_N is 84.00, of ridge"]),
        ({"nested": []}, ["best A_N is 70.00, of adapter"]),
    ],
)  # fmt: skip
def test_the_sentence_says_who_won_and_who_is_best(levels: dict, words: list[str]) -> None:
    sentence = finding(results(ADAPTER | levels), "nested")
    assert sentence.endswith(".") and all(word in sentence for word in words), sentence


def test_several_seeds_have_an_interval_and_may_not_decide() -> None:
    adapter = [(70.0, 9.0), (72.0, 9.0), (71.0, 9.0)]
    clear = finding(results({"adapter": adapter, "nested": [(80.0, 9), (82.1, 9), (81.0, 9)]}))
    assert "95 % interval +" in clear and "do not decide" not in clear
    mixed = finding(results({"adapter": adapter, "nested": [(60.0, 9), (92.0, 9), (71.0, 9)]}))
    assert "95 % interval -" in mixed and "do not decide" in mixed


def test_means_are_over_the_seeds_that_are_paired() -> None:
    cells = {"adapter": [(70.0, 9.0), (72.0, 9.0)], "nested": [(75.0, 9.0), (76.0, 9.0), (99.0, 9.0)]}
    sentence = finding(results(cells))
    assert "4.50 points above" in sentence and "75.50 against 71.00 over seeds 0 and 1" in sentence, sentence
    assert "no other is better" not in sentence and "over all finished runs is 83.33, of nested" in sentence
    cells["nested"].pop()
    assert "seeds 0" not in finding(results(cells))
    lucky = finding(results({"adapter": [(70.0, 9.0)], "nested": [(60.0, 9.0), (90.0, 9.0)]}))
    assert "10.00 points below" in lucky and "no other is better" not in lucky, lucky


def test_all_that_share_the_best_mean_are_named() -> None:
    tied = finding(results(ADAPTER | RIDGE | {"nested": [(84.001, 7.0)]}), "nested")
    assert "best A_N is 84.00, of nested and ridge" in tied, tied
    level = finding(results(ADAPTER | {"nested": [(70.0, 20.0)]}))
    assert "best A_N is 70.00, of adapter and nested" in level, level


def test_an_upper_bound_is_never_the_best() -> None:
    sentence = finding(results(ADAPTER | {"nested": [(75.0, 9.0)], "joint": [(90.0, 0.0)]}))
    assert sentence.startswith("nested ends") and sentence.endswith("no other is better."), sentence


def test_without_a_baseline_the_best_is_named() -> None:
    assert finding(results(ADAPTER | RIDGE, baseline=None)) == "the best A_N is 84.00, of ridge."


def test_the_table_has_a_row_per_cell_and_marks_the_best() -> None:
    cells = results(ADAPTER | RIDGE | {"not run": []}, parameters={"trained": 1500, "stored": 98000})
    *_, above, heading, adapter, ridge, unrun = terminal_table(means_table(cells, Shown.CONSOLE)).splitlines()
    assert above.split()[-2:] == ["parameters", "parameters"] and heading.startswith("cell ")
    numbers = ["70.00", "60.00", "*", "20.00", "90.00", "*", "1.5", "98"]
    assert adapter.split() == ["adapter", "1", *numbers]
    assert "84.00 *" in ridge and unrun.split() == ["not", "run", "0", *"––––––"]
    assert adapter.index("70.00") == heading.index("A_N (%)") + len("A_N (%)") - len("70.00")


def test_names_of_wide_characters_take_the_columns_that_they_fill() -> None:
    cells = results({name: [(70.0, 20.0)] for name in ("入れ子", "abcdefgh")}, None)
    *_, wide, narrow = terminal_table(means_table(cells, Shown.CONSOLE)).splitlines()
    assert wide.startswith("入れ子    1  ") and narrow.startswith("abcdefgh  1  ")


def test_the_legend_tells_each_column_and_chance_where_it_is_known() -> None:
    lines = legend(results(ADAPTER, classes_seen=[5, 10], parameters={"trained": 1500, "stored": 98000}))
    assert [line.split("   ")[0] for line in lines][:4] == ["A_N", "average", "forgetting", "plasticity"]
    assert "by chance 10.00" in lines[0] and "gradient" in lines[-2] and "thousands (k)" in lines[-1]
    assert not any("chance" in line for line in legend(results(ADAPTER)))
