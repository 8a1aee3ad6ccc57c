"""Phrases of logs and tables: counts with nouns, spans of numbers, shortened lists, durations, commands.

counted(1, "group")                    # "1 group"; counted(3, "class", "classes"): "3 classes"
spans([0, 1, 2, 3, 9])                 # "0-3, 9": both ends belong to a span, everywhere
shortened(["bed", "bee", "boy"], 10)   # "bed, bee and 1 more"
some(["a", "b", "c", "d", "e"])        # "a, b, c, d and 1 more"
duration(90)                           # "90 s"
as_typed("main.py", "--resume", "a b") # "python main.py --resume 'a b'"
named_data({"dataset": "cats", "extra_data": ["birds"]})     # "cats + birds"
columns("低 rank")                      # 7 on a terminal
escaped("\\udcff.png")                 # r"\udcff.png": bytes of a name that are no text
"""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unicodedata import combining, east_asian_width

SCRIPTS = ("main.py", "eval.py")


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number and its noun, in the singular for one."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def spans(numbers: Iterable[int]) -> str:
    """Ascending integers in words: neighbours as `first-last`, both inclusive, spans joined by commas."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in found)


def shortened(names: Sequence[str], width: int = 48) -> str:
    """Names joined by commas, as many as fit `width` characters, and the number of the others."""
    kept = 1
    while kept < len(names) and len(", ".join(names[: kept + 1])) <= width:
        kept += 1
    return some(names, most=kept)


def some(names: Sequence[str], separator: str = ", ", most: int = 4) -> str:
    """The first of several names, and the number of the others."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return " and ".join([separator.join(names[:most]), *more])


def duration(seconds: float) -> str:
    """A time with one unit: seconds up to two minutes, minutes up to two hours, else hours."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def as_typed(script: str, *arguments: object) -> str:
    """A command as one types it in a shell, with the project's folder if called from another."""
    called, place = Path(sys.argv[0]), Path()
    if called.name in SCRIPTS:
        with suppress(OSError):  # the current folder is gone
            place = Path() if called.parent.samefile(".") else called.parent
    return shlex.join(["python", str(place / script), *map(str, arguments)])


def named_data(config: Mapping[str, Any]) -> str:
    """Names of the data sets of a configuration, those of `extra_data` last; "" for grids."""
    return " + ".join(filter(None, [config.get("dataset"), *(config.get("extra_data") or [])]))


def columns(text: str) -> int:
    """Columns that a text takes on a terminal: two for Chinese and Japanese, none for an accent."""
    return sum(1 + (east_asian_width(c) in "WF") for c in text if not combining(c))


def is_utf8(text: str) -> bool:
    """Whether a text can be UTF-8; bytes of a file's name that are none appear as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def escaped(text: str) -> str:
    """The text with lone surrogates as escapes, so that every console and file takes it."""
    return text.encode("utf-8", "backslashreplace").decode()
