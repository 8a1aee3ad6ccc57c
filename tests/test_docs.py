"""The documents: sizes, links, files and names, commands, ablations, and figures drawn from tables."""

import json
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

import eval as look
import main
from docs import results
from models import SCHEMAS
from tests.conftest import ROOT, TINY, run_scores, shipped_file
from utils.config.loading import load_config
from utils.errors import UserError
from utils.sweeps.spec import load_sweep

PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PATHS += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "exps").rglob("*.md")])
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS)
GENERATED = {"docs/configs.md"}
WIDTH = 110


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------
# Sizes, links, names


def test_readme_is_short_and_narrow() -> None:
    lines = DOCUMENTS["README.md"].splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if len(line) > WIDTH] == []
    assert len(DOCUMENTS["CONTRIBUTING.md"].splitlines()) <= 60


@pytest.mark.parametrize("document", sorted(DOCUMENTS.keys() - GENERATED))
def test_prose_is_narrow(document: str) -> None:
    """Rows of tables are as wide as they need to be; a long link cannot be broken."""
    lines = prose(DOCUMENTS[document]).splitlines()
    assert [line for line in lines if len(line) > WIDTH and not line.startswith("|") and " " in line] == []


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_DOCUMENT
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[document]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_page_and_figure_is_linked() -> None:
    linked = {
        ((ROOT / document).parent / target.partition("#")[0]).resolve()
        for document, text in DOCUMENTS.items()
        for target in re.findall(r"\]\(([^)]+)\)", text)
    }
    assert {path.resolve() for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".png")} <= linked


@EVERY_DOCUMENT
def test_named_files_exist(document: str) -> None:
    """Paths in code quotes, and the files in the table of experiments."""
    own = r"`((?:backbone|models|utils|tests|exps|docs)(?:/\w+)+\.\w+)`"
    for name in re.findall(own, DOCUMENTS[document]):
        assert (ROOT / name).is_file(), name
    if document == "docs/experiments.md":
        for name in set(re.findall(r"`([\w/*]+\.json)`", DOCUMENTS[document])) - {"other.json"}:
            assert list((ROOT / "exps").glob(name)), name


def test_the_tables_that_readme_asks_to_extend_are_where_it_says() -> None:
    """Each `TABLE` of a bullet stands in one of the files that the bullet names."""
    section = DOCUMENTS["README.md"].split("## Add something")[1].split("\n## ")[0]
    named = 0
    for bullet in section.split("\n- ")[1:]:
        files = [ROOT / name for name in re.findall(r"`(\w+/[\w/]+\.py)`", bullet)]
        code = "\n".join(path.read_text() for path in files)
        for table in re.findall(r"`([A-Z]{4,})`", bullet):
            assert re.search(rf"^{table}\b", code, re.MULTILINE), table
            named += 1
    assert named >= 6


def test_where_published_names_went_exists() -> None:
    """Every dotted name of the table can be imported."""
    table = DOCUMENTS["docs/differences.md"].split("## Where published names went")[1]
    names = re.findall(r"`((?:models|backbone|utils)\.[\w.]+)`", table)
    assert len(names) > 10
    assert [name for name in names if pydoc.locate(name) is None] == []


def test_the_tree_in_readme_names_every_room() -> None:
    """Each folder that holds code stands in the tree with what it is."""
    tree = DOCUMENTS["README.md"].split("## The tree")[1].split("```")[1]
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for package in ("backbone", "models", "utils")
        for path in (ROOT / package).rglob("*.py")
    }
    assert folders <= set(re.findall(r"^([\w/]+)/  +\S", tree, re.MULTILINE))


# ---------------------------------------------------------------------------------------------------------
# Commands


