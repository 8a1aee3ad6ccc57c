"""`eval.py --compare`: groups, names, pairs, tables and refusals, on invented runs."""

import csv
import itertools
import json
import os
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest

import eval as evaluation
from models import SCHEMAS
from tests.conftest import ROOT
from tests.test_eval import finished
from tests.utils.reports.test_report import NOTE, invented
from tests.utils.runs.test_manifest import record
from utils.config.loading import load_config
from utils.sweeps.comparison import group_names

Capture = pytest.CaptureFixture[str]
ADAPTER = {"ffn_adapter_type": "adaptmlp", "ffn_num": 8}

pytestmark = pytest.mark.usefixtures("quick_pictures")


def with_level(folder: str, seed: int, level: float, tasks: int = 4) -> str:
    (Path(folder) / "result.json").write_text(json.dumps(invented(seed, level, tasks)))
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two experiments, nested (seeds 1, 2, 3) and a better adapter (2, 3, 4), one run of it unfinished.

    A run was exported, and the folder of another was never finished: their config.json are no runs.
    """
    for seed in (1, 2, 3):
        finished(tmp_path / f"nested_{seed}", seed, {"code_sha256": "f" * 64})
    for seed in (2, 3, 4, 5):
        folder = finished(
            tmp_path / f"zadapter_{seed}", seed, **ADAPTER, nested_lora_rank=seed, prefix=f"p{seed}"
        )
        with_level(folder, seed, 50)
    (tmp_path / "zadapter_5/result.json").unlink()
    for none in (tmp_path / "nested_1/export/timm", tmp_path / ".nested_4.new"):
        none.mkdir(parents=True)
        (none / "config.json").write_text("{}")
    return tmp_path


def final(seed: int, level: float) -> float:
    return invented(seed, level)["metrics"]["final"]


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def compared(capsys: Capture, *arguments: object) -> str:
    assert evaluation.main(["--compare", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: Capture, *arguments: object) -> str:
    assert evaluation.main(["--compare", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and "Traceback" not in shown.err and "±" not in shown.out
    return shown.err


def test_runs_are_grouped_by_what_differs_and_paired_by_seed(logs: Path, capsys: Capture) -> None:
    """Also runs of other code. Keys without effect (rank of an adapter that is not nested) make no group."""
    shown = compared(capsys, logs, "--out", logs / "out")
    mean = statistics.fmean(final(seed, 50) for seed in (2, 3, 4))
    row = next(line for line in shown.splitlines() if line.startswith("ffn_adapter_type=adaptmlp "))
    assert f"{mean:.2f} ±" in row and row.split()[1] == "3"
    assert f"left out, no result.json: {logs / 'zadapter_5'}" in shown and shown.count("left out") == 1
    assert str(logs / "out/report.html") in shown and (logs / "out/figures/curves.png").is_file()
    rows = {(row["cell"], row["metric"]): row for row in summary(logs / "out")}
    row = rows["ffn_adapter_type=adaptmlp", "final"]
    difference = statistics.fmean(final(seed, 50) - final(seed, 40) for seed in (2, 3))
    assert row["baseline"] == "ffn_adapter_type=nested_lora" and row["paired_n"] == "2"
    assert float(row["difference"]) == pytest.approx(difference)
    groups = json.loads((logs / "out/comparison.json").read_text())["groups"]
    assert groups["ffn_adapter_type=nested_lora"]["1"] == str(logs / "nested_1")
    assert "nested_lora_rank" in shown and "The code changed between runs" in shown


def test_the_baseline_is_a_name_or_a_run(logs: Path, capsys: Capture) -> None:
    for baseline in ("ffn_adapter_type=adaptmlp", logs / "zadapter_3"):
        compared(capsys, logs, "--baseline", baseline, "--out", logs / "out")
        assert {row["baseline"] for row in summary(logs / "out")} == {"ffn_adapter_type=adaptmlp"}
    assert "ffn_adapter_type=nested_lora" in refused(capsys, logs, "--baseline", "nested")


def test_latex_and_markdown_hold_a_table_and_nothing_else(logs: Path, capsys: Capture) -> None:
    latex = compared(capsys, logs, "--latex", "--out", logs / "out").splitlines()
    table = [line for line in latex if not line.startswith("%")]
    assert table[0].startswith("\\begin{tabular}") and table[-1] == "\\end{tabular}"
    assert {"\\toprule", "\\midrule", "\\bottomrule"} < set(table)
    (best,) = [line for line in table if "adaptmlp" in line]
    mean = statistics.fmean(final(seed, 50) for seed in (2, 3, 4))
    assert re.search(rf"\\textbf{{{mean:.2f} \$\\pm\$ [\d.]+}}", best)
    assert re.search(r"(?<!\\)[_%±]", "".join(table).replace("$A_N$", "")) is None
    markdown = compared(capsys, logs, "--markdown", "--out", logs / "out")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.count(" | ") for row in rows}) == 1 and len(rows) == 4
    assert f"**{mean:.2f} ±" in markdown


def test_the_note_on_weights_stands_beside_a_comparison(logs: Path, capsys: Capture) -> None:
    for form in ([], ["--latex"], ["--markdown"]):
        assert compared(capsys, logs, *form, "--out", logs / "out").lower().count(NOTE.lower()) == 1


def test_a_mean_of_different_experiments_is_refused_with_the_command_that_compares(
    logs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both have the same seed."""
    monkeypatch.chdir(logs)
    assert evaluation.main(["--run", "nested_2", "zadapter_2"]) == 2
    told = capsys.readouterr().err
    assert 'ffn_adapter_type ("nested_lora" and "adaptmlp")' in told and "seed 2" not in told
    command = shlex.split(told.partition("compare them: ")[2])
    assert command == ["python", "eval.py", "--compare", "nested_2", "zadapter_2"]
    assert "ffn_adapter_type=adaptmlp" in compared(capsys, *command[3:])
    assert list((logs / "logs/comparisons").glob("*/report.html"))


