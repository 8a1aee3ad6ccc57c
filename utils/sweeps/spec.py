"""Sweep: a table of cells from a file, each run with every seed, checked completely before anything runs.

    sweep = load_sweep("exps/sweeps/smoke.json", [], schemas)
    [cell.name for cell in sweep.cells]        # the rows of the table
    sweep.cells[0].config                      # resolved, typed and frozen

The file is JSON beside the configs; `SweepFile` lists its keys. The table has one row per named cell
(`cells`), per point of the cross product of `grid`, or per cell and point where both are given. A row's
config is its base with `set`, the cell's own keys, those of the grid and `--set` over it, in this order.
Where the base is a sweep itself, its cells, seeds and other keys are those of the file, which states what
differs.
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from utils.config.experiments import kind_of
from utils.config.loading import BASE_KEY, CheckedObject, ConfigError, base_of, load_config, read_object
from utils.config.messages import field_faults, grouped, no_such, shown
from utils.config.schema import RunConfig, Seeds, Text, check_text, key
from utils.reports.hypotheses import Hypothesis, read_hypotheses, unknown_metrics
from utils.wording import as_typed, some

SHAPING = {"base", "set", "cells", "grid"}  # keys without which the cells are unknown
MAX_CELLS = 10_000
MAX_SLUG = 120  # bytes; seed and backbone follow in a file name of at most 255
OWNED = {
    "seed": 'the seeds of all cells stand in "seeds", and --seeds adds some',
    "prefix": "it is made from the cell's name",
    "logs_root": "it follows from that of the base",
    BASE_KEY: 'it stands in "base" of the sweep or of a cell',
}


def _checked_name(name: str) -> str:
    try:
        check_text(name)
    except ValueError as error:
        raise ValueError(f"the name {json.dumps(name)} {error}") from None
    return name


Keys = dict[str, Any]
NamedKeys = dict[Annotated[str, AfterValidator(_checked_name)], Keys]
Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
KEYS = "an object of keys and values"
NAMED_KEYS = f"an object of names, each with {KEYS}"
TEXTS = "an object of texts"
GRID = "an object of keys, each with a non-empty list of values"


class SweepFile(BaseModel):
    """Keys of a sweep file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    description: str = key("", "Command that runs this file, and its expected result.")
    base: Text = key(..., "Config that every cell starts from, or a sweep to repeat: a path from this file.")
    seeds: Seeds = key([1993], "Seeds; every cell is run with each.")
    set: Keys = key({}, "Keys changed in every cell.", KEYS)
    cells: NamedKeys = key({}, 'Name -> keys changed in the cell, its own "base" among them.', NAMED_KEYS)
    grid: Grid = key({}, "Key -> values; each combination is a cell, or a variant of each cell.", GRID)
    baseline: Text | None = key(None, "Name of the cell that the others are compared with.")
    finding: Text | None = key(
        None, "Cell that the closing sentence compares with the baseline; null = the best of the others."
    )
    hypotheses: NamedKeys = key({}, "Name -> keys of `Hypothesis`; the report answers each.", NAMED_KEYS)
    next: dict[str, Text] = key(
        {}, "Suggested next step -> its command, logged at the end; {folder} is the sweep's.", TEXTS
    )
    threads: int = key(1, "Threads of each run, and cores reserved for it.", ge=1, le=1024)
    memory_gb: float = key(3.0, "Memory that a run may need, in GB (10^9 bytes).", gt=0, le=1e6)


@dataclass(frozen=True)
class Cell:
    """Row of the table: its name, the name in paths, its config, and notes to log about it."""

    name: str
    slug: str
    config: RunConfig
    notes: Sequence[str]

    def with_seed(self, seed: int) -> RunConfig:
        """The config of one of its runs."""
        return self.config.model_copy(update={"seed": seed})


@dataclass(frozen=True)
class Sweep:
    """Checked table; `folder` holds everything the sweep writes, `command` runs it or continues it.

    only, seeds: names and seeds of the runs to do; empty for all of the table.
    """

    path: Path
    file: SweepFile
    command: str
    folder: Path
    cells: Sequence[Cell]
    hypotheses: Mapping[str, Hypothesis]
    only: Sequence[str] = ()
    seeds: Sequence[int] = ()

    def chooses(self, cell: Cell, seed: int) -> bool:
        """Whether a run of the table is among those to do."""
        return (not self.only or cell.name in self.only) and (not self.seeds or seed in self.seeds)

    def table(self) -> dict[str, Any]:
        """The content of `sweep.json`."""
        return {
            **self.file.model_dump(include={"description", "seeds", "baseline"}),
            "hypotheses": {name: hypothesis.model_dump() for name, hypothesis in self.hypotheses.items()},
            "cells": [
                {"name": cell.name, "slug": cell.slug, "config": cell.config.model_dump(mode="json")}
                for cell in self.cells
            ],
        }


