"""The report of a sweep: numbers against independent computation, texts and a page that stand alone."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from models import SCHEMAS
from tests.conftest import ROOT
from tests.utils.runs.test_manifest import CHANGES, origins
from utils.config.loading import load_config
from utils.errors import UserError
from utils.reports.figures import sweep_figures
from utils.reports.report import write_report
from utils.reports.results import FinishedRun, Results
from utils.reports.sentences import facts, finding, reading_notes
from utils.reports.stats import mean_over_seeds, paired_difference
from utils.reports.tables import difference_tables, means_table, plain_table
from utils.runs.manifest import Provenance

CONFIG = load_config(ROOT / "exps/smoke.json", [], SCHEMAS).config
METRICS = CONFIG.metrics
SEEDS = (1993, 1994, 1995)
EVIL = 'a|b <script>alert("1")</script> & $x_1$ \\ `c` *d* _e_'
NOTE = "fine-tuned on MRI, not the original weights"
ABOUT = [("Weights", f"tiny_vit.mri ({NOTE})")]
REASONS = {"nested, seed 1995": "exit code 1:\nout of <memory>", "crashed, seed 1993": "not started"}
FILES = ["bars.png", "curves.png", "differences.png", "plasticity_forgetting.png"]


def invented(seed: int, level: float, tasks: int = 4, **metrics: float) -> dict:
    """A result.json whose A_N is the level and something of the seed's own."""
    draw = np.random.default_rng([seed, int(level * 100)])
    final = level + seed % 7 + draw.normal(0, 0.3)
    curve = [*(final + 30 * (1 - (t + 1) / tasks) for t in range(tasks - 1)), final]
    forgetting = None if tasks == 1 else 18 - level / 10 + draw.normal()
    plain = {
        "final": final,
        "average": sum(curve) / tasks,
        "forgetting": forgetting,
        "bwt": None if forgetting is None else -forgetting,
        "plasticity": final + 12 + draw.normal(),
        "expansions": int(seed % 3),
    }
    return {
        "seed": seed,
        "metrics": {**plain, **metrics},
        "accuracy": [],
        "curve": curve,
        "adapters": {"9": 2},
        "parameters": {"adapters": 380640, "trained": 201500, "stored": 384490 + 500 * (seed % 3)},
        "weights": {"tag": "tiny_vit.mri", "note": NOTE},
        "cost": {"seconds": 600.0 + seed % 5, "peak_memory_mb": 1500.25},
    }


def table_of_runs() -> dict[str, dict[int, dict]]:
    """A baseline, a better cell with other seeds, all classes at once, a cell without a run, an evil name."""
    return {
        "base": {seed: invented(seed, 40) for seed in SEEDS},
        "nested": {seed: invented(seed, 43) for seed in (1996, *SEEDS[:2])},
        "joint": {seed: invented(seed, 60, tasks=1) for seed in SEEDS},
        "crashed": {},
        EVIL: {seed: invented(seed, 38) for seed in SEEDS},
    }


def results_of(runs, baseline=None, origins=None, tested_on=None, metrics=METRICS) -> Results:
    """The results of invented runs, all made with the same and tested on the same images unless given."""

    def finished(cell, seed, result) -> FinishedRun:
        origin = origins[cell][seed] if origins else Provenance({})
        return FinishedRun(Path("run"), CONFIG, result, origin, tested_on[cell][seed] if tested_on else {})

    cells = {
        cell: {seed: finished(cell, seed, result) for seed, result in own.items()}
        for cell, own in runs.items()
    }
    return Results(cells, metrics, baseline)


def write(folder, runs, baseline="base", origins=None, **more):
    commands = {name: f"python main.py --config cells/{number}.json" for number, name in enumerate(runs)}
    named = {"commands": commands, "unfinished": {}, "about": ABOUT} | more
    results = results_of(runs, baseline, origins)
    return write_report(folder, "ranks", "Does rank <matter>?", results, **named)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, files) of a report with everything in it."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, write(folder, table_of_runs(), unfinished=REASONS)


