"""Tests of `utils.sweeps.executors` and `forking`: processes, how many fit on a machine, executors."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from utils.errors import UserError
from utils.sweeps.executors import (
    Job,
    LocalExecutor,
    Outcome,
    RayExecutor,
    Resources,
    available_cores,
    available_memory_gb,
    jobs_at_once,
    run_process,
)
from utils.sweeps.forking import FORKS, Starter

SMALL = Resources(threads=1, memory_gb=0.001, gpu=False)
WITH_GPU = Resources(threads=1, memory_gb=0.001, gpu=True)
MakeJob = Callable[..., Job]
RunJob = Callable[..., Outcome | None]
Patch = pytest.MonkeyPatch
needs_fork = pytest.mark.skipif(not FORKS, reason="processes are not forked on this system")


@pytest.fixture
def job(tmp_path: Path) -> MakeJob:
    """Makes jobs that run a few lines of Python; their arguments are in `sys.argv[1:]`."""

    def make(code: str, *arguments: str, name: str = "job", resources: Resources = SMALL) -> Job:
        script = tmp_path / f"{name}.py"
        script.write_text(code)
        command = (sys.executable, str(script), *arguments)
        return Job(command, tmp_path, tmp_path / f"{name}.txt", tmp_path / "stop", resources)

    return make


@pytest.fixture(params=["started", pytest.param("forked", marks=needs_fork)])
def run(request: pytest.FixtureRequest) -> RunJob:
    """Runs a job to its end in a process that is started for it, or forked from a starter."""

    def fork(job: Job, gpu: str | None = None) -> Outcome | None:
        chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with Starter([], job.resources.whole_environment | chosen) as starter:
            return run_process(job, starter=starter)

    return run_process if request.param == "started" else fork


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
        ("1 / 0", (1, "ZeroDivisionError: division by zero")),
        ("import atexit; atexit.register(print, 'bye'); print('end')", (0, "bye")),
        ("import atexit, sys; atexit.register(print, 'bye'); sys.exit(3)", (3, "bye")),
        ("import sys; sys.exit('a reason')", (1, "a reason")),
    ],
    ids=["long last line", "no output", "killed", "error", "end", "exit", "exit with a text"],
)
def test_exit_code_and_last_line(code: str, outcome: tuple[int, str], job: MakeJob, run: RunJob) -> None:
    """Both streams are appended to what an earlier attempt printed, whose last line does not count."""
    made = job(code)
    made.output.write_text("before\n")
    assert run(made) == outcome
    assert made.output.read_text().startswith("before\n")


def test_environment_of_a_process(job: MakeJob, run: RunJob, tmp_path: Path) -> None:
    """Threads, no bars, output at once, a group of its own, nothing to read, folder, arguments."""
    code = (
        "import json, os, sys\n"
        "threads = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')\n"
        "rest = ('TQDM_DISABLE', 'PYTHONUNBUFFERED', 'CUDA_VISIBLE_DEVICES')\n"
        "own = os.getpgid(0) == os.getpid()\n"
        "place = [os.getcwd(), __name__, *sys.argv[1:]]\n"
        "print(json.dumps([*place, own, sys.stdin.read(), *map(os.environ.get, threads + rest)]))"
    )
    made = job(code, "--x", "é", resources=Resources(3, 1.0, True))
    shown = json.loads(run(made, gpu="5").last_line)
    assert shown == [str(tmp_path), "__main__", "--x", "é", True, "", "3", "3", "1", "1", "5"]


def test_requests_to_stop_are_passed_on_one_by_one(job: MakeJob, run: RunJob) -> None:
    """The process gets a SIGTERM for each; it may save and leave with its own code. Then none is started."""
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
    assert run(job(code)) == (130, str([int(signal.SIGTERM)] * 2))
    later = job("print('started')", name="later")
    assert run(later) is None and not later.output.exists()


@needs_fork
def test_a_stop_while_the_starter_imports_starts_nothing(job: MakeJob) -> None:
    """Neither at once nor when it has imported."""
    first, later = job("print('begun')"), job("print('begun')", name="later")
    code = f"import os, time\nwhile not os.path.exists({str(later.output)!r}): time.sleep(0.01)\n"
    (first.working_folder / "slow_import.py").write_text(code)
    environment = SMALL.whole_environment | {"PYTHONPATH": str(first.working_folder)}
    with Starter(["slow_import"], environment) as starter, ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(run_process, first, starter=starter)
        while not first.output.exists():
            time.sleep(0.01)
        first.stop.write_bytes(b".")
        assert outcome.result() == (-signal.SIGTERM, "it printed nothing")
        first.stop.unlink()
        assert run_process(later, starter=starter) == (0, "begun")
    assert first.output.read_text() == ""


@needs_fork
def test_a_starter_that_cannot_import_is_told(job: MakeJob, capfd: pytest.CaptureFixture[str]) -> None:
    with Starter(["no_such_module"], SMALL.whole_environment) as starter:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="has ended"):
                run_process(job(""), starter=starter)
    assert "no_such_module" in capfd.readouterr().err


LEAVES = """
import atexit, os, shared, signal, sys
os.environ["LEFT"] = shared.left = "something"
os.umask(0o77), os.chdir("/"), sys.path.append("/"), atexit.register(print, "left")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
LOOKS = """
import os, sys
imported = "shared" in sys.modules
import shared, signal
names = [name for name in vars(shared) if name[0] != "_"]
print(os.environ.get("LEFT"), os.umask(0), os.getcwd(), sys.path, signal.getsignal(15), names)
print(imported, shared.calls)
"""


