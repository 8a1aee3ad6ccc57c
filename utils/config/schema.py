"""The keys every run has, as a pydantic model that a method extends beside its learner.

    class MyConfig(RunConfig):
        rank: int = Field(4, ge=1, description="Rank of the adapters.")

This file knows no method by name. `utils/config/loading.py` reads and checks the files.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from utils.errors import UserError
from utils.metric_catalogue import MetricSpec
from utils.training.device import resolve_device

MOST = 10**6  # of whatever is counted: batches, epochs, images; more is a slip of the keyboard
PATH_BYTES, NAME_BYTES = 4096, 255  # that file systems take: a whole path, and each name in it
BELOW_RUN = 256  # bytes of a path that what a run writes into its folder may add
BESIDE_RUN = 16  # bytes that a run folder's name may gain: the number of a sibling, the suffix of its log
Conflict = tuple[tuple[str, ...], str]  # the keys involved, and one sentence that says what is allowed
IdleRule = tuple[
    bool, str, Iterable[str]
]  # whether it applies, the reason in few words, keys that change nothing then


def _listed(value: Any) -> Any:
    """A single integer as a list of one: `"seed": 1993` and `--set device=0` are plain to read."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _distinct(seeds: list[int]) -> list[int]:
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ValueError(f"holds {', '.join(map(str, twice))} more than once")
    return seeds


def falling_rate(config: "RunConfig", rates: Sequence[str]) -> list[Conflict]:
    """The conflict of a schedule that ends at `min_lr` with rates, named by their keys, that begin below it.

    What has rate 0 is not trained, and not raised to `min_lr` either; None stands for another of the rates. Keys that
    change nothing are in nothing's way.
    """
    idle = config.without_effect()
    counting = {key: rate for key in rates if key not in idle and (rate := getattr(config, key))}
    lower = {key: rate for key, rate in counting.items() if rate < config.min_lr}
    if not lower or "min_lr" in idle:
        return []
    sentence = f"the schedule only lowers a rate; allowed: min_lr from 0 to {min(lower.values()):g}"
    return [(("min_lr", *lower), sentence)]


def _check_device(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int) for item in items):
        raise ValueError("names no device")
    return value


def check_text(text: str) -> None:
    """Raises ValueError where no file and no path can hold the text."""
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a surrogate pair, which is no character")


def _bytes(path: str) -> int:
    """Length of a path, or of a name in one. Raises ValueError where the file system takes none such."""
    try:
        return len(os.fsencode(path))
    except UnicodeEncodeError as error:
        fault = f"holds {path[error.start]!r}, which no path has in this locale ({error.encoding})"
        raise ValueError(f"{fault}: set PYTHONUTF8=1") from None


def _fitting_path(text: str) -> str:
    """A path as the file system takes it, `~` expanded."""
    check_text(text)
    path = os.path.expanduser(text)
    if _bytes(os.path.abspath(path)) > PATH_BYTES - BELOW_RUN:
        raise ValueError(f"is longer than the {PATH_BYTES - BELOW_RUN} bytes a path may have here")
    longest = max(map(_bytes, path.split("/")))
    if longest > NAME_BYTES:
        raise ValueError(f"holds a name of {longest} bytes; file systems take {NAME_BYTES}")
    return path


def _allowed(text: str) -> dict[str, Any]:
    """Words for the error report where the JSON schema of the key would read poorly."""
    return {"allowed": text}


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_listed)]
Device = Annotated[Any, AfterValidator(_check_device), BeforeValidator(_listed)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(_fitting_path)]


