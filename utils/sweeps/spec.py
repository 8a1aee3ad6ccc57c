"""Sweep files: a table of experiments, checked cell by cell before anything runs.

    sweep = load_sweep("exps/sweeps/smoke.json", [], {"my_method": MyConfig})
    sweep.folder             # logs/sweeps/smoke: all that the sweep writes
    sweep.cells[0].config    # the typed configuration of the first cell

A sweep file is a flat JSON object; `SweepFile` lists its keys. The table has a row for every named cell (`cells`), for
every point of the cross product of `grid`, or for every cell at every point where both are given; each row is run with
every seed. What a row changes is laid over its base in this order: `set`, the cell's own keys, the grid's, `--set`.
`utils/sweeps/run.py` runs the table.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from utils.config.loading import BASE_KEY, ConfigError, base_of, load_config, no_such, read_object
from utils.config.schema import RunConfig, Seeds, Text, check_text
from utils.reports.hypotheses import Hypothesis, read_hypotheses, unknown_metrics

SHAPING = {"base", "set", "cells", "grid"}  # keys without which there is no telling what the cells are
MOST_CELLS = 10_000  # more is a slip of the keyboard
MOST_NAMED = 4  # cells in a sentence
LONGEST_SLUG = 120  # bytes; seed and backbone follow in a file name of at most 255
OWNED = {
    "seed": 'the seeds of all cells stand in "seeds"',
    "prefix": "it is made from the cell's name",
    "logs_root": "it follows from that of the base",
}


class SweepFile(BaseModel):
    """The keys of a sweep file. Unknown keys are refused, types are strict, values frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    description: str = Field(
        "", description="The command that runs this file and what it is expected to give."
    )
    base: Text = Field(description="The config every cell starts from: a path, from the sweep file.")
    seeds: Seeds = Field(
        [1993],
        description="Every cell is run with each.",
        json_schema_extra={
            "allowed": "an integer from 0 to 4294967295, or a list of different ones, at least one"
        },
    )
    set: dict[str, Any] = Field(
        {},
        description="Keys changed in every cell.",
        json_schema_extra={"allowed": "an object of keys and values"},
    )
    cells: dict[str, dict[str, Any]] = Field(
        {},
        description='Cell name -> keys changed in it; a "base" of its own replaces the sweep\'s.',
        json_schema_extra={"allowed": "an object of names, each with an object of keys and values"},
    )
    grid: dict[str, list[Any]] = Field(
        {},
        description="Key -> values; every combination is a cell, or a variant of every named cell.",
        json_schema_extra={"allowed": "an object of keys, each with a list of values"},
    )
    baseline: Text | None = Field(None, description="Name of the cell that the others are compared with.")
    hypotheses: dict[str, dict[str, Any]] = Field(
        {},
        description="Hypothesis name -> the keys of `Hypothesis`; the report answers each.",
        json_schema_extra={"allowed": "an object of names, each with an object of keys and values"},
    )
    threads: int = Field(
        1, ge=1, le=1024, description="Threads of a run; as many cores are set aside for it."
    )
    memory_gb: float = Field(3.0, gt=0, le=1e6, description="Memory a run may need in GB (10^9 bytes).")


@dataclass(frozen=True)
class Cell:
    """A row of the table: its name, the name's form for paths, its configuration, and lines worth logging about it."""

    name: str
    slug: str
    config: RunConfig
    notes: tuple[str, ...] = ()

    def resolved(self, seed: int) -> dict[str, Any]:
        """The configuration of one of its runs, as `config.json` holds it."""
        return self.config.model_dump(mode="json") | {"seed": [seed]}


@dataclass(frozen=True)
class Sweep:
    """A checked table; `folder` holds everything the sweep writes."""

    path: Path
    overrides: tuple[str, ...]
    description: str
    folder: Path
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    baseline: str | None
    hypotheses: Mapping[str, Hypothesis]
    threads: int
    memory_gb: float

    @property
    def command(self) -> str:
        """The command that runs the sweep, or goes on with it."""
        changes = (part for override in self.overrides for part in ("--set", override))
        return shlex.join(["python", "main.py", "--sweep", str(self.path), *changes])

    def notes(self) -> dict[str, list[str]]:
        """Lines worth logging before the first run, each with the names of the cells that it is about."""
        found: dict[str, list[str]] = {}
        for cell in self.cells:
            for note in cell.notes:
                found.setdefault(note, []).append(cell.name)
        return found

    def table(self) -> dict[str, Any]:
        """The content of `sweep.json`."""
        return {
            "description": self.description,
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "hypotheses": {name: hypothesis.model_dump() for name, hypothesis in self.hypotheses.items()},
            "cells": [
                {"name": cell.name, "slug": cell.slug, "config": cell.config.model_dump(mode="json")}
                for cell in self.cells
            ],
        }


