"""The command line.

python main.py                                                   the quickstart: exps/quickstart.json
python main.py --config exps/nested_lora_cifar.json              any other experiment
python main.py --config X.json --set nested_lora_rank=8 --set seed=[1,2,3]
python main.py --resume logs/sema/mnist_5k/0/2/quickstart_1993_vit_small_patch14_reg4_dinov2
torchrun --nproc_per_node=2 main.py --config X.json              several devices, one log
python main.py --sweep exps/sweeps/smoke.json                    a table of experiments; again: goes on with it
python main.py --sweep X.json --engine ray --ray-address HOST:PORT   its runs on a Ray cluster
python main.py --sweep X.json --report                           its summary again, no run
"""

import argparse
import difflib
import logging
import os
import sys

from utils.command_line import as_set, given_path, parse_or_advise
from utils.console import attach_console, prepare_console
from utils.sweeps.executors import EXECUTORS

DEFAULT = "exps/quickstart.json"
OPTIONS = ("config", "set", "resume", "overwrite", "sweep", "jobs", "engine", "ray-address", "report")
OF_EVAL = {"eval", "evaluate", "test", "run", "checkpoint", "recorded", "analyse", "images-per-class"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description="Class-incremental learning with adapters on two time scales.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )
    parser.add_argument(
        "--config", type=given_path, metavar="FILE", help=f"JSON experiment to run (default: {DEFAULT})"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one key; may be repeated",
    )
    parser.add_argument("--resume", type=given_path, metavar="FOLDER", help="continue the run in this folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing folder of the same name"
    )
    parser.add_argument(
        "--sweep",
        type=given_path,
        metavar="FILE",
        help="run a table of experiments; what is finished is skipped",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="of a sweep: runs at once (default: as many as fit)"
    )
    parser.add_argument(
        "--engine", choices=list(EXECUTORS), help="of a sweep: what executes its runs (default: local)"
    )
    parser.add_argument(
        "--ray-address", metavar="ADDR", help="with --engine ray: a cluster (default: a Ray of its own)"
    )
    parser.add_argument("--report", action="store_true", help="of a sweep: only write the summary again")
    options = parse_or_advise(parser, arguments, way_out)
    check_sweep_options(parser, options)
    if options.resume and (options.config or options.overrides or options.overwrite):
        parser.error("--resume continues a run exactly as it was: it takes no --config, --set or --overwrite")
    return options


def way_out(name: str, values: list[str]) -> str:
    """What to write in place of an argument that there is not."""
    from models import SCHEMAS
    from utils.config.loading import nearest_key

    keys = dict.fromkeys(key for schema in SCHEMAS.values() for key in schema.model_fields)
    if not name and values[0].endswith(".json"):
        return f"write --config {values[0]}"
    if not name and "=" in values[0]:
        name, _, value = values[0].partition("=")
        values = [value]
    if name in keys:
        return f"keys of a config are changed with --set: write {as_set(name, values)}"
    if name in OF_EVAL:
        return "a run is tested and looked at with: python eval.py --run FOLDER"
    option = next(iter(difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8)), None)
    if option:
        return f"did you mean --{option}?"
    key, _, value = (nearest_key(name, keys, SCHEMAS.values()) or "").partition("=")
    near = (
        f"did you mean {as_set(key, [value] if value else values)}?" if key else "--help lists the arguments"
    )
    return f"keys of a config are changed with --set KEY=VALUE: {near}"


def check_sweep_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a usage error where the options around `--sweep` do not go together."""
    of_a_sweep = (options.jobs, options.engine, options.ray_address)
    if not options.sweep and (options.report or any(option is not None for option in of_a_sweep)):
        parser.error("--jobs, --engine, --ray-address and --report go with --sweep")
    if options.sweep and (options.config or options.resume):
        parser.error("--sweep runs its own configurations: it takes no --config or --resume")
    if options.report and (options.overwrite or any(option is not None for option in of_a_sweep)):
        parser.error("--report starts no run: it takes no --overwrite, --jobs, --engine or --ray-address")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    if options.ray_address and options.engine != "ray":
        parser.error("--ray-address goes with --engine ray")
    if options.sweep and "RANK" in os.environ:
        parser.error("--sweep starts its runs itself: call it without torchrun")


def sweep(options: argparse.Namespace) -> int:
    """Run a table of experiments, or report on it; the exit code."""
    from models import SCHEMAS
    from utils.sweeps.run import report_sweep, run_sweep
    from utils.sweeps.spec import load_sweep

    table = load_sweep(options.sweep, options.overrides, SCHEMAS)
    if options.report:
        report_sweep(table)
        return 0
    engine, address = options.engine or "local", options.ray_address
    return run_sweep(table, engine, jobs=options.jobs, address=address, overwrite=options.overwrite)


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit code: 0 done, 1 runs of a sweep failed, 2 a mistake, 130 stopped."""
    prepare_console()
    options = parse(arguments)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, if it did
    if not first:
        os.environ["TQDM_DISABLE"] = "1"
    # Imported after parsing, so that --help and usage errors answer at once.
    from models import SCHEMAS
    from trainer import read_config, resume, train
    from utils.config.loading import load_config
    from utils.errors import exit_code
    from utils.training.device import keep_freed_memory, resolve_device
    from utils.training.distributed import init_distributed

    if first:
        attach_console()
    else:
        logging.getLogger("nested_lora").addHandler(logging.NullHandler())  # the first process says it
    keep_freed_memory()
    together = False

    def work() -> int | None:
        nonlocal together
        if options.sweep:
            return sweep(options)
        if options.resume:
            config, notes = read_config(options.resume), []
        else:
            loaded = load_config(options.config or DEFAULT, options.overrides, SCHEMAS)
            config, notes = loaded.config, loaded.notes
        with init_distributed(resolve_device(config.device)[0]) as distributed:
            together = True
            if options.resume:
                resume(options.resume, distributed)
            else:
                train(config, overwrite=options.overwrite, notes=notes, distributed=distributed)
        return None

    return exit_code(work, tells=lambda: first or together)  # a mistake that all processes meet is told once


if __name__ == "__main__":
    sys.exit(main())
