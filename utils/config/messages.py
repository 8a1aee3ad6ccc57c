"""Error texts about keys and values: the fault, what is allowed, the nearest name.

field_faults(SEMAConfig, {"rd_dim": 0})     # {"rd_dim": "too small; allowed: an integer >= 1 and <= 16384"}
nearest_key("nested_lora_alpha", keys)      # "nested_lora_consolidation_alpha"
"""

import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from utils.wording import escaped, some

Member = TypeVar("Member")
Group = TypeVar("Group")
MAX_WIDTH = 80  # characters of a value that are shown
MAX_CHOICES = 20  # names that are listed where one is wrong
FAULTS = {  # words for pydantic's error types; other types keep pydantic's own message
    "missing": "missing",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "less_than": "too large",
    "less_than_equal": "too large",
    "too_short": "empty",
    "string_too_short": "empty",
    "finite_number": "not a finite number",
    "literal_error": "not a choice",
    "string_unicode": "holds half a surrogate pair, which is no character",
    "string_pattern_mismatch": "cannot be part of a folder's name",
}
TYPES = {
    bool: "a boolean",
    int: "an integer",
    float: "a decimal number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def field_faults(schema: type[BaseModel], values: Mapping[str, Any]) -> dict[str, str]:
    """Key -> what is wrong with its value and what is allowed, at most one fault per key."""
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        faults: dict[str, str] = {}
        for detail in error.errors(include_url=False):
            prop = properties(schema)[str(detail["loc"][0])]
            faults.setdefault(str(detail["loc"][0]), f"{_fault(detail, prop)}; allowed: {allowed_text(prop)}")
        return faults
    return {}


@functools.lru_cache
def properties(schema: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Key -> its JSON schema."""
    return schema.model_json_schema()["properties"]


def _fault(detail: Mapping[str, Any], prop: Mapping[str, Any]) -> str:
    """Words for one of pydantic's errors: `item 2 (-2) is too small`, `a wrong type (text)`."""
    error, value, place = detail["type"], detail["input"], detail["loc"][1:]
    wrong_type = error.endswith("_type")
    words = FAULTS.get(error, detail["msg"].removeprefix("Value error, "))
    if error == "too_short" and value:
        words = "too few items"
    if wrong_type:
        words = f"a wrong type ({type_name(value)})"
    if place and isinstance(place[0], int):
        words = f"item {place[0] + 1} ({shown(value)}) is {words}"
    if isinstance(value, str) and (wrong_type or error == "literal_error"):
        plain, choices = parsed(value.lower()), [str(choice) for choice in _choices(prop)]
        if not isinstance(plain, str) and (wrong_type or value in choices):
            return f"{words}; write {shown(plain)} without quotes"
        if near := nearest(value, choices):
            return f"{words}; did you mean {shown(near)}?"
    return words


def _choices(prop: Mapping[str, Any]) -> list[Any]:
    return prop.get("enum", [prop["const"]] if "const" in prop else [])


def allowed_text(prop: Mapping[str, Any]) -> str:
    """Allowed values of a key in words, from its JSON schema.

    `{"type": "integer", "minimum": 1}` -> `an integer >= 1`.
    """
    if "allowed" in prop:
        return prop["allowed"]
    if "anyOf" in prop:
        return " or ".join(map(allowed_text, prop["anyOf"]))
    if choices := _choices(prop):
        return listed(choices)
    if prop.get("type") == "array":
        kind = "a non-empty list" if prop.get("minItems") else "a list"
        return f"{kind}, each item {allowed_text(prop['items'])}"
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "null": "null"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {prop[name]:.10g}" for name, sign in bounds.items() if name in prop]
    text = "non-empty text in double quotes" if prop.get("minLength") else "text in double quotes"
    return " ".join(filter(None, [words.get(prop.get("type", ""), text), " and ".join(limits)]))


# ----------------------------------------------------------------------------------------------------------
# Nearest names


def nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The option with the most similar spelling, ignoring case; None without a similar one."""
    by_lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.strip().lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def nearest_key(name: str, keys: Iterable[str], known_as: Mapping[str, str] | None = None) -> str | None:
    """The key, or `key=value`, that a name most likely means.

    That is the name's entry in `known_as`, else the key with the most similar words (`nested_lora_alpha` is
    `nested_lora_consolidation_alpha`, not `nested_lora_rank`), of equal ones the most similar spelling.
    """
    keys, plain = list(keys), name.strip().lower().replace("-", "_")
    known = (known_as or {}).get(plain, "")
    if known.partition("=")[0] in keys:
        return known
    words = plain.split("_")

    def likeness(key: str) -> tuple[float, float]:
        own = key.split("_")
        alike = sum(bool(difflib.get_close_matches(word, own, n=1, cutoff=0.75)) for word in words)
        letters = difflib.SequenceMatcher(None, plain, key).ratio()
        return 2 * alike / (len(words) + len(own)), letters

    near = max(keys, key=likeness, default="")
    return near if near and likeness(near)[0] >= 0.65 else nearest(plain, keys)


def no_such(what: str, name: str, allowed: Sequence[str]) -> str:
    """Words for a name that is not allowed: `no such cell; did you mean "a"?; allowed: "a", "b"`."""
    guess = f"; did you mean {shown(near)}?" if (near := nearest(name, allowed)) else ""
    return f"no such {what}{guess}; allowed: {some([shown(name) for name in allowed], most=MAX_CHOICES)}"


# ----------------------------------------------------------------------------------------------------------
# Values


def parsed(text: str) -> Any:
    """Value of a text: JSON where it is JSON, else the text."""
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return text


def refuse_constant(name: str) -> Any:
    """Raises ValueError for `NaN` and `Infinity`, which Python's parser takes and JSON does not have."""
    raise ValueError(f"{name} is not a JSON number")


def type_name(value: Any) -> str:
    """Kind of a value in JSON's terms: `an integer`, `a list`."""
    return TYPES.get(type(value), type(value).__name__)


def listed(options: Iterable[Any]) -> str:
    """Values as JSON, with commas between them."""
    return ", ".join(map(shown, options))


def grouped(pairs: Iterable[tuple[Member, Group]]) -> dict[Group, list[Member]]:
    """Group -> its members, from pairs of member and group, in the order of the pairs."""
    found: dict[Group, list[Member]] = {}
    for member, group in pairs:
        found.setdefault(group, []).append(member)
    return found


def shown(value: Any) -> str:
    """A value as JSON, cut when long."""
    return printable(json.dumps(value, ensure_ascii=False, default=repr))


def printable(text: str) -> str:
    """A text that every console and file takes, cut when long."""
    text = escaped(text)
    return text if len(text) <= MAX_WIDTH else text[: MAX_WIDTH - 1] + "…"