def test_every_file_is_where_it_belongs(written):
    folder, files = written
    names = ["summary.csv", "runs.csv", "summary.md", "report.html", *(f"figures/{name}" for name in FILES)]
    assert set(files) == {folder / name for name in names}
    assert {path for path in folder.rglob("*") if path.is_file()} == set(files)  # nothing half-written
    for name in FILES:
        picture = imread(folder / "figures" / name)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05


def read_csv(path) -> pd.DataFrame:
    """The texts of its fields by the first two: cell, and metric or seed."""
    return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=[0, 1])


def test_means_are_over_seeds_and_differences_over_the_common_ones(written):
    runs, rows = table_of_runs(), read_csv(written[0] / "summary.csv")
    row = rows.loc["nested", "forgetting"]
    ours, theirs = ([runs[n][s]["metrics"]["forgetting"] for s in (1993, 1994)] for n in ("nested", "base"))
    expected = paired_difference(pd.DataFrame({"ours": ours, "theirs": theirs}))
    keys = ["paired_n", "difference", "difference_std", "difference_low95", "difference_high95", "p_t"]
    found = row[keys].astype(float).to_list()
    assert found == [getattr(expected, key) for key in ("n", "mean", "std", "low", "high", "p_t")]
    expected = mean_over_seeds([result["metrics"]["forgetting"] for result in runs["nested"].values()])
    found = row[["n", "mean", "std", "low95", "high95"]].astype(float).to_list()
    assert found == pytest.approx([getattr(expected, key) for key in ("n", "mean", "std", "low", "high")])
    least = rows.loc[[("nested", "forgetting"), (EVIL, "forgetting")], ["p_t", "p_holm"]].astype(float).min()
    assert least["p_holm"] == pytest.approx(2 * least["p_t"])
    uncompared = rows.loc[[("base", "final"), ("nested", "seconds"), ("joint", "average")]]
    assert (uncompared[["paired_n", "difference", "p_t", "p_holm", "verdict"]] == "").all(axis=None)


def test_runs_csv_has_a_line_per_run_with_every_digit(written):
    rows, runs = read_csv(written[0] / "runs.csv"), table_of_runs()
    assert list(rows.index) == [(n, str(seed)) for n, results in runs.items() for seed in sorted(results)]
    for (cell, seed), row in rows.iterrows():
        result = runs[cell][int(seed)]
        expected = {key: "" if value is None else repr(value) for key, value in result["metrics"].items()}
        expected |= {"parameters_stored": str(result["parameters"]["stored"]), "weights": "tiny_vit.mri"}
        expected |= {"seconds": repr(result["cost"]["seconds"]), "peak_memory_mb": "1500.25"}
        expected |= {"tasks": "1" if cell == "joint" else "4"}
        assert row[list(expected)].to_dict() == expected


def test_all_classes_at_once_are_a_bound_not_a_competitor():
    results = results_of(table_of_runs(), "base")
    compared = results.summary.dropna(subset="difference").index
    assert [metric for cell, metric in compared if cell == "joint"] == ["final"]
    assert {cell for cell, _ in compared} == {"nested", "joint", EVIL}
    assert results.best("final") == results.best("average") == {"nested"}
    assert any(note.startswith("joint: ") and "upper bound" in note for note in reading_notes(results))
    row = next(row for row in means_table(results).rows if row[0].text == "crashed")  # without a run
    assert [entry.text for entry in row[1:]] == ["0"] + ["–"] * 8
    note = difference_tables(results)[1].note
    assert note == "Not compared: joint (another number of tasks); crashed (no finished run)."
    alone = {"a": {1: invented(1, 40, tasks=1)}, "b": {1: invented(1, 50, tasks=1)}}
    assert results_of(alone).best("final") == {"b"}  # compared among themselves
    assert list(sweep_figures(results_of(alone), "joint alone")) == ["bars.png"]


