"""models.saved.inspection: `eval.py --analyse` on tiny runs of two methods; runs that cannot be analysed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import eval as evaluation
import main
from models.saved.learner import load_learner, task_checkpoints
from tests.conftest import TINY, TINY_SDLORA, command, folder_of, learner_of
from trainer import train as train_run
from utils.analysis.representations import ANALYSES
from utils.analysis.similarity import cka_matrix
from utils.config.schema import RunConfig
from utils.runs.checkpoint import load_checkpoint, save_checkpoint

ALL = list(ANALYSES)
NESTED = {
    **TINY,
    "max_test_per_class": 4,
    "max_tasks": 2,
    "rd_epoch": 0,
    "expansion": "never",
    "nested_lora_freeze": "never",
    "nested_lora_use_consolidation": False,
    "nested_lora_lr_fast": 0.1,
    "nested_lora_lr_slow": 0.05,
    "nested_lora_update_interval_slow": 1,
}
SMALL = {"max_train_per_class": 8, "max_test_per_class": 4, "max_tasks": 2}
SDLORA = {**TINY_SDLORA, **SMALL, "lambda_sparsity": 0.01}


def train(logs: Path, config: str, changes: dict[str, object]) -> Path:
    """The folder of a finished run."""
    assert main.main(command(config, logs, **changes)) == 0
    return folder_of(logs)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("nested"), "smoke.json", NESTED)


@pytest.fixture(scope="module")
def directions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("sdlora")
    return train(logs, "sdlora_c100_test.json", SDLORA | {"filepath": str(logs / "files")})


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a run but those of an analysis."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "analysis"]
    return {path: path.read_bytes() for path in files}


def analyse(folder: Path, *names: str) -> int:
    return evaluation.main(["--run", str(folder), "--analyse", *names, "--images-per-class", "4"])


def test_a_nested_run_is_analysed_and_stays_as_it_is(
    nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, folder = contents(nested), nested / "analysis"
    found = []
    for _ in range(2):  # the same again
        assert analyse(nested, *ALL) == 0
        files = [path for path in folder.iterdir() if path.suffix != ".png"]
        found.append({path.name: path.read_bytes() for path in files})
    assert found[0] == found[1] and contents(nested) == before
    stems = {"cka", "grassmann", "branches", "probes", "probe_transfer"}
    assert {path.stem for path in folder.glob("*.png")} == stems
    assert {path.stem for path in folder.glob("*.json")} == set(ALL)
    assert {path.stem for path in folder.glob("*.csv")} == {*ALL, "branches"}
    drift = json.loads((folder / "cka.json").read_text())
    assert [drift[key] for key in ("tasks", "blocks", "images", "classes")] == [2, 6, 16, 4]
    cka = np.array(drift["cka"])
    assert cka.shape == (6, 2, 2) and cka[:, 0, 0] == pytest.approx(1) and (cka[:, 0, 1] < 1 - 1e-9).all()
    rows = pd.read_csv(folder / "cka.csv")
    assert rows["with_before"][:6].isna().all() and list(rows["with_first"][6:]) == list(cka[:, 0, 1])
    branches = json.loads((folder / "grassmann.json").read_text())["branches"]
    assert [(row["task"], row["block"]) for row in branches] == [(t, b) for t in range(2) for b in range(6)]
    for row in branches:
        assert 1 <= row["fast_dimension"] <= 4 >= row["slow_dimension"] >= 1  # fewer with dead hidden units
        assert 0 < row["smallest"] <= row["between"] < 90
        assert (row["fast_moved"] is None) == (row["slow_moved"] is None) == (row["task"] == 0)
    assert all(row["fast_moved"] > 0 and row["slow_moved"] > 0 for row in branches[6:])
    assert len(pd.read_csv(folder / "probes.csv")) == 6 * 4
    shown = capsys.readouterr().out
    assert "linear CKA" in shown and "angle between fast and slow" in shown and "linear probes" in shown
    assert "block 5.0" in shown and f"wrote {folder / 'probes.csv'}" in shown


def test_the_numbers_are_those_of_the_networks_that_the_checkpoints_hold(nested: Path) -> None:
    """The network after each task, rebuilt and run here, against what was written."""
    assert analyse(nested, "cka") == 0
    tokens = []
    for checkpoint in task_checkpoints(nested):
        learner = load_learner(checkpoint)
        images, labels = next(iter(learner.data.batches(range(4), source="test", batch_size=16)))
        with torch.no_grad():
            x = learner.network.vit.blocks[:3](learner.network.embed(images))
        tokens.append(x[:, 0][labels.argsort(stable=True)])
    cka = json.loads((nested / "analysis" / "cka.json").read_text())["cka"]
    assert cka[2][0][1] == pytest.approx(float(cka_matrix(tokens)[0, 1]), abs=1e-6)


def test_a_run_of_another_method_has_no_branches(
    directions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures are also drawn in the form that its config names."""
    config = json.loads((directions / "config.json").read_text())
    (directions / "config.json").write_text(json.dumps(config | {"figure_format": "svg"}))
    before = contents(directions)
    assert analyse(directions, *ALL, "gate") == 0
    assert contents(directions) == before
    folder = directions / "analysis"
    for form in ("png", "svg"):
        stems = {path.stem for path in folder.glob(f"*.{form}")}
        assert stems == {"cka", "grassmann", "probes", "probe_transfer", "gate"}
    (pair,) = json.loads((folder / "gate.json").read_text())["pairs"]
    weights = json.loads((directions / "gate/beta_values_task_1.json").read_text())["beta_values"]
    assert pair["task"] == 1 and pair["adapter"] == 0 and pair["weight"] == pytest.approx(weights[0])
    numbers = json.loads((folder / "grassmann.json").read_text())
    assert numbers["branches"] == [] and np.array(numbers["principal"]["rms_degrees"])[:, 0, 1].min() > 0
    assert "This run has no nested adapters" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--run", "{run}"],
        ["--run", "{run}", "--recorded"],
        ["--run", "{run}", "--analyse", "cka"],
        ["--checkpoint", "{run}/checkpoints/task_00"],
    ],
)
def test_the_note_on_weights_stands_beside_a_runs_numbers(
    arguments: list[str], nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main([argument.format(run=nested) for argument in arguments]) == 0
    assert capsys.readouterr().out.lower().count("untrained network") == 1


def test_what_cannot_be_analysed_is_a_sentence(
    nested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown analysis, a run that lacks checkpoints as its config says or not, and an unfinished one."""
    copied = shutil.copytree(nested, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))
    config = json.loads((copied / "config.json").read_text())

    def refused(*names: str) -> str:
        assert analyse(copied, *names) == 2 and not (copied / "analysis").exists()
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert re.search("--analyse ckaa: .*allowed: cka, grassmann, probes\n", refused("cka", "ckaa"))
    shutil.rmtree(copied / "checkpoints" / "task_00")
    for kept in ("last", "all"):
        (copied / "config.json").write_text(json.dumps(config | {"checkpoints": kept}))
        message = refused("probes")
        assert "has no checkpoint of task_00" in message
        assert ("--set checkpoints=all" in message) == (kept == "last")
    (copied / "result.json").unlink()
    assert f"python main.py --resume {copied}" in refused("cka")


def test_a_checkpoint_inside_the_first_task_is_a_sentence(
    smoke_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that is solved at task ends knows no class there, and predictions are of finished tasks."""
    config = smoke_config(model_name="simplecil", max_tasks=1)
    train_run(config)
    learner = learner_of(config, seed=config.seed)
    learner.begin_task(0)
    part, tensors = learner.state()
    checkpoint = folder_of(tmp_path / "logs") / "checkpoints" / "task_00"
    inside = checkpoint.with_name("task_00_step_000001")
    _, state = load_checkpoint(checkpoint)
    save_checkpoint(inside, tensors, state | {"learner": part, "evaluations": []})
    for more in ([], ["--predict", str(tmp_path)]):
        assert evaluation.main(["--checkpoint", str(inside), *more]) == 2
        told = capsys.readouterr().err
        assert "inside" in told and "--resume" in told and len(told.splitlines()) == 1