class _Plan(NamedTuple):
    """A cell before its configuration is read: name, base, and (origin, values) laid over it."""

    name: str
    base: Any
    changes: list[tuple[str, dict[str, Any]]]


def load_sweep(path: str | Path, overrides: Sequence[str], schemas: Mapping[str, type[RunConfig]]) -> Sweep:
    """Read a sweep file and resolve every cell; nothing is written.

    Args:
        path: the JSON file.
        overrides: texts `key=value` as for a config; they apply to all cells.
        schemas: method name -> schema.

    Raises:
        ConfigError: the file or any of its cells is wrong; it lists every problem, cell by cell.
    """
    path = Path(os.path.expanduser(path))
    checked = read_object(path, SweepFile)
    if checked.faulty & SHAPING:
        raise ConfigError(str(path), checked.problems, checked.footer)
    file = SweepFile(**checked.sound)
    count = max(1, len(file.cells)) * math.prod(map(len, file.grid.values()))
    if count > MOST_CELLS:
        raise ConfigError(str(path), [f"cells, grid: {count} cells; allowed: at most {MOST_CELLS}"])
    plans = list(_plans(file))
    names = [plan.name for plan in plans]
    if unwritable := [*_unwritable("cell", names), *_unwritable("hypothesis", file.hypotheses)]:
        raise ConfigError(str(path), [*checked.problems, *unwritable], checked.footer)
    hypotheses, doubts = read_hypotheses(file.hypotheses, names)
    problems = [*checked.problems, *_table_problems(file, names, overrides), *doubts]

    cells: list[Cell] = []
    faults: dict[str, list[str]] = {}
    footers = [checked.footer]
    for plan in plans:
        try:
            cells.append(_resolve(plan, path, file, overrides, schemas))
        except ConfigError as error:
            faults[plan.name] = error.problems
            footers.append(error.footer)
    problems += [*_by_cell(faults, len(plans)), *_mixed_metrics(cells), *_twins(cells)]
    problems += unknown_metrics(hypotheses, {cell.name: cell.config.metrics for cell in cells})
    if problems:
        raise ConfigError(str(path), problems, "\n".join(dict.fromkeys(filter(None, footers))))

    logs_root = next((c for c, plan in zip(cells, plans, strict=True) if plan.base == file.base), cells[0])
    folder = Path(logs_root.config.logs_root) / "sweeps" / path.stem
    runs = {"logs_root": str(folder / "runs")}
    return Sweep(
        path=path,
        overrides=tuple(overrides),
        description=file.description,
        folder=folder,
        cells=tuple(replace(cell, config=cell.config.model_copy(update=runs)) for cell in cells),
        seeds=tuple(file.seeds),
        baseline=file.baseline,
        hypotheses=hypotheses,
        threads=file.threads,
        memory_gb=file.memory_gb,
    )


def slug_of(name: str) -> str:
    """The name as it can stand in a path: letters, digits, `_.=+-`; a digest tells apart what is cut or left out.

    `nested, nested_lora_rank=4` -> `nested-nested_lora_rank=4`
    """
    slug = re.sub(r"[^\w.=+-]+", "-", name).strip("-.")
    if slug and len(slug.encode()) <= LONGEST_SLUG:
        return slug
    cut = slug.encode()[: LONGEST_SLUG - 10].decode(errors="ignore")
    return f"{cut or 'cell'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _plans(file: SweepFile) -> Iterator[_Plan]:
    """The cells in the order of the file: each at every point of the grid, the last key changing fastest."""
    if not file.cells and not file.grid:
        return
    points = [dict(zip(file.grid, values, strict=True)) for values in itertools.product(*file.grid.values())]
    for cell, own in file.cells.items() if file.cells else [(None, {})]:
        for point in points:
            parts = [] if cell is None else [cell]
            name = ", ".join([*parts, *(f"{key}={_bare(value)}" for key, value in point.items())])
            layers = {"set": file.set, "cell": own, "grid": point}
            changes = [(origin, _without_base(values)) for origin, values in layers.items()]
            yield _Plan(name, own.get(BASE_KEY, file.base), changes)


def _without_base(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != BASE_KEY}


