"""Tests of `utils.sweeps.executors`: one process, how many fit on a machine, and both executors."""

import json
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from utils.errors import UserError
from utils.sweeps.executors import (
    Job,
    LocalExecutor,
    RayExecutor,
    Resources,
    available_cores,
    available_memory_gb,
    jobs_at_once,
    run_process,
    visible_gpus,
)

SMALL = Resources(threads=1, memory_gb=0.001, gpu=False)
WITH_GPU = Resources(threads=1, memory_gb=0.001, gpu=True)
MakeJob = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path) -> MakeJob:
    """Makes jobs that run a few lines of Python; their arguments are in `sys.argv[1:]`."""

    def make(code: str, *arguments: str, name: str = "job", resources: Resources = SMALL) -> Job:
        command = (sys.executable, "-c", code, *arguments)
        return Job(command, tmp_path, tmp_path / f"{name}.txt", tmp_path / "stop", resources)

    return make


# ------------------------------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (
            "import sys; print('begun'); sys.stderr.write('x' * 400 + '\\n\\n'); sys.exit(3)",
            (3, "x" * 299 + "…"),
        ),
        ("", (0, "it printed nothing")),
        ("import os; print('here', flush=True); os.kill(os.getpid(), 9)", (-signal.SIGKILL, "here")),
    ],
    ids=["long last line", "no output", "killed"],
)
def test_exit_code_and_last_line(code: str, outcome: tuple[int, str], job: MakeJob) -> None:
    """Both streams are appended to what an earlier attempt printed, whose last line does not count."""
    made = job(code)
    made.output.write_text("before\n")
    assert run_process(made) == outcome
    assert made.output.read_text().startswith("before\n")


def test_environment_of_a_process(job: MakeJob, tmp_path: Path) -> None:
    """Threads, no bars, output at once, a group of its own, nothing to read, the working folder."""
    code = (
        "import json, os, sys\n"
        "threads = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')\n"
        "rest = ('TQDM_DISABLE', 'PYTHONUNBUFFERED', 'CUDA_VISIBLE_DEVICES')\n"
        "own = os.getpgid(0) == os.getpid()\n"
        "print(json.dumps([os.getcwd(), own, sys.stdin.read(), *map(os.environ.get, threads + rest)]))"
    )
    shown = json.loads(run_process(job(code, resources=Resources(3, 1.0, True)), gpu="5").last_line)
    assert shown == [str(tmp_path), True, "", "3", "3", "1", "1", "5"]


def test_requests_to_stop_are_passed_on_one_by_one(job: MakeJob) -> None:
    """The process gets a SIGTERM for each; it may save and leave with a code of its own."""
    code = (
        "import pathlib, signal, sys, threading\n"
        "stop, seen, woken = pathlib.Path('stop'), [], threading.Event()\n"
        "def ask(number, frame):\n"
        "    seen.append(number)\n"
        "    stop.write_bytes(b'.' * (len(seen) + 1))\n"
        "    if len(seen) == 2:\n"
        "        print(seen, flush=True)\n"
        "        sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, ask)\n"
        "stop.write_bytes(b'.')\n"
        "while True:\n"
        "    woken.wait(0.05)\n"
    )
    assert run_process(job(code)) == (130, str([int(signal.SIGTERM)] * 2))


def test_nothing_is_started_once_a_stop_was_requested(job: MakeJob) -> None:
    made = job("print('started')")
    made.stop.write_bytes(b".")
    assert run_process(made) is None and not made.output.exists()


# ------------------------------------------------------------------------------------------------------------
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
def test_jobs_at_once(
    cores: int, memory: float, gpus: int, threads: int, memory_gb: float, jobs: int
) -> None:
    assert jobs_at_once(Resources(threads, memory_gb, bool(gpus)), cores, memory, gpus) == jobs


def test_limits_of_a_container_count(tmp_path: Path) -> None:
    cores, memory = available_cores(tmp_path), available_memory_gb(tmp_path)
    assert 1 <= cores <= psutil.cpu_count() and 0 < memory <= psutil.virtual_memory().total / 1e9
    for limit in ("max 100000", "10000000000 100000"):  # none, more than there is
        (tmp_path / "cpu.max").write_text(limit)
        assert available_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("50000 100000")
    (tmp_path / "memory.max").write_text("5000000\n")
    assert available_cores(tmp_path) == 1 and available_memory_gb(tmp_path) == 0.005


@pytest.mark.parametrize(("visible", "gpus"), [("", ["0", "1"]), ("3, GPU-ab", ["3", "GPU-ab"])])
def test_names_of_gpus(visible: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == gpus


# ------------------------------------------------------------------------------------------------------------
# Executors

MEET = """  # waits until the files that the arguments name are there, the first of them its own
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
while not all(pathlib.Path(name).exists() for name in sys.argv[1:]):
    time.sleep(0.01)
print(os.environ.get("CUDA_VISIBLE_DEVICES"))
"""


def last_lines(executor: LocalExecutor, jobs: list[Job]) -> list[str]:
    with executor, ThreadPoolExecutor(executor.jobs) as pool:
        return [outcome.last_line for outcome in pool.map(executor.run, jobs)]


def test_as_many_local_jobs_as_fit_run_side_by_side(job: MakeJob) -> None:
    """Two processes that wait for each other end; a third waits for its turn."""
    assert LocalExecutor(SMALL).jobs == available_cores()
    jobs = [job(MEET, *pair, name=pair[0]) for pair in ("ab", "ba", "ca")]
    assert len(last_lines(LocalExecutor(SMALL, jobs=2), jobs)) == 3


def test_jobs_share_gpus_evenly(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that wants a GPU sees a single one; another keeps its environment."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    jobs = [job(MEET, *names, name=names[0], resources=WITH_GPU) for names in ("abc", "bca", "cab")]
    assert sorted(last_lines(LocalExecutor(WITH_GPU, jobs=3), jobs)) == ["3", "3", "7"]
    assert last_lines(LocalExecutor(WITH_GPU, jobs=1), [job(MEET, "d", name="d")]) == ["3,7"]


@pytest.mark.parametrize("address", ["localhost:1", "nonsense"])
def test_a_ray_cluster_that_does_not_answer(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=f"--ray-address {address}: no Ray cluster"):
        RayExecutor(SMALL, jobs=1, address=address)
