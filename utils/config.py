"""Configs: flat JSON files, checked by pydantic models, with every mistake reported at once.

    loaded = load_config("exps/quickstart.json", ["init_lr=0.01"], {"my_method": MyConfig})
    loaded.config.init_lr    # typed and frozen
    loaded.notes             # lines worth logging: keys with no effect, departures from published behaviour

A method describes its keys in a subclass of `RunConfig` beside its learner; this file knows no method by name.
A file may say `"base": "other.json"` (relative to itself) and state only what differs; `description` is not inherited.
"""

import difflib
import json
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from utils.data import class_count
from utils.errors import UserError
from utils.factory import BackboneShape, backbone_shape
from utils.toolkit import resolve_device

BASE_KEY = "base"
LISTED = "allowed: the keys listed below"
Conflict = tuple[tuple[str, ...], str]  # the keys involved, and one sentence that says what is allowed


class ConfigError(UserError):
    """A config that cannot be run: `problems` holds one line for each mistake, `footer` what is listed below them."""

    def __init__(self, source: str, problems: Sequence[str], footer: str = "") -> None:
        self.problems, self.footer = list(problems), footer
        count = f"{len(problems)} problem" + ("" if len(problems) == 1 else "s")
        lines = [f"{source}: {count}", *(f"  - {problem}" for problem in problems)]
        super().__init__("\n".join([*lines, footer] if footer else lines))


# ---------------------------------------------------------------------------------------------------------------------
# The general keys


