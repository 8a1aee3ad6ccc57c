"""SD-LoRA from the command line: the record of a run, seeds, kills and resumes, two processes, bad input."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation
import main
from tests.conftest import TINY_SDLORA
from tests.conftest import command as base_command
from tests.crash import outcome, run, run_together
from utils.runs.run_log import read_metrics

CHANGES: dict[str, Any] = {
    **TINY_SDLORA,
    "max_train_per_class": 8,
    "max_test_per_class": 4,
    "max_tasks": 3,
    "lambda_sparsity": 0.05,
    "gumbel_anneal_rate": 0.9,
    "gumbel_gate": "layer",
    "growth": "top_k",
    "growth_top_k": 2,
    "optimizer": "adam",
    "init_lr": 0.01,
    "lrate": 0.01,
    "scheduler": "steplr",
    "milestones": [1],
    "lora_rank_schedule": [[1, 3]],
}


def command(logs: Path, **changes: Any) -> list[str]:
    return base_command(
        "sdlora_c100_test.json", logs, **CHANGES | {"filepath": str(logs / "files")} | changes
    )


def folders(logs: Path) -> list[Path]:
    return sorted(path.parent for path in logs.rglob("config.json"))


def gate_files(folder: Path) -> dict[str, str]:
    """Content of every file of a gate, that of binary ones as text."""
    texts = {path.name: path.read_text() for path in folder.glob("*.json")}
    return texts | {path.name: str(torch.load(path, weights_only=True)) for path in folder.glob("*.pt")}


def whole(logs: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Everything that must not depend on interruptions."""
    (folder,) = folders(logs)
    return outcome(folder), gate_files(folder / "gate"), gate_files(logs / "files")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run: where it is, and the moments it went through."""
    logs = tmp_path_factory.mktemp("reference")
    code, moments = run(command(logs, figure_format="png"))
    assert code == 0
    return logs, moments


def test_what_a_run_leaves_behind(
    reference: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = folders(reference[0])
    assert folder.parts[-5:] == ("sdlora", "synthetic", "0", "2", "test_1993_test_vit")
    figures = {path.name for path in (folder / "figures").iterdir()}
    beta = {"beta_evolution.png", "beta_heatmap.png", "beta_layers.png"}
    assert figures == {"accuracy_matrix.png", "accuracy_curves.png", "confusion.png", "growth.png"} | beta
    assert len(list((folder / "gate").iterdir())) == len(list((reference[0] / "files").iterdir())) == 6
    log = folder.with_name(folder.name + ".log").read_text()
    assert "[Conditional Growth] Active adapters: 2/3 (66.7%)" in log
    result = json.loads((folder / "result.json").read_text())
    assert result["adapters"] == {str(block): 2 for block in range(6)} and result["parameters"]["gate"] == 12
    assert evaluation.main(["--run", str(folder)]) == 0  # rebuilt from the last checkpoint, the same accuracy
    shown = capsys.readouterr().out
    for task, accuracy in enumerate(result["accuracy"][-1]):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"task {task:>3}  classes"))
        assert f"{accuracy:6.2f}" in line


def test_killed_while_a_checkpoint_is_renamed_and_resumed_is_uninterrupted(
    reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """After the second task, whose files of the gate are there already."""
    logs, moments = reference
    second = moments.index("rename", moments.index("rename") + 1)
    assert run(command(tmp_path), die_at=second)[0] == -signal.SIGKILL
    (folder,) = folders(tmp_path)
    assert run(["--resume", str(folder)])[0] == 0
    assert whole(tmp_path) == whole(logs)


def test_ctrl_c_inside_an_epoch_keeps_its_sums_and_its_temperature(
    reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    logs, moments = reference
    step = moments.index("step", moments.index("rename"))  # the first of the second task
    code, _ = run(command(tmp_path), die_at=step, how=signal.SIGINT)
    (folder,) = folders(tmp_path)
    (stopped,) = (folder / "checkpoints").glob("task_01_step_*")
    state = json.loads((stopped / "state.json").read_text())["state"]["learner"]["progress"]["state"]
    assert code == 130 and 0.5 < state["tau"] < 5.0 and state["sparsity"] > 0
    assert run(["--resume", str(folder)])[0] == 0
    assert whole(tmp_path) == whole(logs)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Shares of unlike size, the same noise on both, the same growth; one record, one set of files."""
    changes = {"batch_size": 7, "growth": "threshold", "optimizer": "sgd", "lrate": 0.05, "init_lr": 0.05}
    assert run(command(tmp_path / "one", **changes))[0] == 0
    assert run_together(command(tmp_path / "two", **changes), 2) == [0, 0]
    ours, theirs = folders(tmp_path / "two") + folders(tmp_path / "one")
    for name in ("gate", "epoch", "magnitudes"):
        pairs = [[e for e in read_metrics(folder) if e["event"] == name] for folder in (ours, theirs)]
        for mine, others in zip(*pairs, strict=True):
            assert mine.keys() == others.keys()
            for key in mine.keys() & {"beta_values", "loss", "sparse", "magnitudes", "tau"}:
                assert mine[key] == pytest.approx(others[key], rel=1e-3, abs=1e-4)
            assert mine.get("pruning_mask") == others.get("pruning_mask")
    results = [json.loads((folder / "result.json").read_text()) for folder in (ours, theirs)]
    assert results[0]["parameters"] == results[1]["parameters"]
    assert len(list((tmp_path / "two").rglob("*.log"))) == 1 and len(list((ours / "gate").iterdir())) == 6


def test_seeds_have_a_folder_and_files_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"seed": [1, 2], "max_tasks": 2, "init_epoch": 1, "epochs": 1, "gumbel_gate": "global"}
    assert main.main(command(tmp_path, **changes)) == 0
    first, second = folders(tmp_path)
    assert (first.name, second.name) == ("test_1_test_vit", "test_2_test_vit")
    own = [gate_files(folder / "gate") for folder in (first, second)]
    assert own[0] != own[1] == gate_files(tmp_path / "files")
    assert "filepath = " in first.with_name(first.name + ".log").read_text()
    assert "Mean ± std (n) over seeds 1, 2" in capsys.readouterr().out
