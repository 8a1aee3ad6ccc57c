"""Experiment files: where they lie, whether one is a config or a sweep, and which ones are shipped.

path = located(Path("exps/smoke.json"))          # here, else in the project
kind_of(path, schemas)                           # "config", or "sweep"
shipped_file("ranpac", "cifar224", schemas)      # exps/baselines/ranpac_cifar.json
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.config.loading import BASE_KEY, Schemas, base_of, known_method, no_such_method, read_values
from utils.config.messages import parsed
from utils.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
SAME_IMAGES = {"cifar100": "cifar224", "cifar-100": "cifar224"}  # -> the name in shipped files
TABLE_KEYS = {"cells", "grid", "set"}  # no config has any; a sweep without them repeats another


class Shipped(NamedTuple):
    """A shipped file; method and data set are "" for a sweep, data set also where a method has none."""

    path: str  # from the project's folder
    method: str
    dataset: str
    description: str


def located(path: Path) -> Path:
    """The path itself or, if it does not exist, the same path in the project's folder if it exists there."""
    in_project = PROJECT / path
    wanted = in_project if path.parent.exists() else in_project.parent
    return in_project if not path.exists() and wanted.exists() else path


def kind_of(path: Path, schemas: Schemas, inheriting: tuple[str, ...] = ()) -> str:
    """Whether a file is a "sweep" or a "config"; "" if its content does not say, which its loader reports.

    One with none of their keys is what its base is. inheriting: real paths of the files that name it as base.
    """
    if not path.is_file():  # a pipe gives its content once, to its loader
        return ""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        keys = values.keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    if keys & TABLE_KEYS:
        return "sweep"
    of_configs = {name for schema in schemas.values() for name in schema.model_fields}
    if keys & of_configs - {"description"}:
        return "config"
    chain = (*inheriting, os.path.realpath(path))
    try:
        base = base_of(path.absolute(), values[BASE_KEY])
        return "" if os.path.realpath(base) in chain else kind_of(base, schemas, chain)
    except (KeyError, ValueError, OSError):
        return ""


def shipped_files(schemas: Schemas) -> list[Shipped]:
    """All files below `exps/`, in the order of their paths."""
    found = []
    for path in sorted(PROJECT.glob("exps/**/*.json")):
        values = read_values(path)
        method = known_method(values, schemas) if values and kind_of(path, schemas) != "sweep" else None
        field = schemas[method].model_fields.get("dataset") if method else None
        dataset = values.get("dataset", field.default) if field else ""
        name, description = path.relative_to(PROJECT).as_posix(), values.get("description", "")
        found.append(Shipped(name, method or "", str(dataset), str(description)))
    return found


def shipped_file(method: str, dataset: str | None, schemas: Schemas) -> Path:
    """The shipped config of a method and a data set; of several the one with the plainest name.

    Raises UserError: there is no such method, none for the data set, or several data sets and none is given.
    """
    if method not in schemas:
        raise UserError(f"--method {method}: {no_such_method(method, schemas)}")
    dataset = SAME_IMAGES.get((dataset or "").lower(), dataset)
    own = [file for file in shipped_files(schemas) if file.method == method]
    sets = sorted({file.dataset for file in own})
    fitting = [file for file in own if file.dataset == dataset or (dataset is None and len(sets) == 1)]
    if not fitting:
        what = f"no file is shipped for {method} on {dataset}" if dataset else f"{method} needs a data set"
        there = f"give --dataset one of {', '.join(sets)}, or " if any(sets) else "leave --dataset out, or "
        raise UserError(f"{what}: {there if own else ''}write a file of your own")
    return Path(min(fitting, key=lambda file: _strangeness(Path(file.path), method)).path)


def advice_on_method(path: Path, overrides: Sequence[str], schemas: Schemas) -> str | None:
    """What to run instead of a file whose method was changed with `--set model_name=`.

    None where it was not, or where the other method has all keys of the file.
    """
    settings = dict(override.partition("=")[::2] for override in overrides)
    if "model_name" not in settings:
        return None
    values = read_values(path)
    own = known_method(values, schemas)
    asked = known_method({"model_name": parsed(settings["model_name"])}, schemas)
    if own is None or asked in (None, own):
        return None
    if not values.keys() - schemas[asked].model_fields.keys() - schemas[asked].legacy_keys.keys():
        return None
    dataset = settings.get("dataset", values.get("dataset"))
    try:
        known = "dataset" in schemas[asked].model_fields
        instead = f"run python main.py {shipped_file(asked, dataset if known else None, schemas)}"
    except UserError as error:
        instead = str(error)
    return f"--set model_name={asked}: {path} has keys of {own} that {asked} does not have; {instead}"


def _strangeness(path: Path, method: str) -> tuple[bool, int, int, str]:
    """Sort key of files for one method and data set: named after the method, few words, near the top."""
    return not path.stem.startswith(method), path.stem.count("_"), len(path.parts), str(path)
