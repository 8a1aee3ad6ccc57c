"""Console output: messages above progress bars, on any terminal, pipe or encoding.

    prepare_console()             # first of all in a command
    attach_console()              # messages of the program go to standard output
    for batch in progress(batches, desc="scan", unit="batch"):     # a bar, where standard error is a terminal
        logger.info("...")

Levels: INFO tells the story of a run, DEBUG its details (epochs, optimizer groups, norms), WARNING what the
user should look at: it carries its name and, on a terminal without NO_COLOR, a colour. Files and pipes get
whole lines only, at once, so that `2>&1 | tee run.txt` and `grep` see them as they come.
"""

import io
import logging
import os
import sys
from typing import Any

READER_GONE = 141  # exit code of a command whose output nobody reads any more: 128 + SIGPIPE
COLOURS = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31"}  # by level, for terminals

logger = logging.getLogger("nested_lora")
logger.setLevel(logging.INFO)


def prepare_console() -> None:
    """Let standard output and error take any text line by line, and leave progress bars to terminals.

    What the console's encoding lacks is written as an escape; a closed stream (`>&-`) takes what it is given.
    Call this before libraries import tqdm: they read then whether TQDM_DISABLE is set.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the whole program
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def progress(items: Any = None, *, leave: bool = False, **options: Any) -> Any:
    """tqdm's bar, shown where standard error is a terminal and TQDM_DISABLE is not set."""
    from tqdm import tqdm  # here: it reads TQDM_DISABLE when it is imported

    return tqdm(items, leave=leave, disable="TQDM_DISABLE" in os.environ or None, **options)


def attach_console(*, goes_on: bool = True) -> logging.Handler | None:
    """Show the program's messages on standard output, above progress bars.

    goes_on: whether the program goes on silently once the reader has gone (a run has its text log); else
    OSError is raised. Returns the handler, or None where one is attached already.
    """
    if any(isinstance(handler, _Console) for handler in logger.handlers):
        return None
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"  # https://no-color.org
    return add_handler(_Console(goes_on), "%H:%M:%S", coloured=sys.stdout.isatty() and not unwanted)


def add_handler(
    handler: logging.Handler, time_format: str = "%Y-%m-%d %H:%M:%S", *, coloured: bool = False
) -> logging.Handler:
    """Send the program's messages to a handler, in the format of all logs; returns it."""
    handler.setFormatter(_Line(time_format, coloured))
    logger.addHandler(handler)
    return handler


def tell(text: str) -> None:
    """Write a line to standard error; nothing where its reader has gone or its disk is full."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def discard(stream: io.TextIOBase) -> None:
    """Discard what is still written to a stream: its reader has gone, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Line(logging.Formatter):
    """`time  message`, with the level's name from WARNING on; a message may go on over further lines."""

    def __init__(self, time_format: str, coloured: bool) -> None:
        super().__init__("%(asctime)s  %(message)s", time_format)
        self.coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = text.replace("  ", f"  {record.levelname}: ", 1)
        colour = COLOURS.get(record.levelno) if self.coloured else None
        return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


class _Console(logging.Handler):
    """Handler that writes messages above a progress bar instead of through it."""

    def __init__(self, goes_on: bool) -> None:
        super().__init__()
        self.goes_on = goes_on

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except OSError as error:
            if not self.goes_on:
                raise
            discard(sys.stdout)
            if not isinstance(error, BrokenPipeError):
                tell(f"standard output: {error.strerror}; the messages go on in the run's text log")
        except Exception:  # as every logging handler: a message must never end the program
            self.handleError(record)