def commands(text: str) -> Iterator[tuple[list[str], str]]:
    """(words, comment) of every command: lines of bash blocks, and code quotes that begin with `python`.

    Without the file that a command's output goes to.
    """
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^ *```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    for line in [line for block in blocks for line in block.splitlines()]:
        for part in line.split("&&"):
            yield shlex.split(part, comments=True), line.partition("#")[2]
    for line in re.findall(r"`(python [^`\n]*)`", prose(text)):
        yield shlex.split(line.partition(" > ")[0]), ""


ALL_COMMANDS = [command for text in DOCUMENTS.values() for command in commands(text)]
SLOW = [words for words, comment in ALL_COMMANDS if comment.strip().startswith("slow")]


@EVERY_DOCUMENT
def test_every_command_of_the_docs_is_understood_and_loads(document: str) -> None:
    """But for placeholders such as `X.json`, `...` and `<folder>`; the default where no file is named."""
    for words, _ in commands(DOCUMENTS[document]):
        if "eval.py" in words:
            look.parse(words[words.index("eval.py") + 1 :])
        if "main.py" in words:
            options = main.parse(words[words.index("main.py") + 1 :])
            overrides = [override for override in options.set if "<" not in override]
            for load, file in ((load_config, options.config), (load_sweep, options.sweep)):
                if file and "exps" in Path(file).parts:
                    load(ROOT / file, overrides, SCHEMAS)


def starts_a_run(words: list[str]) -> bool:
    """Whether a command computes more than a report, a listing or figures of a finished run."""
    others = {"--resume", "--extend", "--report", "--ray-address", "--list"}
    return "main.py" in words and others.isdisjoint(words)


def test_every_run_of_the_docs_is_run_by_ci_or_named_slow() -> None:
    executed = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for words, _ in ALL_COMMANDS:
        if starts_a_run(words) and words not in SLOW:
            file = next((word for word in words if word.startswith("exps/")), main.DEFAULT)
            assert file in executed, shlex.join(words)


def test_the_documents_name_commands() -> None:
    """The search above finds them."""
    assert len(ALL_COMMANDS) > 40 and len(SLOW) > 15


# ---------------------------------------------------------------------------------------------------------
# Figures


def test_the_readme_s_figures_are_drawn_from_the_tables(tmp_path: Path) -> None:
    script = ROOT / "docs/figures/draw.py"
    subprocess.run([sys.executable, script, "--to", tmp_path], check=True)
    shown = set(re.findall(r"\(docs/figures/(\w+\.png)\)", DOCUMENTS["README.md"]))
    assert shown and {path.name for path in tmp_path.iterdir()} == shown
    assert all(path.stat().st_size < 100_000 for path in script.parent.glob("*.png"))


def test_the_lines_on_confusions_read_any_class_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTS["docs/runs.md"], re.DOTALL)
    (lines,) = (block for block in blocks if "confusion.csv" in block)
    names = ["cat", "NA", "7"]
    counts = pd.DataFrame([[5, 2, 0], [0, 7, 0], [1, 0, 6]], columns=names)
    counts.insert(0, "true class", names)
    counts.to_csv(tmp_path / "confusion.csv", index=False)
    monkeypatch.chdir(tmp_path)
    scope = {"pandas": pd}
    exec(lines, scope)
    assert scope["counts"].index.tolist() == names and scope["counts"].loc["NA", "NA"] == 7


# ---------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("sweep", results.BASELINES)
def test_tables_of_results_are_those_of_the_kept_runs(sweep: str) -> None:
    assert results.table(sweep, results.BASELINES[sweep]) in DOCUMENTS["docs/experiment_log.md"]


def test_the_table_of_the_answer_is_that_of_the_kept_runs() -> None:
    assert results.answer() in DOCUMENTS["exps/RESULTS.md"]


@pytest.mark.parametrize(
    ("sweep", "told"), [("grocery", "nested mean"), ("answer", "full_cifar"), (None, "full_cifar")]
)
def test_a_cell_that_is_not_kept_is_a_sentence(
    sweep: str | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["results", *([sweep] if sweep else []), "--against", "nested"])
    with pytest.raises(SystemExit, match="2"):
        results.main()
    assert told in capsys.readouterr().err


def test_finished_runs_of_a_sweep_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    table = {"base": str(ROOT / "exps/smoke.json"), "seeds": [1, 2], "set": TINY, "cells": {"nested": {}}}
    (tmp_path / "tiny.json").write_text(json.dumps(table))
    folder = tmp_path / "logs/sweeps/tiny"
    assert main.main(["--sweep", str(tmp_path / "tiny.json"), "--set", f"logs_root={tmp_path / 'logs'}"]) == 0
    kept = results.keep(folder)
    first = kept.read_text()
    assert results.keep(folder).read_text() == first
    runs, summary = pd.read_csv(kept), pd.read_csv(folder / "runs.csv")
    assert runs["seed"].tolist() == [1, 2] and set(runs["cell"]) == {"nested"}
    assert runs["final"].tolist() == pytest.approx(summary["final"].tolist(), abs=1e-4)

    unknown = shutil.copytree(next(folder.rglob("manifest.json")).parent, folder / "runs/renamed")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"prefix": "a cell of an earlier table"}))
    assert results.keep(folder).read_text() == first

    own = next(path.parent for path in folder.rglob("result.json") if path.parent != unknown)
    for suffix in ("_2", ".replaced"):  # repeated by hand; replaced by what is not finished
        beside = shutil.copytree(own, own.with_name(own.name + suffix))
        result = json.loads((beside / "result.json").read_text())
        result["metrics"]["final"] = -1.0
        (beside / "result.json").write_text(json.dumps(result))
    assert results.keep(folder).read_text() == first

    path = own / "manifest.json"  # of a run outside a git checkout
    manifest = json.loads(path.read_text())
    manifest["sessions"][-1]["commit"] = None
    path.write_text(json.dumps(manifest))
    assert pd.read_csv(results.keep(folder))["commit"].isna().any()

    shutil.rmtree(folder / "runs")
    with pytest.raises(UserError, match="no finished run"):
        results.keep(folder)