def metric_runs(metric: str, ours: list[float], theirs: list[float]) -> dict:
    """Two cells that are given one metric's values."""
    cells = {"ours": ours, "base": theirs}
    return {n: {s: invented(s, 40, **{metric: value}) for s, value in enumerate(v)} for n, v in cells.items()}


@pytest.mark.parametrize(
    ("metric", "ours", "verdict"),
    [
        ("final", [44.0, 45.1, 46.2], "better"),
        ("final", [36.0, 37.1, 37.9], "worse"),
        ("final", [40.5, 40.0, 43.0], "undecided"),
        ("forgetting", [44.0, 45.1, 46.2], "worse"),
        ("forgetting", [36.0, 37.1, 37.9], "better"),
    ],
)
def test_the_verdict_knows_which_way_is_better(metric, ours, verdict):
    results = results_of(metric_runs(metric, ours, [40.0, 41.0, 42.0]), "base")
    assert results.summary.loc[("ours", metric), "verdict"] == verdict
    assert results.best(metric) == {"base" if verdict == "worse" else "ours"}


def test_a_cell_that_the_seed_cannot_change_is_not_certain():
    """A prototype method on one class order: every run has the same number, as has the baseline."""
    runs = metric_runs("final", [50.0, 50.0, 50.0], [40.0, 40.0, 40.0])
    runs["other"] = {seed: invented(seed, 40, final=42.0 + seed) for seed in range(3)}
    results = results_of(runs, "base")
    ours, other = (results.summary.loc[cell, "final"] for cell in ("ours", "other"))
    assert ours["verdict"] == "same in every seed" and ours["std"] == ours["difference_std"] == 0
    assert ours[["low95", "high95", "difference_low95", "p_t", "p_holm", "p_wilcoxon"]].isna().all()
    assert other["p_holm"] == other["p_t"]  # alone in its family
    row = next(row for row in difference_tables(results)[0].rows if row[0].text == "ours")
    assert [entry.text for entry in row[1:]] == ["3", "+10.00", "–", "–", "–", "–", "same in every seed"]
    assert not any(entry.strong for entry in row)
    notes = " ".join(reading_notes(results))
    assert "ours (A_N); base (A_N)" in notes and '"same in every seed"' in notes
    assert "1 same in every seed" in dict(facts(results, {}))["A_N against the baseline"]
    varied = results_of(table_of_runs(), "base")  # but for numbers of adapters, which no table compares
    assert not any("every seed" in note for note in reading_notes(varied))


def test_the_means_table_shows_mean_and_std_and_the_best():
    table = means_table(results_of(metric_runs("final", [44.0, 45.0, 46.0], [40.0, 41.5, 43.0]), "base"))
    ours, base = (dict(zip(table.headings, row, strict=True)) for row in table.rows)
    assert ours["A_N (%)"] == ("45.00 ± 1.00", True, "") and base["A_N (%)"] == ("41.50 ± 1.50", False, "")
    shown = {"n": "3", "wall-clock minutes": "10.0 ± 0.0", "adapters added": "1.0 ± 1.0"}
    shown |= {"trained parameters (k)": "201.5", "stored parameters (k)": "385.0 ± 0.5"}
    assert {heading: ours[heading].text for heading in shown} == shown
    assert not {"BWT (points)", "adapter parameters (k)"} & set(table.headings)


def test_means_that_are_shown_alike_are_all_the_best():
    results = results_of(metric_runs("final", [88.950], [88.953]), "base")
    table = means_table(results)
    assert [row[table.headings.index("A_N (%)")].strong for row in table.rows] == [True, True]


