"""Choice of the instruction set of PyTorch's CPU kernels, made before PyTorch is imported.

choose_cpu_kernels("avx2")     # AVX2 also where the CPU has AVX512, for the same rounding on both
"""

import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")  # of Linux
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # PyTorch's own kernels, oneDNN, MKL


def choose_cpu_kernels(name: str, cpu_info: Path = CPU_INFO) -> None:
    """Set environment variables that PyTorch and its libraries read at their first computation.

    "auto" undoes an earlier choice. Nothing is set on a CPU without AVX2, which rounds differently anyway.
    """
    if name == "auto":
        if AVX2.items() <= os.environ.items():
            for variable in AVX2:
                del os.environ[variable]
        return
    lacking = cpu_info.is_file() and "avx2" not in cpu_info.read_text(encoding="utf-8", errors="replace")
    if platform.machine().lower() in ("x86_64", "amd64") and not lacking:
        os.environ.update(AVX2)