# ---------------------------------------------------------------------------------------------------------
# Ablations

TABLE = re.compile(
    r"^\| question \| edits of `(\w+)\*\.json` \|\n\| --- \| --- \|\n((?:\|.*\n)+)", re.MULTILINE
)
STAND_IN = {
    "dataset": "synthetic", "init_cls": 2, "increment": 2, "max_tasks": 2, "seed": 1,
    "max_train_per_class": 8, "max_test_per_class": 4, "batch_size": 4, "func_epoch": 3,
    "backbone_type": "test_vit", "weights": "random", "image_size": 32, "adapt_start_layer": 4,
    "adapt_end_layer": 5, "device": "cpu", "precision": "fp32", "cache_gb": 0,
}  # fmt: skip
STAND_IN_ONLY = {
    "nested_lora_cifar": {"rd_epoch": 1, "detect_batch_size": 8},
    "nested_mean_cifar": {"ranpac_dim": 20},
}


def ablations(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """(file, its edits) for every table of ablations; an edit is a list of `key=value`."""
    for file, rows in TABLE.findall(text):
        cells = [row.split("|")[2] for row in rows.splitlines()]
        yield file, [edit.split() for cell in cells for edit in re.findall(r"`([^`]+)`", cell)]


ABLATIONS = dict(ablations(DOCUMENTS["docs/methods.md"]))


def test_the_ablations_of_the_specification_are_named() -> None:
    edits = {part for edits in ABLATIONS.values() for edit in edits for part in edit}
    assert set(ABLATIONS) == set(STAND_IN_ONLY) and sum(map(len, ABLATIONS.values())) >= 25
    for asked in (
        "nested_lora_update_interval_slow=1", "nested_lora_update_interval_slow=10", "nested_lora_rank=8",
        "nested_lora_lr_slow=0.002", "nested_lora_use_consolidation=true",
        "nested_lora_consolidation_alpha=0.05", "nested_lora_consolidation_alpha=0.2",
    ):  # fmt: skip
        assert asked in edits


@pytest.mark.parametrize("file", STAND_IN_ONLY)
def test_every_ablation_changes_what_the_run_predicts(file: str, tmp_path: Path) -> None:
    small = [f"{key}={json.dumps(value)}" for key, value in (STAND_IN | STAND_IN_ONLY[file]).items()]
    small.append(f"logs_root={tmp_path}")
    unedited = run_scores(load_config(shipped_file(file), small, SCHEMAS).config)
    for edit in ABLATIONS[file]:
        config = load_config(shipped_file(file), [*small, *edit], SCHEMAS).config
        assert not config.unused_keys().keys() & {part.split("=")[0] for part in edit}, edit
        assert not torch.equal(run_scores(config), unedited), edit
