"""Command line of experiments: single runs, sweeps of many, benchmarks and lists. By examples:

python main.py                                                   five methods compared: exps/quickstart.json
python main.py exps/nested_lora_cifar.json                       any other file: one experiment, or a sweep
python main.py --method ranpac --dataset cifar224                the file that is shipped for the two
python main.py --config X.json --set nested_lora_rank=8 --set seed=[1,2,3]
python main.py --resume logs/sema/mnist_5k/0/2/sema_growth_demo_1993_vit_small_patch14_reg4_dinov2
python main.py --resume auto --config X.json                     continue X where it was stopped, or start it
python main.py --extend logs/sema/... --set max_tasks=10         a finished run learns further tasks
python main.py --extend logs/sema/... --data FOLDER              or classes of another folder
torchrun --nproc_per_node=2 main.py --config X.json              several devices, one log
python main.py --sweep exps/sweeps/smoke.json                    a table of experiments; again: continues it
python main.py --sweep X.json --engine ray --ray-address HOST:PORT   its runs on a Ray cluster
python main.py --sweep X.json --only CELL --seeds 1 2            some of its runs; --dry-run: their commands
python main.py --sweep X.json --report                           its summary again, no run
python main.py --benchmark --config X.json                       what its steps cost, in plain forwards
python main.py --benchmark --sweep exps/sweeps/costs.json        what whole runs cost, in CPU seconds
python main.py --list keys --method sema                         config keys, what they allow and mean
python main.py --list configs                                    also: methods, datasets, backbones, metrics

FILE is looked for in the current folder, then in that of main.py; other paths start at the current folder.
"""

# PyTorch and what needs it are imported after the config is checked, so that mistakes are reported at once.

import argparse
import contextlib
import difflib
import itertools
import logging
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.command_line import (
    as_set,
    at_least_one,
    given_options,
    given_path,
    parse_or_advise,
    refused_options,
    whole_number,
)
from utils.console import attach_console, prepare_console
from utils.errors import UserError, exit_code
from utils.stop import abrupt_interrupts
from utils.sweeps.executors import EXECUTORS
from utils.training.cpu_kernels import choose_cpu_kernels
from utils.training.late_compiler import import_networks
from utils.wording import as_typed

DEFAULT = "exps/quickstart.json"  # a sweep
AUTO = "auto"  # instead of a folder to resume
TAKES = {  # command -> options that it takes besides its own; the first one given decides, else "run"
    "list": ("method", "format"),
    "extend": ("set", "data", "overwrite", "verbose"),
    "resume": ("config", "set", "verbose"),
    "report": ("sweep", "set", "seeds"),
    "dry-run": ("sweep", "set", "only", "seeds"),
    "benchmark": ("config", "sweep", "set", "only", "repeats", "profile"),
    "sweep": ("set", "only", "seeds", "overwrite", "jobs", "engine", "ray-address", "verbose"),
    "run": ("config", "set", "overwrite", "verbose"),
}
OPTIONS = sorted({*TAKES, *itertools.chain(*TAKES.values())} - {"run"})

logger = logging.getLogger("nested_lora")


