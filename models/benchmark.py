"""Benchmark of a configuration: time of its steps, relative to a forward of the plain timm network.

    python main.py --benchmark --config exps/nested_lora_cifar.json
    python main.py --benchmark --config X.json --set precision=bf16 --repeats 7 --profile trace/

The unit is one forward pass of the unchanged timm network over the same images in the same precision, timed
just before every measurement; a figure is the median over repeats. The learner goes through its tasks as in a
run, with one step of each phase instead of all; growing methods grow in every task. Weights are random and
images generated, since neither changes a time, so nothing is downloaded. A benchmark is for people: no test
depends on a time. Whole runs are measured by `utils/sweeps/costs.py`.
"""

import itertools
import logging
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from backbone.frozen_block import FrozenLinear
from backbone.frozen_vit import FrozenViT
from models.methods import SCHEMAS
from models.ranpac import RanPACHead
from models.saved.learner import make_learner
from models.vit.config import ClassIncrementalConfig, OneTaskRules, StepKeys
from models.vit.sources import load_backbone
from models.vit.training import train_functional
from utils.config.loading import config_from_dict, refuse_changes
from utils.config.messages import shown
from utils.config.schema import RunConfig
from utils.data.synthetic import write_noise
from utils.errors import UserError
from utils.runs.run_log import SilentLog
from utils.training.device import resolve_device
from utils.training.phase import Phase, PhaseProgress
from utils.wording import counted

COUNTS = (1, 2, 6)  # numbers of adapters per block at which steps and tests are measured; a task adds one
COUNTS_OF = {"sdlora": (1, 19)}  # the same of methods that differ
BATCHES, DEVICE_BATCHES = 2, 16  # in a task on a CPU, and elsewhere, where data workers make some ahead
HEAD_IMAGES, HEAD_CLASSES = 500, 10  # of the task that a ridge head is measured with
OWN = {  # keys of the configuration that is measured, whatever the given one has; None: made in a folder
    "dataset": None, "cache_root": None, "weights": "random", "filepath": None, "extra_data": None,
    "init_cls": 1, "increment": 1, "max_tasks": None, "max_train_per_class": None, "max_test_per_class": None,
    "validation_share": 0.0, "test_share": None, "buffer_size": 3,
}  # fmt: skip
Work = Callable[[], object]

logger = logging.getLogger("nested_lora")


class Cost(NamedTuple):
    """CPU seconds (user and system) of this process, and seconds on the clock."""

    cpu: float
    clock: float


def benchmark(
    config: RunConfig, repeats: int, profile: Path | None = None, overrides: Sequence[str] = ()
) -> Iterator[str]:
    """The table of a configuration, line by line.

    Args:
        repeats: of every measurement.
        profile: folder for a trace of a training step of task 0, to be opened in ui.perfetto.dev.
        overrides: texts `key=value` that the configuration was changed by.

    Raises UserError: the method has no pretrained network, or an override is of a key that is set here.
    """
    refuse_changes(overrides, OWN, "--benchmark")
    if not isinstance(config, ClassIncrementalConfig):
        fault = f"model_name = {config.model_name!r} has no pretrained network to measure against"
        raise UserError(f"--benchmark: {fault}; allowed: a class-incremental method")
    level = logger.level
    logger.setLevel(logging.ERROR)  # without the learner's lines the table stays in one piece
    try:
        with tempfile.TemporaryDirectory() as scratch:
            yield from Benchmark(config, Path(scratch), repeats, profile).lines()
    finally:
        logger.setLevel(level)


def stand_in(config: ClassIncrementalConfig, folder: Path, batches: int) -> ClassIncrementalConfig:
    """The configuration with tasks of one generated class, random weights, fixed views, growth per task."""
    tasks = 1 if isinstance(config, OneTaskRules) else max(COUNTS_OF.get(config.model_name, COUNTS))
    dataset, given = folder / "noise.npz", config.model_dump()
    write_noise(dataset, classes=tasks, train=batches * batch_size(config), test=2)
    values = OWN | {"dataset": str(dataset), "cache_root": str(folder)}
    values["cache_views"] = max(1, given.get("cache_views", 1))
    if given.get("expansion") == "novelty":
        values["expansion"] = "always"
    values = {name: value for name, value in values.items() if name in given}
    return config_from_dict(given | values, SCHEMAS, "benchmark").config


def batch_size(config: ClassIncrementalConfig) -> int:
    """Images of a measurement: a training batch, or where nothing is trained a test batch."""
    return config.batch_size if isinstance(config, StepKeys) else config.eval_batch_size


