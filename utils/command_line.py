"""Parsing of command lines: types of arguments, and advice on arguments that a command does not have.

parser.add_argument("--run", type=given_path)
options = parse_or_advise(parser, arguments, lambda name, value: f"write --set {name}={value}")
fault = refused_options(options, TAKES, "a run")     # TAKES: command -> options it takes
"""

import argparse
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from utils.wording import escaped, is_utf8


def given_path(text: str) -> Path:
    """A path as typed on a command line, of which files will tell: that of `given_image`, in UTF-8.

    Raises ArgumentTypeError: as `given_image`, or the path is not UTF-8.
    """
    path = given_image(text)
    if not is_utf8(str(path)):
        raise argparse.ArgumentTypeError(f"{escaped(str(path))} is not UTF-8: rename it")
    return path


def given_image(text: str) -> Path:
    """A path as typed on a command line: `~` expanded, and a folder such as `.` under its own name.

    Raises ArgumentTypeError: the text is empty, or no path.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("empty, or with a NUL character; allowed: a path")
    path = Path(os.path.expanduser(text))
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))


def at_least_one(text: str) -> int:
    """A positive integer as typed on a command line; argparse reports the error."""
    if (number := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def whole_number(text: str) -> int:
    """An integer as typed on a command line; argparse reports the error, and how several are written."""
    try:
        return int(text)
    except ValueError:
        several = "; several are written with spaces between" if "," in text else ""
        raise argparse.ArgumentTypeError(f'"{text}" is not an integer{several}') from None


def given_options(options: argparse.Namespace) -> set[str]:
    """Names of the options that were typed, with dashes."""
    values = vars(options).items()
    return {name.replace("_", "-") for name, value in values if value not in (None, False, [])}


def chosen_command(options: argparse.Namespace, takes: Mapping[str, Sequence[str]]) -> str:
    """The command that the options ask for: the first of `takes` that is among them, else "run"."""
    return next((name for name in takes if name in given_options(options)), "run")


def refused_options(options: argparse.Namespace, takes: Mapping[str, Sequence[str]], run: str) -> str:
    """A sentence about options that the chosen command does not take; empty where there are none.

    Args:
        takes: command -> options that it takes beside its own.
        run: what the sentence calls the command "run".
    """
    command = chosen_command(options, takes)
    refused = given_options(options) - {command, *takes[command]}
    if not refused:
        return ""
    named, hint = f"--{command}", f"it takes {dashed(takes[command]) or 'nothing'}"
    if command == "run":
        named, hint = run, f"allowed with {dashed(name for name in takes if refused & {*takes[name]})}"
    return f"{named} takes no {dashed(sorted(refused))}: {hint}"


def dashed(names: Iterable[str]) -> str:
    """Options as they are typed: "--run, --out"."""
    return ", ".join(f"--{name}" for name in names)


def parse_or_advise(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    advice: Callable[[str, list[str]], str],
    takes_file: bool = False,
) -> argparse.Namespace:
    """The command line's arguments; exits with a usage error where some are unknown.

    Args:
        advice: (name without dashes, "" where there is none; values) -> what to write instead.
        takes_file: whether the first argument may be a path without an option; it becomes `file`.
    """
    options, unknown = parser.parse_known_args(arguments)
    options.file = None
    if takes_file and unknown and not unknown[0].startswith("-") and "=" not in unknown[0]:
        try:
            options.file = given_path(unknown.pop(0))
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument FILE: {error}")
    faults = [
        f"{shlex.join(([f'--{name}'] if name else []) + values)}: no such argument; {advice(name, values)}"
        for name, values in _settings(unknown)
    ]
    if faults:
        parser.error("\n".join(faults))
    return options


def as_set(key: str, values: Sequence[str]) -> str:
    """The `--set` argument that gives a key the values typed after `--key`, in JSON's words."""
    words = {"True": "true", "False": "false", "None": "null"}
    plain = [words.get(value, value) for value in values]
    text = plain[0] if len(plain) == 1 else f"[{','.join(map(_json, plain))}]"
    return f"--set {shlex.quote(f'{key}={text}')}"


def _json(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text)
    return text


def _settings(unknown: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(name, values) of arguments `--name value ...` and `--name=value`; "" where there is no name."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for argument in unknown:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found.append((name, [value] if equals else []))
        else:
            found[-1][1].append(argument)
    return [(name, values) for name, values in found if name or values]
