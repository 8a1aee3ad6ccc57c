"""RunConfig, base class of all configs: the keys of every run, conflicts, unused keys and warnings.

    class MyConfig(RunConfig):
        rank: Count = key(4, "Rank of the adapters.")

Groups of keys that methods share extend `RunConfig` (`models/vit/config.py`); a method's config combines
groups and adds its own keys. `conflicts`, `unused_rules` and `warnings` extend those of `super()`, such as by
`yield from super().conflicts()`: every group is asked.
`utils/config/loading.py` reads and checks files.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from utils.config.messages import grouped
from utils.errors import UserError
from utils.metric_catalogue import MetricSpec
from utils.wording import is_utf8

MAX_COUNT = 10**6  # of batches, epochs, images, ...: a larger number is a typing mistake
MAX_PATH_BYTES, MAX_NAME_BYTES = 4096, 255  # limits of file systems: a whole path, each name in it
BELOW_RUN = 256  # bytes that the files in a run folder may add to its path
BESIDE_RUN = 16  # bytes that may be added to a run folder's name: a sibling's number, a log's suffix
GPU_NUMBER = re.compile("-1|[0-9]{1,4}")
DEVICE_NAME = re.compile(f"auto|cpu|mps|cuda(:[0-9]{{1,4}})?|{GPU_NUMBER.pattern}", re.IGNORECASE)
Conflict = tuple[tuple[str, ...], str]  # the keys involved, and a sentence that says what is allowed
UnusedRule = tuple[bool, str, Iterable[str]]  # whether it applies, why, the keys without effect then


# ----------------------------------------------------------------------------------------------------------
# Types of values


def key(default: Any, meaning: str, allowed: str = "", **limits: Any) -> Any:
    """A key with its default, its meaning and, where its type does not tell, words for what it allows."""
    return Field(
        default, description=meaning, json_schema_extra={"allowed": allowed} if allowed else None, **limits
    )


def check_text(text: str) -> None:
    """Raises ValueError for text that no file and no path can hold."""
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if not is_utf8(text):
        raise ValueError("holds half a surrogate pair, which is no character")


def distinct(values: list[Any]) -> list[Any]:
    """The values themselves; raises ValueError where one stands twice."""
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"holds {', '.join(map(str, repeated))} more than once")
    return values


def _listed(value: Any) -> Any:
    """A single integer as a list of one: `"seed": 1993`, `--set device=0`."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _device_names(value: Any) -> Any:
    """The value itself; raises ValueError where no machine has such a device."""
    items, known = (value, GPU_NUMBER) if isinstance(value, list) else ([value], DEVICE_NAME)
    if not items or not all(known.fullmatch(str(item)) for item in items):
        raise ValueError("names no device")
    return value


def _path_bytes(path: str) -> int:
    """Length of a path, or of a name in one. Raises ValueError outside the locale's encoding."""
    try:
        return len(os.fsencode(path))
    except UnicodeEncodeError as error:
        fault = f"holds {path[error.start]!r}, which no path has in this locale ({error.encoding})"
        raise ValueError(f"{fault}: set PYTHONUTF8=1") from None


def _valid_path(text: str) -> str:
    """The path with `~` expanded. Raises ValueError where a file system does not take it."""
    check_text(text)
    path = os.path.expanduser(text)
    if _path_bytes(os.path.abspath(path)) > MAX_PATH_BYTES - BELOW_RUN:
        raise ValueError(f"is longer than the {MAX_PATH_BYTES - BELOW_RUN} bytes a path may have here")
    longest = max(map(_path_bytes, path.split("/")))
    if longest > MAX_NAME_BYTES:
        raise ValueError(f"holds a name of {longest} bytes; file systems take {MAX_NAME_BYTES}")
    return path


Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Rate = Annotated[float, Field(gt=0, lt=1e3)]  # of learning
RateOrZero = Annotated[float, Field(ge=0, lt=1e3)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(_valid_path)]
Device = Annotated[Any, AfterValidator(_device_names), BeforeValidator(_listed)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(distinct), BeforeValidator(_listed)]
SEEDS_ALLOWED = "an integer from 0 to 4294967295, or a list of different ones, at least one"


# ----------------------------------------------------------------------------------------------------------
# The config of a run


