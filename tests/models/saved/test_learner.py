"""models.saved.learner: which errors of loading a checkpoint say that it does not fit."""

from pathlib import Path

import pytest

from models.saved.learner import fitting


def test_a_lack_of_memory_says_nothing_about_the_checkpoint() -> None:
    with pytest.raises(RuntimeError, match="allocate memory"), fitting(Path("task_00")):
        raise RuntimeError("can't allocate memory")
