"""The runs of one command, one per seed, each in a folder of its own, and the mean over them.

command = new_command([1, 2, 3], overwrite=False)  # recorded in the manifest of each run
seed_runs(folder, config, command)                 # all of them, with their state
log_mean(results, config.metrics, [(folder, config), ...])  # refuses runs of different experiments
"""

import json
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from utils.config.messages import shown
from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.metric_catalogue import MetricSpec
from utils.runs.folder import CONFIG, MANIFEST, folder_of
from utils.runs.manifest import SOURCES, Command, changes, is_complete, read_manifest, read_provenance
from utils.runs.tables import seeds_table, weights_notes
from utils.wording import as_typed

logger = logging.getLogger("nested_lora")

SILENT = {"device", "description"}  # keys that a resumed run keeps without a warning


class SeedRun(NamedTuple):
    """The run of one seed of a command: its folder, None before it begins, and whether it is complete."""

    seed: int
    folder: Path | None
    complete: bool

    @classmethod
    def of(cls, seed: int, folder: Path | None) -> "SeedRun":
        """The run in a folder, as its files say."""
        return cls(seed, folder, folder is not None and is_complete(folder))

    @property
    def state(self) -> str:
        """Progress of the run, for the log."""
        return "finished" if self.complete else "to be resumed" if self.folder else "to be started"


def new_command(seeds: Sequence[int], overwrite: bool) -> Command:
    """Command that starts runs, with an id of its own."""
    return Command(id=uuid.uuid4().hex, seeds=list(seeds), overwrite=overwrite)


def seed_runs(folder: Path, config: RunConfig, command: Command) -> list[SeedRun]:
    """The runs of a command: that in the folder, then the others beside it, also under an edited prefix.

    Raises UserError: the config in the folder is not of a seed of the command, or a manifest is damaged.
    """
    if config.seed not in command.seeds:
        raise UserError(
            f"{folder / CONFIG} does not belong to this run any more: its seed is {config.seed}, and the run "
            f"was started for one of {command.seeds}; set back what was edited"
        )
    others = [seed for seed in command.seeds if seed != config.seed]
    folders: dict[int, Path | None] = {config.seed: folder} | dict.fromkeys(others)
    for seed in others:
        name = folder_of(config, seed).name
        names = re.compile(".*" + re.escape(name.removeprefix(config.prefix)) + r"(_\d+)?")
        for path in sorted(folder.absolute().parent.iterdir()):
            if names.fullmatch(path.name) and _is_of(path, command, surely=path.name.startswith(name)):
                folders[seed] = folder.with_name(path.name)
    return [SeedRun.of(seed, found) for seed, found in folders.items()]


def for_seed_left(command: Command, begun: Path, place: Path) -> Command:
    """The command that starts a seed left at `place`: it replaces no run that was made there since it began.

    begun: a run folder of the command.
    """
    if command.overwrite and (place / MANIFEST).exists():
        first, last = read_manifest(begun).sessions[0], read_manifest(place).sessions[-1]
        if datetime.fromisoformat(last.started) >= datetime.fromisoformat(first.started):
            return command.model_copy(update={"overwrite": False})
    return command


def _is_of(folder: Path, command: Command, surely: bool) -> bool:
    """Whether a folder holds a run of a command; a damaged manifest is refused only if `surely` is set."""
    try:
        return (folder / MANIFEST).exists() and read_manifest(folder).command.id == command.id
    except UserError:
        if surely:
            raise
        return False


def check_same_config(configs: Sequence[tuple[Path, RunConfig]]) -> None:
    """Refuse run folders whose configs differ in more than the seed and `editable_keys`, naming the keys."""
    first, expected = configs[0]
    for folder, config in configs:
        if differing := expected.differing(config):
            raise _different(configs, folder, f"their {CONFIG} differ in {both_values(differing)}")


def check_one_experiment(configs: Sequence[tuple[Path, RunConfig]]) -> list[str]:
    """Sentences about code or libraries that differ between runs of one experiment.

    Raises UserError: a seed stands twice, or configs, data or weights differ.
    """
    check_same_config(configs)
    by_seed: dict[int, Path] = {}
    for folder, config in configs:
        if config.seed in by_seed:
            both = f"{by_seed[config.seed]} and {folder}"
            raise UserError(
                f"{both} both have seed {config.seed} and the same configuration: give each seed once"
            )
        by_seed[config.seed] = folder
    origins = {folder: read_provenance(folder) for folder in by_seed.values()}
    first, *others = configs
    for folder, config in others:
        ours, theirs = origins[first[0]].hashes, origins[folder].hashes
        if kinds := [kind for kind in ours | theirs if ours.get(kind) != theirs.get(kind)]:
            names = {key for kind in kinds for key in SOURCES[kind]}
            edited = first[1].edited(config).items()
            named = both_values({key: both for key, both in edited if key in names})
            how = f"the hashes of their {' and '.join(kinds)} differ{named and ', as do '}{named}"
            raise _different(configs, folder, how)
    return changes({str(folder): origin for folder, origin in origins.items()})


def kept_settings(run: str | Path, path: Path, config: RunConfig, given: RunConfig) -> str:
    """Sentence about the values that a begun run keeps when it is resumed, whatever is given; "" without any.

    path: file of its config.
    """
    edited = {key: ours for key, (ours, _) in config.edited(given).items() if key not in SILENT}
    own = ", ".join(f"{key} = {shown(value)}" for key, value in edited.items())
    return f"{run} keeps its own {own}: edit {path} to change them" if own else ""


def both_values(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Keys with the values of both sides, in a sentence: `rank (4 and 8), init_lr (0.01 and 0.02)`."""
    return ", ".join(f"{key} ({json.dumps(a)} and {json.dumps(b)})" for key, (a, b) in differing.items())


def _different(configs: Sequence[tuple[Path, RunConfig]], second: Path, how: str) -> UserError:
    command = as_typed("eval.py", "--compare", *(folder for folder, _ in configs))
    return UserError(
        f"{configs[0][0]} and {second} are different experiments, {how}: a mean is over runs that differ in "
        f"their seed alone; set back what was edited, or compare them: {command}"
    )


def log_mean(
    results: Sequence[dict[str, Any]],
    metrics: Sequence[MetricSpec],
    configs: Sequence[tuple[Path, RunConfig]] = (),
) -> None:
    """Log the table of means over several seeds; a warning where folders hold different experiments."""
    if len(results) < 2:
        return
    try:
        notes = check_one_experiment(configs) if configs else []
    except UserError as error:
        logger.warning(f"No mean over the seeds: {error}")
        return
    for note in notes:
        logger.warning(note)
    for line in (seeds_table(results, metrics), *weights_notes(results)):
        logger.info(line)