class Benchmark:
    """Measurements of one learner next to the plain network it stands on.

    folder: for images and stored activations.
    """

    def __init__(
        self, config: ClassIncrementalConfig, folder: Path, repeats: int, profile: Path | None
    ) -> None:
        batches = BATCHES if resolve_device(config.device)[0].type == "cpu" else DEVICE_BATCHES
        learner = self.learner = make_learner(stand_in(config, folder, batches))
        learner.context.log, learner.calibrate = SilentLog(folder), lambda: None
        learner.run_phase = self.measure_phase
        self.given, self.method, self.device = config, config.model_name, learner.device
        self.repeats, self.profile = repeats, profile
        self.plain = load_backbone(learner.config).vit.to(self.device).eval().requires_grad_(False)
        chosen = learner.data.indices(range(1), "train")[: batch_size(config)]
        self.images = learner.data.views(chosen, "train", ("benchmark",), self.device)
        self.forwards: dict[str, float] = {}  # per image, by the name of a row
        self.rows: list[str] = []  # of the open task
        self.nothing_grows = False

    def lines(self) -> Iterator[str]:
        """The table: costs per image, shares of the rate of matrix products, cost of a ridge head."""
        learner, threads = self.learner, counted(torch.get_num_threads(), "thread")
        config, size = learner.config, learner.data.train_view.image_size
        yield f"{config.backbone_type}, {size} px, batch {len(self.images)}, {config.precision}"
        yield f"{self.device}, {threads}, torch {torch.__version__}; medians of {self.repeats}"
        if replaced := self.replaced():
            yield f"measured with {', '.join(replaced)}"
        yield ""
        yield f"{'per image':<52}{'forwards':>9}{'min - max':>19}{'CPU ms':>10}{'ms':>10}"
        yield self.per_image("plain forward", self.forward, len(self.images))
        for task in range(learner.nb_tasks):
            learner.begin_task(task)
            learner.train_task()
            yield from self.rows
            self.rows.clear()
            name = f"{self.method}: evaluation{self.adapters}"
            if self.is_measured and name not in self.forwards:
                yield self.per_image(name, self.evaluate, len(self.images))
        if isinstance(learner.network, FrozenViT):
            yield from self.stored(learner.network)
        yield ""
        yield from self.shares()
        if isinstance(learner.closed_form, RanPACHead):
            yield ""
            yield from self.head(learner.closed_form)

    def replaced(self) -> list[str]:
        """What is measured in place of the configuration's own fixed views and growth."""
        keys = {"cache_views", "expansion"} - {*self.given.without_effect()}
        values = {
            key: [getattr(config, key, None) for config in (self.learner.config, self.given)]
            for key in sorted(keys)
        }
        return [
            f"{key} {shown(now)} in place of {shown(own)}" for key, (now, own) in values.items() if now != own
        ]

    # --- names ----------------------------------------------------------------------------------------------

    @property
    def is_measured(self) -> bool:
        return self.learner.task + 1 in COUNTS_OF.get(self.method, COUNTS)

    @property
    def adapters(self) -> str:
        """Largest number of adapters in a block, as the end of a row's name."""
        count = max(self.learner.network.adapters_per_block().values(), default=0)
        return f", {counted(count, 'adapter')}" if count else ""

    def name_of(self, phase: Phase) -> str:
        """The row of a step of a phase."""
        if phase.name == "rd":
            return f"{self.method}: step of the descriptors"
        if self.nothing_grows:
            return f"{self.method}: step of a task that grows nothing"
        return f"{self.method}: step of {'a later task' if self.learner.task else 'task 0'}{self.adapters}"

    # --- rows -----------------------------------------------------------------------------------------------

    def measure_phase(self, phase: Phase) -> None:
        """Take one step in place of a whole phase, measured where the table lacks a row of this name."""
        learner, name = self.learner, self.name_of(phase)
        batch, count = next(iter(phase.batches(0, 0))), learner.data.count(learner.classes, "train")

        def step() -> None:
            learner.take_step(phase, PhaseProgress(), batch)

        if self.profile is not None:
            self.profile.mkdir(parents=True, exist_ok=True)
            with torch.profiler.profile(record_shapes=True, acc_events=True) as profiler:
                step()
            profiler.export_chrome_trace(str(self.profile / "trace.json"))
            self.profile = None
        if self.is_measured and name not in self.forwards:
            self.rows.append(self.per_image(name, step, min(len(self.images), count)))
            batches = f"batches of {'stored tokens' if getattr(batch, 'depth', 0) else 'new views'}"
            if phase.name != "rd" and batches not in self.forwards:
                self.rows.append(self.per_image(batches, lambda: deque(phase.batches(0, 0), maxlen=0), count))
        else:
            step()
        learner.progress.phases += 1

    def stored(self, network: FrozenViT) -> Iterator[str]:
        """Rows of scans and of filling the store of activations, in the state after the last task."""
        learner, number, depth = self.learner, itertools.count(), network.fixed_depth()
        count = learner.data.count(learner.classes, "train")
        if self.method == "sema" and network.growing:
            yield self.per_image("sema: scan of a later task", self.scan, count)
            self.nothing_grows = True
            train_functional(learner)
            yield from self.rows

        def fill() -> None:
            learner.inputs.store.at(depth, learner.classes, "train", ("benchmark", next(number)))

        if depth:
            what = "features" if depth == network.depth else "tokens"
            yield self.per_image(f"filling a store with {what}", fill, count)

    def scan(self) -> None:
        """A whole scan of the open task's images that grows nothing."""
        learner, always = self.learner, self.learner.config
        learner.config = always.model_copy(update={"expansion": "novelty", "exp_threshold": float("inf")})
        learner.method_state.update(block=None, grown=[], scan=0, batch=0, grown_in_scan=False)
        learner.scan()
        learner.config = always

    def shares(self) -> Iterator[str]:
        """Rows: share of the machine's rate of matrix products that passes reach, for the products they need.

        The rate is measured on the network's own products, in whichever weight layout is faster. In the last
        block a forward of the learner needs only keys and values of all tokens, and the rest of the class
        token. A step of task 0 needs two forwards, as a backward without gradients of weights has as many
        products as a forward.
        """
        vit, images = self.plain, len(self.images)
        patches, depth, d = vit.patch_embed.num_patches, len(vit.blocks), vit.embed_dim
        tokens = patches + vit.num_prefix_tokens
        layers = [FrozenLinear(layer) for layer in vit.blocks.modules() if isinstance(layer, nn.Linear)]
        linear = 2 * images * tokens * sum(layer.weight.numel() for layer in layers)
        attention = 4 * images * tokens**2 * d * depth
        whole = linear + attention + 2 * images * patches * vit.patch_embed.proj.weight.numel()
        needed = whole - (linear + attention) / depth + 4 * images * tokens * d**2
        dtype = torch.bfloat16 if self.learner.config.precision == "bf16" else torch.float32
        rows = {layer.in_features for layer in layers}
        rows = {width: torch.randn(images * tokens, width, device=self.device, dtype=dtype) for width in rows}
        pairs = [(rows[layer.in_features], layer, layer.weight.to(dtype)) for layer in layers]

        def plain() -> None:
            for x, _, weight in pairs:
                F.linear(x, weight)

        def prepared() -> None:
            for x, layer, _ in pairs:
                layer(x)

        prepared()
        works, costs = (self.forward, plain, prepared), []
        for _ in range(self.repeats):
            forward, *products = map(self.cost, works)
            costs.append((forward, min(products, key=self.seconds)))
        rate = statistics.median(linear / product.clock for _, product in costs)
        times = statistics.median(self.seconds(forward) / self.seconds(product) for forward, product in costs)
        yield f"{'share of the rate of matrix products':<52}{'%':>9}{f'of {rate / 1e9:,.0f} GFLOP/s':>19}"
        for kind, flops in {
            "plain forward": whole,
            "evaluation": needed,
            "step of task 0": 2 * needed,
        }.items():
            for name in [name for name in self.forwards if kind_of(name) == kind][:1]:
                share = flops / linear / times / self.forwards[name]
                yield f"{f'{name}, share':<52}{100 * share:>9.1f}"

    def head(self, head: RanPACHead) -> Iterator[str]:
        """Row of the cost of adding a task to ridge regression on random features."""
        features, labels = torch.randn(HEAD_IMAGES, head.width), torch.arange(HEAD_IMAGES) % HEAD_CLASSES
        costs = [
            self.cost(lambda: head.add(features, len(head.counts) + labels)) for _ in range(self.repeats)
        ]
        cpu, clock = (statistics.median(values) for values in zip(*costs, strict=True))
        yield f"{'per task':<52}{'CPU s':>9}{'s':>9}"
        name = f"{self.method}: head, {HEAD_IMAGES} images of {HEAD_CLASSES} classes"
        yield f"{name:<52}{cpu:>9.2f}{clock:>9.2f}"

    # --- measuring ------------------------------------------------------------------------------------------

    def per_image(self, name: str, work: Work, images: int) -> str:
        """The row of some work on so many images, relative to the plain forward."""
        work()  # warm up
        costs, ratios = [], []
        for _ in range(self.repeats):
            unit, cost = self.cost(self.forward), self.cost(work)
            ratios.append(self.seconds(cost) / images / (self.seconds(unit) / len(self.images)))
            costs.append(cost)
        self.forwards[name] = statistics.median(ratios)
        cpu, clock = (1000 * statistics.median(values) / images for values in zip(*costs, strict=True))
        span = f"{min(ratios):.4f} - {max(ratios):.4f}"
        return f"{name:<52}{self.forwards[name]:>9.4f}{span:>19}{cpu:>10.2f}{clock:>10.2f}"

    def cost(self, work: Work) -> Cost:
        """The cost of one call, device work included."""
        self.wait()
        cpu, clock = time.process_time(), time.perf_counter()
        work()
        self.wait()
        return Cost(time.process_time() - cpu, time.perf_counter() - clock)

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def seconds(self, cost: Cost) -> float:
        """The seconds that are compared: of the CPU, or where another device computes, on the clock."""
        return cost.cpu if self.device.type == "cpu" else cost.clock

    @torch.no_grad()
    def forward(self) -> None:
        """The unit: a forward pass of the plain network."""
        with self.learner.autocast():
            self.plain(self.images)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Images through network and classifier, nothing stored."""
        self.learner.classify(self.learner.features(self.images))


def kind_of(name: str) -> str:
    """A row's name without method and number of adapters."""
    return name.rpartition(": ")[2].partition(",")[0]