@needs_fork
def test_a_forked_process_finds_nothing_that_another_changed(job: MakeJob, monkeypatch: Patch) -> None:
    """What is named is imported already, and was called once; all else is as in a process of its own."""
    looks, leaves = job(LOOKS), job(LEAVES, name="leaves")
    (looks.working_folder / "shared.py").write_text(
        "calls = 0\ndef call(): globals().update(calls=calls + 1)"
    )
    monkeypatch.setenv("PYTHONPATH", str(looks.working_folder))
    assert run_process(looks).last_line == "False 0"
    own = looks.output.read_text()
    with Starter(["shared:call"], SMALL.whole_environment) as starter:
        assert run_process(leaves, starter=starter) == (0, "left")
        assert run_process(looks, starter=starter).last_line == "True 1"
    assert looks.output.read_text() == own + own.replace("False 0", "True 1")


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


# ------------------------------------------------------------------------------------------------------------
# Executors

PARENT = "import os; print(os.getppid())"
MEET = """  # waits until the files that the arguments name are there, the first of them its own
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
while not all(pathlib.Path(name).exists() for name in sys.argv[1:]):
    time.sleep(0.01)
print(os.environ.get("CUDA_VISIBLE_DEVICES"))
"""


def outcomes(executor: LocalExecutor, jobs: list[Job]) -> list[Outcome]:
    with executor, ThreadPoolExecutor(executor.jobs) as pool:
        return list(pool.map(executor.run, jobs))


def last_lines(executor: LocalExecutor, jobs: list[Job]) -> list[str]:
    return [outcome.last_line for outcome in outcomes(executor, jobs)]


@pytest.mark.parametrize("imports", [[], pytest.param(["json"], marks=needs_fork)], ids=["started", "forked"])
def test_as_many_local_jobs_as_fit_run_side_by_side(imports: list[str], job: MakeJob) -> None:
    """Two processes that wait for each other end; a third waits for its turn; a killed one harms none."""
    assert LocalExecutor(SMALL).jobs == available_cores()
    kill = "import os; os.kill(os.getpid(), 9)"
    jobs = [job(kill, name="k"), *(job(MEET, *pair, name=pair[0]) for pair in ("ab", "ba", "ca"))]
    ended = outcomes(LocalExecutor(SMALL, 2, imports=imports), jobs)
    assert [outcome.code for outcome in ended] == [-signal.SIGKILL, 0, 0, 0]
    (parent,) = last_lines(LocalExecutor(SMALL, imports=imports), [job(PARENT)])
    assert (int(parent) == os.getpid()) == (not imports)


@pytest.mark.parametrize(("visible", "gpus"), [("", ["0", "0", "1"]), ("3, GPU-a", ["3", "3", "GPU-a"])])
def test_jobs_share_gpus_evenly(visible: str, gpus: list[str], job: MakeJob, monkeypatch: Patch) -> None:
    """A job that wants a GPU sees a single one; another keeps its environment."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    jobs = [job(MEET, *names, name=names[0], resources=WITH_GPU) for names in ("abc", "bca", "cab")]
    assert sorted(last_lines(LocalExecutor(WITH_GPU, jobs=3), jobs)) == gpus
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 7")
    assert last_lines(LocalExecutor(WITH_GPU, jobs=1), [job(MEET, "d", name="d")]) == ["3, 7"]


@pytest.mark.parametrize(("forks", "gpus"), [(False, 0), (True, 1)], ids=["no fork", "a GPU"])
def test_where_jobs_are_not_forked(forks: bool, gpus: int, job: MakeJob, monkeypatch: Patch) -> None:
    """Systems that cannot, and machines with GPUs for the jobs that want one: each is started anew."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("utils.sweeps.executors.FORKS", forks)
    (parent,) = last_lines(LocalExecutor(WITH_GPU, 1, imports=["json"]), [job(PARENT)])
    assert int(parent) == os.getpid()


@pytest.mark.parametrize("address", ["localhost:1", "nonsense"])
def test_a_ray_cluster_that_does_not_answer(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=f"--ray-address {address}: no Ray cluster"):
        RayExecutor(SMALL, jobs=1, address=address)
