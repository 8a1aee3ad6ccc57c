"""Tables of config keys, made from the schemas, for `main.py --list keys` and `docs/configs.md`.

print(keys_text({"sema": SEMAConfig}))
print(keys_markdown(SCHEMAS))
"""

import inspect
import itertools
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from utils.config.messages import allowed_text, properties, shown
from utils.config.schema import RunConfig, with_reasons

HEADINGS = ("key", "default", "allowed", "meaning")
MIN_WIDTH, MAX_DEFAULT = 110, 28  # characters: of a table, of a default in it
INTRODUCTION = """\
# Config keys

Made from the code by `python main.py --list keys --format markdown > docs/configs.md`; do not edit.
`python main.py --list keys --method sema` prints those of one method. A config is a flat JSON file; keys that
it leaves out have their default, and `--set key=value` changes one. The groups below are shared by the
methods named under them; then follow the keys that a method adds or redefines."""


def keys_text(schemas: Mapping[str, type[RunConfig]]) -> str:
    """All keys of each method, group by group, as wide as the terminal."""
    sections = [
        f"{method}: {_title(group)}\n\n{_text_table(_rows(group, names))}"
        for method, schema in schemas.items()
        for group, names in _groups(schema)
    ]
    return "\n\n".join(sections)


def keys_markdown(schemas: Mapping[str, type[RunConfig]]) -> str:
    """The page of all keys: groups that methods share first, then what each method adds."""
    methods: dict[type[RunConfig], list[str]] = {}
    for method, schema in schemas.items():
        for group, _ in _groups(schema):
            methods.setdefault(group, []).append(method)
    sections = [INTRODUCTION]
    for group, users in methods.items():
        if group not in schemas.values():
            names = ", ".join(f"`{user}`" for user in users)
            sections += [f"## {_title(group)}", f"Of {names}.", _markdown_table(group, group.own_keys())]
    for method, schema in schemas.items():
        sections += [
            f"## `{method}`",
            inspect.getdoc(schema) or "",
            _markdown_table(schema, schema.own_keys()),
        ]
        if schema.legacy_keys:
            sections.append(f"Accepted without effect: {with_reasons(schema.legacy_keys)}.")
    return "\n\n".join(sections)


def _groups(schema: type[RunConfig]) -> Iterator[tuple[type[RunConfig], list[str]]]:
    """The classes that a config combines, general ones first, with the keys that no later one redefines."""
    owner = {
        name: group
        for group in reversed(schema.__mro__)
        for name in group.__dict__.get("__annotations__", {})
    }
    for group in reversed(schema.__mro__):
        if names := [name for name in schema.model_fields if owner[name] is group]:
            yield group, names


def _title(group: type[RunConfig]) -> str:
    return (inspect.getdoc(group) or group.__name__).split("\n")[0].rstrip(".")


def _rows(schema: type[RunConfig], names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Key, default, what is allowed, and meaning."""
    rows = []
    for name in names:
        field = schema.model_fields[name]
        default = "(required)" if field.is_required() else shown(field.default)
        rows.append((name, default, allowed_text(properties(schema)[name]), field.description or ""))
    return rows


def _markdown_table(schema: type[RunConfig], names: Sequence[str]) -> str:
    lines = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS)]
    for name, default, allowed, meaning in _rows(schema, names):
        cells = [f"`{name}`", f"`{default}`", allowed, meaning]
        lines.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    return "\n".join(f"| {line} |" for line in lines)


def _text_table(rows: Sequence[Sequence[str]]) -> str:
    """Four columns as wide as the terminal; the last two are wrapped to what keys and defaults leave."""
    cells = [HEADINGS, *rows]
    keys, defaults = (max(len(row[column]) for row in cells) for column in (0, 1))
    defaults = min(defaults, MAX_DEFAULT)
    left = max(MIN_WIDTH, shutil.get_terminal_size().columns) - keys - defaults - 6
    widths = (keys, defaults, left * 2 // 5, left - left * 2 // 5)
    lines = []
    for row in cells:
        wrapped = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            lines.append("  ".join(map(str.ljust, parts, widths)).rstrip())
    return "\n".join(lines)
