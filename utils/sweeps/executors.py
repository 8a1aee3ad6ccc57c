"""Executors of a sweep's runs: processes on this machine, or Ray tasks on a cluster.

    with EXECUTORS["local"](Resources(threads=1, memory_gb=3.0, gpu=False)) as executor:
        executor.jobs             # runs that fit side by side
        executor.run(Job(...))    # Outcome(code=0, last_line="..."), when the process has ended

A run is a process of its own. Both executors start it with `run_process`, so files and results are the same;
the local one forks it from a process that has imported everything, where that is safe (Linux, no GPU).
With Ray on several machines all must see the working folder, the code and the Python environment under the
same paths.

This file imports little: a Ray worker that only waits for a process need not load PyTorch.
"""

import itertools
import logging
import math
import os
import queue
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from utils.errors import UserError
from utils.sweeps.forking import FORKS, Starter

CGROUP = Path("/sys/fs/cgroup")  # limits of a container, in Linux
POLL = 0.2  # seconds between two looks at processes, requests to stop, and signals
MAX_LINE = 300  # characters of a process's last line that are reported
CONNECT_SECONDS = 10  # until a Ray cluster must have answered
RAY_OBJECT_BYTES = 10**8  # shared memory for a Ray of our own: nothing but exit codes goes through it


@dataclass(frozen=True)
class Resources:
    """Resources of one run: threads, GB (10^9 bytes) of memory, and whether it gets a GPU if there is one."""

    threads: int
    memory_gb: float
    gpu: bool

    @property
    def environment(self) -> dict[str, str]:
        """Variables that hold a process to its threads."""
        return {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}

    @property
    def whole_environment(self) -> dict[str, str]:
        """All variables of a process: those of this one, its threads, no bars, output at once."""
        return {**os.environ, **self.environment, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Job:
    """Process to run.

    output: file to which its output is appended; it lies in a folder that exists.
    stop: file whose length counts the requests to stop; absent for none.
    """

    command: tuple[str, ...]
    working_folder: Path
    output: Path
    stop: Path
    resources: Resources


class Outcome(NamedTuple):
    """End of a process: exit code (negative: killed by that signal) and the last line it printed."""

    code: int
    last_line: str


class LocalExecutor(AbstractContextManager):
    """Processes on this machine, `jobs` at once or as many as fit its cores and memory.

    Where there are GPUs, a job that wants one sees a single one; more jobs than GPUs share them in turn.

    imports: modules that jobs import (`Starter`); on Linux without GPUs jobs are then forked from a process
        that has imported them, with the threads of `resources`. Without any, and elsewhere, each is started
        anew.
    """

    def __init__(
        self, resources: Resources, jobs: int | None = None, address: None = None, imports: Sequence[str] = ()
    ) -> None:
        gpus = visible_gpus() if resources.gpu else []
        forks = FORKS and imports and not gpus
        self._starter = Starter(imports, resources.whole_environment) if forks else None
        self.jobs = jobs or jobs_at_once(resources, available_cores(), available_memory_gb(), len(gpus))
        self._gpus: queue.Queue[str | None] = queue.Queue()
        for gpu in itertools.islice(itertools.cycle(gpus or [None]), self.jobs):
            self._gpus.put(gpu)

    def run(self, job: Job) -> Outcome | None:
        """Outcome of a job when it has ended; None if a stop was requested before it started."""
        gpu = self._gpus.get() if job.resources.gpu else None
        try:
            return run_process(job, gpu, self._starter)
        finally:
            if job.resources.gpu:
                self._gpus.put(gpu)

    def __exit__(self, *_: object) -> None:
        if self._starter:
            self._starter.close()


class RayExecutor(AbstractContextManager):
    """Ray tasks, one per run: on the cluster at `address`, or on a Ray started here and shut down afterwards.

    A task takes `threads` CPUs and, where the cluster has any and the run wants one, a GPU. `imports` are not
    used: each job is started anew.

    Raises UserError: Ray is not installed, no cluster answers, or none of its machines has `threads` CPUs.
    """

    def __init__(
        self,
        resources: Resources,
        jobs: int | None = None,
        address: str | None = None,
        imports: Sequence[str] = (),
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a CPU run keeps its environment
        try:
            import ray
        except ImportError as error:
            install = "pip install -r requirements-ray.txt"
            raise UserError(
                f"--engine ray: Ray is not installed; {install}, or use --engine local"
            ) from error
        options = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            cores = max(available_cores(), resources.threads)
            own = {"num_cpus": cores, "object_store_memory": RAY_OBJECT_BYTES, "include_dashboard": False}
            options |= {"address": "local", **own}
        try:
            if address and ":" in address:  # asked first: Ray itself tries for minutes
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, port), CONNECT_SECONDS).close()
            ray.init(**options)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--ray-address {address}: no Ray cluster answers ({error}); give HOST:PORT of its "
                "head, and set RAY_AUTH_MODE and RAY_AUTH_TOKEN as there if it asks for a token"
            ) from error
        largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        if largest < resources.threads:
            ray.shutdown()
            available = f"the largest machine of the Ray cluster has {largest} CPUs"
            raise UserError(f"threads = {resources.threads}: {available}; allowed: as many, or fewer")
        total = ray.cluster_resources()
        gpus = int(total.get("GPU", 0)) if resources.gpu else 0
        cores, memory_gb = int(total.get("CPU", 0)), total.get("memory", 0) / 1e9
        self.jobs = jobs or jobs_at_once(resources, cores, memory_gb, gpus)
        self._ray = ray
        self._gpus = min(gpus, 1)
        self._task = ray.remote(max_retries=0, num_cpus=resources.threads)(run_process)

    def run(self, job: Job) -> Outcome | None:
        """As `LocalExecutor.run`; raises Ray's error where a machine was lost."""
        gpus = self._gpus if job.resources.gpu else 0
        return self._ray.get(self._task.options(num_gpus=gpus).remote(job))

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()


