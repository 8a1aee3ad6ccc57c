"""What a configuration costs on this machine, in forward passes of the plain timm network.

    python -m utils.benchmark --config exps/nested_lora_cifar.json
    python -m utils.benchmark --config X.json --set precision=bf16 --repeats 7 --profile trace/

The unit is one forward pass of the unchanged timm network over the same images in the same dtype, timed next to every
measurement; every figure is the median over repeats. Speed does not depend on the weights or on what the images show:
the weights are random and the images generated, so nothing is downloaded. The methods say what there is to measure
(`Learner.costs`), `utils/costs.py` measures it. A benchmark is for people: no test depends on a time.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models.vit.config import ClassIncrementalConfig
from utils.command_line import given_path
from utils.config.loading import config_from_dict, load_config
from utils.console import prepare_console
from utils.costs import Clock, Measured, flops_of, matmul_ceiling, measure_all, plain_forward, trace
from utils.errors import UserError, exit_code
from utils.runs.run_log import SilentLog
from utils.training.device import keep_freed_memory

STAND_INS = {  # for data and weights: they do not change what anything costs
    "dataset": "synthetic",
    "init_cls": 2,
    "increment": 2,
    "max_train_per_class": None,
    "max_test_per_class": None,
    "max_tasks": None,
    "weights": "random",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description="What a configuration costs on this machine, in plain forward passes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="JSON experiment")
    change = {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "dest": "overrides",
        "help": "change a key",
    }
    parser.add_argument("--set", **change)
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="of every measurement (default 5)"
    )
    parser.add_argument(
        "--growths", type=float, default=1, metavar="G", help="adapters a later task adds (default 1)"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=3,
        default=(5000, 1000, 10),
        metavar=("TRAIN", "TEST", "TASKS"),
        help="images of a task and number of tasks, for the projection (default CIFAR-100 10x10: 5000 1000 10)",
    )
    parser.add_argument(
        "--profile", type=given_path, metavar="FOLDER", help="write a torch profiler trace of a task-0 step"
    )
    return parser.parse_args(arguments)


def report(
    learner: Any, plain: torch.nn.Module, build: Callable[[Mapping[str, Any]], Any], options: Any
) -> None:
    """Measure the learner's costs next to the plain network; print the table, the share of the ceiling, a whole run."""
    config, device, data = learner.config, learner.device, learner.data
    chosen = data.indices(data.task_classes(0), "train")[: config.batch_size]
    images = data.views(chosen, "train", "train", ("view", 0)).to(device)
    work = plain_forward(plain.to(device).eval(), images, learner.autocast)
    clock = Clock(work, len(images), device, options.repeats)
    costs = learner.costs(build)
    measured = measure_all(clock, costs.parts())
    print(
        f"{config.backbone_type}, {data.train_view.image_size} px, batch {config.batch_size}, {config.precision}"
    )
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.repeats} repeats"
    )
    print(
        f"plain forward: {clock.images_per_second:.1f} images/s; below, plain forwards an image (least - most)\n"
    )
    for row in measured:
        print(row.line())
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    ceiling = matmul_ceiling(device, dtype)
    print(
        f"\na large {dtype} matrix product: {ceiling / 1e9:.0f} GFLOP/s; products and attention in it reach, of that,"
    )
    first = build({}).costs(build).parts()[0]
    for name, flops, forwards in (
        ("plain forward", flops_of(work) / clock.images, 1.0),
        (first.name, flops_of(first.prepare()) / first.images, measured[0].value),
    ):
        print(f"  {name:<30}{100 * flops / forwards * clock.images_per_second / ceiling:>6.0f} %")
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
    print(
        f"  {'all':<30}{total:>12,.0f} image-forwards, {total / speed / 60:,.0f} minutes at {speed:.1f} images/s"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for; the exit code: 0 done, 2 a mistake to mend."""
    # A command line like main.py that stands beside what it uses: only here does it look at the layers above.
    from models import SCHEMAS
    from trainer import assemble, make_learner

    prepare_console()
    options = parse(arguments)
    keep_freed_memory()

    def run() -> None:
        config = load_config(options.config, options.overrides, SCHEMAS).config
        if not isinstance(config, ClassIncrementalConfig):
            problem = f"model_name = {config.model_name!r} has no pretrained network to measure against"
            raise UserError(f"{options.config}: {problem}; allowed: a class-incremental method")
        with tempfile.TemporaryDirectory() as scratch:
            given = config.model_dump() | STAND_INS | {"cache_root": scratch}
            if "cache_views" in given:  # what is stored is measured as stored
                given["cache_views"] = max(1, given["cache_views"])

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
