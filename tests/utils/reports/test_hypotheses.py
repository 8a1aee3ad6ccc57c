"""Hypotheses of a sweep: what is refused, the numbers and verdicts, and what the report says and draws."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.figure import Figure

import main
from models import SCHEMAS
from tests.conftest import ROOT
from tests.drawn import assert_readable
from tests.utils.reports.test_report import Page, invented, results_of
from tests.utils.reports.test_report import write as write_named
from tests.utils.runs.test_manifest import CHANGES, origins, record
from utils.plotting import BLUE, GREY, STYLE, VERMILLION
from utils.reports.answers import answer
from utils.reports.figures import hypotheses_figure
from utils.reports.hypotheses import Hypothesis, read_hypotheses
from utils.reports.tables import Table, hypotheses_table
from utils.runs.folder import folder_of
from utils.runs.run_log import RESULT
from utils.sweeps.spec import load_sweep

NEAR = {"says": "it is higher", "cell": "ours", "metric": "score", "expected": "higher", "against": "theirs"}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in NEAR.items() if key not in keys}


def hypotheses_of(cells: list[str], **given: dict[str, Any]) -> dict[str, Hypothesis]:
    hypotheses, problems = read_hypotheses(given, cells)
    assert problems == []
    return hypotheses


def runs_of(**scores: list[float | None]) -> dict[str, dict[int, dict]]:
    """Cell -> seed 0, 1, ... -> a run with that score; a seed without one has no run."""
    return {
        name: {s: invented(s, 40, score=score) for s, score in enumerate(values) if score is not None}
        for name, values in scores.items()
    }


def answers_of(runs: dict[str, dict[int, dict]], **given: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of answers."""
    return answer(hypotheses_of(list(runs), **given), results_of(runs)).to_dict("records")


def shown(runs: dict[str, dict[int, dict]], **given: dict[str, Any]) -> Table:
    results = results_of(runs)
    return hypotheses_table(answer(hypotheses_of(list(runs), **given), results), results)


def write(folder: Path, runs: dict[str, dict[int, dict]], **given: Any) -> list[Path]:
    return write_named(folder, runs, None, commands={}, hypotheses=hypotheses_of(list(runs), **given))


SMALL = runs_of(ours=[3.0, 5.5, 8.0], theirs=[1.0, 3.0, 5.0])  # differences 2, 2.5, 3
QUANTILE = 0.95 / math.sqrt(2 * 0.975 * 0.025)  # 0.975 of Student's t with 2 degrees of freedom
HALF = QUANTILE * 0.5 / math.sqrt(3)  # of the interval of their mean
T = 2.5 * math.sqrt(3) / 0.5
SMALL_P = 1 - T / math.sqrt(T * T + 2)  # two-sided, with 2 degrees of freedom
for seed, result in SMALL["ours"].items():
    result["cost"]["seconds"] += (-60, 0, 60)[seed]


# ------------------------------------------------------------------------------------------------------------
# Numbers and verdicts


@pytest.mark.parametrize(
    ("ours", "expected", "verdict"),
    [
        ([-1.0, 0.5, 2.0], "lower", "supported"),
        ([-1.0, 0.5, 2.0], "higher", "contradicted"),
        ([3.0, 6.0, 6.0], "higher", "undecided"),  # differences 2, 3, 1: 2 ± 2.48
    ],
)
def test_the_verdict_knows_what_was_expected(ours: list[float], expected: str, verdict: str) -> None:
    (found,) = answers_of(runs_of(ours=ours, theirs=[1.0, 3.0, 5.0]), H1={**NEAR, "expected": expected})
    assert found["verdict"] == verdict


@pytest.mark.parametrize(
    ("sides", "difference", "compared"),
    [
        ({"against": "theirs"}, 30.0, "score, ours against theirs"),
        ({"against_metric": "chance"}, 39.0, "score against chance, ours"),
        ({"against": "theirs", "against_metric": "chance"}, 38.0, "score, ours against chance, theirs"),
        ({"against": "ours", "against_metric": "final"}, 0.0, "score against A_N (%), ours"),
    ],
)
def test_the_other_side_is_another_cell_or_metric_or_both(
    sides: dict[str, str], difference: float, compared: str
) -> None:
    runs = {
        "ours": {seed: invented(seed, 40, score=40.0, chance=1.0, final=40.0) for seed in (1, 2)},
        "theirs": {seed: invented(seed, 40, score=10.0, chance=2.0) for seed in (1, 2)},
    }
    given = without("against") | sides
    assert answers_of(runs, H1=given)[0]["difference"] == difference
    assert shown(runs, H1=given).rows[0][6].text == compared


