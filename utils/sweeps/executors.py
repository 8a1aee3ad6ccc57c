"""Where the runs of a sweep are executed: on this machine, or by Ray.

    with ENGINES["local"](Needs(threads=1, memory_gb=3.0, jobs=None, gpu=False, address=None)) as engine:
        engine.submit(Job(...)).result()      # Outcome(code=0, last_line="...")

A run is a process of its own: `main.py` with a configuration, or with a folder to resume. `execute` starts it and waits
for it; both engines call it, so files and results are the same. With Ray on several machines all of them must see the
working folder, the code and the Python environment under the same paths.

This file imports little: a Ray worker that only waits for a process need not load PyTorch.
"""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from utils.errors import UserError

MAIN = Path(__file__).resolve().parents[2] / "main.py"
CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may use
MEMINFO = Path("/proc/meminfo")
POLL = 0.2  # seconds between two looks at a process and at the stop file
LONGEST_LINE = 300  # characters of a process's last line that are told
STOPPED = 130  # exit code of a run that was stopped, as of `main.py`
CONNECT = 10  # seconds a Ray cluster has to answer
RAY_OBJECTS = 10**8  # bytes of shared memory for a Ray of our own: nothing but exit codes goes through it


@dataclass(frozen=True)
class Needs:
    """What a sweep's runs need: threads, GB and perhaps a GPU each; how many at once (None: as many as fit)."""

    threads: int
    memory_gb: float
    jobs: int | None
    gpu: bool
    address: str | None


@dataclass(frozen=True)
class Job:
    """One process to run.

    arguments: of `main.py`; paths are relative to `working_folder`.
    output: file that gets what the process prints.
    stop: file whose length counts the requests to stop.
    gpu: whether the process is given a GPU of its own, where there is one.
    """

    arguments: tuple[str, ...]
    working_folder: Path
    output: Path
    stop: Path
    threads: int
    gpu: bool


class Outcome(NamedTuple):
    """How a process ended: exit code (negative: killed by that signal) and the last line it printed."""

    code: int
    last_line: str


class Engine(Protocol):
    """Runs at most `jobs` of the submitted jobs at once; leaving its context waits for those that run."""

    jobs: int

    def submit(self, job: Job) -> Future: ...
    def __enter__(self) -> "Engine": ...
    def __exit__(self, *_: object) -> None: ...


class LocalEngine:
    """Processes on this machine, side by side within its cores and memory.

    Where there are GPUs, a job that wants one is shown a single one; more jobs at once than GPUs share them in turn.
    """

    def __init__(self, needs: Needs) -> None:
        gpus = visible_gpus() if needs.gpu else []
        self.jobs = needs.jobs or jobs_at_once(
            available_cores(),
            available_memory_gb(),
            len(gpus),
            threads=needs.threads,
            memory_gb=needs.memory_gb,
        )
        self._pool = ThreadPoolExecutor(self.jobs)
        self._gpus: queue.Queue[str] = queue.Queue()
        for slot in range(self.jobs if gpus else 0):
            self._gpus.put(gpus[slot % len(gpus)])
        self._pinned = bool(gpus)

    def submit(self, job: Job) -> Future:
        """Queue a job; the future holds its `Outcome`."""
        return self._pool.submit(self._execute, job)

    def _execute(self, job: Job) -> Outcome:
        if not (job.gpu and self._pinned):
            return execute(job)
        gpu = self._gpus.get()
        try:
            return execute(job, gpu)
        finally:
            self._gpus.put(gpu)

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


