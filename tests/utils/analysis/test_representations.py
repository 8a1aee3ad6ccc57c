"""utils.analysis.representations: known drift and angles, and `eval.py --analyse` on tiny runs."""

import csv
import hashlib
import json
import math
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor

import eval as evaluation
import main
from models.inspection import analysis_inputs
from models.saved_run import load_learner, task_checkpoints
from tests.conftest import ROOT, TINY, TINY_SDLORA
from tests.drawn import assert_readable
from utils.analysis.representations import (
    ANALYSES,
    AnalysisInputs,
    branch_rows,
    chance_angle,
    chosen_images,
    halves,
)
from utils.analysis.results import value_table
from utils.analysis.similarity import linear_cka
from utils.errors import UserError
from utils.plotting import STYLE
from utils.training.random import rng

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
SDLORA = {
    **TINY_SDLORA,
    "max_train_per_class": 8,
    "max_test_per_class": 4,
    "max_tasks": 2,
    "lambda_sparsity": 0.01,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng("test", seed))


def train(logs: Path, config: str, changes: dict[str, object]) -> Path:
    """The folder of a finished run."""
    places = {"logs_root": str(logs), "cache_root": str(logs / "cache")}
    settings = [f"{key}={json.dumps(value)}" for key, value in {**changes, **places}.items()]
    command = [
        "--config",
        str(ROOT / "exps" / config),
        *(part for text in settings for part in ("--set", text)),
    ]
    assert main.main(command) == 0
    (folder,) = (path.parent for path in logs.rglob("config.json"))
    return folder


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("nested"), "smoke.json", NESTED)


@pytest.fixture(scope="module")
def directions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("sdlora")
    return train(logs, "sdlora_c100_test.json", SDLORA | {"filepath": str(logs / "files")})


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a run but those of an analysis."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "analysis"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def analyse(folder: Path, *names: str) -> int:
    return evaluation.main(["--run", str(folder), "--analyse", *names, "--images-per-class", "4"])


def gather(folder: Path) -> AnalysisInputs:
    return analysis_inputs(folder, 4)