def test_a_number_that_is_missing_is_explained() -> None:
    runs = {**runs_of(ours=[1.0, 2.0], theirs=[1.0, 2.0], late=[None, None, 3.0]), "crashed": {}}
    given = {"H1": {"against_metric": "chance"}, "H2": {"against": "crashed"}, "H3": {"against": "late"}}
    table = shown(runs, **{name: NEAR | values for name, values in given.items()})
    assert [[entry.text for entry in row[1:5]] for row in table.rows] == [["no number", "–", "–", "0"]] * 3
    for reason in ("H1 (no seed with a number", "H2 (no finished run of crashed", "H3 (no seed in common"):
        assert reason in table.note


def test_only_runs_of_the_same_provenance_are_paired(tmp_path: Path) -> None:
    runs = runs_of(ours=[3.0, 5.5, 8.0], theirs=[1.0, 3.0, 5.0], other=[1.0, 2.5, 7.0])
    was, _, now = origins(tmp_path, {}, {}, CHANGES[0][1]).values()
    old, new = dict.fromkeys(range(3), was), dict.fromkeys(range(3), now)
    results = results_of(runs, None, {"ours": old, "theirs": old | {0: now}, "other": new})
    more = {"H2": NEAR | {"against": "other"}, "H3": without("against") | {"against_metric": "final"}}
    answers = answer(hypotheses_of(list(runs), H1=NEAR, **more), results)
    assert list(answers["n"]) == [2, 0, 3] and answers["difference"][0] == 2.75
    assert answers.loc[0, ["mean", "against_mean"]].to_list() == [6.75, 4.0]  # over the seeds of both
    assert "provenance" in hypotheses_table(answers, results).note


# ------------------------------------------------------------------------------------------------------------
# Mistakes in the file


def sweep_file(folder: Path, **values: Any) -> Path:
    path = folder / "table.json"
    cells = {"ours": {}, "theirs": {"rd_dim": 3}}
    path.write_text(
        json.dumps({"base": str(ROOT / "exps/smoke.json"), "seeds": [1, 2], "cells": cells, **values})
    )
    return path


def test_all_mistakes_come_at_once_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = {**NEAR, "cell": "our", "expected": "less", "against": "their"}, {**NEAR, "metric": "final"}
    given = {"H1": bad, "H2": without("against"), "H3": good, " ": good, "H4": {**NEAR, "metric": "finl"}}
    given |= {"H5": {**good, "against_metric": "unseen_iou"}, "H6": {**good, "metrics": "a"}}
    given |= {"H7": {**good, "against": "ours"}, "H8": without("metric"), "H9": {**good, "says": ""}}
    path = sweep_file(tmp_path, hypotheses=given, baseline="x")
    assert main.main(["--sweep", str(path), "--set", f"logs_root={tmp_path}/logs"]) == 2
    message = capsys.readouterr().err
    told = ['baseline = "x"', '"H1": cell = "our"', 'did you mean "ours"', 'allowed: "ours", "theirs"']
    told += ['"H1": expected = "less"', '"H1": against = "their"', '"H2": against', "a name is empty"]
    told += ['"H4": metric = "finl"', 'did you mean "final"', 'allowed: "final", "average"']
    told += ['"H5": against_metric = "unseen_iou"', '"H6": metrics = "a"', "did you mean metric"]
    told += ['"H7": against, against_metric: final of ours on both sides', '"H8": metric: missing']
    told += ['"H9": says = ""', "12 problems"]
    assert [part for part in told if part not in message] == []
    assert "H3" not in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == [path]


