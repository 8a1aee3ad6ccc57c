"""Tests of `utils.sweeps.executors`: one process at a time with a small stand-in for main.py, machines in numbers, Ray."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import utils.sweeps.executors
from utils.errors import UserError
from utils.sweeps.executors import (
    Job,
    LocalEngine,
    Needs,
    available_cores,
    available_memory_gb,
    execute,
    jobs_at_once,
    visible_gpus,
)

NEEDS = Needs(threads=1, memory_gb=0.001, jobs=2, gpu=False, address=None)
MakeJob = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeJob:
    """Jobs that run a few lines of Python, the same in all, in place of main.py; the arguments are in `sys.argv`."""
    program = tmp_path / "program.py"
    monkeypatch.setattr(utils.sweeps.executors, "MAIN", program)

    def make(code: str, *arguments: str, name: str = "job", threads: int = 1, gpu: bool = False) -> Job:
        if not program.exists():  # written once: another job may be about to read it
            program.write_text(code)
        return Job(arguments, tmp_path, tmp_path / "logs" / f"{name}.txt", tmp_path / "stop", threads, gpu)

    return make


# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_exit_code_and_last_line(job: MakeJob) -> None:
    """Both streams go to the file, behind what an earlier attempt printed; empty lines do not count."""
    made = job(
        "import sys; print('begun'); sys.stderr.write('x' * 400 + '\\n\\n'); sys.exit(int(sys.argv[1]))", "3"
    )
    made.output.parent.mkdir()
    made.output.write_text("before\n")
    code, line = execute(made)
    assert (code, line) == (3, "x" * 299 + "…")
    assert made.output.read_text().startswith("before\nbegun\nxxx")


def test_a_process_that_prints_nothing_is_not_given_the_line_of_the_one_before(job: MakeJob) -> None:
    made = job("")
    made.output.parent.mkdir()
    made.output.write_text("before\n")
    assert execute(made) == (0, "it printed nothing")


def test_where_and_in_what_surroundings(job: MakeJob, tmp_path: Path) -> None:
    """Threads, no bars, output at once, a group of its own, nothing to read, the working folder."""
    code = (
        "import json, os, sys\n"
        "keys = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'TQDM_DISABLE', 'PYTHONUNBUFFERED', 'CUDA_VISIBLE_DEVICES')\n"
        "print(json.dumps([os.getcwd(), os.getpgid(0) == os.getpid(), sys.stdin.read(), *map(os.environ.get, keys)]))"
    )
    shown = json.loads(execute(job(code, threads=3), gpu="5").last_line)
    assert shown == [str(tmp_path), True, "", "3", "3", "1", "1", "5"]


def test_killed_is_told_by_a_negative_code(job: MakeJob) -> None:
    made = job("import os, signal; print('here', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    assert execute(made) == (-signal.SIGKILL, "here")


def test_requests_to_stop_are_passed_on_one_by_one(job: MakeJob) -> None:
    """The process gets a SIGTERM for each; it may save and leave with a code of its own."""
    made = job(
        "import pathlib, signal, sys, threading\n"
        "stop, seen, woken = pathlib.Path(sys.argv[1]), [], threading.Event()\n"
        "def ask(number, frame):\n"
        "    seen.append(number)\n"
        "    stop.write_bytes(b'.' * (len(seen) + 1))\n"
        "    if len(seen) == 2:\n"
        "        print(seen, flush=True)\n"
        "        sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, ask)\n"
        "stop.write_bytes(b'.')\n"
        "while True:\n"
        "    woken.wait(0.05)\n",
        "stop",
    )
    assert execute(made) == (130, str([int(signal.SIGTERM)] * 2))


def test_nothing_is_started_once_a_stop_was_asked_for(job: MakeJob) -> None:
    made = job("print('started')")
    made.stop.write_bytes(b".")
    assert execute(made) == (130, "stopped before it started")
    assert not made.output.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Machines


@pytest.mark.parametrize(
    ("cores", "memory", "gpus", "threads", "memory_gb", "jobs"),
    [
        (8, 64.0, 0, 1, 3.0, 8),
        (8, 64.0, 0, 3, 3.0, 2),
        (8, 10.0, 0, 1, 3.0, 3),
        (8, 2.0, 0, 1, 3.0, 1),
        (2, 64.0, 0, 4, 3.0, 1),
        (64, 512.0, 4, 2, 3.0, 4),
        (4, 512.0, 8, 2, 3.0, 2),
        (16, 9.0, 8, 2, 3.0, 3),
    ],
)
def test_how_many_at_once(
    cores: int, memory: float, gpus: int, threads: int, memory_gb: float, jobs: int
) -> None:
    assert jobs_at_once(cores, memory, gpus, threads=threads, memory_gb=memory_gb) == jobs


def test_a_containers_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.sweeps.executors, "CGROUP", tmp_path)
    cores, memory = available_cores(), available_memory_gb()
    assert cores >= 1 and memory > 0
    for limit in ("max 100000", "10000000000 100000"):  # none, more than there is
        (tmp_path / "cpu.max").write_text(limit)
        assert available_cores() == cores
    (tmp_path / "cpu.max").write_text("50000 100000")
    (tmp_path / "memory.max").write_text("5000000\n")
    assert available_cores() == 1 and available_memory_gb() == 0.005


def test_memory_is_what_programs_can_still_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.sweeps.executors, "CGROUP", tmp_path)
    monkeypatch.setattr(utils.sweeps.executors, "MEMINFO", tmp_path / "meminfo")
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    assert available_memory_gb() == everything
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    2000 kB\n")
    assert available_memory_gb() == 2000 * 1024 / 1e9


@pytest.mark.parametrize(("visible", "gpus"), [(None, ["0", "1"]), ("3, GPU-ab", ["3", "GPU-ab"])])
def test_names_of_gpus(visible: str | None, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == gpus


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def test_local_jobs_run_side_by_side(job: MakeJob) -> None:
    """Two processes that wait for each other end; a third waits for its turn."""
    code = (
        "import pathlib, sys, time\n"
        "me, other = map(pathlib.Path, sys.argv[1:])\n"
        "me.touch()\n"
        "while not other.exists():\n"
        "    time.sleep(0.01)\n"
    )
    with LocalEngine(NEEDS) as engine:
        assert engine.jobs == 2
        names = [("a", "b"), ("b", "a"), ("c", "a")]
        futures = [engine.submit(job(code, *pair, name=pair[0])) for pair in names]
        assert [future.result(600).code for future in futures] == [0, 0, 0]


def test_every_gpu_is_given_to_one_job_at_a_time(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.sweeps.executors, "visible_gpus", lambda: ["3", "7"])
    given: list[str | None] = []
    both = threading.Barrier(2, timeout=600)

    def record(job: Job, gpu: str | None = None) -> None:
        given.append(gpu)
        if job.gpu:
            both.wait()

    monkeypatch.setattr(utils.sweeps.executors, "execute", record)
    with LocalEngine(Needs(threads=1, memory_gb=0.001, jobs=2, gpu=True, address=None)) as engine:
        for _ in range(4):
            engine.submit(job("", gpu=True))
    assert sorted(given[:2]) == sorted(given[2:]) == ["3", "7"]
    with LocalEngine(Needs(threads=1, memory_gb=0.001, jobs=1, gpu=True, address=None)) as engine:
        engine.submit(job("", gpu=False)).result(600)
    assert given[4] is None


def test_without_a_number_as_many_run_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.sweeps.executors, "available_cores", lambda: 9)
    monkeypatch.setattr(utils.sweeps.executors, "available_memory_gb", lambda: 100.0)
    monkeypatch.setattr(utils.sweeps.executors, "visible_gpus", lambda: ["0", "1", "2"])
    with LocalEngine(Needs(threads=2, memory_gb=3.0, jobs=None, gpu=False, address=None)) as engine:
        assert engine.jobs == 4
    with LocalEngine(Needs(threads=2, memory_gb=3.0, jobs=None, gpu=True, address=None)) as engine:
        assert engine.jobs == 3


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install -r requirements-ray.txt"):
        utils.sweeps.executors.RayEngine(NEEDS)


@pytest.mark.parametrize("address", ["localhost:1", "nonsense"])
def test_a_ray_cluster_that_does_not_answer(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=f"--ray-address {address}: no Ray cluster lets us in"):
        utils.sweeps.executors.RayEngine(Needs(threads=1, memory_gb=1.0, jobs=1, gpu=False, address=address))