# ----------------------------------------------------------------------------------------------------------
# Arguments


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments; exits with a usage error where they do not go together."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # --seed is a key of a config, and not short for --seeds
        usage="%(prog)s [FILE] [--set KEY=VALUE] [options]",
        description="Class-incremental learning with adapters on two time scales.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__,
    )
    add = parser.add_argument
    lists = ("keys", "methods", "datasets", "backbones", "configs", "metrics")
    add("--config", type=given_path, metavar="FILE", help="run an experiment, as FILE alone does")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")
    add(
        "--resume",
        type=lambda text: text if text == AUTO else given_path(text),
        metavar="FOLDER",
        help="continue the run in this folder; auto: that of --config, or start it where there is none",
    )
    add("--extend", type=given_path, metavar="FOLDER", help="a finished run, to learn further tasks")
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="with --extend: new classes; each folder is one task",
    )
    add("--overwrite", action="store_true", help="replace an existing folder of the same name")
    add("--verbose", action="store_true", help="log every epoch, optimizer group and norm, too")
    add("--sweep", type=given_path, metavar="FILE", help="run a table of experiments; skips finished ones")
    add("--only", action="append", default=[], metavar="CELL", help="of a sweep: run this cell; repeatable")
    add(
        "--seeds",
        type=whole_number,
        nargs="+",
        action="extend",
        metavar="N",
        help="of a sweep: run these seeds, also new ones",
    )
    add("--dry-run", action="store_true", help="of a sweep: print a shell command for each run still to do")
    add("--jobs", type=at_least_one, metavar="N", help="of a sweep: runs at once (default: as many as fit)")
    add("--engine", choices=list(EXECUTORS), help="of a sweep: what executes its runs (default: local)")
    add("--ray-address", metavar="ADDR", help="with --engine ray: a cluster (default: a Ray of its own)")
    add("--report", action="store_true", help="of a sweep: only write the summary again")
    add(
        "--benchmark",
        action="store_true",
        help="measure the time of a configuration's steps, or of a sweep's runs",
    )
    add("--repeats", type=at_least_one, metavar="N", help="with --benchmark: of each step (5) or run (1)")
    add("--profile", type=given_path, metavar="FOLDER", help="with --benchmark: a trace of a training step")
    add("--list", choices=lists, help="print this list, and exit")
    add("--method", metavar="NAME", help="run this method's shipped file; with --list: of this method only")
    add("--dataset", metavar="NAME", help="with --method: the file for this data set")
    add("--format", choices=("text", "markdown"), help="with --list keys: how to print them (default: text)")
    options = parse_or_advise(parser, arguments, way_out, takes_file=True)
    if not options.list:
        choose_file(options)
    if fault := usage_fault(options):
        parser.error(fault)
    return options


def choose_file(options: argparse.Namespace) -> None:
    """Set `config` or `sweep` from FILE, from --method and --dataset, or without any to the default sweep.

    Raises UserError: two files are given, or one that is not of the kind that its option takes.
    """
    from models import SCHEMAS
    from utils.config.experiments import kind_of, located, shipped_file

    if options.dataset and not options.method:
        raise UserError(
            f"--dataset goes with --method; of a file it is changed with --set dataset={options.dataset}"
        )
    given = {
        "FILE": options.file, "--config": options.config, "--sweep": options.sweep, "--method": options.method
    }  # fmt: skip
    given = {name: path for name, path in given.items() if path}
    if len(given) > 1 and {"FILE", "--method"} & given.keys():
        raise UserError(f"{' and '.join(given)} each name an experiment: give one of them")
    path = shipped_file(options.method, options.dataset, SCHEMAS) if options.method else options.file
    options.method = options.dataset = options.file = None
    if not given and given_options(options) <= {*TAKES["sweep"], "report", "dry-run"}:
        path = Path(DEFAULT)
    if path:
        setattr(options, kind_of(located(path), SCHEMAS) or "config", located(path))
    for option, other, what in (
        ("config", "sweep", "a table of experiments"),
        ("sweep", "config", "one experiment and no table of them"),
    ):
        if path := getattr(options, option):
            setattr(options, option, located(path))
            if kind_of(located(path), SCHEMAS) == other:
                raise UserError(f"{path} is {what}: run it with {as_typed('main.py', f'--{other}', path)}")


