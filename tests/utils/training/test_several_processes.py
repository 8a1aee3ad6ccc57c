"""Two processes with gloo train what one does on the same global batches: same growth, one log, resumable."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, command, folder_of
from tests.crash import run, run_together
from utils.runs.run_log import read_metrics

CHANGES: dict[str, Any] = {
    **TINY,
    "max_tasks": 3,
    "func_epoch": 2,
    "exp_threshold": 0.5,
    "adapter_blocks": "growing",
    "cache_views": 1,
    "batch_size": 7,  # shares of unlike size, and a last batch of four
    "max_train_per_class": 9,
}
ALL_LEARN: dict[str, Any] = {
    "cache_views": 0,
    "adapter_blocks": "all",
    "nested_lora_freeze": "never",
    "rd_views": 0,
    "detect_batch_size": 17,  # of 18 images: one process has no image of the last batch
}


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(folder) if event["event"] == "epoch"]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same growth at the same points, the same accuracies, losses to rounding."""
    result, expected = (json.loads((folder / "result.json").read_text()) for folder in (ours, theirs))
    for key in ("accuracy", "adapters", "parameters"):
        assert result[key] == expected[key]
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)  # calibration, likelihood
    records = [read_metrics(folder) for folder in (ours, theirs)]
    kinds = [[(e["event"], e.get("task"), e.get("block")) for e in record] for record in records]
    assert kinds[0] == kinds[1]
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, ALL_LEARN],
    ids=["stored activations", "images"],
)
def test_two_processes_train_what_one_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert run(command("smoke.json", tmp_path / "one", **CHANGES | changes))[0] == 0
    drawn = CHANGES | changes | {"figure_format": "png"}
    assert run_together(command("smoke.json", tmp_path / "two", **drawn), 2) == [0, 0]
    one, two = folder_of(tmp_path / "one"), folder_of(tmp_path / "two")
    assert sum(json.loads((one / "result.json").read_text())["adapters"].values()) > 2
    assert_same_run(two, one)
    assert len(list((tmp_path / "two").rglob("*.log"))) == 1 and list((two / "figures").iterdir())
    assert json.loads((two / "manifest.json").read_text())["sessions"][0]["processes"] == 2


SMALL: dict[str, Any] = {
    "dataset": "synthetic", "init_cls": 2, "increment": 2, "max_tasks": 2, "max_train_per_class": 9,
    "backbone_type": "test_vit", "weights": "random", "image_size": 32, "device": "cpu", "func_epoch": 2,
    "batch_size": 7, "figure_format": "none",
}  # fmt: skip
GROWING = {"adapter_blocks": "growing", "adapt_start_layer": 4, "adapt_end_layer": 5, "cache_views": 1}
METHODS: dict[str, dict[str, Any]] = {
    "aper": {},
    "ease": GROWING,
    "inflora": GROWING | {"lora_rank": 4},
    "moal": {"ranpac_dim": 50, "ema_decay": 0.9},
    "coda_prompt": {"prompt_components": 3, "cache_views": 1},
    "merge_ema": {"ranpac_dim": 50, "init_cls": 3, "eval_batch_size": 13},  # 27 images: as above
    "slca": GROWING,
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_to_compare_with_learn_the_same_in_two_processes(method: str, tmp_path: Path) -> None:
    for place, processes in (("one", 1), ("two", 2)):
        arguments = command(f"methods/{method}_cifar.json", tmp_path / place, **SMALL | METHODS[method])
        assert run_together(arguments, processes) == [0] * processes
    assert_same_run(folder_of(tmp_path / "two"), folder_of(tmp_path / "one"))


def test_a_run_is_extended_together(tmp_path: Path) -> None:
    """Two tasks by one process, the third by two, as the whole by one."""
    assert run(command("smoke.json", tmp_path / "one", **CHANGES))[0] == 0
    assert run(command("smoke.json", tmp_path / "two", **CHANGES | {"max_tasks": 2}))[0] == 0
    half = folder_of(tmp_path / "two")
    again = ["--extend", str(half), "--set", "max_tasks=3", "--set", f"logs_root={tmp_path / 'three'}"]
    assert run_together(again, 2) == [0, 0]
    assert_same_run(folder_of(tmp_path / "three"), folder_of(tmp_path / "one"))


def test_stopped_together_and_resumed_together(tmp_path: Path) -> None:
    """A signal to one process saves once and stops both; both go on to the same end."""
    assert run_together(command("smoke.json", tmp_path / "whole", **CHANGES), 2) == [0, 0]
    cut = command("smoke.json", tmp_path / "cut", **CHANGES)
    assert run_together(cut, 2, die_at=40, how=signal.SIGINT) == [130, 130]
    folder = folder_of(tmp_path / "cut")
    assert not (folder / "result.json").exists() and list((folder / "checkpoints").iterdir())
    assert run_together(["--resume", str(folder)], 2) == [0, 0]
    whole = folder_of(tmp_path / "whole")
    assert_same_run(folder, whole)
    assert losses(folder) == losses(whole)


def test_a_mistake_ends_all_of_them(tmp_path: Path) -> None:
    assert run_together(command("smoke.json", tmp_path, **CHANGES | {"batch_size": 0}), 2) == [2, 2]
    assert list(tmp_path.iterdir()) == []
