"""Configs from flat JSON files, checked with their method's schema: every problem in one message.

    loaded = load_config("exps/smoke.json", ["init_lr=0.01"], {"my_method": MyConfig})
    loaded.config.init_lr    # typed and frozen
    loaded.configs           # one per seed of the file
    loaded.notes             # lines worth logging: keys without effect, departures from published behaviour

A file may say `"base": "other.json"` (relative to itself) and state only what differs; `description` is not
inherited, and null takes an inherited key back to its default.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from utils.config.messages import (
    field_faults,
    listed,
    nearest,
    nearest_key,
    no_such,
    parsed,
    printable,
    refuse_constant,
    shown,
    type_name,
)
from utils.config.schema import SEEDS_ALLOWED, Conflict, RunConfig, Seeds, check_text, key, with_reasons
from utils.errors import UserError
from utils.training.cpu_kernels import choose_cpu_kernels
from utils.wording import counted

BASE_KEY = "base"
DEFAULT_SEED = RunConfig.model_fields["seed"].default
Schemas = Mapping[str, type[RunConfig]]


class ConfigError(UserError):
    """A config that cannot be run; `problems` holds one line per mistake.

    unchecked: keys whose values are looked at only when these mistakes are mended.
    """

    def __init__(self, source: str, problems: Sequence[str], unchecked: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        heading = f"{source}: {counted(len(problems), 'problem')}"
        if unchecked:
            heading += f" ({' and '.join(unchecked)} not looked at yet)"
        super().__init__("\n  - ".join([heading, *problems]))


@dataclass(frozen=True)
class LoadedConfig:
    """The checked configs of a file, one per seed, and the notes to log with them."""

    configs: list[RunConfig]
    notes: list[str]

    @property
    def config(self) -> RunConfig:
        """The config of the first seed."""
        return self.configs[0]


class CheckedObject(NamedTuple):
    """A JSON object checked key by key: `sound` values, names of `faulty` keys, one line per mistake."""

    sound: dict[str, Any]
    faulty: set[str]
    problems: list[str]


class SeedList(BaseModel):
    """The value of "seed" in a file."""

    model_config = ConfigDict(strict=True)

    seed: Seeds = key([DEFAULT_SEED], "Seeds of the runs.", SEEDS_ALLOWED)


@dataclass
class Draft:
    """A config as read, before any check: values of files, changes and overrides, later ones replace earlier.

    Attributes:
        origins: key -> where its value comes from, "" for the file itself.
        taken_back: keys that are null now and had a value before.
        complete: False if a file could not be read, so that values are missing.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    taken_back: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    complete: bool = True

    def update(self, values: Mapping[str, Any], origin: str) -> None:
        """Replace values by those of a further layer."""
        self.taken_back -= values.keys()
        self.taken_back |= {name for name in values if values[name] is None and name in self.values}
        self.values |= values
        self.origins |= dict.fromkeys(values, origin)


# ----------------------------------------------------------------------------------------------------------
# Reading