def load_sweep(
    path: str | Path,
    overrides: Sequence[str],
    schemas: Mapping[str, type[RunConfig]],
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Sweep:
    """Read a sweep file and check every cell; nothing is written.

    Args:
        overrides: texts `key=value` as for a config; they apply to all cells.
        only: cells to run, by their names or slugs; empty for all.
        seeds: seeds to run; those that are not in the file join the table. Empty for all of the file.

    Raises ConfigError: the file or any of its cells is wrong; it lists every problem, cell by cell.
    """
    path = Path(os.path.expanduser(path))
    checked = _read_chain(path, schemas)
    if checked.faulty & SHAPING:
        raise ConfigError(str(path), checked.problems)
    file = SweepFile(**checked.sound)
    wrong = field_faults(SweepFile, {"base": file.base, "seeds": list(seeds)}) if seeds else {}
    if not wrong:
        file = file.model_copy(update={"seeds": list(dict.fromkeys([*file.seeds, *seeds]))})
    count = max(1, len(file.cells)) * math.prod(map(len, file.grid.values()))
    if count > MAX_CELLS:
        raise ConfigError(str(path), [f"cells, grid: {count} cells; allowed: at most {MAX_CELLS}"])
    rows = list(_rows(file, path))
    names = [name for name, _, _ in rows]
    hypotheses, doubts = read_hypotheses(file.hypotheses, names)
    problems = [*checked.problems, *_table_problems(file, names), *_owned_keys(file, overrides), *doubts]
    problems += [f"--seeds: {fault}" for fault in wrong.values()]
    known = {*names, *map(slug_of, names)}
    problems += [
        f"--only {shown(name)}: {no_such('cell', name, names)}" for name in only if name not in known
    ]

    cells: list[Cell] = []
    faults: list[tuple[str, str]] = []
    for name, base, changes in rows:
        try:
            loaded = load_config(_base_path(path, base), overrides, schemas, changes)
            cells.append(Cell(name, slug_of(name), loaded.config, loaded.notes))
        except ConfigError as error:
            faults += [(name, problem) for problem in error.problems]
    for problem, faulty in grouped(faults).items():
        problems.append(f"{'every cell' if 1 < len(faulty) == len(rows) else _named(faulty)}: {problem}")
    problems += [*_mixed_metrics(cells), *_equal_configs(cells)]
    problems += unknown_metrics(hypotheses, {cell.name: cell.config.metrics for cell in cells})
    if problems:
        raise ConfigError(str(path), problems)

    of_base = [cell for cell, (_, base, _) in zip(cells, rows, strict=True) if base == file.base]
    folder = Path((of_base or cells)[0].config.logs_root) / "sweeps" / path.stem
    runs = {"logs_root": str(folder / "runs")}
    cells = [replace(cell, config=cell.config.model_copy(update=runs)) for cell in cells]
    options = [part for override in overrides for part in ("--set", override)]
    options += [part for name in only for part in ("--only", name)]
    options += ["--seeds", *map(str, seeds)] if seeds else []
    command = as_typed("main.py", "--sweep", path, *options)
    chosen = [cell.name for cell in cells if {cell.name, cell.slug} & set(only)]
    return Sweep(path, file, command, folder, cells, hypotheses, chosen, seeds)


def slug_of(name: str) -> str:
    """A name as part of a path: letters, digits, `_.=+-`; a digest is added to names that are cut or empty.

    `nested, nested_lora_rank=4` -> `nested-nested_lora_rank=4`
    """
    slug = re.sub(r"[^\w.=+-]+", "-", name).strip("-.")
    if slug and len(slug.encode()) <= MAX_SLUG:
        return slug
    cut = slug.encode()[: MAX_SLUG - 10].decode(errors="ignore")
    return f"{cut or 'cell'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _read_chain(
    path: Path, schemas: Mapping[str, type[RunConfig]], inheriting: tuple[str, ...] = ()
) -> CheckedObject:
    """The keys of a sweep file, over those of its base where that is a sweep; bases become absolute paths.

    A base's "description" and "next" are not inherited. `set`, `hypotheses`, `cells` and each cell are merged
    key by key. inheriting: real paths of the files that name this one as their base.
    """
    sound, faulty, problems = read_object(path, SweepFile)
    chain = (*inheriting, os.path.realpath(path))
    sound |= {"cells": {name: _absolute(path, own) for name, own in sound.get("cells", {}).items()}}
    sound = _absolute(path, sound)
    target = Path(str(sound.get(BASE_KEY, "")))
    if kind_of(target, schemas) != "sweep":
        return CheckedObject(sound, faulty, problems)
    label = f"{BASE_KEY} = {bare(str(target))}"
    if os.path.realpath(target) in chain:
        fault = f"{label}: it is this sweep or repeats it; allowed: a config, or a sweep of other files"
        return CheckedObject(sound, faulty | {BASE_KEY}, [*problems, fault])
    below = _read_chain(target, schemas, chain)
    theirs = {key: value for key, value in below.sound.items() if key not in ("description", "next")}
    joined = {key: theirs.get(key, {}) | sound.get(key, {}) for key in ("set", "hypotheses")}
    names = dict.fromkeys([*theirs["cells"], *sound["cells"]])
    joined["cells"] = {name: theirs["cells"].get(name, {}) | sound["cells"].get(name, {}) for name in names}
    problems = [*problems, *(f"{label}: {problem}" for problem in below.problems)]
    return CheckedObject(
        theirs | sound | joined | {BASE_KEY: theirs.get(BASE_KEY)}, faulty | below.faulty, problems
    )


