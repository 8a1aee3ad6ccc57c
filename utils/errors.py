"""The one exception for mistakes a person can mend: bad config, missing data, foreign checkpoints.

`main.py` and `eval.py` print its text without a traceback and exit with code 2.
"""


class UserError(Exception):
    """One clear sentence: what is wrong, what was given, what is allowed, what to do."""
