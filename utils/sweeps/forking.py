"""Starter: `multiprocessing`'s fork server imports what scripts need once and forks a process for each.

    starter = Starter(["trainer"], {**os.environ, "OMP_NUM_THREADS": "1"})
    process = starter.start(["/.../main.py", "--config", "X.json"], Path.cwd(), Path("out"))
    process.wait(0.2)           # its exit code, or None while it is at work
    process.send_signal(signal.SIGTERM)

A script runs as `python main.py ...` would run it, in a process of its own with its own memory, signals and
exit code, without the seconds that imports take. It inherits nothing that a script before it has changed: the
server only imports. It computes nothing, so it has no threads, CUDA context or choice of CPU kernels either.
On Linux only (`FORKS`): elsewhere there is no fork, or loaded libraries do not survive it.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = sys.platform == "linux"
ROOT = Path(__file__).resolve().parents[2]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if FORKS else ()
PATH = "PYTHONPATH"
UNKNOWN = 255  # exit code that `multiprocessing` gives where the server has ended
ONE_BY_ONE = threading.Lock()  # `multiprocessing` looks after all its children whenever one starts


class Starter:
    """Server that forks processes until this one ends; threads may share it. A process has one.

    names: modules that it imports, from the folder of `main.py`; what cannot be imported the scripts tell.
    environment: variables of the forked processes.
    """

    def __init__(self, names: Sequence[str], environment: dict[str, str]) -> None:
        self._names, self._environment = list(names), environment
        with ONE_BY_ONE:
            self._serve()

    def start(self, arguments: Sequence[str], working_folder: Path, output: Path) -> "ForkedProcess":
        """Process of a script with its arguments, leading a group of its own; `output` takes what it prints.

        Returns when the server has imported. RuntimeError: the server has ended.
        """
        given = (arguments, working_folder, output.absolute(), self._environment)
        process = multiprocessing.get_context("forkserver").Process(target=run_script, args=given)
        with ONE_BY_ONE:
            self._serve()
            try:
                process.start()
            except (EOFError, ConnectionError) as error:
                raise RuntimeError("the process that starts runs has ended") from error
        return ForkedProcess(process)

    def _serve(self) -> None:
        """Start the server where it is not at work.

        Signals that stop are blocked in it, so that none is lost between a fork and the script.
        """
        before = dict(os.environ)
        path = os.pathsep.join([str(ROOT), *filter(None, [self._environment.get(PATH)])])
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            resource_tracker.ensure_running()  # the server's companion; it lets some of them pass again
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            os.environ.update(self._environment | {PATH: path})
            forkserver.set_forkserver_preload(self._names)
            forkserver.ensure_running()
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class ForkedProcess:
    """Process that a starter forked; like `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self.returncode: int | None = None
        self._process = process

    def poll(self) -> int | None:
        """The exit code (negative: killed by that signal), or None while it is at work."""
        return self.wait(0)

    def wait(self, timeout: float) -> int | None:
        """As `poll`, after at most so many seconds without news.

        RuntimeError: the server has ended, and how the process will end is unknown; it is asked to stop.
        """
        connection.wait([self._process.sentinel], timeout)
        with ONE_BY_ONE:
            self.returncode = self._process.exitcode
        if self.returncode == UNKNOWN:
            with suppress(ProcessLookupError):  # it has ended, with this code
                os.kill(self._process.pid, signal.SIGTERM)
                raise RuntimeError("the process that starts runs has ended")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


def run_script(
    arguments: Sequence[str], working_folder: Path, output: Path, environment: dict[str, str]
) -> None:
    """Run a script as `python` would, in a process that the server has just forked.

    It is asked to stop when the process that asked for it is no more.
    """
    gc.freeze()  # a collection would write to, and so copy, pages that all share
    os.setpgid(0, 0)
    with open(output, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if any(os.environ.get(name) != environment[name] for name in environment.keys() - {PATH}):
        raise RuntimeError("this process has started a server already, with other variables")
    os.environ.pop(PATH, None)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # again the system's own
    threading.Thread(target=stop_without, args=[multiprocessing.parent_process()], daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    os.chdir(working_folder)
    sys.argv, sys.path[0] = list(arguments), str(Path(arguments[0]).resolve().parent)
    with ExitStack() as at_exit:
        atexit.register = at_exit.callback  # `multiprocessing` ends processes without these
        runpy.run_path(arguments[0], run_name="__main__")


def stop_without(parent: BaseProcess) -> None:
    """Ask this process to stop when its parent has ended."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
