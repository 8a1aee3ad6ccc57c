"""Benchmark of a configuration: training steps and tests, in forward passes of the plain timm network.

    python main.py --benchmark --config exps/nested_lora_cifar.json
    python main.py --benchmark --config X.json --set precision=bf16 --repeats 7 --profile trace/

The unit is one forward pass of the unchanged timm network over the same images in the same dtype, timed next
to every measurement; a figure is the median over repeats. The learner goes through its tasks as in a run,
with some steps of each phase instead of all; growing methods grow in every task. Weights are random and
images generated, since neither changes a time, so nothing is downloaded. A benchmark is for people: no test
depends on a time.
"""

import itertools
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from models.methods import SCHEMAS
from models.phase import Phase, PhaseProgress
from models.saved.learner import make_learner
from models.vit.config import ClassIncrementalConfig, StepKeys
from models.vit.sources import load_data_and_backbone
from utils.config.loading import config_from_dict
from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.runs.run_log import SilentLog
from utils.wording import counted

STAND_INS = {  # for data and weights
    "dataset": "synthetic",
    "init_cls": 1,
    "increment": 1,
    "max_train_per_class": None,
    "max_test_per_class": None,
    "max_tasks": None,
    "weights": "random",
}
TASKS = (0, 1, 5)  # that are measured; a growing block has 1, 2 and 6 adapters after them
CEILING_SIDE = (
    2048  # of the square matrices whose product shows what a CPU can do; a GPU gets four times that
)
Work = Callable[[], object]

logger = logging.getLogger("nested_lora")


def benchmark(config: RunConfig, repeats: int, profile: Path | None = None) -> Iterator[str]:
    """The table of a configuration, line by line.

    Args:
        config: of a class-incremental method.
        repeats: of every measurement.
        profile: folder for a trace of a training step of task 0, to be opened in ui.perfetto.dev.

    Raises:
        UserError: the method has no pretrained network.
    """
    if not isinstance(config, ClassIncrementalConfig):
        fault = f"model_name = {config.model_name!r} has no pretrained network to measure against"
        raise UserError(f"--benchmark: {fault}; allowed: a class-incremental method")
    with tempfile.TemporaryDirectory() as scratch, only_warnings():
        values = config.model_dump() | STAND_INS | {"cache_root": scratch}
        if "filepath" in values:  # nothing is left behind
            values["filepath"] = None
        if "cache_views" in values:  # stored activations are measured as stored
            values["cache_views"] = max(1, values["cache_views"])
        if values.get("expansion") == "novelty":
            values["expansion"] = "always"
        yield from Benchmark(config_from_dict(values, SCHEMAS, "benchmark").config, repeats, profile).lines(
            Path(scratch)
        )


class Benchmark:
    """Measurements of one learner next to the plain network it stands on.

    Args:
        config: with generated data and random weights.
        repeats, profile: as for `benchmark`.
    """

    def __init__(self, config: ClassIncrementalConfig, repeats: int, profile: Path | None) -> None:
        self.learner, self.repeats, self.profile = make_learner(config), repeats, profile
        self.config, data = self.learner.config, self.learner.data
        self.plain = load_data_and_backbone(self.config, self.learner.context)[1].vit
        self.plain.to(self.learner.device).eval()
        self.batch_size = config.batch_size if isinstance(config, StepKeys) else config.eval_batch_size
        chosen = data.indices(range(1), "train")[: self.batch_size]
        self.images = data.views(chosen, "train", "train", ("benchmark",), self.learner.device)
        self.unit_seconds: list[float] = []  # per image

    def lines(self, folder: Path) -> Iterator[str]:
        """Measure tasks 0, 1 and 5, and say what share of the device's rate they reach."""
        learner, config = self.learner, self.config
        learner.context.log = SilentLog(folder)
        threads, version = torch.get_num_threads(), torch.__version__
        size = learner.data.train_view.image_size
        yield f"{config.backbone_type}, {size} px, batch {self.batch_size}, {config.precision}"
        beside = f"{counted(threads, 'thread')}, torch {version}"
        yield f"{learner.device}, {beside}; medians of {counted(self.repeats, 'repeat')}"
        yield "in plain forwards per image (least - most)"
        yield ""
        for task in range(min(max(TASKS) + 1, learner.nb_tasks)):
            rows: list[str] = []
            learner.run_phase = lambda phase, rows=rows: self.measure_phase(phase, rows)
            learner.begin_task(task)
            learner.train_task()
            if task in TASKS:
                yield from rows
                adapters = max(learner.network.adapters_per_block().values(), default=0)
                yield self.measure(
                    f"task {task}: test, up to {adapters} adapters per block", self.evaluate, len(self.images)
                )
        rate = self.ceiling()
        with FlopCounterMode(display=False) as counter:
            self.forward()
        flops = counter.get_total_flops() / statistics.median(self.unit_seconds) / len(self.images)
        yield ""
        yield f"plain forward: {1 / statistics.median(self.unit_seconds):.1f} images/s"
        yield (
            f"  {flops / 1e9:.0f} GFLOP/s, {100 * flops / rate:.0f} % "
            f"of a large matrix product's {rate / 1e9:.0f}"
        )

    def measure_phase(self, phase: Phase, rows: list[str]) -> None:
        """Some steps of a phase in place of all."""
        learner = self.learner
        full = range(max(1, phase.steps_per_epoch - 1))  # the last batch of an epoch may be smaller
        batches = (
            batch
            for epoch in itertools.count()
            for _, batch in zip(full, phase.batches(epoch % max(1, phase.epochs), 0), strict=False)
        )

        def step() -> None:
            learner.take_step(phase, PhaseProgress(), next(batches))

        if self.profile is not None:
            self.profile.mkdir(parents=True, exist_ok=True)
            with torch.profiler.profile(record_shapes=True, acc_events=True) as profiler:
                step()
            profiler.export_chrome_trace(str(self.profile / "trace.json"))
            self.profile = None
        if learner.task in TASKS:
            block = "" if phase.block is None else f", block {phase.block}"
            count = learner.data.count(learner.classes, "train")
            images = min(self.batch_size, count)
            rows.append(self.measure(f"task {learner.task}: step of phase {phase.name}{block}", step, images))
        else:
            step()
        learner.progress.phases += 1

    def measure(self, name: str, work: Work, images: int) -> str:
        """One row: the work, on so many images, next to the plain forward."""
        work()  # warm up
        ratios = []
        for _ in range(self.repeats):
            unit = seconds(self.forward) / len(self.images)
            self.unit_seconds.append(unit)
            ratios.append(seconds(work) / images / unit)
        return f"{name:<52}{statistics.median(ratios):>9.4f}  ({min(ratios):.4f} - {max(ratios):.4f})"

    @torch.no_grad()
    def forward(self) -> None:
        """The unit: a forward pass of the plain network."""
        with self.learner.autocast():
            self.plain(self.images)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Images through network and classifier, nothing stored."""
        self.learner.classify(self.learner.features(self.images))

    def ceiling(self) -> float:
        """Floating point operations per second of a large square matrix product, the best of the repeats."""
        device = self.learner.device
        side = CEILING_SIDE if device.type == "cpu" else 4 * CEILING_SIDE
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / min(seconds(lambda: left @ right) for _ in range(max(3, self.repeats)))


@contextmanager
def only_warnings() -> Iterator[None]:
    """The learner's log lines are left out, so that the table stays in one piece."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def seconds(work: Work) -> float:
    """Wall-clock seconds of one call, until the device has finished."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(1).mean
