"""Starter: a process that has imported the modules that scripts need, and forks a process for each script.

    with Starter(["trainer"], {**os.environ, "OMP_NUM_THREADS": "1"}) as starter, open("out", "ab") as out:
        process = starter.start(["/.../main.py", "--config", "X.json"], Path.cwd(), out)
        process.wait(0.2)       # its exit code, or None while it is at work
        process.send_signal(signal.SIGTERM)

A script runs as `python main.py ...` would run it, in a process of its own with its own memory, signals and
exit code, without the seconds that imports take. Scripts cannot influence each other, as the starter only
imports; it computes nothing, so it has no threads, CUDA context or choice of CPU kernels to inherit.
On Linux only (`FORKS`): elsewhere there is no fork, or loaded libraries do not survive it.
"""

import atexit
import gc
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO

FORKS = sys.platform == "linux"
ROOT = Path(__file__).resolve().parents[2]
POLL = 0.05  # seconds between two looks at the forked processes
MAX_REQUEST = 2**17  # bytes
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if FORKS else ()


class Starter(AbstractContextManager):
    """Process that forks others, as long as the context lasts; threads may share it.

    names: what it imports, from the folder of `main.py`: "module", or "module:function", which it calls.
    environment: variables of the forked processes. Errors of imports are shown on standard error.
    """

    def __init__(self, names: Sequence[str], environment: dict[str, str]) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *names],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def start(self, arguments: Sequence[str], working_folder: Path, output: IO[bytes]) -> "ForkedProcess":
        """Process of a script with its arguments, leading a group of its own; `output` takes what it prints.

        RuntimeError: the starter has ended.
        """
        connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps([*arguments, str(working_folder)]).encode()
        with theirs:
            try:
                socket.send_fds(self._requests, [request], [theirs.fileno(), output.fileno()])
            except ConnectionError as error:
                connection.close()
                raise RuntimeError("the process that starts runs has ended") from error
        return ForkedProcess(connection)

    def close(self) -> None:
        self._requests.close()
        self._process.kill()  # what it has forked goes on
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.close()


class ForkedProcess:
    """Process that a starter forks, or will fork when it has imported; like `subprocess.Popen`.

    It sends its pid and waits for an answer before it begins; later the starter sends its exit code.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.returncode: int | None = None
        self._pid: int | None = None
        self._connection = connection

    def poll(self) -> int | None:
        """The exit code (negative: killed by that signal), or None while it is at work."""
        return self.wait(0)

    def wait(self, timeout: float) -> int | None:
        """As `poll`, after at most so many seconds without news.

        RuntimeError: the starter has ended, and how the process will end is unknown; it is asked to stop.
        """
        while self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            try:
                message = self._connection.recv(32)
            except ConnectionResetError:  # it was killed before it read our answer
                continue
            if not message:
                self.send_signal(signal.SIGTERM)
                raise RuntimeError("the process that starts runs has ended")
            if self._pid is None:
                self._pid = int(message)
                with suppress(ConnectionError):
                    self._connection.send(b"begin")
            else:
                self._end(int(message))
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal; one that has not begun yet never will."""
        if self._pid is None:
            self._end(-number)
        elif self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def _end(self, code: int) -> None:
        self.returncode = code
        self._connection.close()


def serve(requests: socket.socket, names: Sequence[str]) -> list[str] | None:
    """Import and call what is named, then fork for every request.

    Returns the request in the forked process, and None in this one when nobody asks any more. Signals that
    stop are blocked here, so that none is lost between the fork and the script.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    for name in names:
        found = pkgutil.resolve_name(name)
        if callable(found):
            found()
    gc.freeze()  # a collection would write to, and so copy, pages that all share
    running: dict[int, socket.socket] = {}
    while True:
        if select.select([requests], [], [], POLL if running else None)[0]:
            message, descriptors, *_ = socket.recv_fds(requests, MAX_REQUEST, 2)
            if not message:
                return None
            connection, output = socket.socket(fileno=descriptors[0]), descriptors[1]
            pid = os.fork()
            if pid == 0:
                for other in (requests, *running.values()):
                    other.close()
                begin(connection, output)
                return json.loads(message)
            os.close(output)
            running[pid] = connection
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with running.pop(ended[0]) as connection, suppress(ConnectionError):
                connection.send(str(os.waitstatus_to_exitcode(ended[1])).encode())


def begin(connection: socket.socket, output: int) -> None:
    """Detach a forked process from the starter, once the sweep knows its pid; without an answer it ends."""
    os.setpgid(0, 0)
    with connection, suppress(ConnectionError):
        connection.send(str(os.getpid()).encode())
        if connection.recv(32):
            for stream in (1, 2):
                os.dup2(output, stream)
            os.close(output)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            return
    os._exit(1)


def leave(codes: Sequence[int]) -> None:
    """End with the first of the exit codes, if there is one, without destroying what was imported."""
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


if __name__ == "__main__":
    codes: list[int] = []
    atexit.register(leave, codes)  # registered first, called last: after what scripts register
    request = serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
    if request is None:
        codes.append(0)
    else:
        *sys.argv, folder = request
        os.chdir(folder)
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            codes += [ended.code] if isinstance(ended.code, int) else []
            raise
