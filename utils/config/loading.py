"""Configs as flat JSON files, checked against the models of `utils/config/schema.py`, with every mistake reported at once.

    loaded = load_config("exps/quickstart.json", ["init_lr=0.01"], {"my_method": MyConfig})
    loaded.config.init_lr    # typed and frozen
    loaded.notes             # lines worth logging: keys with no effect, departures from published behaviour

A file may say `"base": "other.json"` (relative to itself) and state only what differs; `description` is not inherited,
and null takes an inherited key back to its default.
"""

import difflib
import functools
import json
import os
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from utils.config.schema import RunConfig, check_text, with_reason
from utils.errors import UserError

BASE_KEY = "base"
LISTED = "allowed: the keys listed below"
MOST_IN_LINE = 8  # keys that are told where one is unknown; more are listed below


class ConfigError(UserError):
    """A config that cannot be run: `problems` holds one line for each mistake, `footer` what is listed below them."""

    def __init__(self, source: str, problems: Sequence[str], footer: str = "") -> None:
        self.problems, self.footer = list(problems), footer
        count = f"{len(problems)} problem" + ("" if len(problems) == 1 else "s")
        lines = [f"{source}: {count}", *(f"  - {problem}" for problem in problems)]
        super().__init__("\n".join([*lines, footer] if footer else lines))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config and the notes to log with it."""

    config: RunConfig
    notes: list[str]


class CheckedObject(NamedTuple):
    """A JSON object that was checked key by key: `sound` values, names of `faulty` keys, one line for each mistake."""

    sound: dict[str, Any]
    faulty: set[str]
    problems: list[str]
    footer: str


@dataclass
class _Given:
    """What was read, before any check: values, where each comes from ("" = the file itself), and what went wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    complete: bool = True  # False when a file of the chain could not be read
    taken_back: set[str] = field(default_factory=set)  # keys that had a value and are null now

    def change(self, values: Mapping[str, Any], origin: str) -> None:
        """Lay values over those there are."""
        self.taken_back -= values.keys()
        self.taken_back |= {key for key, value in values.items() if value is None and key in self.values}
        self.values |= values
        self.origins |= dict.fromkeys(values, origin)