def test_numbers_that_are_missing_or_not_finite_count_as_absent():
    runs = metric_runs("plasticity", [50.0, None, math.nan], [50.0, 51.0, 52.0])
    for result in runs["ours"].values():
        result["parameters"] = {"head": 10}
    runs["none"] = {1: invented(1, 40, plasticity=None)}
    results = results_of(runs, "base")
    ours = results.summary.loc["ours", "plasticity"]
    assert (ours["n"], ours["verdict"]) == (1, "one seed")
    assert results.values("ours", "parameters_adapters").empty
    table = means_table(results)
    shown = {row[0].text: row[table.headings.index("plasticity (%)")].text for row in table.rows}
    assert shown == {"ours": "50.00 (n = 1)", "base": "51.00 ± 1.00", "none": "–"}
    note = next(table.note for table in difference_tables(results) if table.caption.startswith("plasticity"))
    assert note == "Not compared: none (no seed with a number of both)."


def test_runs_of_another_provenance_are_told_and_not_paired(tmp_path):
    """Two seeds of the old code in both cells, a third of which only the baseline was run anew."""
    was, _, now = origins(tmp_path, {}, {}, CHANGES[0][1]).values()
    runs = metric_runs("final", [44.0, 45.1, 46.2], [40.0, 41.5, 42.0])
    made = {"ours": dict.fromkeys(range(3), was), "base": {0: was, 1: was, 2: now}}
    old = {"ours, seed 2": ("code", "python main.py --config cells/ours_2.json --overwrite")}
    write(tmp_path, runs, origins=made, outdated=old)
    page = Page((tmp_path / "report.html").read_text()).text
    for text in (page, (tmp_path / "summary.md").read_text()):
        assert "ours and base, seed 2 (code)" in text and old["ours, seed 2"][1] in text
    made = {"ours": dict.fromkeys(range(3), was), "base": dict.fromkeys(range(3), now)}
    results = results_of(runs, "base", made)
    assert difference_tables(results) == [] and "differences.png" not in sweep_figures(results, "code")


@pytest.mark.parametrize(
    ("order", "new", "paired_seeds"),
    [
        ([0, 1, 2], {2}, {0, 1}),  # the most seeds
        ([0, 1, 2], {1, 2}, {1, 2}),
        ([0, 1], {1}, {1}),  # the latest of equals
        ([1, 0], {0}, {0}),
        ([0, 1, 2], set(), {0, 1, 2}),
    ],
)
def test_a_difference_is_over_runs_of_one_provenance(tmp_path, order, new, paired_seeds):
    """Both cells were run with other data from some seed on: pairs of the two are not mixed."""
    was, _, now = origins(tmp_path, {}, {}, CHANGES[3][1]).values()
    runs = metric_runs("final", [50.0, 50.0, 70.0], [40.0, 41.0, 49.0])
    runs = {name: {seed: results[seed] for seed in order} for name, results in runs.items()}
    made = dict.fromkeys(runs, {seed: now if seed in new else was for seed in order})
    results = results_of(runs, "base", made)
    found = results.summary.loc["ours", "final"]
    expected = np.mean([(10.0, 9.0, 21.0)[seed] for seed in paired_seeds])
    assert (found["n"], found["paired_n"], found["difference"]) == (len(order), len(paired_seeds), expected)
    assert results.left_out("ours", "base") == {seed: ["data"] for seed in order if seed not in paired_seeds}


def test_cells_tested_on_other_images_are_not_paired(tmp_path):
    """Also not one with as many classes; a cell of one task does not say how classes are split into tasks."""
    names = ("base", "more", "order", "joint", "other")
    runs = {name: {1: invented(1, 40), 2: invented(2, 42)} for name in names}
    tested = {
        "base": {"data": "a", "classes": 8, "init_cls": 2, "shuffle": True},
        "more": {"data": "a", "classes": 8, "init_cls": 4, "shuffle": True},
        "order": {"data": "a", "classes": 8, "init_cls": 2, "shuffle": False},
        "joint": {"data": "a", "classes": 8},
        "other": {"data": "b", "classes": 8, "init_cls": 2, "shuffle": True},
    }
    (made,) = origins(tmp_path, {}).values()
    by_seed = {name: dict.fromkeys((1, 2), about) for name, about in tested.items()}
    results = results_of(runs, "base", dict.fromkeys(runs, dict.fromkeys((1, 2), made)), by_seed)
    paired = results.summary.xs("final", level="metric")["paired_n"].dropna()
    assert list(paired.index) == ["more", "order", "joint"]
    assert "other (other test images)" in difference_tables(results)[0].note
    assert any("base, more, order and joint; other" in note for note in reading_notes(results))