def table(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


# --- from the command line ----------------------------------------------------------------------------------


def test_a_nested_run_is_analysed_and_stays_as_it_is(
    nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(nested)
    assert analyse(nested, *ALL) == 0
    assert contents(nested) == before
    folder = nested / "analysis"
    stems = {"cka", "grassmann", "branches", "probes", "probe_transfer"}
    assert {path.stem for path in folder.glob("*.png")} == stems
    assert {path.name for path in folder.iterdir() if path.suffix != ".png"} == {
        "cka.json", "grassmann.json", "probes.json", "cka.csv", "grassmann.csv", "branches.csv", "probes.csv",
    }  # fmt: skip
    drift = json.loads((folder / "cka.json").read_text())
    assert [drift[key] for key in ("tasks", "blocks", "images", "classes")] == [2, 6, 16, 4]
    cka = np.array(drift["cka"])
    assert cka.shape == (6, 2, 2) and cka[:, 0, 0] == pytest.approx(1) and (cka[:, 0, 1] < 1 - 1e-9).all()
    rows = table(folder / "cka.csv")
    assert [row["with_before"] for row in rows[:6]] == [""] * 6
    assert [float(row["with_first"]) for row in rows[6:]] == list(cka[:, 0, 1])
    branches = json.loads((folder / "grassmann.json").read_text())["branches"]
    assert [(row["task"], row["block"]) for row in branches] == [(t, b) for t in range(2) for b in range(6)]
    for row in branches:
        assert (
            1 <= row["fast_dimension"] <= 4 >= row["slow_dimension"] >= 1
        )  # fewer where hidden units are dead
        assert 0 < row["smallest"] <= row["between"] < 90
        assert (row["fast_moved"] is None) == (row["slow_moved"] is None) == (row["task"] == 0)
    assert all(row["fast_moved"] > 0 and row["slow_moved"] > 0 for row in branches[6:])
    assert len(table(folder / "probes.csv")) == 6 * 4
    shown = capsys.readouterr().out
    assert "linear CKA" in shown and "angle between fast and slow" in shown and "linear probes" in shown
    assert "block 5.0" in shown and f"wrote {folder / 'probes.csv'}" in shown


def test_the_analysis_is_the_same_again_and_replaces_the_one_before(nested: Path) -> None:
    found = []
    for _ in range(2):
        assert analyse(nested, "cka", "cka") == 0
        found.append((nested / "analysis" / "cka.json").read_bytes())
    gathered = [gather(nested) for _ in range(2)]
    assert found[0] == found[1] and torch.equal(gathered[0].tokens, gathered[1].tokens)
    for name in ("grassmann", "probes"):
        first, second = (ANALYSES[name](inputs) for inputs in gathered)
        assert (first.numbers, first.tables, first.text) == (second.numbers, second.tables, second.text)


def test_the_numbers_are_those_of_the_networks_that_the_checkpoints_hold(nested: Path) -> None:
    """The network after each task, rebuilt and run here, against what was gathered and written."""
    assert analyse(nested, "cka") == 0
    tokens = []
    for checkpoint in task_checkpoints(nested):
        learner = load_learner(checkpoint)
        images, labels = next(iter(learner.data.batches(range(4), source="test", mode="test", batch_size=16)))
        with torch.no_grad():
            tokens.append(learner.network(images, 0, 3)[:, 0][labels.argsort(stable=True)])
    inputs = gather(nested)
    assert torch.equal(inputs.labels, torch.arange(4).repeat_interleave(4))
    torch.testing.assert_close(inputs.tokens[:, 2], torch.stack(tokens))
    cka = json.loads((nested / "analysis" / "cka.json").read_text())["cka"]
    assert cka[2][0][1] == pytest.approx(linear_cka(*tokens), abs=1e-6)


def test_a_run_of_another_method_has_no_branches(
    directions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(directions)
    assert analyse(directions, *ALL) == 0
    assert contents(directions) == before
    folder = directions / "analysis"
    assert {path.stem for path in folder.glob("*.png")} == {"cka", "grassmann", "probes", "probe_transfer"}
    numbers = json.loads((folder / "grassmann.json").read_text())
    assert numbers["branches"] == [] and np.array(numbers["principal"]["rms_degrees"])[:, 0, 1].min() > 0
    assert "This run has no nested adapters" in capsys.readouterr().out


@pytest.fixture
def copied(nested: Path, tmp_path: Path) -> Path:
    """A copy of the nested run that was not analysed yet."""
    return shutil.copytree(nested, tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))


@pytest.mark.parametrize("kept", ["last", "all"])
def test_a_run_without_its_checkpoints(kept: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"checkpoints": kept}))
    shutil.rmtree(copied / "checkpoints" / "task_00")
    assert analyse(copied, "probes") == 2
    message = capsys.readouterr().err
    assert "has no checkpoint of task_00 (" in message and "--set checkpoints=all" in message
    assert ('checkpoints = "last"' in message) == (kept == "last")
    assert message.count("\n") == 1 and not (copied / "analysis").exists()


def test_an_unfinished_run_is_not_analysed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "result.json").unlink()
    assert analyse(copied, "cka") == 2
    assert f"python main.py --resume {copied}" in capsys.readouterr().err
    assert not (copied / "analysis").exists()