def load_config(
    path: str | Path,
    overrides: Sequence[str],
    schemas: Mapping[str, type[RunConfig]],
    changes: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> LoadedConfig:
    """Read a JSON config with its bases, apply changes and `key=value` overrides, check it against its method's schema.

    Args:
        path: the JSON file.
        overrides: texts `key=value`; the value is read as JSON where it is JSON, else as text; later ones win.
        schemas: method name -> schema; the first is used where a file names no method.
        changes: (origin, values) over the file and below the overrides; later ones win, an error names the origin.

    Raises:
        ConfigError: anything is wrong; it lists every problem, and nothing has been created yet.
    """
    given = _read_chain(Path(os.path.expanduser(path)), ())
    for origin, values in changes:
        given.change(values, origin)
    _apply_overrides(given, overrides)
    return _check(given, schemas, str(path))


def config_from_dict(
    values: Mapping[str, Any], schemas: Mapping[str, type[RunConfig]], source: str
) -> LoadedConfig:
    """Check a resolved config, such as a run folder's `config.json`; `source` is named in the error.

    Raises:
        ConfigError: anything is wrong; it lists every problem.
    """
    return _check(_Given(values=dict(values)), schemas, source)


def read_object(path: Path, schema: type[BaseModel]) -> CheckedObject:
    """Read a JSON file whose keys are no run's, such as a sweep's, and check every key; nothing is raised.

    Where the file cannot be read at all, every key of the schema counts as faulty.
    """
    given = _read_file(path)
    if not given.complete:
        return CheckedObject({}, set(schema.model_fields), given.problems, "")
    return _check_object(given, schema)


def check_object(values: Mapping[str, Any], schema: type[BaseModel]) -> CheckedObject:
    """Check every key of an object that stands in such a file; nothing is raised."""
    return _check_object(_Given(values=dict(values)), schema)


def base_of(path: Path, name: Any) -> Path:
    """The file that another, at the path, names as its base. Raises ValueError where the name can be no path's."""
    if not isinstance(name, str):
        raise ValueError(f"a wrong type ({_kind(name)})")
    check_text(name)
    return Path(os.path.normpath(path.parent / os.path.expanduser(name)))


def no_such(what: str, name: str, allowed: Sequence[str]) -> str:
    """The words for a name that is none of those allowed: `no such cell; did you mean "a"?; allowed: "a", "b"`."""
    near = difflib.get_close_matches(name, allowed, n=1)
    guess = f"; did you mean {json.dumps(near[0], ensure_ascii=False)}?" if near else ""
    listed = ", ".join(json.dumps(option, ensure_ascii=False) for option in allowed[:MOST_IN_LINE])
    return f"no such {what}{guess}; allowed: {listed}" + (", ..." if len(allowed) > MOST_IN_LINE else "")


def _check_object(given: _Given, schema: type[BaseModel]) -> CheckedObject:
    valid = list(schema.model_fields)
    values = {key: value for key, value in given.values.items() if key in valid}
    faults = {key: _unknown_key(key, valid, "", {}) for key in given.values if key not in valid}
    footer = _list_of_keys(valid) if any(LISTED in fault for fault in faults.values()) else ""
    faults = _field_faults(schema, values) | faults
    sound = {key: value for key, value in values.items() if key not in faults}
    return CheckedObject(sound, set(faults), [*given.problems, *_fault_lines(faults, given)], footer)


def _read_chain(path: Path, seen: tuple[str, ...]) -> _Given:
    """The file's values over those of its base, recursively."""
    own = _read_file(path)
    if BASE_KEY not in own.values:
        return own
    name = own.values.pop(BASE_KEY)
    label = f"{BASE_KEY} = {_shown(name)}"
    chain = (*seen, os.path.realpath(path))
    try:
        target = base_of(path, name)
    except ValueError as error:
        return _broken(own, f"{label}: {error}; allowed: the path of a JSON file, from this one")
    if os.path.realpath(target) in chain:
        return _broken(
            own, f"{label}: {target} is this file or one that inherits from it; allowed: a chain that ends"
        )
    base = _read_chain(target, chain)
    base.values.pop("description", None)
    inherited = {key: value for key, value in base.values.items() if key not in own.values}
    return _Given(
        values={**own.values, **inherited},
        origins={key: base.origins.get(key) or f"from {target}" for key in inherited},
        problems=[*own.problems, *(f"{label}: {problem}" for problem in base.problems)],
        complete=own.complete and base.complete,
        taken_back=(base.taken_back - own.values.keys())
        | {key for key, value in own.values.items() if value is None and key in base.values},
    )


def _broken(given: _Given, problem: str) -> _Given:
    given.problems.append(problem)
    given.complete = False
    return given


def _read_file(path: Path) -> _Given:
    """One JSON object; whatever prevents that becomes a problem."""
    given = _Given()

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                both = f"{_shown(values[key])} and {_shown(value)}"
                given.problems.append(f"{_key(key)}: written twice, as {both}; allowed: once")
            values[key] = value
        return values

    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=collect, parse_constant=_refuse_constant)
    except FileNotFoundError:
        return _broken(given, _missing(path))
    except OSError as error:
        return _broken(given, f"{path} cannot be read: {error.strerror}")
    except json.JSONDecodeError as error:
        line = _clipped(text.split("\n")[error.lineno - 1].strip())
        reads = f"the line reads: {line}" if line else "nothing stands there"
        place = f"line {error.lineno}, column {error.colno}"
        return _broken(given, f"{path} is not valid JSON at {place}: {error.msg}; {reads}")
    except (ValueError, RecursionError) as error:
        return _broken(given, f"{path} is not valid JSON: {error}")
    if not isinstance(values, dict):
        return _broken(given, f"{path} holds {_kind(values)}; allowed: one JSON object of keys and values")
    given.values = values
    return given


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _missing(path: Path) -> str:
    here = sorted(entry.name for entry in path.parent.glob("*.json"))
    near = _nearest(path.name, here, 0.5)
    if near:
        return f"{path} does not exist; did you mean {path.parent / near}?"
    return f"{path} does not exist" + (f"; {path.parent} holds {', '.join(here)}" if here else "")