def usage_fault(options: argparse.Namespace) -> str:
    """A sentence about options that do not go together; empty where they do."""
    rules = [
        (
            options.resume not in (None, AUTO) and (options.config or options.set),
            "--config and --set go with --resume auto: a run folder has its own config.json, in "
            "which keys that change no result may be edited",
        ),
        (options.resume == AUTO and not options.config, "--resume auto goes with --config FILE"),
        (
            options.extend and not (options.set or options.data),
            "--extend goes with --set max_tasks=N or --data FOLDER",
        ),
        (options.report and not options.sweep, "--report goes with --sweep"),
        (options.benchmark and not (options.config or options.sweep), "--benchmark goes with --config"),
        (options.benchmark and options.config and options.only, "--only goes with --benchmark --sweep"),
        (options.profile and options.sweep, "--profile goes with --benchmark --config"),
        (options.dry_run and not options.sweep, "--dry-run goes with --sweep"),
        (
            options.overwrite and (options.only or options.seeds),
            "--overwrite replaces a whole sweep, it goes without --only and --seeds",
        ),
        (options.ray_address and options.engine != "ray", "--ray-address goes with --engine ray"),
        (options.sweep and "RANK" in os.environ, "--sweep starts its runs itself: call it without torchrun"),
        (options.format and options.list != "keys", "--format goes with --list keys"),
        (
            options.method and options.list not in ("keys", "configs", "metrics"),
            "--method goes with --list keys, configs and metrics",
        ),
    ]
    faults = (sentence for applies, sentence in rules if applies)
    return refused_options(options, TAKES, "a run") or next(faults, "")


def way_out(name: str, values: list[str]) -> str:
    """Advice for an argument that does not exist."""
    from eval import TAKES as EVAL_TAKES
    from models import SCHEMAS
    from utils.config.messages import nearest_key, parsed

    keys = {name: field for schema in SCHEMAS.values() for name, field in schema.model_fields.items()}

    def setting(key: str, values: list[str]) -> str:
        return as_set(key, values or ["true" if keys[key].annotation is bool else "VALUE"])

    if not name and values[0].endswith(".json"):
        return "one file is run at a time"
    if not name and "=" in values[0]:
        name, _, value = values[0].partition("=")
        values = [value]
    if name in keys:
        return f"keys of a config are changed with --set: write {setting(name, values)}"
    if name in {"eval", "evaluate", *EVAL_TAKES, *itertools.chain(*EVAL_TAKES.values())}:
        compares = name in {"compare", *EVAL_TAKES["compare"]} - {"out"}
        words = ["--compare", "FOLDER", "FOLDER"] if compares else ["--run", "FOLDER"]
        if values and name in ("run", "checkpoint", "compare"):
            words = [f"--{name}", *values]
        return f"a run is tested and looked at with: {as_typed('eval.py', *words)}"
    if near := difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8):
        return f"did you mean --{near[0]}?"
    known_as = {other: meant for schema in SCHEMAS.values() for other, meant in schema.known_as.items()}
    key, _, value = (nearest_key(name, keys, known_as) or "").partition("=")
    if value:  # the name is that of a value, or what switches it off
        values = [] if [parsed(given.lower()) for given in values] == [False] else [value]
    hint = f"did you mean {setting(key, values)}?" if key else "--help lists the arguments"
    return f"keys of a config are changed with --set KEY=VALUE: {hint}"


# ----------------------------------------------------------------------------------------------------------
# Commands


def show(lines: Iterable[str]) -> int:
    """Print lines as they come; returns the exit code 0."""
    for line in lines:
        print(line, flush=True)
    return 0


def run_sweep(options: argparse.Namespace) -> int:
    """Run a table of experiments, or report on it; returns the exit code."""
    from models import METHODS, SCHEMAS
    from utils.sweeps.spec import load_sweep

    try:
        table = load_sweep(options.sweep, options.set, SCHEMAS, options.only, options.seeds or [])
    except UserError as error:
        if not any(change.partition("=")[0].strip() == "model_name" for change in options.set):
            raise
        own = "run one of them with --only CELL, or a method's own file (--list configs --method NAME)"
        raise UserError(f"--set model_name: the cells of {options.sweep} say their methods; {own}") from error
    with abrupt_interrupts():
        import_networks()
        from utils.sweeps.run import commands_of, report_sweep, run_sweep

    if options.dry_run:
        with contextlib.redirect_stdout(sys.stderr):  # messages
            commands = commands_of(table)
        return show(commands)
    if options.report:
        report_sweep(table)
        return 0
    before = ["main", "utils.training.late_compiler:import_networks", "trainer"]
    learners = {METHODS[cell.config.model_name].learner.rpartition(".")[0] for cell in table.cells}
    return run_sweep(
        table,
        options.engine or "local",
        jobs=options.jobs,
        address=options.ray_address,
        overwrite=options.overwrite,
        imports=[*before, *sorted(learners), "utils.runs.manifest:code_sha256", "utils.runs.manifest:commit"],
    )


