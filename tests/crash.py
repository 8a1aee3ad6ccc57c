"""Runs that die where a test says: a child process runs the command line and sends itself a signal at a
chosen moment.

Children are forked from a server that has imported everything and computed nothing: one costs what its run
computes.
"""

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import backbone.sema_block
import main
import models.vit.activations
import models.vit.task_inputs
import trainer  # noqa: F401  with it what every run imports
import utils.runs.checkpoint
import utils.training.optim
from utils.runs.run_log import read_metrics

METHODS = [models.LEARNERS[name] for name in models.LEARNERS]  # imported, too
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.crash"])

# What counts as a moment, in the order in which it happens during a run.
MOMENTS: dict[str, tuple[Any, str]] = {
    "step": (utils.training.optim.GroupedOptimizer, "step"),
    "scan": (backbone.sema_block.SEMAModules, "novelty"),
    "test": (models.vit.task_inputs.TaskInputs, "seen_features"),
    "store": (models.vit.activations.Activations, "compute"),
    "write": (utils.runs.checkpoint, "write_synced"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
}


def run(
    arguments: list[str], die_at: int | None = None, how: signal.Signals = signal.SIGKILL
) -> tuple[int, list[str]]:
    """Run `main.py arguments` in a child that gets the signal at moment `die_at`: (exit code, moments)."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_child, args=(arguments, die_at, int(how), sender))
    child.start()
    sender.close()
    moments: list[str] = []
    while True:
        try:
            moments.append(receiver.recv())
        except EOFError:
            break
    child.join()
    return child.exitcode, moments


def run_together(
    arguments: list[str], size: int, die_at: int | None = None, how: signal.Signals = signal.SIGINT
) -> list[int]:
    """Exit codes of `main.py arguments` in `size` processes as by torchrun; rank 0 gets the signal."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    children = []
    for rank in range(size):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **address}
        moment = die_at if rank == 0 else None
        child = CONTEXT.Process(target=_child, args=(arguments, moment, int(how), sender, ranks))
        child.start()
        children.append((child, receiver, sender))
    for child, _, _ in children:
        child.join()
    return [child.exitcode for child, _, _ in children]


def _child(
    arguments: list[str], die_at: int | None, how: int, sender: Any, environment: dict[str, str] | None = None
) -> None:
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    seen = 0

    def counted(name: str, original: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            sender.send(name)
            if seen == die_at:
                os.kill(os.getpid(), how)
            seen += 1
            return original(*args, **kwargs)

        return wrapper

    for name, (owner, attribute) in MOMENTS.items():
        setattr(owner, attribute, counted(name, getattr(owner, attribute)))
    code = main.main(arguments)
    sender.close()
    os._exit(code)


def outcome(folder: Path) -> dict[str, Any]:
    """What a run leaves behind that must not depend on interruptions: everything but seconds and memory."""
    result = json.loads((folder / "result.json").read_text())
    result.pop("cost")
    events = read_metrics(folder)
    for event in events:
        event.pop("seconds", None)
        event.pop("peak_memory_mb", None)
    tables = [*folder.glob("accuracy.csv"), *folder.glob("analysis/*.csv"), *folder.glob("analysis/*.json")]
    return {"result": result, "events": events, "tables": {path.name: path.read_text() for path in tables}}