def test_what_cannot_be_compared_is_a_sentence(logs: Path, capsys: Capture) -> None:
    """Also a folder of something else, which is not written over."""
    first = logs / "nested_1"
    before = sorted(first.iterdir())
    assert "--out" in refused(capsys, logs, "--out", first) and sorted(first.iterdir()) == before
    assert "--run" in refused(capsys, first, logs / "nested_2")  # one experiment
    told = refused(capsys, first, logs / "zadapter_5")
    assert "1 finished run," in told and f"unfinished: {logs / 'zadapter_5'}" in told
    again = finished(logs / "again", 1)
    assert again in refused(capsys, first, logs / "zadapter_2", again)
    assert str(logs / "nothing") in refused(capsys, logs / "nothing")
    other = finished(logs / "split", 1, increment=5)
    assert "increment (2 and 5)" in refused(capsys, first, other)
    data = {"data": {"name": "other", "sha256": "f" * 64}}
    other = finished(logs / "data", 1, data, **ADAPTER)
    assert "dataset (" in refused(capsys, first, other)
    other = finished(logs / "extended", 1, data, extra_data=["birds"], **ADAPTER)
    assert "+ birds" in refused(capsys, first, other)
    grids = load_config(ROOT / "exps/shared_subspace_small.json", [], SCHEMAS).config
    record(logs / "grids")
    (logs / "grids/config.json").write_text(grids.model_dump_json())
    result = invented(1, 40)
    result["metrics"][grids.metrics[0].key] = 1.0
    (logs / "grids/result.json").write_text(json.dumps(result))
    assert "metric (" in refused(capsys, first, logs / "grids")


def test_all_classes_at_once_may_stand_beside_several_tasks(logs: Path, capsys: Capture) -> None:
    joint = with_level(finished(logs / "joint", 1, init_cls=8, increment=8), 1, 70, tasks=1)
    manifest = logs / "nested_1/manifest.json"
    for folder in (logs / "nested_1", Path(joint)):
        content = json.loads(manifest.read_text()) | {"class_order": list(range(8))}
        (folder / "manifest.json").write_text(json.dumps(content))
    shown = compared(capsys, logs / "nested_1", joint, "--out", logs / "out")
    assert "init_cls=8" in shown


def test_a_limit_on_tasks_that_leaves_out_none_is_no_other_data(logs: Path, capsys: Capture) -> None:
    """Four tasks of two classes, which one run gives as its limit, and three classes of another data set."""
    order = {"class_order": list(range(11))}
    folders = [
        finished(logs / name, 1, order, extra_data=["birds"], **keys)
        for name, keys in (("all", {}), ("most", ADAPTER | {"max_tasks": 4}))
    ]
    for folder in map(Path, folders):
        result = invented(1, 40, tasks=5) | {"classes_seen": [2, 4, 6, 8, 11]}
        (folder / "result.json").write_text(json.dumps(result))
    assert "max_tasks=4" in compared(capsys, *folders, "--out", logs / "out")


def test_a_comparison_that_was_killed_is_written_again(
    logs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, itertools.count()

    def dies(*paths: Path) -> None:
        if next(calls):  # the first file is there
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        assert evaluation.main(["--compare", str(logs), "--out", str(logs / "out")]) == 130
    compared(capsys, logs, "--out", logs / "out")


@pytest.mark.parametrize(
    ("experiments", "names"),
    [
        (
            [{"rank": 4, "lr": 0.1}, {"rank": 8, "lr": 0.1}, {"rank": 4, "lr": 0.2}],
            ["rank=4, lr=0.1", "rank=8, lr=0.1", "rank=4, lr=0.2"],
        ),
        (
            [{"kind": "a"}, {"kind": "b", "rank": 4}, {"kind": "b", "rank": 8}],
            ["kind=a", "kind=b, rank=4", "kind=b, rank=8"],
        ),
        ([{"kind": "a", "rank": 4, "lr": 1}, {"kind": "a", "lr": 2}], ["lr=1", "lr=2"]),
    ],
)
def test_a_name_has_few_keys_that_tell(experiments: list[dict[str, Any]], names: list[str]) -> None:
    one = [{"model_name": "m"} | experiment for experiment in experiments]
    assert group_names(one) == names
    assert group_names([*one, {"model_name": "n"}]) == [*(f"m, {name}" for name in names), "n"]
