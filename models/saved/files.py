"""Configuration and result of a run folder, read before PyTorch is imported.

config = read_config(Path("logs/sema/..."))
"""

import os
from pathlib import Path
from typing import Any

from models.methods import SCHEMAS
from utils.config.loading import config_from_dict
from utils.config.schema import RunConfig
from utils.errors import UserError
from utils.files import read_json
from utils.runs.folder import CONFIG, waiting_notes
from utils.runs.metrics import checked_result


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run folder. UserError: the folder holds none, or a damaged one."""
    path = folder / CONFIG
    if not path.is_file():
        if (run := folder.with_suffix("")) != folder and (run / CONFIG).is_file():
            raise UserError(f"{folder} is the text log of a run: give its folder, {run}")
        faults = [f"{folder} is not a run folder: it has no {CONFIG}", *waiting_notes(folder)]
        raise UserError(f"{'; '.join(faults)}; give a folder such as logs/sema/.../run_1993_...")
    values = read_json(path)
    if not {"model_name", "seed"} <= values.keys():
        raise UserError(
            f"{path} names no model_name and seed, as that of a run does: the file is damaged, restore it"
        )
    loaded = config_from_dict(values, SCHEMAS, str(path))
    if len(loaded.configs) > 1:
        raise UserError(f"{path} names several seeds, and a run has one: set back what was edited")
    return loaded.config


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in, also for a path relative to a folder inside it."""
    folder = checkpoint.parent.parent
    return folder if folder.name not in ("", "..") else Path(os.path.abspath(checkpoint)).parents[1]


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished run. UserError: it is absent or damaged."""
    return checked_result(folder, read_config(folder).metrics)