def test_an_unknown_analysis_is_a_sentence(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyse(copied, "cka", "ckaa") == 2
    message = capsys.readouterr().err
    assert "--analyse ckaa:" in message and "allowed: cka, grassmann, probes\n" in message
    assert not (copied / "analysis").exists()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--checkpoint", "x", "--analyse", "cka"], "one --run"),
        (["--run", "x", "--analyse", "cka", "--recorded"], "one --run"),
        (["--run", "x", "y", "--analyse", "cka"], "one --run"),
        (["--run", "x", "--images-per-class", "4"], "goes with --analyse"),
        (["--run", "x", "--analyse", "cka", "--images-per-class", "1"], "at least 2"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        evaluation.main(arguments)
    assert exit_info.value.code == 2 and expected in capsys.readouterr().err


# --- what learners give -------------------------------------------------------------------------------------


def test_class_tokens_are_what_enters_the_next_block_and_become_the_features(make_sema) -> None:
    learner = make_sema(max_tasks=1)
    learner.begin_task(0)
    images = torch.rand(3, 3, 32, 32, generator=rng("test", 0))
    tokens, network = learner.class_tokens(images), learner.network
    assert tokens.shape == (6, 3, network.vit.embed_dim) and not tokens.requires_grad
    with torch.no_grad():
        for block in range(5):
            torch.testing.assert_close(tokens[block], network(images, 0, block + 1)[:, 0])
        torch.testing.assert_close(network.vit.norm(tokens[5]), learner.features(images))


def test_class_tokens_of_merged_directions_become_the_features(make_sdlora) -> None:
    learner = make_sdlora()
    learner.begin_task(0)
    torch.nn.init.normal_(learner.network.projections[2].new.up)
    images = torch.rand(3, 3, 32, 32, generator=rng("test", 0))
    tokens = learner.class_tokens(images)
    with torch.no_grad():
        torch.testing.assert_close(learner.network.vit.norm(tokens[5]), learner.features(images))
    assert learner.branch_spaces() == {}


def test_branch_spaces_are_those_of_the_trained_products(make_sema) -> None:
    learner = make_sema(max_tasks=1, nested_lora_rank=3)
    silent = learner.branch_spaces()
    assert set(silent) == {(block, 0) for block in range(6)} and silent[2, 0]["fast"].shape[1] == 0
    functional = learner.network.modules_by_block[2].adapters[0].functional
    torch.nn.init.normal_(functional.slow.up_proj.weight)
    spaces = learner.branch_spaces()[2, 0]
    product = (functional.slow.up_proj.weight @ functional.slow.down_proj.weight).detach().double()
    basis = spaces["slow"]
    assert basis.shape[1] == 3 and spaces["fast"].shape[1] == 0
    torch.testing.assert_close(basis @ (basis.T @ product), product)


# --- the analyses -------------------------------------------------------------------------------------------


def basis(*columns: int, width: int = 12) -> Tensor:
    """Some axes of a space."""
    return torch.eye(width, dtype=torch.float64)[:, list(columns)]


def known(tasks: int = 3, blocks: int = 2, n: int = 40) -> AnalysisInputs:
    """Block 0 never moves; block 1 is rotated by task 1 and replaced by task 2. Four clear classes."""
    labels = torch.arange(n) % 4
    start = normal(n, 12) + 8 * torch.eye(12)[labels]
    turned = start @ torch.linalg.qr(normal(12, 12, seed=1))[0]
    moves = [start, turned, normal(n, 12, seed=2)]
    tokens = torch.stack([torch.stack([start, *[moves[t % 3]] * (blocks - 1)]) for t in range(tasks)])
    turns = [(basis(0, 1), basis(2, 3)), (basis(0, 1), basis(0, 3)), (basis(), basis(0, 3))]
    spaces = [{(1, 0): dict(zip(("fast", "slow"), turns[t % 3], strict=True))} for t in range(tasks)]
    return AnalysisInputs(tokens, labels, spaces, 1993, "run · seed 1993")


def test_cka_sees_a_replaced_block_and_no_rotation() -> None:
    values = np.array(ANALYSES["cka"](known()).numbers["cka"])
    assert values[0] == pytest.approx(np.ones((3, 3)))
    assert values[1, 0, 1] == pytest.approx(1, abs=1e-6) and abs(values[1, 0, 2]) < 0.3


def test_subspaces_see_the_rotation_too() -> None:
    found = ANALYSES["grassmann"](known())
    values = np.array(found.numbers["principal"]["rms_degrees"])
    assert values[0] == pytest.approx(np.zeros((3, 3)), abs=1e-6)
    assert values[1, 0, 1] > 10 and values[1, 1, 0] == values[1, 0, 1]
    first = found.tables["grassmann"][3]
    assert first == {"task": 1, "block": 1, "with_first": values[1, 0, 1], "with_before": values[1, 0, 1]}


def test_angles_of_known_branches() -> None:
    rows = branch_rows(known())
    assert [row["between"] for row in rows] == [pytest.approx(90), pytest.approx(90 / math.sqrt(2)), None]
    assert [row["smallest"] for row in rows] == [pytest.approx(90), pytest.approx(0, abs=1e-6), None]
    assert rows[0]["distance"] == pytest.approx(math.pi / math.sqrt(2))
    assert [row["fast_moved"] for row in rows] == [None, pytest.approx(0, abs=1e-6), None]
    assert [row["slow_moved"] for row in rows] == [
        None, pytest.approx(90 / math.sqrt(2)), pytest.approx(0, abs=1e-6),
    ]  # fmt: skip
    assert [row["chance"] is None for row in rows] == [False, False, True]


def test_a_branch_that_output_is_always_zero_is_a_sentence() -> None:
    whole = known()
    spaces = [{(1, 0): {"fast": basis(), "slow": basis(2)}}] * 3
    found = ANALYSES["grassmann"](AnalysisInputs(whole.tokens, whole.labels, spaces, 1, "run"))
    assert "zero whenever a task ends" in found.text
    assert found.numbers["branches"][0]["between"] is None


def test_random_subspaces_are_nearly_orthogonal_in_wide_spaces() -> None:
    assert chance_angle(400, 1, 1, rng("test", 0)) > 85
    assert 25 < chance_angle(2, 1, 1, rng("test", 0)) < 65
    assert chance_angle(5, 5, 2, rng("test", 0)) == pytest.approx(0, abs=1e-6)


def test_probes_read_what_is_there_and_lose_it_when_the_network_moves() -> None:
    found = ANALYSES["probes"](known(n=200))
    values = np.array(found.numbers["accuracy"])
    assert (values[0] > 95).all() and values[1, 0, 0] > 95 and values[1, 1, 1] > 95
    assert values[1, 0, 1] < 80 and values[1, 2, 2] < 50 and found.numbers["chance"] == 25
    assert found.tables["probes"][-1]["accuracy"] == values[1, 2, 2]
    assert found.numbers["fitted_on"] == found.numbers["tested_on"] == 100


def test_halves_share_no_image_and_hold_every_class() -> None:
    labels = torch.tensor([0] * 5 + [1] * 4 + [2])
    fit, test = halves(labels, rng("test", 0))
    assert sorted([*fit.tolist(), *test.tolist()]) == list(range(10))
    assert labels[fit].bincount().tolist() == [3, 2, 1] and labels[test].bincount().tolist() == [2, 2]


def test_a_smaller_choice_of_images_is_part_of_a_larger_one(make_sema) -> None:
    data = make_sema(max_tasks=2, max_test_per_class=None).data
    few, many = (chosen_images(data, 1, n) for n in (3, 6))
    assert len(few) == 12 and len(many) == 24 and set(few) <= set(many)
    assert torch.equal(data.targets(few, "test"), torch.arange(4).repeat_interleave(3))
    assert not np.array_equal(few, chosen_images(data, 2, 3))
    with pytest.raises(UserError, match="larger max_test_per_class"):
        chosen_images(make_sema(max_tasks=2, max_test_per_class=1).data, 1, 6)


def test_tables_fold_where_they_would_be_too_wide() -> None:
    values = np.array([[0.5] * 20, [math.nan] * 19 + [0.25]])
    lines = value_table(
        "title", ["block 0", "block 10"], [f"task {t}" for t in range(20)], values, 2
    ).splitlines()
    assert max(map(len, lines)) <= 100 and lines[-1].split() == ["block", "10", "0.25"]
    assert [line.count("task") for line in lines if "task" in line] == [11, 9]


def test_no_text_of_a_figure_overlaps_another_or_leaves_the_picture() -> None:
    """One task: the narrowest figures."""
    whole = known(tasks=1)
    with mpl.rc_context(STYLE):
        for name in ALL:
            for draw in ANALYSES[name](whole).figures.values():
                assert_readable(draw())
