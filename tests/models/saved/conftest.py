"""Tiny finished runs of several methods, whose data set is removed once they are trained."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from models import SCHEMAS
from tests.conftest import TINY, TINY_SDLORA, folder_of
from trainer import train
from utils.config.loading import config_from_dict
from utils.data.synthetic import synthetic_arrays

COMMON = TINY | {  # of these, each method takes the keys that it has
    "init_cls": 2,
    "increment": 2,
    "max_tasks": 2,
    "max_test_per_class": None,
    "backbone_type": "test_vit",
    "weights": "random",
    "image_size": 32,
    "device": "cpu",
    "precision": "fp32",
    "input_normalization": "weights",
    "adapt_start_layer": 4,
    "adapt_end_layer": 5,
    "ffn_adapter_type": "nested_lora",
    "ranpac_dim": 50,
}
RUNS: dict[str, dict[str, Any]] = {  # what each changes; its name is that of its method, unless it says so
    "sema": {"expansion": "always", "detect_batch_size": 8},
    "simplecil": {},
    "ranpac": {"cache_gb": 0},
    "linear_probe": {"init_cls": 8, "increment": 8, "max_tasks": 1, "func_epoch": 2},
    "fecam": {"model_name": "finetune", "head": "fecam"},
    "aligned": {"model_name": "finetune", "head": "aligned", "head_drift": "linear"},
    "ease": {},
    "moal": {},
    "inflora": {},
    "coda_prompt": {"prompt_components": 3},
    "sdlora": TINY_SDLORA | {"max_test_per_class": None},
}


class Finished(NamedTuple):
    """A run folder, and the images and names of the data set that it was trained on."""

    folder: Path
    images: np.ndarray
    labels: list[str]


def make_run(name: str, place: Path) -> Finished:
    """The run of `RUNS` of this name; its data set is not there any more."""
    names, arrays = synthetic_arrays()
    data = place / "things.npz"
    np.savez(data, class_names=names, **arrays)
    own = {"model_name": name} | RUNS[name] | {"dataset": str(data), "logs_root": str(place / "logs")}
    known = SCHEMAS[own["model_name"]].model_fields
    shared = {key: value for key, value in COMMON.items() if key in known}
    train(config_from_dict(shared | own | {"cache_root": str(place / "cache")}, SCHEMAS, "test").config)
    data.unlink()
    return Finished(folder_of(place / "logs"), arrays["x_test"], [names[i] for i in arrays["y_test"]])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """Each run, made when it is first asked for."""
    return functools.cache(lambda name: make_run(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=RUNS)
def finished(request: pytest.FixtureRequest, runs: Callable[[str], Finished]) -> Finished:
    """Every run in turn."""
    return runs(request.param)


@pytest.fixture
def simplecil(runs: Callable[[str], Finished]) -> Finished:
    return runs("simplecil")
