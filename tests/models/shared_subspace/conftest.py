"""A learner on tiny tasks with its record."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import SCHEMAS
from models.base import RunContext
from models.shared_subspace.learner import SharedSubspace
from tests.conftest import TINY_GRIDS
from utils.config.loading import config_from_dict
from utils.config.schema import RunConfig
from utils.runs.run_log import RunLog

Make = Callable[..., SharedSubspace]


@pytest.fixture
def make(open_log: Callable[[RunConfig], RunLog]) -> Make:
    """A learner at the start of its task; making another closes the record of the one before."""

    def learner(**changes: Any) -> SharedSubspace:
        config = config_from_dict(TINY_GRIDS | {"seed": 1} | changes, SCHEMAS, "test").config
        made = SharedSubspace(config, RunContext(torch.device("cpu"), log=open_log(config)))
        made.begin_task(0)
        return made

    return learner