class RunConfig(BaseModel):
    """The keys every run has. Unknown keys are refused, types are strict (no `true` for an integer), values frozen.

    A subclass adds its keys and may extend `legacy_keys`, `folder_names`, `conflicts`, `idle_rules`, `remarks`,
    `editable_keys` (those that may be edited before a run is resumed, since they change its numbers by no more than
    rounding, or name files that are known by their content), and `known_as` (other names of keys -> `key` or
    `key=value`, for the message about an unknown key).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    metrics: ClassVar[tuple[MetricSpec, ...]]  # what its runs are measured by, the main metric first
    legacy_keys: ClassVar[dict[str, str]] = {}
    editable_keys: ClassVar[frozenset[str]] = frozenset(
        {"description", "prefix", "logs_root", "device", "grad_accumulation", "eval_batch_size"}
    )
    known_as: ClassVar[dict[str, str]] = {"learning_rate": "init_lr", "lr": "init_lr", "gpu": "device"}

    description: str = Field(
        "", description="The command that runs this file and the number it is expected to give."
    )
    prefix: str = Field(
        "run",
        pattern=r"^[^/\\\x00-\x1f]+$",
        description="First part of the run folder's name.",
        json_schema_extra=_allowed("a name without / and \\"),
    )
    model_name: str = Field(description="The method: one of the registered learners.")
    logs_root: PathText = Field("logs", description="Folder under which run folders are made.")

    seed: Seeds = Field(
        [1993],
        description="Seeds; each is a run of its own, in a folder of its own.",
        json_schema_extra=_allowed(
            "an integer from 0 to 4294967295, or a list of different ones, at least one"
        ),
    )
    device: Device = Field(
        "auto",
        description='Where to compute; a published list such as ["0"] falls back to the CPU where there is no GPU.',
        json_schema_extra=_allowed(
            '"auto", "cpu", "mps", "cuda", "cuda:N", or a list such as ["0"] or ["-1"]'
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="fp32, or bf16 autocast where the device has it."
    )

    batch_size: int = Field(32, ge=1, le=MOST, description="Samples in a training step, over all devices.")
    grad_accumulation: int = Field(
        1, ge=1, le=MOST, description="Parts a training step is cut into to save memory."
    )
    eval_batch_size: int = Field(64, ge=1, le=MOST, description="Samples in a batch without gradients.")

    @field_validator("*")
    @classmethod
    def _writable_text(cls, value: Any) -> Any:
        """Refuses text that no file and no path takes."""
        if isinstance(value, str):
            check_text(value)
        return value

    def folder_names(self, seed: int) -> list[str]:
        """The names of a run's folder and of those above it, from `logs_root` on."""
        return [self.model_name, f"{self.prefix}_{seed}"]

    def conflicts(self) -> list[Conflict]:
        """Keys that are fine one by one and impossible together or on this machine; subclasses extend `super()`'s."""
        return [*self._device_conflicts(), *self._folder_conflicts()]

    def idle_rules(self) -> list[IdleRule]:
        """When keys change nothing given the others; a subclass puts its rules before those of `super()`.

        How much there is to do is not looked at: with `max_tasks` 1 the keys of later tasks keep their meaning.
        """
        return []

    def without_effect(self) -> dict[str, str]:
        """Keys that change nothing given the others, set or not, with the reason of the first rule that applies."""
        reasons: dict[str, str] = {}
        for applies, reason, keys in self.idle_rules():
            if applies:
                reasons = dict.fromkeys(keys, reason) | reasons
        return reasons

    def idle_keys(self) -> dict[str, str]:
        """Those of the keys without effect that were set.

        A resolved configuration sets every key, so that none of them was anyone's choice.
        """
        given, reasons = self.given(), self.without_effect()
        if len(given) == len(type(self).model_fields):
            return {}
        return {key: reasons[key] for key in given if key in reasons}

    def given(self) -> list[str]:
        """The keys that were set, in the order of the schema."""
        return [key for key in type(self).model_fields if key in self.model_fields_set]

    def remarks(self) -> list[str]:
        """Sentences worth a warning: settings that depart from what a reader would expect."""
        return []

    def differing(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """Key -> both values, for the keys in which two experiments differ, apart from the seed and `editable_keys`.

        Of two methods only the name of the method is told.
        """
        if self.model_name != other.model_name:
            return {"model_name": (self.model_name, other.model_name)}
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        keys = [key for key in ours if key not in self.editable_keys and key != "seed"]
        return {key: (ours[key], theirs[key]) for key in keys if ours[key] != theirs[key]}

    def _device_conflicts(self) -> list[Conflict]:
        try:
            resolve_device(self.device)
        except UserError as error:
            return [(("device",), str(error))]
        return []

    def _folder_conflicts(self) -> list[Conflict]:
        try:
            names = [_bytes(name) for name in self.folder_names(max(self.seed))]
            whole = _bytes(os.path.abspath(self.logs_root)) + sum(names) + len(names)
        except ValueError as error:
            return [(("prefix", "logs_root"), f"the run folder's path {error}")]
        longest, most = NAME_BYTES - BESIDE_RUN, PATH_BYTES - BELOW_RUN
        if max(names) <= longest and whole <= most:
            return []
        fault = (
            f"the longest name in the run folder's path would have {max(names)} bytes, the whole path {whole}"
        )
        way_out = "shorten prefix, logs_root, or the names of dataset and backbone_type"
        return [(("prefix", "logs_root"), f"{fault}; allowed: {longest} and {most}; {way_out}")]


def with_reason(reasons: Mapping[str, str]) -> list[str]:
    """Keys with the reason in brackets, those of one reason together: `{"a": "x", "b": "x"}` -> `["a, b (x)"]`."""
    grouped: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        grouped.setdefault(reason, []).append(key)
    return [f"{', '.join(keys)} ({reason})" for reason, keys in grouped.items()]