def _listed(value: Any) -> Any:
    """A single integer as a list of one: `"seed": 1993` and `--set device=0` are plain to read."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _distinct(seeds: list[int]) -> list[int]:
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ValueError(f"holds {', '.join(map(str, twice))} more than once")
    return seeds


def _check_device(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int) for item in items):
        raise ValueError("names no device")
    return value


def _allowed(text: str) -> dict[str, Any]:
    """Words for the error report where the JSON schema of the key would read poorly."""
    return {"allowed": text}


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_listed)]
Device = Annotated[Any, AfterValidator(_check_device), BeforeValidator(_listed)]
Text = Annotated[str, Field(min_length=1)]


class RunConfig(BaseModel):
    """The keys every method has. Unknown keys are refused, types are strict (no `true` for an integer), values frozen.

    A subclass adds its keys and may extend `legacy_keys`, `conflicts`, `idle_keys` and `remarks`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    legacy_keys: ClassVar[dict[str, str]] = {
        "memory_size": "no exemplar memory",
        "memory_per_class": "no exemplar memory",
        "fixed_memory": "no exemplar memory",
        "vpt_type": "no prompts",
        "prompt_token_num": "no prompts",
        "nb_classes": "counted in the data",
        "nb_tasks": "follows from the classes, init_cls and increment",
        "pretrained": "weights says which",
        "topk": "accuracy is top-1",
        "drop": "the backbone is frozen and in evaluation mode",
        "drop_path": "the backbone is frozen and in evaluation mode",
    }

    description: str = Field("", description="The command that runs this file and the number it is expected to give.")
    prefix: str = Field(
        "run",
        pattern=r"^[^/\\\x00-\x1f]+$",
        description="First part of the run folder's name.",
        json_schema_extra=_allowed("a name without / and \\"),
    )
    model_name: str = Field(description="The method: one of the registered learners.")

    dataset: Text = Field("cifar224", description="A known data set's name, or the path of an .npz or image folder.")
    data_root: Text = Field("data", description="Folder where data sets are looked for and downloaded to.")
    weights_root: Text = Field("weights", description="Folder where backbone weights are looked for and fetched to.")
    logs_root: Text = Field("logs", description="Folder under which run folders are made.")
    shuffle: bool = Field(True, description="Draw the class order from the seed; false keeps the data set's order.")
    init_cls: int = Field(10, ge=1, description="Classes of the first task.")
    increment: int = Field(10, ge=1, description="Classes of every later task; the last task may be shorter.")
    max_tasks: int | None = Field(None, ge=1, description="Stop after this many tasks; null runs all.")
    max_train_per_class: int | None = Field(None, ge=1, description="Training images of each class; null = all.")
    max_test_per_class: int | None = Field(None, ge=1, description="Test images of each class; null = all.")

    seed: Seeds = Field(
        [1993],
        description="Seeds; each is a run of its own, in a folder of its own.",
        json_schema_extra=_allowed("an integer from 0 to 4294967295, or a list of different ones, at least one"),
    )
    device: Device = Field(
        "auto",
        description='Where to compute; a published list such as ["0"] falls back to the CPU where there is no GPU.',
        json_schema_extra=_allowed('"auto", "cpu", "mps", "cuda", "cuda:N", or a list such as ["0"] or ["-1"]'),
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="fp32, or bf16 autocast where the device has it.")
    num_workers: int | None = Field(None, ge=0, description="Data workers; null = 0 on the CPU, else min(8, cores).")

    backbone_type: Text = Field(
        "pretrained_vit_b16_224_adapter", description="Published short name, or a timm name with its weight tag."
    )
    weights: Text | None = Field(None, description='null for the backbone\'s own, "random" for untrained, or a file.')
    image_size: int | None = Field(None, ge=8, description="Side of the input in pixels; null = the weights' own.")
    input_normalization: Literal["none", "weights"] = Field(
        "none", description='"none" feeds images in [0, 1], as published; "weights" uses mean and std of the weights.'
    )
    augmentation: Literal["crop_flip", "crop", "none"] = Field(
        "crop_flip", description="Random resized crop with or without horizontal flip, or the test transform."
    )
    batch_size: int = Field(32, ge=1, description="Images in a training step, over all devices.")
    grad_accumulation: int = Field(1, ge=1, description="Parts a training step is cut into to save memory; same step.")
    eval_batch_size: int = Field(64, ge=1, description="Images in a batch without gradients.")

    checkpoints: Literal["all", "last"] = Field("all", description="Keep the checkpoint of every task, or the last.")
    cache_root: Text = Field("cache", description="Folder for what is computed once: activations, decoded images.")
    cache_gb: float = Field(20.0, ge=0, description="Size it may reach in GB (10^9 bytes); 0 keeps nothing.")

    def conflicts(self) -> list[Conflict]:
        """Keys that are fine one by one and impossible together or on this machine; subclasses extend `super()`'s."""
        return [*self._class_conflicts(), *self._backbone_conflicts(), *self._device_conflicts()]

    def idle_keys(self) -> dict[str, str]:
        """Keys that were set and change nothing given the others, with the reason; subclasses extend `super()`'s."""
        return {}

    def given(self) -> list[str]:
        """The keys that were set, in the order of the schema."""
        return [key for key in type(self).model_fields if key in self.model_fields_set]

    def remarks(self) -> list[str]:
        """Sentences worth a warning: settings that depart from what a reader would expect."""
        return []

    def known_backbone(self) -> BackboneShape | None:
        """Depth, width and patch of the backbone; None when its name is unknown (which `conflicts` reports)."""
        try:
            return backbone_shape(self.backbone_type)
        except UserError:
            return None

    def _class_conflicts(self) -> list[Conflict]:
        try:
            classes = class_count(self.dataset, self.data_root)
        except UserError as error:
            return [(("dataset",), str(error))]
        if classes is None:
            return []
        return [
            ((key, "dataset"), f"the data set has {classes} classes; allowed: {key} from 1 to {classes}")
            for key in ("init_cls", "increment")
            if getattr(self, key) > classes
        ]

    def _backbone_conflicts(self) -> list[Conflict]:
        found: list[Conflict] = []
        if self.weights not in (None, "random") and not Path(self.weights).is_file():
            found.append((("weights",), 'there is no such file; allowed: null, "random" or the path of a weight file'))
        try:
            shape = backbone_shape(self.backbone_type, weights=self.weights)
        except UserError as error:
            return [*found, (("backbone_type",), str(error))]
        if self.image_size is not None and self.image_size % shape.patch:
            low = max(self.image_size // shape.patch, 1) * shape.patch
            fault = f"the side is no multiple of the {shape.patch}-pixel patch"
            nearby = f"allowed: a multiple of {shape.patch}, such as {low} or {low + shape.patch}"
            found.append((("image_size", "backbone_type"), f"{fault}; {nearby}"))
        return found

    def _device_conflicts(self) -> list[Conflict]:
        try:
            resolve_device(self.device)
        except UserError as error:
            return [(("device",), str(error))]
        return []


def with_reason(reasons: Mapping[str, str]) -> list[str]:
    """Keys with the reason in brackets, those of one reason together: `{"a": "x", "b": "x"}` -> `["a, b (x)"]`."""
    grouped: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        grouped.setdefault(reason, []).append(key)
    return [f"{', '.join(keys)} ({reason})" for reason, keys in grouped.items()]


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
    given = _read_chain(Path(path), ())
    for origin, values in changes:
        given.values |= values
        given.origins |= dict.fromkeys(values, origin)
    _apply_overrides(given, overrides)
    return _check(given, schemas, str(path))


def config_from_dict(values: Mapping[str, Any], schemas: Mapping[str, type[RunConfig]], source: str) -> LoadedConfig:
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
    valid = list(schema.model_fields)
    values = {key: value for key, value in given.values.items() if key in valid}
    faults = {key: _unknown_key(key, valid, "", {}) for key in given.values if key not in valid}
    footer = _list_of_keys(valid) if any(LISTED in fault for fault in faults.values()) else ""
    faults |= _field_faults(schema, values)
    sound = {key: value for key, value in values.items() if key not in faults}
    return CheckedObject(sound, set(faults), [*given.problems, *_fault_lines(faults, given)], footer)


def _read_chain(path: Path, seen: tuple[Path, ...]) -> _Given:
    """The file's values over those of its base, recursively."""
    own = _read_file(path)
    if BASE_KEY not in own.values:
        return own
    name = own.values.pop(BASE_KEY)
    label = f"{BASE_KEY} = {_shown(name)}"
    chain = (*seen, path.resolve())
    if not isinstance(name, str):
        return _broken(own, f"{label}: a wrong type ({_kind(name)}); allowed: the path of a JSON file, from this one")
    target = Path(os.path.normpath(path.parent / name))
    if target.resolve() in chain:
        return _broken(own, f"{label}: {target} is this file or one that inherits from it; allowed: a chain that ends")
    base = _read_chain(target, chain)
    base.values.pop("description", None)
    inherited = {key: value for key, value in base.values.items() if key not in own.values}
    return _Given(
        values={**own.values, **inherited},
        origins={key: base.origins.get(key) or f"from {target}" for key in inherited},
        problems=[*own.problems, *(f"{label}: {problem}" for problem in base.problems)],
        complete=own.complete and base.complete,
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
            given.problems.append(f"--set {override}: no key and value; allowed: --set key=value")
        elif key == BASE_KEY:
            given.problems.append(f"--set {override}: a base is named in a file; allowed: the keys of the method")
        else:
            given.values[key] = _parsed(text)
            given.origins[key] = "--set"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def _check(given: _Given, schemas: Mapping[str, type[RunConfig]], source: str) -> LoadedConfig:
    name, schema, faults = _pick_schema(given.values, schemas)
    possible = schemas.values() if schema is RunConfig else [schema]
    valid = {key for option in possible for key in option.model_fields}
    accepted = valid.union(*(option.legacy_keys for option in possible))
    values = {key: value for key, value in given.values.items() if key in schema.model_fields}
    values["model_name"] = name
    unknown = [key for key in given.values if key not in accepted]
    faults |= {key: _unknown_key(key, valid, name, schemas) for key in unknown}
    faults |= _field_faults(schema, values)
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


def _pick_schema(
    values: Mapping[str, Any], schemas: Mapping[str, type[RunConfig]]
) -> tuple[str, type[RunConfig], dict[str, str]]:
    """The method's schema; for an unknown method the nearest one's, else the general one, so that checking goes on."""
    name = values.get("model_name", next(iter(schemas)))
    if isinstance(name, str) and name in schemas:
        return name, schemas[name], {}
    near = _nearest(name, schemas) if isinstance(name, str) else None
    guess = f"did you mean {_shown(near)}?; " if near else ""
    fault = f"no such method; {guess}allowed: {_choices(schemas)}"
    return near or str(name), schemas[near] if near else RunConfig, {"model_name": fault}


def _unknown_key(key: str, valid: Iterable[str], name: str, schemas: Mapping[str, type[RunConfig]]) -> str:
    owners = [other for other, schema in schemas.items() if key in schema.model_fields]
    if owners:
        return f"not a key of model_name {_shown(name)}; it belongs to {_choices(owners)}"
    near = _nearest(key, [*valid, BASE_KEY])
    return f"unknown key; did you mean {near}?" if near else f"unknown key; {LISTED}"


def _field_faults(schema: type[BaseModel], values: Mapping[str, Any]) -> dict[str, str]:
    """Key -> what is wrong with its value and what is allowed, at most one fault a key."""
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        properties = schema.model_json_schema()["properties"]
        faults: dict[str, str] = {}
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0])
            prop = properties[key]
            faults.setdefault(key, f"{_what_is_wrong(detail, prop)}; allowed: {_allowed_text(prop)}")
        return faults
    return {}


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
        near = _nearest(value, prop.get("enum", [])) if isinstance(value, str) else None
        return "not a choice" + (f"; did you mean {_shown(near)}?" if near else "")
    if kind.startswith("greater_than"):
        return f"{item}too small"
    if kind.startswith("less_than"):
        return f"{item}too large"
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
        return f"a {'non-empty ' if prop.get('minItems') else ''}list, each item {_allowed_text(prop['items'])}"
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "null": "null"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {prop[name]:g}" for name, sign in bounds.items() if name in prop)
    text = "non-empty text in double quotes" if prop.get("minLength") else "text in double quotes"
    return " ".join(filter(None, [words.get(prop.get("type", ""), text), limits]))


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


def _nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    plain = name.strip().lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(plain, list(options), n=1, cutoff=cutoff)), None)


def _choices(options: Iterable[Any]) -> str:
    return ", ".join(_shown(option) for option in options)


def _key(key: str) -> str:
    return key if key.isidentifier() else _shown(key)


def _shown(value: Any) -> str:
    """A value as it stands in the JSON file, cut when long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return _clipped(text.encode("utf-8", "backslashreplace").decode())


def _clipped(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "an integer", float: "a decimal number", str: "text", list: "a list"}
    return {**kinds, dict: "an object", type(None): "null"}.get(type(value), type(value).__name__)