def _apply_overrides(given: _Given, overrides: Sequence[str]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            given.problems.append(f"--set {_printable(override)}: no key and value; allowed: --set key=value")
        elif key == BASE_KEY:
            given.problems.append(
                f"--set {_printable(override)}: a base is named in a file; allowed: the keys of the method"
            )
        else:
            given.change({key: _parsed(text)}, "--set")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def _check(given: _Given, schemas: Mapping[str, type[RunConfig]], source: str) -> LoadedConfig:
    name, schema, faults = _pick_schema(given.values, schemas)
    taken_back = _taken_back(given, schema)
    given.values = {key: value for key, value in given.values.items() if key not in taken_back}
    possible = schemas.values() if "model_name" in faults else [schema]
    valid = {key for option in possible for key in option.model_fields}
    accepted = valid.union(*(option.legacy_keys for option in possible))
    values = {key: value for key, value in given.values.items() if key in schema.model_fields}
    values["model_name"] = name
    unknown = [key for key in given.values if key not in accepted]
    faults |= {key: _unknown_key(key, valid | {BASE_KEY}, name, schemas) for key in unknown}
    faults = _field_faults(schema, values) | faults
    problems = [*given.problems, *_fault_lines(faults, given)]

    sound = {key: value for key, value in values.items() if key not in faults or key == "model_name"}
    try:
        config = schema.model_validate(sound)
    except ValidationError:  # a required key is missing, and reported; what depends on it cannot be judged
        config = None
    if config is not None and given.complete:
        problems += _conflict_lines(config, faults, given)
    if problems or config is None:
        listed = any(LISTED in faults[key] for key in unknown)
        raise ConfigError(source, problems, _list_of_keys(valid) if listed else "")
    legacy = {key: schema.legacy_keys[key] for key in given.values if key in schema.legacy_keys}
    idle = with_reason({**legacy, **config.idle_keys()})
    notes = [f"keys with no effect here: {', '.join(idle)}"] if idle else []
    return LoadedConfig(config, [*notes, *config.remarks()])


def _taken_back(given: _Given, schema: type[RunConfig]) -> set[str]:
    """Keys that null took back: all that are null now and were not, but for those where null is a value of its own."""
    fields = {key: schema.model_fields[key] for key in given.taken_back if key in schema.model_fields}
    faulty = _field_faults(schema, dict.fromkeys(fields))
    return given.taken_back - {
        key for key, info in fields.items() if key not in faulty and info.default is not None
    }


def _pick_schema(
    values: Mapping[str, Any], schemas: Mapping[str, type[RunConfig]]
) -> tuple[str, type[RunConfig], dict[str, str]]:
    """The method's schema; for an unknown method the nearest one's, else the first, so that checking goes on."""
    name = values.get("model_name", next(iter(schemas)))
    if isinstance(name, str) and name in schemas:
        return name, schemas[name], {}
    near = _nearest(name, schemas) if isinstance(name, str) else None
    guess = f"did you mean {_shown(near)}?; " if near else ""
    fault = f"no such method; {guess}allowed: {_choices(schemas)}"
    judged = near or next(iter(schemas))
    return judged, schemas[judged], {"model_name": fault}


def _unknown_key(key: str, valid: Collection[str], name: str, schemas: Mapping[str, type[RunConfig]]) -> str:
    owners = [other for other, schema in schemas.items() if key in schema.model_fields]
    if owners:
        return f"not a key of model_name {_shown(name)}; it belongs to {_choices(owners)}"
    near = nearest_key(key, valid, schemas.values())
    if near:
        return f"unknown key; did you mean {near}?"
    return f"unknown key; {LISTED if len(valid) > MOST_IN_LINE else 'allowed: ' + ', '.join(valid)}"


def _field_faults(schema: type[BaseModel], values: Mapping[str, Any]) -> dict[str, str]:
    """Key -> what is wrong with its value and what is allowed, at most one fault a key."""
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        properties = _properties(schema)
        faults: dict[str, str] = {}
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0])
            prop = properties[key]
            faults.setdefault(key, f"{_what_is_wrong(detail, prop)}; allowed: {_allowed_text(prop)}")
        return faults
    return {}


@functools.lru_cache
def _properties(schema: type[BaseModel]) -> dict[str, Any]:
    return schema.model_json_schema()["properties"]


def _what_is_wrong(detail: Mapping[str, Any], prop: Mapping[str, Any]) -> str:
    kind, value, place = detail["type"], detail["input"], detail["loc"][1:]
    item = f"item {place[0] + 1} ({_shown(value)}) is " if place and isinstance(place[0], int) else ""
    if kind == "missing":
        return "missing"
    if kind.endswith("_type"):
        plain = _parsed(value.lower()) if isinstance(value, str) else value
        hint = "" if plain is value or isinstance(plain, str) else f"; write {_shown(plain)} without quotes"
        return f"{item}a wrong type ({_kind(value)}){hint}"
    if kind == "literal_error":
        choices = prop.get("enum", [prop.get("const")])
        if isinstance(value, str) and _parsed(value) in choices:
            return f"a wrong type (text); write {_shown(_parsed(value))} without quotes"
        near = _nearest(value, map(str, choices)) if isinstance(value, str) else None
        return "not a choice" + (f"; did you mean {_shown(near)}?" if near else "")
    if kind.startswith("greater_than"):
        return f"{item}too small"
    if kind == "int_parsing_size":
        return f"{item}too {'large' if value > 0 else 'small'}"
    if kind.startswith("less_than"):
        return f"{item}too large"
    if kind == "string_unicode":
        return f"{item}holds half a surrogate pair, which is no character"
    if kind in ("too_short", "string_too_short"):
        return "empty"
    if kind == "finite_number":
        return f"{item}not a finite number"
    if kind == "string_pattern_mismatch":
        return "cannot be part of a folder's name"
    return item + detail["msg"].removeprefix("Value error, ")


