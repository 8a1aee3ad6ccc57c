"""The benchmarks' tables are complete, and those of docs/performance.md. No test depends on a time."""

import importlib.util
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from models import SCHEMAS
from models.benchmark import benchmark
from tests.conftest import ROOT
from utils.config.loading import load_config
from utils.errors import UserError
from utils.sweeps.costs import run_cost, run_costs
from utils.sweeps.spec import load_sweep

TINY = [
    "backbone_type=test_vit",
    "weights=random",
    "image_size=32",
    "eval_batch_size=8",
    "device=cpu",
]
COSTS = ROOT / "exps/sweeps/costs.json"
SCRIPT = importlib.util.spec_from_file_location("gpu_check", ROOT / "docs/gpu_check.py")
gpu_check = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(gpu_check)


def lines_of(path: str, *overrides: str, profile: Path | None = None) -> list[str]:
    return list(lines_as_they_come(path, *overrides, profile=profile))


def lines_as_they_come(path: str, *overrides: str, profile: Path | None = None) -> Iterator[str]:
    config = load_config(ROOT / path, [*TINY, *overrides], SCHEMAS).config
    return benchmark(config, 1, profile)


def names(lines: Iterable[str]) -> list[str]:
    """Names of the rows: they are followed by a number."""
    return [found[1] for line in lines if (found := re.match(r"(\S.*?) {2,}[\d.]+", line))]


def test_the_documents_table_has_the_rows_that_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a growing method, SD-LoRA and a head in closed form; nothing is left behind or told between rows."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "nested_lora"):
        tables = [
            lines_of("exps/smoke.json", "head=fc", "batch_size=8"),
            lines_of("exps/sdlora_c100_baseline.json", "lora_rank=2", "batch_size=4"),
            lines_of("exps/baselines/ranpac_cifar.json", "ranpac_dim=20"),
        ]
    assert caplog.messages == [] and list(tmp_path.iterdir()) == []
    printed = [name for table in tables for name in names(table)]
    assert len(printed) > len(set(printed)) > 20
    assert "sema: step of a later task, 6 adapters" in printed
    assert "sdlora: evaluation, 19 adapters" in printed
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", page.split("## What everything costs")[1].split("\n## ")[0], re.M)
    cells = [cell.name for cell in load_sweep(COSTS, [], SCHEMAS).cells]
    assert set(rows[2:]) == {*printed, "start-up of a process", *cells}


def test_what_is_measured_in_place_of_the_configuration_is_told() -> None:
    """Fixed views instead of new ones, and growth in every task; nothing where that is what it says."""

    def head(path: str, *changes: str) -> str:
        return "\n".join(itertools.islice(lines_as_they_come(path, "batch_size=4", *changes), 4))

    replaced = 'cache_views 1 in place of 0, expansion "always" in place of "novelty"'
    assert replaced in head("exps/smoke.json", "cache_views=0")
    assert "in place of" not in head("exps/smoke.json", "cache_views=2", "expansion=always")
    assert "in place of" not in head("exps/baselines/ranpac_cifar.json")


def test_a_trace_opens_and_one_task_is_enough(tmp_path: Path) -> None:
    lines = lines_of("exps/baselines/joint_cifar.json", "batch_size=4", profile=tmp_path)
    assert "joint: step of task 0, 1 adapter, share" in names(lines)
    assert '"traceEvents"' in (tmp_path / "trace.json").read_text()


def test_a_run_on_grids_is_a_sentence() -> None:
    config = load_config(ROOT / "exps/shared_subspace_small.json", [], SCHEMAS).config
    with pytest.raises(UserError, match="pretrained network"):
        list(benchmark(config, 1))


def test_whole_runs_are_processes_with_a_row_each(tmp_path: Path) -> None:
    """Of a run that fails the last line is told."""
    cell = {"max_tasks": 1, "max_train_per_class": 2, "max_test_per_class": 2}
    tiny = dict(pair.split("=") for pair in TINY if "size" not in pair) | {"image_size": 32}
    sweep = {
        "base": str(ROOT / "exps/baselines/simplecil_cifar.json"),
        "set": tiny,
        "cells": {"tiny": cell, "left out": {}},
    }
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(sweep))
    assert names(run_costs(path, [], SCHEMAS, ["tiny"], 1)) == ["start-up of a process", "tiny"]
    with pytest.raises(UserError, match="tiny.*exit code 1.*no room"):
        run_cost("tiny", ["-c", "raise SystemExit('no room')"], os.environ)


def test_the_gpu_check_runs_on_a_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    """With small benchmarks and one of its runs; the others load, and a mistake is its exit code."""
    settings = ["device=cpu", "precision=bf16"]
    benchmarks = {"exps/sdlora_c100_baseline.json": [*TINY, "lora_rank=2", "batch_size=4"]}
    assert gpu_check.check(settings, benchmarks, gpu_check.RUNS[2:3], repeats=1) == 0
    printed = capfd.readouterr().out
    assert "sdlora: step of task 0, 1 adapter, share" in printed and "Everything ran" in printed
    for file, changes in [*gpu_check.BENCHMARKS.items(), *gpu_check.RUNS]:
        load_config(ROOT / file, [*changes, *settings], SCHEMAS)
    assert gpu_check.check(["batch_size=0"], benchmarks, [], repeats=1) == 2
