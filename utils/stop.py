"""Requests to stop: Ctrl-C, SIGTERM and a lost terminal (SIGHUP).

    stop = StopRequest()
    with stop_signals(stop.receive):
        while not stop.requested:
            ...                       # a step; what is done is saved afterwards

A command that such a signal ended has the exit code `utils.errors.STOPPED`.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from utils.errors import STOPPED

logger = logging.getLogger("nested_lora")


@contextmanager
def stop_signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Context in which SIGINT, SIGTERM and SIGHUP only call `receive` with their number.

    SIGHUP that is ignored, as under nohup, stays ignored; Windows has none.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        receive(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def abrupt_interrupts() -> AbstractContextManager[None]:
    """Context in which these signals end the process at once and silently.

    For imports and other work before anything is written: libraries would turn a KeyboardInterrupt in their
    middle into other exceptions.
    """
    return stop_signals(lambda number: os._exit(STOPPED))


class StopRequest:
    """Request to stop that training honours between two steps.

    A second one stops at once, by KeyboardInterrupt. Signals less than a second apart are one: torchrun
    passes on to its processes what the terminal sent them already.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def receive(self, number: int) -> None:
        """Handle a signal: request a stop or, a second later or more, stop at once."""
        if self.requested:
            if time.monotonic() - self._since > 1:
                raise KeyboardInterrupt
            return
        self.requested, self._since = True, time.monotonic()
        logger.warning("Stopping after this step and saving; once more stops at once without saving")