def load_config(
    path: str | Path,
    overrides: Sequence[str],
    schemas: Schemas,
    changes: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> LoadedConfig:
    """Read a JSON config with its bases, apply changes and overrides, check it with its method's schema.

    Args:
        overrides: texts `key=value`, the value as JSON where it is JSON, else as text; later ones win.
        schemas: method name -> schema; the first is used where a file names no method.
        changes: (origin, values) over the file and below the overrides; errors name the origin.

    Raises ConfigError: anything is wrong; it lists every problem, and nothing has been created yet.
    """
    draft = _read_chain(Path(os.path.expanduser(path)))
    for origin, values in changes:
        draft.update(values, origin)
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if name and equals and name != BASE_KEY:
            draft.update({name: parsed(text)}, "--set")
        else:
            fault = "a base is named in a file" if name == BASE_KEY else "no key and value"
            draft.problems.append(f"--set {printable(override)}: {fault}; allowed: --set key=value")
    return _check(draft, schemas, str(path))


def refuse_changes(overrides: Sequence[str], own: Mapping[str, Any], command: str) -> None:
    """Raises UserError: overrides as of `load_config` give keys other values than a command's own."""
    given = {name.strip(): parsed(text) for name, _, text in (each.partition("=") for each in overrides)}
    if refused := [name for name in given if name in own and given[name] != own[name]]:
        raise UserError(
            f"--set {', '.join(refused)}: {command} has its own {', '.join(refused)}, since it generates "
            "images, draws weights at random and leaves nothing behind; leave out this --set"
        )


def config_from_dict(values: Mapping[str, Any], schemas: Schemas, source: str) -> LoadedConfig:
    """Check a config such as a run folder's `config.json`; `source` is named in the ConfigError."""
    return _check(Draft(dict(values)), schemas, source)


def read_values(path: Path) -> dict[str, Any]:
    """The values of a config file over those of its bases, unchecked; none of files that cannot be read."""
    return _read_chain(path).values


def known_method(values: Mapping[str, Any], schemas: Schemas) -> str | None:
    """The method that a config names, the first where it names none; None for one that does not exist."""
    name = values.get("model_name", next(iter(schemas)))
    return name if isinstance(name, str) and name in schemas else None


def read_object(path: Path, schema: type[BaseModel]) -> CheckedObject:
    """Read a JSON file that is not a run's config, such as a sweep, and check every key; nothing is raised.

    Where the file cannot be read, every key of the schema counts as faulty.
    """
    values, problems = _read_file(path)
    if values is None:
        return CheckedObject({}, set(schema.model_fields), problems)
    checked = check_object(values, schema)
    return checked._replace(problems=[*problems, *checked.problems])


def check_object(values: Mapping[str, Any], schema: type[BaseModel]) -> CheckedObject:
    """Check every key of an object in such a file; nothing is raised."""
    known = {name: value for name, value in values.items() if name in schema.model_fields}
    allowed = f"allowed: {', '.join(schema.model_fields)}"
    faults = {name: _unknown(name, schema.model_fields, allowed) for name in values if name not in known}
    faults = field_faults(schema, known) | faults
    sound = {name: value for name, value in known.items() if name not in faults}
    return CheckedObject(sound, set(faults), _fault_lines(faults, values, {}))


def base_of(path: Path, name: Any) -> Path:
    """The file that the one at the path names as its base. Raises ValueError where the name is no path."""
    if not isinstance(name, str):
        raise ValueError(f"a wrong type ({type_name(name)})")
    check_text(name)
    return Path(os.path.normpath(path.parent / os.path.expanduser(name)))


def _read_chain(path: Path, origin: str = "", inheriting: tuple[str, ...] = ()) -> Draft:
    """The file over its base, recursively; inheriting: real paths of the files that name it as their base."""
    values, problems = _read_file(path)
    draft = Draft(problems=problems, complete=values is not None)
    values = values or {}
    if BASE_KEY in values:
        name = values.pop(BASE_KEY)
        label, chain = f"{BASE_KEY} = {shown(name)}", (*inheriting, os.path.realpath(path))
        try:
            target = base_of(path, name)
            if os.path.realpath(target) in chain:
                raise ValueError(f"{target} is this file or one that inherits from it")
        except ValueError as error:
            allowed = "the path of a JSON file, from this one, in a chain that ends"
            draft = Draft(problems=[*problems, f"{label}: {error}; allowed: {allowed}"], complete=False)
        else:
            draft = _read_chain(target, f"from {target}", chain)
            draft.values.pop("description", None)
            problems += [f"{label} (a path from {path}): {problem}" for problem in draft.problems]
            draft.problems = problems
    draft.update(values, origin)
    return draft


def _read_file(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The JSON object in a file, None where there is none, and what is wrong with it."""
    problems: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                both = f"{shown(values[name])} and {shown(value)}"
                problems.append(f"{_name(name)}: written twice, as {both}; allowed: once")
            values[name] = value
        return values

    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=collect, parse_constant=refuse_constant)
    except FileNotFoundError:
        return None, [_missing(path)]
    except OSError as error:
        return None, [f"{path} cannot be read: {error.strerror}"]
    except json.JSONDecodeError as error:
        line = printable(text.split("\n")[error.lineno - 1].strip()) or "(empty)"
        place = f"line {error.lineno}, column {error.colno}"
        fault = "JSON has no comments" if text.startswith(("//", "/*", "#"), error.pos) else error.msg
        return None, [f"{path} is not valid JSON at {place}: {fault}; the line reads: {line}"]
    except (ValueError, RecursionError) as error:
        return None, [f"{path} is not valid JSON: {error}"]
    if not isinstance(values, dict):
        return None, [f"{path} holds {type_name(values)}; allowed: one JSON object of keys and values"]
    return values, problems


def _missing(path: Path) -> str:
    """A sentence with the file of this name one folder below or above, else the nearest name beside it."""
    beside, above = sorted(path.parent.glob("*.json")), sorted(path.parent.parent.glob("*.json"))
    around = [*beside, *sorted(path.parent.glob("*/*.json")), *above]
    same = (entry for entry in around if entry.stem.lower() == path.stem.lower())
    names = [entry.name for entry in beside]
    near = next(same, None) or (path.parent / name if (name := nearest(path.name, names, 0.5)) else None)
    hint = f"; did you mean {near}?" if near else f"; {path.parent} holds {', '.join(names)}"
    return f"{path} does not exist{hint if near or names else ''}"


# ----------------------------------------------------------------------------------------------------------
# Checking


def _check(draft: Draft, schemas: Schemas, source: str) -> LoadedConfig:
    values, origins = draft.values, draft.origins
    named = {name: value for name, value in values.items() if name not in draft.taken_back}
    method, schema, faults = _pick_schema(named, schemas)
    fields = schema.model_fields
    no_nulls = field_faults(schema, {name: None for name in draft.taken_back if name in fields})
    for name in draft.taken_back:  # back to the default, unless null is a valid value of the key
        if name not in fields or name in no_nulls or fields[name].default is None:
            del values[name]
    known = {name: value for name, value in values.items() if name in fields} | {"model_name": method}
    seeds = known.pop("seed", DEFAULT_SEED)
    unknown = _unknown_keys(values, method, schemas, possible=list(schemas) if faults else [method])
    faults = unknown | field_faults(SeedList, {"seed": seeds}) | field_faults(schema, known) | faults
    problems = [*draft.problems, *_fault_lines(faults, values, origins)]

    sound = {name: value for name, value in known.items() if name not in faults} | {"model_name": method}
    seeds = SeedList(seed=DEFAULT_SEED if "seed" in faults else seeds).seed
    if "seed" in values:
        sound["seed"] = max(seeds)  # makes the longest name of a run folder
    try:
        config = schema.model_validate(sound)
    except ValidationError:  # a required key is missing, which is reported, and no conflict can be judged
        raise ConfigError(source, problems) from None

    judged = set(faults)

    def sentences(conflicts: Iterable[Conflict]) -> Iterator[str]:
        for names, sentence in conflicts:
            if faults.keys().isdisjoint(names):
                judged.update(names)
                label = ", ".join(_assignment(name, values, origins, getattr(config, name)) for name in names)
                yield sentence if sentence.startswith(names[0]) else f"{label}: {sentence}"

    if draft.complete:
        problems += sentences(config.conflicts())
    if problems:
        raise ConfigError(source, problems, [name for name in config.unchecked_keys() if name not in judged])
    choose_cpu_kernels(config.cpu_kernels)  # before the late checks import PyTorch
    if problems := list(sentences(config.late_conflicts())):
        raise ConfigError(source, problems)
    legacy = {name: schema.legacy_keys[name] for name in values if name in schema.legacy_keys}
    unused = with_reasons(legacy | config.unused_keys())
    notes = [f"keys with no effect here: {unused}"] if unused else []
    configs = [config.model_copy(update={"seed": seed}) for seed in seeds]
    return LoadedConfig(configs, [*notes, *config.warnings(len(seeds))])


def _pick_schema(values: Mapping[str, Any], schemas: Schemas) -> tuple[str, type[RunConfig], dict[str, str]]:
    """The method, its schema and the fault; for an unknown name what it seems to mean, else the first."""
    if method := known_method(values, schemas):
        return method, schemas[method], {}
    name = str(values["model_name"])
    judged = _meant_method(name, schemas)[0] or next(iter(schemas))
    return judged, schemas[judged], {"model_name": no_such_method(name, schemas)}


def no_such_method(name: str, schemas: Schemas) -> str:
    """Words for a method that does not exist; of one that is a setting of another, the two."""
    method, setting = _meant_method(name, schemas)
    if setting:
        return f"no such method; did you mean {method} with {setting}?"
    return no_such("method", name, list(schemas))


def _meant_method(name: str, schemas: Schemas) -> tuple[str | None, str]:
    """The method that an unknown name seems to mean, and the `key=value` of it, "" where it means none."""
    plain = re.sub("[- ]", "_", name.strip().lower())
    for method, schema in schemas.items():
        if "=" in (setting := schema.known_as.get(plain, "")):
            return method, setting
    return nearest(name, schemas), ""


def _unknown_keys(
    values: Mapping[str, Any], method: str, schemas: Schemas, possible: Sequence[str]
) -> dict[str, str]:
    """The faults of keys that none of the possible methods has."""
    valid = {name for option in possible for name in schemas[option].model_fields}
    accepted = valid.union(*(schemas[option].legacy_keys for option in possible))
    known_as = {other: meant for schema in schemas.values() for other, meant in schema.known_as.items()}
    advice = f"python main.py --list keys --method {method} lists the keys"
    faults = {}
    for name in values.keys() - accepted:
        owners = [other for other, schema in schemas.items() if name in schema.model_fields]
        belongs = f"not a key of model_name {shown(method)}; it belongs to {listed(owners)}"
        faults[name] = belongs if owners else _unknown(name, valid | {BASE_KEY}, advice, known_as)
    return faults


def _unknown(
    name: str, valid: Collection[str], otherwise: str, known_as: Mapping[str, str] | None = None
) -> str:
    near = nearest_key(name, valid, known_as)
    return f"unknown key; did you mean {near}?" if near else f"unknown key; {otherwise}"


def _fault_lines(
    faults: Mapping[str, str], values: Mapping[str, Any], origins: Mapping[str, str]
) -> list[str]:
    """One line per fault, in the order of the values, then keys that are missing."""
    present = [f"{_assignment(name, values, origins)}: {faults[name]}" for name in values if name in faults]
    return present + [f"{name}: {faults[name]}" for name in faults if name not in values]


def _assignment(name: str, values: Mapping[str, Any], origins: Mapping[str, str], default: Any = None) -> str:
    """`key = value`, with its origin where that is not the file itself."""
    origin = origins.get(name, "") if name in values else "default"
    return f"{_name(name)} = {shown(values.get(name, default))}" + (f" ({origin})" if origin else "")


def _name(name: str) -> str:
    return name if name.isidentifier() else shown(name)