def test_a_sweep_has_its_hypotheses_and_records_them(tmp_path: Path) -> None:
    given = {**NEAR, "metric": "parameters_stored"}
    sweep = load_sweep(sweep_file(tmp_path, hypotheses={"H1": given}), [], SCHEMAS)
    assert sweep.hypotheses["H1"].sides == (("ours", "parameters_stored"), ("theirs", "parameters_stored"))
    assert sweep.table()["hypotheses"] == {"H1": {**given, "against_metric": None}}
    assert load_sweep(sweep_file(tmp_path), [], SCHEMAS).hypotheses == {}


# ------------------------------------------------------------------------------------------------------------
# The report


GIVEN = {
    "H1": NEAR,
    "H2": {**NEAR, "says": "a|b <script> & $x_1$", "expected": "lower"},
    "H3": {**NEAR, "metric": "nothing"},
    "H4": {**NEAR, "metric": "seconds", "expected": "lower"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """(folder, files) of a report with hypotheses of several verdicts, one of them about minutes."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, write(folder, SMALL, **GIVEN)


def test_hypotheses_csv_has_every_digit(written: tuple[Path, list[Path]]) -> None:
    rows = pd.read_csv(written[0] / "hypotheses.csv", index_col="hypothesis")
    assert list(rows.index) == list(GIVEN)
    named = NEAR | {"against_metric": "score", "n": 3, "verdict": "supported"}
    named |= {"mean": 5.5, "std": 2.5, "against_mean": 3.0, "against_std": 2.0}
    named |= {"difference": 2.5, "difference_std": 0.5}
    assert rows.loc["H1", list(named)].to_dict() == named
    limits = rows.loc["H1", ["difference_low95", "difference_high95"]].to_list()
    assert limits == pytest.approx([2.5 - HALF, 2.5 + HALF], rel=1e-12)
    assert rows.loc["H1", ["p_t", "p_holm"]].to_list() == pytest.approx([SMALL_P, 3 * SMALL_P])
    assert rows.loc["H3", "n"] == 0 and rows.loc["H3", ["difference", "p_t", "p_holm"]].isna().all()
    assert list(rows["verdict"]) == ["supported", "contradicted", "no number", "undecided"]


def test_the_section_follows_the_facts_in_both_texts(written: tuple[Path, list[Path]]) -> None:
    folder, files = written
    names = {str(path.relative_to(folder)) for path in files}
    assert {"hypotheses.csv", "figures/hypotheses.png"} <= names
    markdown, html = (folder / "summary.md").read_text(), (folder / "report.html").read_text()
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE), re.findall("<h2>(.*)</h2>", html)
    assert [found[:2] for found in headings] == [["Figures", "Hypotheses"]] * 2
    section = markdown.split("## Hypotheses")[1].split("\n## ")[0]
    row = "| H1: it is higher | **supported** | **+2.500** | +1.258 to +3.742 | 3 | 0.039 "
    assert row + "| score, ours against theirs | 5.500 ± 2.500 | 3.000 ± 2.000 |" in section
    assert "(figures/hypotheses.png)" in markdown and "No number: H3 (" in section
    lines = [line for line in section.split("\n") if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    page = Page(html)
    assert page.open == [] and "script" not in {tag for tag, _ in page.tags}
    assert html.count("data:image/png;base64,") == len([n for n in names if n.endswith(".png")])
    assert "No number: H3 (" in html
    assert '<td class="strong better">supported</td>' in html
    assert '<td class="strong worse">contradicted</td>' in html
    assert "A hypothesis is answered by" in markdown and "A hypothesis is answered by" in html


def test_without_hypotheses_the_rest_of_the_report_is_the_same(
    written: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Files of hypotheses of an earlier report go; numbers and other figures are the same to the byte."""
    folder = shutil.copytree(written[0], tmp_path / "sweep")
    files = {path.relative_to(folder): path.read_bytes() for path in write(folder, SMALL)}
    assert {folder / name for name in files} == {path for path in folder.rglob("*") if path.is_file()}
    before = {path.relative_to(written[0]): path.read_bytes() for path in written[1]}
    assert {str(name) for name in before.keys() - files} == {"hypotheses.csv", "figures/hypotheses.png"}
    unlike = {str(name) for name, content in files.items() if content != before[name]}
    assert unlike == {"summary.md", "report.html"}
    assert not any(b"ypothes" in files[Path(name)] for name in unlike)


def test_the_command_line_reports_on_the_hypotheses_of_the_file(tmp_path: Path) -> None:
    about_final = {**NEAR, "metric": "final"}
    path, logs_root = sweep_file(tmp_path, hypotheses={"H1": about_final}), f"logs_root={tmp_path}/logs"
    sweep = load_sweep(path, [logs_root], SCHEMAS)
    for cell in sweep.cells:
        for seed in sweep.file.seeds:
            folder = folder_of(cell.config, seed)
            folder.mkdir(parents=True)
            record(folder, cell.with_seed(seed).model_dump(mode="json"))
            (folder / RESULT).write_text(json.dumps(invented(seed, 50 if cell.name == "ours" else 40)))
    assert main.main(["--sweep", str(path), "--set", logs_root, "--report"]) == 0
    summary = (sweep.folder / "summary.md").read_text()
    assert "| H1: it is higher | **supported** |" in summary and "| A_N (%), ours against theirs |" in summary


# ------------------------------------------------------------------------------------------------------------
# The figure


def figure_of(runs: dict[str, dict[int, dict]], **given: dict[str, Any]) -> Figure:
    results = results_of(runs)
    with mpl.rc_context(STYLE):
        figure = hypotheses_figure(
            answer(hypotheses_of(list(runs), **given), results), results, "ranks " * 40
        )
        assert_readable(figure)
    return figure


def test_a_panel_per_metric_has_its_hypotheses_in_the_verdicts_colours() -> None:
    panels = figure_of(SMALL, **GIVEN, H5={**NEAR, "against_metric": "final"}).axes
    assert [len(axes.get_yticks()) for axes in panels] == [3, 1]
    texts = [text for axes in panels for text in axes.texts]
    verdicts = ["supported", "contradicted", "contradicted", "undecided"]
    assert [text.get_text().split("\n")[0] for text in texts] == verdicts
    assert [text.get_color() for text in texts] == [BLUE, VERMILLION, VERMILLION, GREY]


def test_a_row_shows_the_difference_its_interval_and_every_seed() -> None:
    (axes,) = figure_of(SMALL, H1=NEAR).axes
    zero, interval, mean, seeds = (list(line.get_xdata()) for line in axes.lines)
    assert zero == [0, 0] and interval == pytest.approx([2.5 - HALF, 2.5 + HALF])
    assert mean == [2.5] and seeds == [2.0, 2.5, 3.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["H1\nscore, ours against theirs"]
    assert [text.get_text() for text in axes.texts] == ["supported\n+2.500 (+1.258 to +3.742)"]


def test_differences_are_in_the_unit_of_their_metric_and_fewer_seeds_are_told() -> None:
    given = {"H1": {**NEAR, "metric": "seconds", "expected": "lower"}, "H2": NEAR | {"against": "few"}}
    runs = {**SMALL, **runs_of(few=[1.0, 3.0])}
    minutes, score = figure_of(runs, **given).axes
    assert list(minutes.lines[-1].get_xdata()) == pytest.approx([-1.0, 0.0, 1.0])
    assert "minutes" in minutes.get_yticklabels()[0].get_text()
    assert "n =" not in minutes.texts[0].get_text() and "n = 2" in score.texts[0].get_text()


def test_no_figure_where_no_hypothesis_has_a_number() -> None:
    runs = runs_of(ours=[1.0, 2.0], theirs=[None, None])
    results = results_of(runs)
    assert hypotheses_figure(answer(hypotheses_of(list(runs), H1=NEAR), results), results, "x") is None


@pytest.mark.parametrize("number", [1, 5])
def test_no_text_of_the_figure_overlaps_another_or_leaves_the_picture(number: int) -> None:
    long = [f"a cell $5 of a long name, nested_lora_rank={i}, nested_lora_freeze=never" for i in range(2)]
    runs = runs_of(**{name: [1e6 + s + i for s in range(5)] for i, name in enumerate(long)})
    cells = {**NEAR, "cell": long[0], "against": long[1]}
    one_cell = {"against": None, "against_metric": "plasticity"}
    about = [cells, cells | one_cell, cells | {"metric": "seconds"}]
    figure_of(runs, **{f"H{i}" + " of a long name" * i: about[i % 3] for i in range(number)})