class RunConfig(BaseModel):
    """Keys of every run.

    Unknown keys are refused, types are strict (no `true` for an integer), values frozen.

    Class attributes that a subclass may extend:
        metrics: what its runs are measured by, the main metric first.
        legacy_keys: keys that published files have and that have no effect here, with the reason.
        asset_keys: keys that say which data and weights a run needs.
        editable_keys: keys that may be edited before a run is resumed: they change its numbers by rounding at
            most, or name files that are identified by their content.
        known_as: other names of keys -> `key` or `key=value`, for the message about an unknown key,
            or about a method that does not exist and is a setting of this one.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    metrics: ClassVar[tuple[MetricSpec, ...]]
    legacy_keys: ClassVar[dict[str, str]] = {}
    asset_keys: ClassVar[tuple[str, ...]] = ()
    editable_keys: ClassVar[frozenset[str]] = frozenset({
        "description", "prefix", "logs_root", "trackers", "figure_format", "device", "eval_batch_size",
    })  # fmt: skip
    known_as: ClassVar[dict[str, str]] = {"learning_rate": "init_lr", "lr": "init_lr", "gpu": "device"}

    description: str = key("", "The command that runs this file and the number it is expected to give.")
    prefix: str = key(
        "run",
        "First part of the run folder's name.",
        "a name without / and \\",
        pattern=r"^[^/\\\x00-\x1f]+$",
    )
    model_name: str = Field(description="The method: one of the registered learners.")
    logs_root: PathText = key("logs", "Folder that gets the run folders.")
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], AfterValidator(distinct)] = key(
        ["tensorboard"], "Trackers that get the run's numbers and figures, besides its folder; [] for none."
    )
    figure_format: Literal["png", "pdf", "svg", "none"] = key(
        "png",
        "File format of figures in addition to PNG, also in a sweep's report; "
        '"none" draws no figure of a run, which saves about a CPU second.',
    )
    seed: Seed = key(
        1993,
        "Seed; of a list in a file, each seed is a run of its own, in a folder of its own.",
        SEEDS_ALLOWED,
    )
    device: Device = key(
        "auto",
        'Where to compute; a published list such as ["0"] falls back to the CPU where there is no GPU.',
        '"auto", "cpu", "mps", "cuda", "cuda:N", or a list such as ["0"] or ["-1"]',
    )
    precision: Literal["auto", "fp32", "bf16"] = key(
        "fp32",
        "fp32, or bf16 autocast where the device has it; auto: bf16 where that is the faster, else fp32.",
    )
    cpu_kernels: Literal["auto", "avx2"] = key(
        "auto", "auto: the CPU's fastest instruction set; avx2: AVX2, with equal rounding on all x86 CPUs."
    )
    eval_batch_size: Count = key(64, "Samples in a batch without gradients.")

    @field_validator("*")
    @classmethod
    def _writable_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            check_text(value)
        return value

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys that this class adds to its bases, or redefines."""
        return [name for name in cls.__annotations__ if name in cls.model_fields]

    def folder_names(self, seed: int) -> list[str]:
        """Names of a run's folder and of those above it, from `logs_root` on."""
        return [self.model_name, f"{self.prefix}_{seed}"]

    # --- what a run needs and leaves; a subclass extends those of super() --------------------------------

    def missing_assets(self) -> Iterator[str]:
        """Sentences about data and weights that are missing; what can be downloaded is."""
        yield from ()

    # --- rules; a subclass extends those of super() -------------------------------------------------------

    def conflicts(self) -> Iterator[Conflict]:
        """Keys that are valid one by one and impossible together, as known without PyTorch and timm."""
        try:
            names = [_path_bytes(name) for name in self.folder_names(self.seed)]
            whole = _path_bytes(os.path.abspath(self.logs_root)) + sum(names) + len(names)
        except ValueError as error:
            yield ("prefix", "logs_root"), f"the run folder's path {error}"
            return
        max_name, max_path = MAX_NAME_BYTES - BESIDE_RUN, MAX_PATH_BYTES - BELOW_RUN
        if max(names) > max_name or whole > max_path:
            fault = f"the run folder's path would have {whole} bytes, its longest name {max(names)}"
            way_out = "shorten prefix, logs_root, or the names of dataset and backbone_type"
            yield ("prefix", "logs_root"), f"{fault}; allowed: {max_path} and {max_name}; {way_out}"

    def unchecked_keys(self) -> list[str]:
        """Keys that only `late_conflicts` checks; published device lists fall back to the CPU instead."""
        return ["device"] if str(self.device).lower().startswith(("cuda", "mps")) else []

    def late_conflicts(self) -> Iterator[Conflict]:
        """Conflicts that only PyTorch or timm can detect; checked once nothing else is wrong."""
        if "device" not in self.unchecked_keys():
            return
        from utils.training.device import resolve_device  # here: it imports PyTorch

        try:
            resolve_device(self.device)
        except UserError as error:
            yield ("device",), str(error)

    def unused_rules(self) -> list[UnusedRule]:
        """When keys have no effect given the others; of several reasons for a key the first is reported.

        The number of tasks is not considered: with `max_tasks` 1 the keys of later tasks keep their meaning.
        """
        return []

    def warnings(self, nb_seeds: int = 1) -> Iterator[str]:
        """Departures from what a reader would expect; nb_seeds: how many seeds the experiment is run with."""
        yield from ()

    # --- what follows from the rules ----------------------------------------------------------------------

    def without_effect(self) -> dict[str, str]:
        """Keys that have no effect given the others, set or not, with the reason."""
        reasons: dict[str, str] = {}
        for applies, reason, keys in self.unused_rules():
            if applies:
                reasons = dict.fromkeys(keys, reason) | reasons
        return reasons

    def unused_keys(self) -> dict[str, str]:
        """Keys that were set and have no effect, with the reason; none for a resolved config: it sets all."""
        fields = type(self).model_fields
        if len(self.model_fields_set) == len(fields):
            return {}
        reasons = self.without_effect()
        return {name: reasons[name] for name in fields if name in self.model_fields_set & reasons.keys()}

    def min_lr_conflicts(self, lr_keys: Sequence[str]) -> Iterator[Conflict]:
        """The conflict of a schedule that ends at `min_lr` with learning rates below it, given by their keys.

        Rates of 0 (not trained) and None (another rate is used) are ignored.
        """
        unused = self.without_effect()
        lrs = {name: lr for name in lr_keys if name not in unused and (lr := getattr(self, name))}
        lower = {name: lr for name, lr in lrs.items() if lr < self.min_lr}
        if lower and "min_lr" not in unused:
            most = f"{min(lower.values()):g}"
            yield ("min_lr", *lower), f"the schedule only lowers a rate; allowed: min_lr from 0 to {most}"

    def experiment(self) -> dict[str, Any]:
        """Key -> value of all that determines a run's numbers besides the seed.

        Without `editable_keys` and keys that have no effect given the others.
        """
        skipped = {"seed", *self.editable_keys, *self.without_effect()}
        return self.model_dump(mode="json", exclude=skipped)

    def differing(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """Key -> both values, where two experiments differ; for two methods only their names."""
        if self.model_name != other.model_name:
            return {"model_name": (self.model_name, other.model_name)}
        ours, theirs = self.experiment(), other.experiment()
        names = [
            name
            for name in ours | theirs  # a key that has an effect in one of them only may have one value
            if ours.get(name) != theirs.get(name) and getattr(self, name) != getattr(other, name)
        ]
        shared = [name for name in names if name in ours and name in theirs]  # the others follow from these
        return {name: (ours.get(name), theirs.get(name)) for name in shared or names}

    def edited(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """Key -> both values, of the `editable_keys` in which two configs of one method differ."""
        ours, theirs = (one.model_dump(mode="json", include=self.editable_keys) for one in (self, other))
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}

    def tested_on(self, tasks: int, seen: int, classes: int) -> dict[str, Any]:
        """Key -> value of what a run is evaluated on: runs that differ in it cannot be compared.

        A run of one task is an upper bound for runs of several, so its keys leave out how classes are split
        into tasks.

        Args:
            tasks, seen: numbers of tasks and of classes that the run has learned.
            classes: number of classes in its data.
        """
        return {}


def with_reasons(reasons: Mapping[str, str]) -> str:
    """Keys with the reason in brackets, grouped by reason: `{"a": "x", "b": "x"}` -> `a, b (x)`."""
    groups = grouped(reasons.items())
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())