EXECUTORS: dict[str, type[LocalExecutor] | type[RayExecutor]] = {"local": LocalExecutor, "ray": RayExecutor}


def run_process(job: Job, gpu: str | None = None, starter: Starter | None = None) -> Outcome | None:
    """Run a job's process to its end, passing on every request to stop; None if one came before it started.

    gpu: the only GPU it sees. starter: forks it, as a Python script, with the starter's environment.

    The process leads a group of its own, so a Ctrl-C in the terminal does not reach it. It is stopped by
    SIGTERM, to which runs react as to Ctrl-C: Ray's workers block SIGINT, and their processes inherit that.
    """
    if stop_requests(job.stop):
        return None
    with open(job.output, "ab") as output:
        start = output.tell()
        if starter:
            process = starter.start(job.command[1:], job.working_folder, output)
        else:
            chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
            process = subprocess.Popen(
                job.command,
                cwd=job.working_folder,
                env=job.resources.whole_environment | chosen,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        passed_on = 0
        while process.poll() is None:
            requested = stop_requests(job.stop)
            if requested > passed_on:
                process.send_signal(signal.SIGTERM)
                passed_on = requested
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
    printed = job.output.read_bytes()[start:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(printed) if line.strip()), "it printed nothing")
    return Outcome(process.returncode, last if len(last) <= MAX_LINE else last[: MAX_LINE - 1] + "…")


def stop_requests(stop: Path) -> int:
    """Number of requests to stop so far."""
    try:
        return stop.stat().st_size
    except FileNotFoundError:
        return 0


def request_stop(stop: Path) -> None:
    """Count one more request; the file exists."""
    os.truncate(stop, stop_requests(stop) + 1)  # takes no block of the disk: it may be full


def jobs_at_once(resources: Resources, cores: int, memory_gb: float, gpus: int) -> int:
    """Number of runs that fit side by side in cores, memory and GPUs (if there are any), at least one."""
    fitting = min(cores // resources.threads, int(memory_gb / resources.memory_gb))
    return max(1, min(fitting, gpus) if gpus else fitting)


def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores this process may use: its affinity, and no more than its container's quota."""
    process = psutil.Process()
    affinity = hasattr(process, "cpu_affinity")  # absent in macOS
    cores = len(process.cpu_affinity()) if affinity else psutil.cpu_count() or 1
    return max(1, int(min(cores, _container_limit(cgroup / "cpu.max"))))


def available_memory_gb(cgroup: Path = CGROUP) -> float:
    """Memory in GB (10^9 bytes) that programs can still get, and no more than the container's limit."""
    return min(psutil.virtual_memory().available, _container_limit(cgroup / "memory.max")) / 1e9


def _container_limit(path: Path) -> float:
    """Limit of a container, which psutil does not see: "limit" or "quota period" in a file; inf for none."""
    try:
        limit, *period = map(int, path.read_text(encoding="utf-8").split())
        return limit / (period or [1])[0]
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf


def visible_gpus() -> list[str]:
    """CUDA devices as `CUDA_VISIBLE_DEVICES` names them."""
    import torch  # here: a Ray worker does without

    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [name.strip() for name in names.split(",")][:count]
