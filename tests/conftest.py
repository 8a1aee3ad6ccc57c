"""Shared by the tests: tiny runs on generated images, nothing downloaded, one thread."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from models import SCHEMAS
from models.base import Learner
from models.saved.learner import make_learner
from models.sdlora import SDLoRA
from models.vit.class_incremental import ClassIncrementalLearner
from utils.config.experiments import kind_of
from utils.config.loading import config_from_dict, load_config
from utils.config.schema import RunConfig
from utils.runs.run_log import RunLog, SilentLog, read_metrics

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "exps").rglob("*.json"))
SWEEPS = [path for path in SHIPPED if kind_of(path, SCHEMAS) == "sweep"]
EXPS = [path for path in SHIPPED if path not in SWEEPS]
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if hasattr(signal, "SIGHUP"):  # nohup ignores it, and so would all that the tests start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = {
    "max_train_per_class": 16,
    "max_test_per_class": 8,
    "batch_size": 8,
    "func_epoch": 1,
    "rd_epoch": 2,
    "figure_format": "none",  # half of such a run
}

TINY_SDLORA = {
    "model_name": "sdlora",
    "dataset": "synthetic",
    "init_cls": 2,
    "increment": 2,
    "max_train_per_class": 12,
    "max_test_per_class": 6,
    "backbone_type": "test_vit",
    "weights": "random",
    "image_size": 32,
    "device": "cpu",
    "precision": "fp32",
    "batch_size": 8,
    "init_epoch": 2,
    "epochs": 2,
    "init_lr": 0.05,
    "lrate": 0.05,
    "lora_rank": 2,
    "figure_format": "none",
}

TINY_GRIDS = {
    "model_name": "shared_subspace",
    "prefix": "tiny",
    "device": "cpu",
    "primitives": ["rotate", "shift", "frame", "fall", "erase"],
    "held_out_pairs": 2,
    "test_compositions": 10,
    "validation_samples": 16,
    "test_samples": 16,
    "width": 8,
    "depth": 1,
    "heads": 2,
    "hidden": 12,
    "sparse_units": 16,
    "sharing_rank": 2,
    "batch_size": 12,
    "group_size": 4,
    "epochs": 3,
    "steps_per_epoch": 5,
    "save_every": 1,
    "few_shot_tasks": 2,
    "few_shot_samples": 4,
    "few_shot_queries": 8,
    "few_shot_steps": 4,
    "few_shot_every": 2,
    "figure_format": "none",
}


def shipped_file(name: str) -> Path:
    """The file of this name below exps/, in whatever folder it lies."""
    return next((ROOT / "exps").rglob(f"{name}.json"))


def learner_of(config: RunConfig, log: RunLog | None = None, seed: int = 1) -> Learner:
    """The learner of a configuration, with its own seed, and a record that keeps nothing unless given."""
    learner = make_learner(config.model_copy(update={"seed": seed}))
    learner.context.log = log or SilentLog(Path(config.logs_root))
    return learner


def run_scores(config: RunConfig) -> torch.Tensor:
    """Scores of all test images, (n, C), at the end of a run that keeps no record."""
    learner = learner_of(config)
    assert isinstance(learner, ClassIncrementalLearner)
    run_tasks(learner, learner.nb_tasks)
    with torch.no_grad():
        tasks = [learner.features_of(task, "test") for task in range(learner.nb_tasks)]
        return learner.classify(torch.cat(tasks))


def run_tasks(learner: Learner, tasks: int) -> Learner:
    """The learner after its first tasks; one that has finished some goes on with the next."""
    for task in range(learner.task + 1, tasks):
        learner.begin_task(task)
        learner.train_task()
    return learner


def events(learner: Learner, name: str) -> list[dict[str, Any]]:
    """Events of one kind in the record of a learner."""
    return [event for event in read_metrics(learner.log.folder) if event["event"] == name]


def tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """A copy of everything that was learned."""
    return {name: tensor.clone() for name, tensor in learner.learned_tensors().items()}


def saved_state(learner: Learner) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state of a learner as a checkpoint brings it back."""
    state, saved = learner.state()
    return json.loads(json.dumps(state)), {name: tensor.clone() for name, tensor in saved.items()}


def command(config: str, logs: Path, **changes: Any) -> list[str]:
    """Arguments of main.py: a config below exps/ with changes, everything written below `logs`."""
    values = {"logs_root": str(logs), "cache_root": str(logs / "cache"), **changes}
    return ["--config", str(ROOT / "exps" / config), *settings(values)]


def settings(values: Mapping[str, Any]) -> list[str]:
    """Arguments of main.py that change keys of a config."""
    return [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def folder_of(logs: Path) -> Path:
    """The only run folder below a folder."""
    (folder,) = (path.parent for path in logs.rglob("config.json"))
    return folder


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that ends with this code, and returns what it prints, no traceback among it."""

    def tell(code: int, program: Callable[[list[str]], int], *words: object) -> str:
        capsys.readouterr()
        assert program([str(word) for word in words]) == code
        out, error = capsys.readouterr()
        assert "Traceback" not in error
        return out + error

    return tell


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made of what is read; that they can be painted is shown elsewhere."""
    monkeypatch.setattr("utils.plotting.png", lambda figure: b"picture")


@pytest.fixture
def smoke_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """exps/smoke.json made smaller still and with its fc head, with changes, in the test's own folder."""

    def make(**changes: Any) -> RunConfig:
        base = load_config(ROOT / "exps" / "smoke.json", [], SCHEMAS).config.model_dump(exclude_unset=True)
        del base["head"], base["head_drift"]
        values = base | TINY | {"logs_root": str(tmp_path / "logs"), "cache_root": str(tmp_path / "cache")}
        known = SCHEMAS[changes.get("model_name", "sema")].model_fields
        shared = {key: value for key, value in values.items() if key in known}
        return config_from_dict(shared | changes, SCHEMAS, "test").config

    return make


@pytest.fixture
def open_log(tmp_path: Path) -> Iterator[Callable[[RunConfig], RunLog]]:
    """A run's record in a folder of its own; opening another closes the one before."""
    logs: list[RunLog] = []

    def make(config: RunConfig) -> RunLog:
        for log in logs:
            log.close()
        logs.append(RunLog.create(tmp_path / f"run{len(logs)}", config=config.model_dump(), overwrite=False))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def make_sema(
    smoke_config: Callable[..., RunConfig], open_log: Callable[[RunConfig], RunLog]
) -> Callable[..., Learner]:
    """A learner on the tiny data (SEMA unless named) with its record; the next one closes that record."""

    def make(stop_requested: Callable[[], bool] = lambda: False, **changes: Any) -> Learner:
        config = smoke_config(**changes)
        learner = learner_of(config, open_log(config))
        learner.context.stop = stop_requested
        return learner

    return make


@pytest.fixture
def make_sdlora(tmp_path: Path, open_log: Callable[[RunConfig], RunLog]) -> Callable[..., SDLoRA]:
    """An SD-LoRA learner on the tiny data, with its record; making another closes the record before."""

    def make(**changes: Any) -> SDLoRA:
        values = TINY_SDLORA | {"cache_root": str(tmp_path / "cache")} | changes
        config = config_from_dict(values, SCHEMAS, "test").config
        return learner_of(config, open_log(config))

    return make