def _absolute(path: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with the file that they name as their base, from the folder of a path, by an absolute path."""
    try:
        return {**keys, BASE_KEY: str(base_of(path.absolute(), keys[BASE_KEY]))}
    except (KeyError, ValueError):  # there is none, or no path: the loader says what is wrong
        return dict(keys)


def _rows(file: SweepFile, path: Path) -> Iterator[tuple[str, Any, list[tuple[str, dict[str, Any]]]]]:
    """Name, base and changes of each cell, before its config is read; a change is its origin and values.

    In the order of the file: each cell at every point of the grid, the last key changing fastest.
    """
    points = [dict(zip(file.grid, values, strict=True)) for values in itertools.product(*file.grid.values())]
    unnamed = {"": {}} if file.grid else {}
    for cell, own in (file.cells or unnamed).items():
        for point in points:
            parts = [cell] if file.cells else []
            name = ", ".join([*parts, *(f"{key}={bare(value)}" for key, value in point.items())])
            layers = {"set": file.set, "cell": own, "grid": point}
            allowed = {
                origin: {key: value for key, value in values.items() if key not in OWNED}
                for origin, values in layers.items()
            }
            changes = [
                ("sweep", {"description": f"cell {shown(name)} of the sweep {path.name}"}),
                *allowed.items(),
                ("sweep", {"prefix": slug_of(name), "seed": file.seeds}),
            ]
            yield name, own.get(BASE_KEY, file.base), changes


def _base_path(path: Path, base: Any) -> Path:
    """The file that a row names as its base. Raises ConfigError where the name cannot be a path."""
    try:
        return base_of(path, base)
    except ValueError as error:
        problem = f"base = {bare(base)}: {error}; allowed: the path of a JSON file, relative to the sweep's"
        raise ConfigError(str(path), [problem]) from None


def _table_problems(file: SweepFile, names: Sequence[str]) -> Iterator[str]:
    """Mistakes in the table as a whole, whatever the configs of its cells."""
    if not names:
        yield "cells, grid: both are missing; allowed: at least one of them, not empty"
    for role, cell in (("baseline", file.baseline), ("finding", file.finding)):
        if names and cell is not None and cell not in names:
            yield f"{role} = {shown(cell)}: {no_such('cell', cell, names)}"
    if file.finding is not None and file.baseline in (None, file.finding):
        given = "the baseline itself" if file.baseline else "there is no baseline to compare it with"
        yield f"finding = {shown(file.finding)}: {given}; allowed: another cell than the baseline, or null"
    yield from ("cells: a name is empty; allowed: any other text" for name in file.cells if not name.strip())
    for slug, same in grouped((name, slug_of(name).casefold()) for name in names).items():
        if len(same) > 1:  # also where a file system does not tell cases apart
            yield f"{_named(same)}: their files would all be named {slug}; rename or leave out all but one"


def _owned_keys(file: SweepFile, overrides: Sequence[str]) -> Iterator[str]:
    """Keys that the sweep sets itself, where they are given."""
    cells = ((_named([name]), own.keys() - {BASE_KEY}) for name, own in file.cells.items())
    given = {override.partition("=")[0].strip() for override in overrides} - {"logs_root", BASE_KEY}
    for place, keys in (("set", file.set), ("grid", file.grid), *cells, ("--set", given)):
        for owned, reason in OWNED.items():
            if owned in keys:
                yield f"{place}: {owned} cannot be set in a sweep, {reason}; leave it out"


def _mixed_metrics(cells: Sequence[Cell]) -> Iterator[str]:
    """The problem of cells with different metrics."""
    kinds = grouped((cell.name, cell.config.metrics[0].key) for cell in cells)
    if len(kinds) > 1:
        each = "; ".join(f"{kind}: {_named(names)}" for kind, names in kinds.items())
        yield (
            f"cells with different metrics ({each}); "
            "allowed: the same, each experiment has a sweep of its own"
        )


def _equal_configs(cells: Sequence[Cell]) -> Iterator[str]:
    """Cells whose configs differ in nothing but names and keys without effect."""
    texts = {}
    for cell in cells:
        skipped = {"prefix", "description", "logs_root", *cell.config.without_effect()}
        texts[cell.name] = json.dumps(cell.config.model_dump(mode="json", exclude=skipped), sort_keys=True)
    for same in grouped(texts.items()).values():
        keys = sorted({key for cell in cells if cell.name in same for key in cell.config.unused_keys()})
        but = f", but for keys that change nothing here ({', '.join(keys)})" if keys else ""
        if len(same) > 1:
            yield f"{_named(same)}: the same configuration{but}; leave all but one out"


def _named(names: Sequence[str]) -> str:
    """Cells in a sentence: `cells "a", "b", "c", "d" and 3 more`."""
    return f"cell{'s' * (len(names) > 1)} {some([shown(name) for name in names])}"


def bare(value: Any) -> str:
    """A grid value in a name: text without quotes; anything else, and text that cannot be shown, as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
