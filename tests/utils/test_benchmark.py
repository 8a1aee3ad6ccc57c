"""The benchmark measures what it says, on whatever machine: its table is complete. No test depends on a time."""

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from utils import benchmark
from utils.costs import Clock, Cost, Measured, flops_of

CPU = torch.device("cpu")


class SteppedClock(Clock):
    """A clock whose work takes as many seconds as the work says."""

    def seconds(self, work) -> float:
        return work()


def test_costs_are_in_units_an_image_and_ratios_are_between_them() -> None:
    clock = SteppedClock(lambda: 8.0, images=4, device=CPU, repeats=3)  # 2 seconds an image
    plain = clock.measure(Cost("plain", lambda: lambda: 20.0, images=5, target=2.1))  # 4 seconds an image
    assert (plain.value, plain.low, plain.high) == (2.0, 2.0, 2.0)
    ratio = clock.measure(Cost("ratio", lambda: lambda: 30.0, images=5, against="plain"))
    assert ratio.value == pytest.approx(1.5)
    assert clock.images_per_second == 0.5


def test_a_missed_target_is_said() -> None:
    assert "MISSED" in Measured("x", 2.2, 2.0, 2.4, 2.1).line()
    assert "MISSED" not in Measured("x", 2.1, 2.0, 2.4, 2.1).line()
    assert "target" not in Measured("x", 2.1, 2.0, 2.4, None).line()


def test_flops_of_a_matrix_product() -> None:
    left, right = torch.randn(3, 5), torch.randn(5, 7)
    assert flops_of(lambda: left @ right) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("adapter", ["nested_lora", "adaptmlp"])
def test_the_table_is_complete(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part of a run, each of 1, 6 and 20 adapters, the projection with its sum, and a profile that opens."""
    arguments = [
        "--config",
        str(ROOT / "exps/smoke.json"),
        "--repeats",
        "1",
        "--profile",
        str(tmp_path / "trace"),
    ]
    assert (
        benchmark.main([*arguments, "--set", f"ffn_adapter_type={adapter}", "--sizes", "100", "50", "3"]) == 0
    )
    out = capsys.readouterr().out
    rows = ["functional step of task 0", "descriptors, an epoch", "detection scan", "evaluation, 6 adapters"]
    rows += [f"functional step of a later task, {n} adapters" for n in (1, 6, 20)]
    for row in rows + (["nested against that adapter"] if adapter == "nested_lora" else []):
        assert re.search(rf"{re.escape(row)}.*\d\.\d{{4}}", out), row
    for row in ("plain forward", "functional step of task 0"):
        assert re.search(rf"^  {row} +\d+ %$", out, re.MULTILINE), row
    parts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) image-forwards", out)]
    assert abs(sum(parts[:-1]) - parts[-1]) <= len(parts)
    assert '"traceEvents"' in (tmp_path / "trace" / "trace.json").read_text()


def test_the_table_of_a_method_with_other_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SD-LoRA: steps and evaluation with 1, 10 and 50 adapters, gate included; the projection adds up."""
    tiny = {
        "backbone_type": "test_vit",
        "weights": "random",
        "image_size": 32,
        "lora_rank": 2,
        "batch_size": 8,
    }
    tiny["eval_batch_size"] = 8
    settings = [part for key, value in tiny.items() for part in ("--set", f"{key}={value}")]
    arguments = [
        "--config",
        str(ROOT / "exps/sdlora_c100.json"),
        "--repeats",
        "1",
        *settings,
        "--set",
        "device=cpu",
    ]
    assert benchmark.main([*arguments, "--sizes", "100", "50", "3"]) == 0
    out = capsys.readouterr().out
    for row in [f"{what}, {n} adapters" for what in ("training step", "evaluation") for n in (1, 10, 50)]:
        assert re.search(rf"{row}.*\d\.\d{{4}}", out), row
    assert "50 against 1 adapter" in out and "target 1.02" in out
    parts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) image-forwards", out)]
    assert len(parts) == 4 and abs(sum(parts[:-1]) - parts[-1]) <= 3


def test_a_method_without_costs_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from models.base import Learner
    from models.sema import SEMA

    monkeypatch.setattr(SEMA, "costs", Learner.costs)
    assert benchmark.main(["--config", str(ROOT / "exps/smoke.json"), "--repeats", "1"]) == 2
    assert "names no costs" in capsys.readouterr().err


def test_a_run_of_another_kind_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--config", str(ROOT / "exps/shared_subspace_small.json")]) == 2
    assert "no pretrained network to measure against; allowed: a class-incremental" in capsys.readouterr().err