def _table_problems(file: SweepFile, names: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """What is wrong with the table as a whole, whatever the cells' configurations are."""
    problems = []
    if not file.cells and not file.grid:
        problems.append("cells, grid: both are missing; allowed: at least one of them, not empty")
    problems += [
        f"grid, {key}: no values; allowed: a non-empty list"
        for key, values in file.grid.items()
        if not values
    ]
    problems += ["cells: a name is empty; allowed: any other text" for name in file.cells if not name.strip()]
    problems += _forbidden(file)
    given = {override.partition("=")[0].strip() for override in overrides}
    problems += [f"--set {key}: not with --sweep, {OWNED[key]}" for key in ("seed", "prefix") if key in given]
    if file.baseline is not None and names and file.baseline not in names:
        problems.append(f"baseline = {_quoted(file.baseline)}: {no_such('cell', file.baseline, names)}")
    return [*problems, *_collisions(names)]


def _forbidden(file: SweepFile) -> Iterator[str]:
    """Keys where they may not stand: those the sweep sets itself, and a base that is not a cell's."""
    cells = {f"cell {_quoted(name)}": own for name, own in file.cells.items()}
    for place, values in {"set": file.set, "grid": file.grid, **cells}.items():
        yield from (
            f"{place}: {key} cannot be set, {OWNED[key]}; leave it out" for key in OWNED if key in values
        )
        if BASE_KEY in values and place not in cells:
            yield f'{place}: base cannot be set; allowed: "base" of the sweep or of a cell'


def _unwritable(what: str, names: Iterable[str]) -> Iterator[str]:
    """Names that no file holds."""
    for name in names:
        try:
            check_text(name)
        except ValueError as error:
            yield f"{what} {json.dumps(name)}: its name {error}; rename it"


def _collisions(names: Sequence[str]) -> Iterator[str]:
    """Cells whose files would have the same names, also where a file system does not tell cases apart."""
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        other = first.setdefault(slug_of(name).casefold(), number)
        if other != number:
            both = f"cells {_quoted(names[other])} and {_quoted(name)}"
            yield f"{both}: the files of both would be named {slug_of(name)}; rename one"


def _resolve(
    plan: _Plan, path: Path, file: SweepFile, overrides: Sequence[str], schemas: Mapping[str, type[RunConfig]]
) -> Cell:
    """The cell's configuration, checked. Raises ConfigError."""
    try:
        target = base_of(path, plan.base)
    except ValueError as error:
        problem = f"base = {_bare(plan.base)}: {error}; allowed: the path of a JSON file, from the sweep's"
        raise ConfigError(str(path), [problem]) from None
    description = ("sweep", {"description": f"cell {_quoted(plan.name)} of the sweep {path.name}"})
    slug = slug_of(plan.name)
    fixed = ("sweep", {"prefix": slug, "seed": file.seeds})
    loaded = load_config(target, overrides, schemas, [description, *plan.changes, fixed])
    return Cell(plan.name, slug, loaded.config, tuple(loaded.notes))


def _by_cell(faults: Mapping[str, Sequence[str]], cells: int) -> list[str]:
    """One line a problem, cell by cell; what all cells share is said once, first."""
    shared = set.intersection(*map(set, faults.values())) if cells > 1 and len(faults) == cells else set()
    lines = [f"every cell: {problem}" for problem in next(iter(faults.values()), []) if problem in shared]
    return lines + [
        f"cell {_quoted(name)}: {problem}"
        for name, problems in faults.items()
        for problem in problems
        if problem not in shared
    ]


def _mixed_metrics(cells: Sequence[Cell]) -> Iterator[str]:
    """Experiments that are measured by different metrics."""
    names: dict[str, list[str]] = {}
    for cell in cells:
        names.setdefault(cell.config.metrics[0].key, []).append(_quoted(cell.name))
    if len(names) > 1:
        each = "; ".join(f"{main}: {', '.join(its[:MOST_NAMED])}" for main, its in names.items())
        yield f"cells with different metrics ({each}): allowed: the same, each experiment has a sweep of its own"


def _twins(cells: Sequence[Cell]) -> Iterator[str]:
    """Cells with the same configuration, but for names and for keys that change nothing: one of them is a mistake."""
    first: dict[str, int] = {}
    for number, cell in enumerate(cells):
        idle = {key: type(cell.config).model_fields[key].default for key in cell.config.idle_keys()}
        values = {**cell.config.model_dump(mode="json", exclude={"prefix", "description"}), **idle}
        other = first.setdefault(json.dumps(values, sort_keys=True), number)
        if other != number:
            both = f"cells {_quoted(cells[other].name)} and {_quoted(cell.name)}"
            unused = sorted({*cells[other].config.idle_keys(), *idle})
            but = f", but for keys that change nothing here ({', '.join(unused)})" if unused else ""
            yield f"{both}: the same configuration{but}; leave one out"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _bare(value: Any) -> str:
    """A grid value in a name: text without quotes, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
