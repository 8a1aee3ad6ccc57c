"""The benchmark's table is complete, for methods of every kind. No test depends on a time."""

import logging
import re
from pathlib import Path

import pytest

from models import SCHEMAS
from models.benchmark import benchmark
from tests.conftest import ROOT
from utils.config.loading import load_config
from utils.errors import UserError

TINY = [
    "backbone_type=test_vit",
    "weights=random",
    "image_size=32",
    "batch_size=8",
    "eval_batch_size=8",
    "device=cpu",
]


def rows(path: str, *overrides: str, profile: Path | None = None) -> list[str]:
    config = load_config(ROOT / path, [*TINY, *overrides], SCHEMAS).config
    return list(benchmark(config, 1, profile))


def named(lines: list[str]) -> list[str]:
    return [re.split(r"\s{2,}", line)[0] for line in lines if re.search(r"\d\.\d{4}  \(", line)]


def test_the_table_of_a_growing_method_is_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of both phases of task 0, of each growth of later tasks, tests, and a trace that opens."""
    with caplog.at_level(logging.INFO, "nested_lora"):
        lines = rows("exps/smoke.json", profile=tmp_path / "trace")
    assert caplog.messages == []  # nothing between the rows
    assert named(lines) == [
        "task 0: step of phase func",
        "task 0: step of phase rd",
        "task 0: test, up to 1 adapters per block",
        *(f"task 1: step of phase {phase}, block {block}" for block in (4, 5) for phase in ("func", "rd")),
        "task 1: test, up to 2 adapters per block",
        *(f"task 5: step of phase {phase}, block {block}" for block in (4, 5) for phase in ("func", "rd")),
        "task 5: test, up to 6 adapters per block",
    ]
    assert "images/s" in lines[-2] and "%" in lines[-1]
    assert '"traceEvents"' in (tmp_path / "trace" / "trace.json").read_text()


@pytest.mark.parametrize(
    ("path", "overrides", "measured"),
    [("exps/sdlora_c100.json", ["lora_rank=2"], 6), ("exps/baselines/simplecil_cifar.json", [], 3)],
)
def test_the_table_of_other_methods(
    path: str, overrides: list[str], measured: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(named(rows(path, *overrides))) == measured
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_run_on_grids_is_a_sentence() -> None:
    config = load_config(ROOT / "exps/shared_subspace_small.json", [], SCHEMAS).config
    with pytest.raises(UserError, match="pretrained network"):
        list(benchmark(config, 1))
