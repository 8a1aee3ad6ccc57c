"""Exceptions that users see, sentences for errors of the operating system, and exit codes of commands.

raise UserError("batch_size is 0: at least 1 is allowed; change it with --set batch_size=32")
sys.exit(exit_code(lambda: work()))          # 2 after an error, printed as one sentence
"""

import errno
import sys
from collections.abc import Callable

from utils.console import READER_GONE, discard, tell

STOPPED = 130  # exit code of a command that Ctrl-C, SIGTERM or a lost terminal ended: 128 + SIGINT


class UserError(Exception):
    """One clear sentence: what is wrong, what was given, what is allowed, what to do."""


class Interrupted(Exception):
    """Work was asked to stop and did so between two steps; its state can be saved and resumed."""


AGAIN = "give the command again"
RESUME = "go on with --resume where a run had begun"
OUT_OF_MEMORY = (
    "out of memory: end other programs that hold it, lower what needs it (batch_size, eval_batch_size, "
    "ranpac_dim), or use a device with more"
)
WAYS_OUT = {
    errno.ENOSPC: "free some space, or choose another disk with logs_root or cache_root",
    errno.EDQUOT: "free some space, or choose another disk with logs_root or cache_root",
    errno.EROFS: "choose a folder that can be written with logs_root or cache_root",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EPERM: "change its permissions, or choose another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or choose another folder",
    errno.EISDIR: "a folder stands where a file is needed: move it away",
    errno.EEXIST: "a file stands where a folder is needed: move it away, or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def os_error_sentence(error: OSError, go_on: str = RESUME) -> str:
    """Sentence for an OSError: path, reason, what to do; go_on: how to continue then."""
    where = f"{error.filename}: " if error.filename is not None else ""
    way_out = WAYS_OUT.get(error.errno, "check the path and its disk")
    return f"{where}{error.strerror or error}; {way_out}, then {go_on}"


def in_one_line(error: Exception) -> str:
    """An error's class and text without line breaks, for a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory was left, that of Python or PyTorch, on any device."""
    if isinstance(error, RuntimeError):
        said = ("can't allocate memory", "out of memory")  # the second also by drivers, of any device
        return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in said)
    return isinstance(error, MemoryError)


def exit_code(
    run: Callable[[], int | None], tells: Callable[[], bool] = lambda: True, go_on: str = RESUME
) -> int:
    """Exit code of a command: what it returns (None: 0), 2 after an error, 130 stopped, 141 output closed.

    A UserError, OSError or lack of memory is printed on standard error as one sentence, if `tells` returns
    True. go_on: how to continue once the cause of the latter two is removed.
    """
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        discard(sys.stdout)
        return READER_GONE
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError):
            sentence = os_error_sentence(error, go_on)
        elif is_out_of_memory(error):
            sentence = f"{OUT_OF_MEMORY}; then {go_on}"
        elif isinstance(error, UserError):
            sentence = str(error)
        else:
            raise
        if tells():
            tell(sentence)
        return 2
    except (Interrupted, KeyboardInterrupt):
        return STOPPED
