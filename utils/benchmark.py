"""What a configuration costs on this machine, in forward passes of the plain timm network.

    python -m utils.benchmark --config exps/nested_lora_cifar.json
    python -m utils.benchmark --config X.json --set precision=bf16 --repeats 7 --profile trace/

The unit is one forward pass of the unchanged timm network over the same images in the same dtype, timed next to every
measurement; every figure is the median over repeats. Speed does not depend on the weights or on what the images show:
the weights are random and the images generated, so nothing is downloaded. The methods say what there is to measure
(`Learner.costs`); this file measures it. A benchmark is for people: no test depends on a time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from utils.config import config_from_dict, load_config
from utils.errors import exit_code
from utils.run_log import SilentLog
from utils.toolkit import keep_freed_memory

STAND_INS = {  # for data and weights: they do not change what anything costs
    "dataset": "synthetic",
    "init_cls": 4,
    "increment": 4,
    "max_train_per_class": None,
    "max_test_per_class": None,
    "max_tasks": None,
    "weights": "random",
}
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


def plain_forward(network: torch.nn.Module, images: Tensor, context: Callable[[], object]) -> Callable[[], Tensor]:
    """The unit of work: a forward pass without gradients."""

    @torch.no_grad()
    def work() -> Tensor:
        with context():
            return network(images)

    return work


def measure_all(clock: Clock, costs: Iterable[Cost]) -> list[Measured]:
    """Every cost in turn, in order: an earlier one may bring the network into the state of a later one."""
    return [clock.measure(cost) for cost in tqdm(list(costs), desc="measuring", unit="cost", leave=False)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description="What a configuration costs on this machine, in plain forward passes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON experiment")
    change = {"action": "append", "default": [], "metavar": "KEY=VALUE", "dest": "overrides", "help": "change a key"}
    parser.add_argument("--set", **change)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of every measurement (default 5)")
    parser.add_argument("--growths", type=float, default=1, metavar="G", help="adapters a later task adds (default 1)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=3,
        default=(5000, 1000, 10),
        metavar=("TRAIN", "TEST", "TASKS"),
        help="images of a task and number of tasks, for the projection (default CIFAR-100 10x10: 5000 1000 10)",
    )
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write a torch profiler trace of a task-0 step")
    return parser.parse_args(arguments)


def report(learner: Any, plain: torch.nn.Module, build: Callable[[Mapping[str, Any]], Any], options: Any) -> None:
    """Measure the learner's costs next to the plain network; print the table, the share of the ceiling, a whole run."""
    config, device, data = learner.config, learner.device, learner.data
    chosen = data.indices(data.task_classes(0), "train")[: config.batch_size]
    images = data.views(chosen, "train", "train", (0,)).to(device)
    work = plain_forward(plain.to(device).eval(), images, learner.autocast)
    clock = Clock(work, len(images), device, options.repeats)
    costs = learner.costs(build)
    measured = measure_all(clock, costs.parts())
    print(f"{config.backbone_type}, {data.train_view.image_size} px, batch {config.batch_size}, {config.precision}")
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.repeats} repeats"
    )
    print(f"plain forward: {clock.images_per_second:.1f} images/s; below, plain forwards an image (least - most)\n")
    for row in measured:
        print(row.line())
    reached = flops_of(work) / clock.images * clock.images_per_second
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    share = 100 * reached / matmul_ceiling(device, dtype)
    print(f"\nplain forward: {reached / 1e9:.0f} GFLOP/s, {share:.0f} % of a large {dtype} matrix product")
    print_projection(costs, measured, clock, options)


def print_projection(costs: Any, measured: list[Measured], clock: Clock, options: Any) -> None:
    """Image-forwards and minutes of a whole run of the sizes that the command line names."""
    train, test, tasks = options.sizes
    values = {row.name: row.value for row in measured}
    parts = costs.projected(values, train=train, test=test, tasks=tasks, growths=options.growths)
    total, speed = sum(parts.values()), clock.images_per_second
    print(
        f"\na run of {tasks} tasks of {train} training and {test} test images, {options.growths:g} growths a later task"
    )
    for name, value in parts.items():
        print(f"  {name:<30}{value:>12,.0f} image-forwards")
    print(f"  {'all':<30}{total:>12,.0f} image-forwards, {total / speed / 60:,.0f} minutes at {speed:.1f} images/s")


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for; the exit code: 0 done, 2 a mistake to mend."""
    # A command line like main.py that stands beside what it uses: only here does it look at the layers above.
    from models import SCHEMAS
    from trainer import assemble, make_learner

    options = parse(arguments)
    keep_freed_memory()

    def run() -> None:
        config = load_config(options.config, options.overrides, SCHEMAS).config
        with tempfile.TemporaryDirectory() as scratch:
            given = config.model_dump() | STAND_INS | {"cache_root": scratch, "cache_views": max(1, config.cache_views)}

            def parts(changes: Mapping[str, Any]) -> Any:
                return assemble(config_from_dict({**given, **changes}, SCHEMAS, "benchmark").config, seed=0)

            def build(changes: Mapping[str, Any]) -> Any:
                return make_learner(parts(changes), SilentLog(Path(scratch)))

            if options.profile:
                path = trace(build({}).costs(build).parts()[0].prepare(), options.profile)
                print(f"profile of one call of the first measurement below: {path}")
            report(build({}), parts({}).backbone.vit, build, options)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
