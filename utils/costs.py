"""Measuring what work costs, in forward passes of a plain network timed next to it.

clock = Clock(plain_forward(vit, images, context), len(images), device, repeats=5)
for cost in costs:                                # a method names its own: see Learner.costs
    print(clock.measure(cost).line())
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from utils.console import progress

CEILING_SIDE = 2048  # of the square matrices whose product says what the device can do


@dataclass(frozen=True)
class Cost:
    """Something worth measuring.

    Attributes:
        name: what it is, for the table.
        prepare: called once before measuring; brings the network into the state the measurement is about and returns
            the work to time.
        images: images one call of the work is about.
        target: what it should cost at most, in plain forwards an image, or None.
        against: name of an earlier cost that this one is a ratio to, instead of the plain forward.
    """

    name: str
    prepare: Callable[[], Callable[[], object]]
    images: int
    target: float | None = None
    against: str | None = None


@dataclass(frozen=True)
class Measured:
    """A cost as measured: `value` in plain forwards an image (or as a ratio), smallest and largest of the repeats."""

    name: str
    value: float
    low: float
    high: float
    target: float | None

    def line(self) -> str:
        """One row of the table."""
        missed = self.target is not None and self.value > self.target
        goal = "" if self.target is None else f"  target {self.target:g}" + ("  MISSED" if missed else "")
        return f"{self.name:<66}{self.value:>9.4f}  ({self.low:.4f} - {self.high:.4f}){goal}"


class Clock:
    """Times work next to a unit of work, so that a machine that slows down slows both.

    Args:
        unit: the plain forward of `images` images.
        device: waited for where it computes on its own.
        repeats: of every measurement.
    """

    def __init__(self, unit: Callable[[], object], images: int, device: torch.device, repeats: int) -> None:
        self.unit, self.images, self.device, self.repeats = unit, images, device, repeats
        self.unit_seconds: list[float] = []
        self._medians: dict[str, float] = {}  # seconds an image
        self.seconds(unit)  # warm up

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall-clock seconds of one call, until the device has finished."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def measure(self, cost: Cost) -> Measured:
        """The cost in units, or as a ratio to an earlier one."""
        work = cost.prepare()
        work()  # warm up
        ratios, plain = [], []
        for _ in range(self.repeats):
            unit = self.seconds(self.unit)
            self.unit_seconds.append(unit)
            plain.append(self.seconds(work) / cost.images)
            ratios.append(plain[-1] * self.images / unit)
        self._medians[cost.name] = statistics.median(ratios)
        if cost.against is not None:
            ratios = [ratio / self._medians[cost.against] for ratio in ratios]
        return Measured(cost.name, statistics.median(ratios), min(ratios), max(ratios), cost.target)

    @property
    def images_per_second(self) -> float:
        """Of the unit, the median over all its measurements."""
        return self.images / statistics.median(self.unit_seconds)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating point operations per second of a large square matrix product, the best of the repeats."""
    side = CEILING_SIDE if device.type == "cpu" else 4 * CEILING_SIDE
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock = Clock(lambda: left @ right, 1, device, 1)
    return 2 * side**3 / min(clock.seconds(clock.unit) for _ in range(repeats))


def flops_of(work: Callable[[], object]) -> int:
    """Floating point operations of the matrix products and attention in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def trace(work: Callable[[], object], folder: Path) -> Path:
    """Profile one call; the trace opens in chrome://tracing or ui.perfetto.dev."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profiler:
        work()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    return path


def plain_forward(
    network: torch.nn.Module, images: Tensor, context: Callable[[], object]
) -> Callable[[], Tensor]:
    """The unit of work: a forward pass without gradients."""

    @torch.no_grad()
    def work() -> Tensor:
        with context():
            return network(images)

    return work


def measure_all(clock: Clock, costs: Iterable[Cost]) -> list[Measured]:
    """Every cost in turn, in order: an earlier one may bring the network into the state of a later one."""
    return [clock.measure(cost) for cost in progress(list(costs), desc="measuring", unit="cost")]
