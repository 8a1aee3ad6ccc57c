"""Lists of config keys and of metrics, made from the schemas, for `main.py --list` and `docs/configs.md`.

print(keys_text({"sema": SEMAConfig}))
print(keys_markdown(SCHEMAS))
print(metrics_text(SCHEMAS))
"""

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from utils.config.messages import allowed_text, grouped, properties, shown
from utils.config.schema import RunConfig, with_reasons
from utils.metric_catalogue import COSTS

WIDTH = 110  # characters of a line
INTRODUCTION = """\
# Config keys

This page is the output of `python main.py --list keys --format markdown`: write it anew, do not edit it.
`python main.py --list keys --method sema` prints those of one method. A config is a flat JSON file; keys that
it leaves out have their default, and `--set key=value` changes one. The groups below are shared by the
methods named under them; then follow the keys that a method adds or redefines."""


def keys_text(schemas: Mapping[str, type[RunConfig]]) -> str:
    """All keys of each method, group by group: `key = default (allowed)`, then the meaning, indented."""
    lines = []
    for method, schema in schemas.items():
        for group, names in _groups(schema):
            lines.append(f"\n{method}: {_title(group)}\n")
            for name, default, allowed, meaning in _rows(group, names):
                lines += textwrap.wrap(f"{name} = {default} ({allowed})", WIDTH, subsequent_indent="      ")
                lines += textwrap.wrap(meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).strip()


def keys_markdown(schemas: Mapping[str, type[RunConfig]]) -> str:
    """The page of all keys: groups that methods share first, then what each method adds."""
    methods = grouped((method, group) for method, schema in schemas.items() for group, _ in _groups(schema))
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


def metrics_text(schemas: Mapping[str, type[RunConfig]]) -> str:
    """The numbers of a run: key, name with unit, direction and meaning; those of several methods once."""
    users = grouped((method, schema.metrics) for method, schema in schemas.items())
    tables = {", ".join(methods): metrics for metrics, methods in users.items()} | {"every run": COSTS}
    lines = []
    for title, metrics in tables.items():
        rows = [
            (spec.key, spec.heading, "" if spec.count or spec in COSTS else f"{spec.better} is better")
            for spec in metrics
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(f"\n{title}\n")
        for row, spec in zip(rows, metrics, strict=True):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join([*cells, spec.meaning]).rstrip())
    return "\n".join(lines).strip()


def _groups(schema: type[RunConfig]) -> Iterator[tuple[type[RunConfig], list[str]]]:
    """The classes that a config combines, general ones first, with the keys that no later one redefines."""
    classes = [group for group in reversed(schema.__mro__) if issubclass(group, RunConfig)]
    owner = {name: group for group in classes for name in group.own_keys()}
    for group in classes:
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
    lines = ["key | default | allowed | meaning", "--- | --- | --- | ---"]
    for name, default, allowed, meaning in _rows(schema, names):
        cells = [f"`{name}`", f"`{default}`", allowed, meaning]
        lines.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    return "\n".join(f"| {line} |" for line in lines)