@pytest.mark.parametrize("baseline", ["base", None])
def test_no_cell_is_the_best_of_those_tested_on_other_images(baseline):
    """Only of those that were tested on the images of the baseline."""
    levels, images = {"base": 40, "near": 42, "easy": 60}, {"base": "a", "near": "a", "easy": "b"}
    runs = {name: {seed: invented(seed, level) for seed in SEEDS} for name, level in levels.items()}
    tested = {name: dict.fromkeys(SEEDS, {"data": data}) for name, data in images.items()}
    results = results_of(runs, baseline, tested_on=tested)
    assert not results.best("final") and "Best mean A_N" not in dict(facts(results, {}))
    assert "easy" not in finding(results)
    assert ("near ends" in finding(results)) == (baseline is not None)
    assert "no comparable runs" in finding(results, "easy") or baseline is None


def test_cells_belong_together_where_any_runs_were_tested_on_the_same_images(tmp_path):
    """The first run of a cell was tested on images that have changed since."""
    runs = {name: {1: invented(1, 40), 2: invented(2, 42)} for name in ("base", "begun earlier", "other")}
    made = {seed: {"data": "b", "classes": 8} for seed in (1, 2)}
    tested = {"base": made, "begun earlier": made | {1: {"data": "a", "classes": 8}}}
    tested["other"] = dict.fromkeys((1, 2), {"data": "c", "classes": 8})
    (origin,) = origins(tmp_path, {}).values()
    results = results_of(runs, "base", dict.fromkeys(runs, dict.fromkeys((1, 2), origin)), tested)
    assert results.summary.loc[("begun earlier", "final"), "paired_n"] == 1
    assert results.by_images == [["base", "begun earlier"], ["other"]]


def test_cells_whose_tasks_differ_in_size_are_compared_in_the_main_metric_alone():
    """As many tasks, of as many classes in all; nothing else is the best of them or in the figure."""
    split = {"base": [10, 20, 30, 40], "same": [10, 20, 30, 40], "other": [19, 26, 33, 40]}
    runs = {
        name: {s: invented(s, 40) | {"classes_seen": seen} for s in (1, 2)} for name, seen in split.items()
    }
    results = results_of(runs, "base")
    compared = results.summary["paired_n"].notna()
    assert compared.loc["same", "final"] and compared.loc["other", "final"]
    assert compared.loc["same", "forgetting"] and not compared.loc["other", "forgetting"]
    notes = {table.caption.split(",")[0]: table.note for table in difference_tables(results)}
    assert "other (tasks" in notes["forgetting"] and notes["A_N"] == ""
    assert results.best("final") and not results.best("forgetting")
    del runs["other"]
    assert results_of(runs, "base").best("forgetting")


def test_one_seed_with_and_without_a_baseline(tmp_path):
    runs = {"a": {1: invented(1, 40)}, "b": {1: invented(1, 42)}, "c": {2: invented(2, 42)}}
    assert "differences.png" not in [path.name for path in write(tmp_path, runs, baseline=None)]
    markdown, html = (tmp_path / "summary.md").read_text(), (tmp_path / "report.html").read_text()
    assert "Differences" not in markdown + html and "p (t)" not in html and "nan" not in markdown.lower()
    assert "±" not in markdown.split("## Means over seeds")[1].split("##")[0]
    row = read_csv(tmp_path / "summary.csv").loc["a", "final"]
    assert row["n"] == "1" and {row[key] for key in ("std", "low95", "p_t", "baseline")} == {""}
    results = results_of(runs, "a")
    table = difference_tables(results)[0]
    difference = results.values("b", "final")[1] - results.values("a", "final")[1]
    expected = ["b", "1", f"{difference:+.2f}", "–", "–", "–", "–", "one seed"]
    assert [[entry.text for entry in row] for row in table.rows] == [expected]
    assert table.note == "Not compared: c (no seed in common)."
    assert not any("against the baseline" in name for name, _ in facts(results, {}))
    alone = " ".join(reading_notes(results_of(runs, "c")))
    assert "Not compared: a (no seed in common); b" in alone and "paired by seed" not in alone


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text outside the style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # well-formed

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


