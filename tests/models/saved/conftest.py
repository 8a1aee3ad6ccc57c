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

COMMON = {
    "init_cls": 2,
    "increment": 2,
    "max_tasks": 2,
    "backbone_type": "test_vit",
    "weights": "random",
    "image_size": 32,
    "device": "cpu",
    "precision": "fp32",
    "figure_format": "none",
}
ADAPTERS = TINY | {"adapt_start_layer": 4, "adapt_end_layer": 5, "ffn_adapter_type": "nested_lora"}
FINETUNE = {name: value for name, value in ADAPTERS.items() if name in SCHEMAS["finetune"].model_fields}
RUNS: dict[str, dict[str, Any]] = {
    "sema": ADAPTERS | {"model_name": "sema", "expansion": "always", "detect_batch_size": 8},
    "simplecil": {"model_name": "simplecil", "max_train_per_class": 16},
    "ranpac": {"model_name": "ranpac", "ranpac_dim": 50, "max_train_per_class": 16, "cache_gb": 0},
    "linear_probe": {"model_name": "linear_probe", "init_cls": 8, "increment": 8, "max_tasks": 1}
    | {"func_epoch": 2, "max_train_per_class": 16},
    "fecam": FINETUNE | {"model_name": "finetune", "head": "fecam"},
    "aligned": FINETUNE | {"model_name": "finetune", "head": "aligned", "head_drift": "linear"},
    "ensemble": FINETUNE
    | {"model_name": "finetune", "head": "ranpac", "ranpac_dim": 50, "merge": "ema", "merge_ensemble": True},
    "ease": FINETUNE | {"model_name": "ease"},
    "inflora": {key: value for key, value in TINY.items() if key != "rd_epoch"} | {"model_name": "inflora"},
    "coda_prompt": {key: value for key, value in TINY.items() if key != "rd_epoch"}
    | {"model_name": "coda_prompt", "prompt_components": 3},
    "sdlora": TINY_SDLORA | {"model_name": "sdlora"},
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
    values = COMMON | RUNS[name] | {"dataset": str(data), "logs_root": str(place / "logs")}
    values |= {"cache_root": str(place / "cache"), "input_normalization": "weights"}
    train(config_from_dict(values, SCHEMAS, "test").config)
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
