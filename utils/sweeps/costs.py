"""Cost of whole runs in CPU seconds and seconds: every cell of a sweep as its own process, one after another.

    python main.py --benchmark --sweep exps/sweeps/costs.json

Images are generated and weights random, since neither changes a time; nothing is left behind. Every run
starts with an empty cache. With several repeats all cells are run once, then all again: a slow minute of the
machine meets every cell.
"""

import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from utils.config.loading import refuse_changes
from utils.config.schema import RunConfig
from utils.data.synthetic import write_noise
from utils.errors import UserError
from utils.sweeps.executors import Resources
from utils.sweeps.run import MAIN
from utils.sweeps.spec import load_sweep
from utils.wording import counted

NOISE = {"classes": 100, "train": 50, "test": 50}  # images per class; cells may take fewer
IMPORTS = "import trainer; from models import LEARNERS; LEARNERS[{!r}]"

logger = logging.getLogger("nested_lora")


def run_costs(
    path: Path,
    overrides: Sequence[str],
    schemas: Mapping[str, type[RunConfig]],
    only: Sequence[str],
    repeats: int,
) -> Iterator[str]:
    """The table of a sweep, line by line: the imports of a run, then every cell with the first seed.

    Numbers are medians of the repeats. Raises UserError: the sweep is wrong, an override is of a key that is
    set here, or a run failed; it quotes the last line that the run printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        noise, runs, config = (Path(scratch) / name for name in ("noise.npz", "runs", "config.json"))
        own = {"dataset": noise, "weights": "random", "logs_root": runs, "cache_root": runs / "cache"}
        refuse_changes(overrides, own, "--benchmark")
        write_noise(noise, **NOISE)
        places = [f"{key}={value}" for key, value in own.items()]
        table = load_sweep(path, [*overrides, *places], schemas, only)
        threads = Resources(table.file.threads, table.file.memory_gb, gpu=False).environment
        seed, first = table.file.seeds[0], table.cells[0].config.model_name
        cells = [cell for cell in table.cells if table.chooses(cell, seed)]
        commands = {"start-up of a process": (["-c", IMPORTS.format(first)], None)}
        commands |= {cell.name: (["main.py", "--config", str(config)], cell) for cell in cells}
        costs = defaultdict(list)
        for _ in range(repeats):
            for name, (arguments, cell) in commands.items():
                if cell is not None:
                    config.write_text(json.dumps(cell.with_seed(seed).model_dump(mode="json")))
                costs[name].append(run_cost(name, arguments, os.environ | threads))
                logger.info(f"{name}: {costs[name][-1][0]:.1f} CPU seconds")
                shutil.rmtree(runs, ignore_errors=True)
    yield f"{counted(table.file.threads, 'thread')} a run; medians of {repeats}"
    yield f"{'':<52}{'CPU s':>9}{'s':>9}"
    for name, pairs in costs.items():
        cpu, clock = (statistics.median(values) for values in zip(*pairs, strict=True))
        yield f"{name:<52}{cpu:>9.1f}{clock:>9.1f}"


def run_cost(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """CPU seconds (user and system) and wall-clock seconds of a Python process, started beside main.py."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=MAIN.parent, env=environment, capture_output=True, text=True
    )
    clock, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"{name}: the run failed with exit code {done.returncode}: {last}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, clock
