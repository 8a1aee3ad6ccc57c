"""Arguments of the commands: paths, and advice on arguments that a command does not have.

parser.add_argument("--run", type=given_path)
options = parse_or_advise(parser, arguments, lambda name, value: f"write --set {name}={value}")
"""

import argparse
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def given_path(text: str) -> Path:
    """A path as typed on a command line: `~` expanded, and a folder such as `.` under its own name.

    Raises:
        argparse.ArgumentTypeError: the text is empty, or no path.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("empty, or with a NUL character; allowed: a path")
    path = Path(os.path.expanduser(text))
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))


def parse_or_advise(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, advice: Callable[[str, list[str]], str]
) -> argparse.Namespace:
    """The command line's arguments; exits with a usage error where some are unknown.

    Args:
        advice: (name without dashes, "" where there is none; values) -> what to write instead.
    """
    options, unknown = parser.parse_known_args(arguments)
    told = []
    for name, values in _settings(unknown):
        given = shlex.join(([f"--{name}"] if name else []) + values)
        told.append(f"{given}: no such argument; {advice(name, values)}")
    if told:
        parser.error("\n".join(told))
    return options


def as_set(key: str, values: Sequence[str]) -> str:
    """The `--set` argument that gives a key the values typed after `--key`, in JSON's words."""
    words = {"True": "true", "False": "false", "None": "null"}
    plain = [words.get(value, value) for value in values] or ["true"]
    text = plain[0] if len(plain) == 1 else f"[{','.join(map(_json, plain))}]"
    return f"--set {shlex.quote(f'{key}={text}')}"


def _json(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text)
    return text


def _settings(unknown: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, values) of arguments `--name value ...` and `--name=value`; "" where there is no name."""
    name, values = "", []
    for argument in unknown:
        if argument.startswith("--"):
            if name or values:
                yield name, values
            name, equals, value = argument[2:].partition("=")
            values = [value] if equals else []
        else:
            values.append(argument)
    if name or values:
        yield name, values