def test_the_page_stands_alone_and_escapes_what_users_wrote(written):
    html = (written[0] / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "a", "memory", "matter"}
    attributes = [pair for _, pairs in page.tags for pair in pairs.items()]
    loaded = [value for key, value in attributes if key in ("src", "srcset", "href", "data", "style")]
    assert len(loaded) == len(FILES) and all(value.startswith("data:image/png;base64,") for value in loaded)
    rest = re.sub(r"base64,[^\"]*", "", html)
    assert "url(" not in rest and "@import" not in rest and "http" not in rest
    assert page.text.count(EVIL) >= 3 and "Does rank <matter>?" in page.text


def test_both_texts_say_what_was_compared_on_what_and_what_is_missing(written):
    page = " ".join(Page((written[0] / "report.html").read_text()).text.split())
    markdown = (written[0] / "summary.md").read_text()
    said = ["lower is better", NOTE, "tiny_vit.mri", "1993, 1994, 1995, 1996", "nested: 1993, 1994, 1996"]
    said += ["nested, seed 1995", "out of <memory>", "not started", "python main.py --config cells/4.json"]
    for text in (page, markdown.replace("\\", "")):
        assert [part for part in said if part not in text] == []
    assert "```bash\n# base\npython main.py --config cells/0.json\n# nested\n" in markdown


def test_markdown_tables_are_whole_whatever_a_cell_is_called(written, tmp_path):
    markdown = (written[0] / "summary.md").read_text()
    blocks = [block.split("\n") for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 1 + 4 and len(blocks[0]) == 2 + 5
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1
    assert r"| a\|b \<script>alert(" in blocks[0][-1]
    names = {"rank=nested_lora_8, R&D <3": "rank=nested_lora_8, R&D <3", "_a_ &lt; <b>": r"\_a\_ \&lt; \<b>"}
    names |= {"# x\n- y": r"\# x - y"}
    names["a|b"] = r"a\|b"
    keys = plain_table(["key", *names], [["seed", "", "1", "2", "3"]])
    write(tmp_path, {name: {1: invented(1, 40)} for name in names}, None, keys=keys)
    above, table = (tmp_path / "summary.md").read_text().split("## Means over seeds")
    assert [f"\n| {shown} | 1 |" in table for shown in names.values()] == [True] * 4
    heading = f"| key | {' | '.join(names.values())} |"
    assert f"{heading}\n| --- | ---: | ---: | ---: | ---: |\n| seed |  | 1 | 2 | 3 |\n\n" in above


def test_the_same_input_gives_the_same_bytes_and_old_figures_go(tmp_path, written):
    shuffled = {name: dict(reversed(results.items())) for name, results in table_of_runs().items()}
    first = {path.name: path.read_bytes() for path in written[1]}
    assert {path.name: path.read_bytes() for path in write(tmp_path, shuffled, unfinished=REASONS)} == first
    write(tmp_path, {"joint": {1: invented(1, 40, tasks=1)}}, baseline=None)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["bars.png"]


def test_what_cannot_be_reported_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="4 with seed 1, 3 with seed 2"):
        results_of({"a": {1: invented(1, 40), 2: invented(2, 40, tasks=3)}})
    (tmp_path / "sweep").write_text("a file")
    with pytest.raises(UserError, match="cannot write the report into"):
        write(tmp_path / "sweep", {"a": {1: invented(1, 40, tasks=1)}}, None)
