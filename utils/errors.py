"""The one exception for mistakes a person can mend; the commands tell of it without a traceback, exit code 2."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """One clear sentence: what is wrong, what was given, what is allowed, what to do."""


def exit_code(run: Callable[[], object]) -> int:
    """Run a command: 0 when it is done, 2 after a `UserError`, whose text goes to standard error, 130 after Ctrl-C."""
    try:
        run()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