def _allowed_text(prop: Mapping[str, Any]) -> str:
    """Words for one property of a JSON schema: `{"type": "integer", "minimum": 1}` -> "an integer >= 1"."""
    if "allowed" in prop:
        return prop["allowed"]
    if "anyOf" in prop:
        return " or ".join(_allowed_text(option) for option in prop["anyOf"])
    if "enum" in prop or "const" in prop:
        return _choices(prop.get("enum", [prop.get("const")]))
    if prop.get("type") == "array":
        return (
            f"a {'non-empty ' if prop.get('minItems') else ''}list, each item {_allowed_text(prop['items'])}"
        )
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "null": "null"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {_number(prop[name])}" for name, sign in bounds.items() if name in prop)
    text = "non-empty text in double quotes" if prop.get("minLength") else "text in double quotes"
    return " ".join(filter(None, [words.get(prop.get("type", ""), text), limits]))


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _fault_lines(faults: Mapping[str, str], given: _Given) -> list[str]:
    """One line a fault, in the order of the file, then keys that are missing from it."""
    present = [f"{_assignment(key, given)}: {faults[key]}" for key in given.values if key in faults]
    return present + [f"{key}: {faults[key]}" for key in faults if key not in given.values]


def _conflict_lines(config: RunConfig, faults: Mapping[str, str], given: _Given) -> list[str]:
    """One line a conflict, leaving out those that involve a key already reported."""
    lines = []
    for keys, sentence in config.conflicts():
        if faults.keys().isdisjoint(keys):
            label = ", ".join(_assignment(key, given, getattr(config, key)) for key in keys)
            lines.append(sentence if sentence.startswith(keys[0]) else f"{label}: {sentence}")
    return lines


def _assignment(key: str, given: _Given, default: Any = None) -> str:
    """`key = value`, with its origin where that is not the file itself."""
    origin = given.origins.get(key, "") if key in given.values else "default"
    return f"{_key(key)} = {_shown(given.values.get(key, default))}" + (f" ({origin})" if origin else "")


def _list_of_keys(valid: Iterable[str]) -> str:
    listed = f"Valid keys: {', '.join(sorted(valid))}"
    return textwrap.fill(listed, width=110, initial_indent="  ", subsequent_indent="    ")


def nearest_key(name: str, keys: Iterable[str], schemas: Iterable[type[RunConfig]] = ()) -> str | None:
    """The key, or `key=value`, that a name most likely means: by a schema's `known_as`, words in common, or letters.

    Words that differ by a letter or two count nearly as the same, so that `nested_lora_alpha` is
    `nested_lora_consolidation_alpha` and not `nested_lora_rank`, which is as near by letters.
    """
    keys, plain = list(keys), _plain_name(name)
    for schema in schemas:
        meant = schema.known_as.get(plain, "")
        if meant.partition("=")[0] in keys:
            return meant
    words = set(plain.split("_"))

    def in_common(key: str) -> float:
        own = set(key.split("_"))
        alike = sum(max(_alike(word, other) for other in own) for word in words)
        return alike / (len(words | own) - len(words & own) + alike)

    near = max(keys, key=lambda key: (in_common(key), _alike(plain, key, 0)), default="")
    return near if near and in_common(near) >= 0.5 else _nearest(plain, keys)


def _alike(first: str, second: str, least: float = 0.75) -> float:
    """Share of letters in common, 0 where it is below the least."""
    ratio = difflib.SequenceMatcher(None, first, second).ratio()
    return ratio if ratio >= least else 0


def _plain_name(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(_plain_name(name), list(options), n=1, cutoff=cutoff)), None)


def _choices(options: Iterable[Any]) -> str:
    return ", ".join(_shown(option) for option in options)


def _key(key: str) -> str:
    return key if key.isidentifier() else _shown(key)


def _shown(value: Any) -> str:
    """A value as it stands in the JSON file, cut when long."""
    return _printable(json.dumps(value, ensure_ascii=False, default=repr))


def _printable(text: str) -> str:
    return _clipped(text.encode("utf-8", "backslashreplace").decode())


def _clipped(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "an integer", float: "a decimal number", str: "text", list: "a list"}
    return {**kinds, dict: "an object", type(None): "null"}.get(type(value), type(value).__name__)
