"""Shared by the tests: tiny runs on generated images, nothing downloaded, one thread."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models import SCHEMAS
from models.sema import SEMA
from trainer import assemble, make_learner
from utils.config import RunConfig, config_from_dict, load_config
from utils.run_log import RunLog

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

TINY = {
    "max_train_per_class": 16,
    "max_test_per_class": 8,
    "batch_size": 8,
    "func_epoch": 1,
    "rd_epoch": 2,
}


@pytest.fixture
def smoke_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """exps/smoke.json made smaller still, with changes, logging below the test's own folder."""

    def make(**changes: Any) -> RunConfig:
        base = load_config(ROOT / "exps" / "smoke.json", [], SCHEMAS).config.model_dump()
        values = base | TINY | {"logs_root": str(tmp_path / "logs"), "cache_root": str(tmp_path / "cache")} | changes
        return config_from_dict(values, SCHEMAS, "test").config

    return make


@pytest.fixture
def make_sema(smoke_config: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Callable[..., SEMA]]:
    """A SEMA learner on the tiny data, its record in a folder of its own; making another closes the record before."""
    logs: list[RunLog] = []

    def make(**changes: Any) -> SEMA:
        config = smoke_config(**changes)
        for log in logs:
            log.close()
        logs.append(RunLog.create(tmp_path / f"run{len(logs)}", config=config.model_dump(), overwrite=False))
        return make_learner(assemble(config, seed=1), logs[-1])

    yield make
    for log in logs:
        log.close()
