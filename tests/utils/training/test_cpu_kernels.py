"""The chosen instruction set reaches PyTorch, and is chosen only where the CPU has it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.training.cpu_kernels import AVX2, choose_cpu_kernels


def has_avx2() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx2" in info.read_text()


@pytest.mark.skipif(not has_avx2(), reason="the CPU has no AVX2, or no Linux tells")
def test_pytorch_computes_with_what_a_config_says() -> None:
    """In a process of its own, through all checks of the config; what its parent chose does not count."""
    script = (
        "import main, sys; main.load(main.parse(sys.argv[1:])); "
        "import torch; print(torch.backends.cpu.get_cpu_capability())"
    )
    command = [sys.executable, "-c", script, "--config", str(ROOT / "exps/smoke.json")]
    found = [
        subprocess.run(
            [*command, "--set", f"cpu_kernels={name}"],
            cwd=ROOT, env=os.environ | AVX2, capture_output=True, text=True, check=True,
        ).stdout.split()
        for name in ("avx2", "auto")
    ]  # fmt: skip
    assert found[0] == ["AVX2"]
    assert found[1] == found[0] or "avx512" in Path("/proc/cpuinfo").read_text()


def test_nothing_is_set_without_avx2_and_auto_undoes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in AVX2:
        monkeypatch.delenv(variable, raising=False)
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("flags : sse4_2 avx\n")
    new.write_text("flags : avx2\n")
    choose_cpu_kernels("avx2", old)
    assert not AVX2.keys() & os.environ.keys()
    choose_cpu_kernels("avx2", new)
    assert platform.machine() != "x86_64" or AVX2.items() <= os.environ.items()
    choose_cpu_kernels("auto")
    assert not AVX2.keys() & os.environ.keys()