class RayEngine:
    """One Ray task a run: on a cluster (`address`), or on a Ray started for the sweep and shut down after it.

    A task takes `threads` CPUs and, where the cluster has any and the run wants one, a GPU.

    Raises:
        UserError: Ray is not installed, no cluster answers, or none of its machines has `threads` CPUs.
    """

    def __init__(self, needs: Needs) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault(
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
        )  # a run on the CPU keeps its environment
        try:
            import ray
        except ImportError as error:
            install = "pip install -r requirements-ray.txt"
            raise UserError(
                f"--engine ray: Ray is not installed; {install}, or use --engine local"
            ) from error
        self._ray = ray
        self._start(needs)
        total = ray.cluster_resources()
        gpus = int(total.get("GPU", 0)) if needs.gpu else 0
        memory = total.get("memory", 0) / 1e9
        cores = int(total.get("CPU", 0))
        self.jobs = needs.jobs or jobs_at_once(
            cores, memory, gpus, threads=needs.threads, memory_gb=needs.memory_gb
        )
        self._gpu = 1 if gpus else 0
        self._task = ray.remote(max_retries=0, num_cpus=needs.threads)(execute)

    def _start(self, needs: Needs) -> None:
        own: dict[str, Any] = {}
        if needs.address is None:
            cores = max(available_cores(), needs.threads)
            own = {"num_cpus": cores, "object_store_memory": RAY_OBJECTS, "include_dashboard": False}
        try:
            if ":" in (needs.address or ""):  # asked first: Ray itself goes on trying for minutes
                host, _, port = needs.address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, port), CONNECT).close()
            self._ray.init(needs.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--ray-address {needs.address}: no Ray cluster lets us in ({error}); give HOST:PORT of its head, and "
                "set RAY_AUTH_MODE and RAY_AUTH_TOKEN as there if it asks for a token"
            ) from error
        largest = max(int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"])
        if largest < needs.threads:
            self._ray.shutdown()
            raise UserError(
                f"threads = {needs.threads}: the largest machine of the Ray cluster has {largest} CPUs"
            )

    def submit(self, job: Job) -> Future:
        """Hand a job to Ray; the future holds its `Outcome`, or the error of a machine that was lost."""
        return self._task.options(num_gpus=self._gpu if job.gpu else 0).remote(job).future()

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()


ENGINES: dict[str, Callable[[Needs], Engine]] = {
    "local": LocalEngine,
    "ray": RayEngine,
}


def execute(job: Job, gpu: str | None = None) -> Outcome:
    """Run a job's process to its end; every request in the stop file is passed on to it.

    The process is the leader of its own group, so a Ctrl-C in the terminal does not reach it. It is stopped with
    SIGTERM, which runs answer as they answer Ctrl-C: Ray's workers block SIGINT, and their processes inherit that.
    """
    if requests(job.stop):
        return Outcome(STOPPED, "stopped before it started")
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with open(job.output, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, str(MAIN), *job.arguments],
            cwd=job.working_folder,
            env=environment(job.threads, gpu),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        passed_on = 0
        while process.poll() is None:
            asked = requests(job.stop)
            if asked > passed_on:
                process.send_signal(signal.SIGTERM)
                passed_on = asked
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
    return Outcome(process.returncode, _last_line(job.output, start))


def environment(threads: int, gpu: str | None) -> dict[str, str]:
    """The environment of a run: so many threads, no progress bars, output at once, one GPU where one is given."""
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    pinned = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return {**os.environ, **own, "PYTHONUNBUFFERED": "1", **pinned}


def requests(stop: Path) -> int:
    """How often the sweep was asked to stop."""
    try:
        return stop.stat().st_size
    except FileNotFoundError:
        return 0


def jobs_at_once(cores: int, memory: float, gpus: int, *, threads: int, memory_gb: float) -> int:
    """Runs that fit side by side: min(cores // threads, memory // memory_gb, gpus if there are any), at least one."""
    fitting = min(cores // threads, int(memory / memory_gb))
    return max(1, min(fitting, gpus) if gpus else fitting)


def available_cores() -> int:
    """Cores this process may use: its affinity, and the share its container is given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max" where there is no limit
        quota, period = map(int, (CGROUP / "cpu.max").read_text(encoding="utf-8").split())
        cores = min(cores, quota // period)
    return max(1, cores)


def available_memory_gb() -> float:
    """Memory in GB (10^9 bytes) that programs can still get, and no more than the container's limit.

    On Linux what is free or can be freed at once; elsewhere all there is.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        lines = dict(line.split(":") for line in MEMINFO.read_text(encoding="utf-8").splitlines())
        memory = int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):
        memory = min(memory, int((CGROUP / "memory.max").read_text(encoding="utf-8")))
    return memory / 1e9


def visible_gpus() -> list[str]:
    """The CUDA devices as `CUDA_VISIBLE_DEVICES` names them."""
    import torch  # here: a Ray worker does without

    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [name.strip() for name in names.split(",")][:count]
        if names
        else [str(index) for index in range(count)]
    )


def _last_line(path: Path, start: int) -> str:
    """The last line with anything on it that was written after byte `start`."""
    lines = path.read_bytes()[start:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return last if len(last) <= LONGEST_LINE else last[: LONGEST_LINE - 1] + "…"