def list_lines(options: argparse.Namespace) -> list[str]:
    """The keys, methods, data sets, backbones, metrics or shipped configs, for the console."""
    from models import SCHEMAS
    from models.vit.backbones import BACKBONES
    from utils.config.experiments import shipped_files
    from utils.config.listing import keys_markdown, keys_text, metrics_text
    from utils.config.loading import no_such_method
    from utils.data.datasets import DATASETS

    if options.method not in (None, *SCHEMAS):
        raise UserError(f"--method {options.method}: {no_such_method(options.method, SCHEMAS)}")
    schemas = {name: SCHEMAS[name] for name in SCHEMAS if options.method in (None, name)}
    if options.list == "keys":
        return [keys_markdown(schemas) if options.format == "markdown" else keys_text(schemas)]
    if options.list == "metrics":
        return [metrics_text(schemas)]
    files = [file for file in shipped_files(SCHEMAS) if options.method in (None, file.method)]
    table = {
        "methods": {name: schema.model_fields["model_name"].description for name, schema in SCHEMAS.items()},
        "datasets": {name: f"{source.classes} classes" for name, source in DATASETS.items()},
        "backbones": BACKBONES,
        "configs": {file.path: file.description for file in files},
    }[options.list]
    width = max(map(len, table))
    return [f"{name:<{width}}  {meaning}" for name, meaning in table.items()]


def load(options: argparse.Namespace) -> Any:
    """The checked config. UserError: all of its mistakes, or advice where --set changes the method."""
    from models import SCHEMAS
    from utils.config.experiments import advice_on_method
    from utils.config.loading import load_config

    try:
        return load_config(options.config, options.set, SCHEMAS)
    except UserError as error:
        raise UserError(advice_on_method(options.config, options.set, SCHEMAS) or str(error)) from error


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for.

    Returns the exit code: 0 done, 1 runs of a sweep failed, 2 a mistake, 130 stopped by Ctrl-C, SIGTERM or a
    lost terminal.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also where nothing can be saved
    prepare_console()
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, if it did
    if not first:
        os.environ["TQDM_DISABLE"] = "1"
    together = False

    def work() -> int | None:
        nonlocal together
        options = parse(arguments)
        logger.setLevel(logging.DEBUG if options.verbose else logging.INFO)
        if first:
            attach_console()
        else:
            logger.addHandler(logging.NullHandler())  # the first process logs
        if options.list:
            return show(list_lines(options))
        if options.sweep and options.benchmark:
            from models import SCHEMAS
            from utils.sweeps.costs import run_costs

            return show(run_costs(options.sweep, options.set, SCHEMAS, options.only, options.repeats or 1))
        if options.sweep:
            return run_sweep(options)
        with abrupt_interrupts():
            from models import LEARNERS
            from models.saved.files import read_config

            folder = options.extend or (options.resume if options.resume != AUTO else None)
            loaded = None if folder else load(options)
            config = read_config(folder) if folder else loaded.config
            choose_cpu_kernels(config.cpu_kernels)
            import_networks()
            import trainer  # with it all that is heavy
            from models.saved.extension import Extension
            from models.saved.learner import run_context
            from utils.training.device import keep_freed_memory

            LEARNERS[config.model_name]
            keep_freed_memory()
        if options.benchmark:
            from models.benchmark import benchmark

            return show(benchmark(config, options.repeats or 5, options.profile, options.set))
        extension = Extension.of(folder, options.set, options.data or []) if options.extend else None
        with run_context(extension.config if extension else config) as context:
            together = True
            if extension:
                trainer.extend(extension, context, overwrite=options.overwrite)
            elif folder:
                trainer.resume_seeds(folder, context)
            else:
                trainer.train_seeds(loaded, context, options.overwrite, go_on=options.resume == AUTO)
        return 0

    return exit_code(work, tells=lambda: first or together)  # an error of all processes is printed once


if __name__ == "__main__":
    sys.exit(main())
