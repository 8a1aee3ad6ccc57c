"""`eval.py --run A B`: the mean over seeds of one experiment, and runs that are none; on invented folders."""

import json
from pathlib import Path
from typing import Any

import pytest

import eval as evaluation
import main
from models import SCHEMAS
from tests.conftest import shipped_file
from tests.utils.reports.test_report import NOTE, invented
from tests.utils.runs.test_manifest import CHANGES, record
from utils.config.loading import load_config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "--run FOLDER"),
        ("--predict photos", "--run FOLDER"),
        ("--compare a --latex --markdown", "--latex and --markdown"),
        ("--checkpoint x --analyse cka", "takes no --checkpoint"),
        ("--run x y --analyse cka", "one --run"),
        ("--run x --images-per-class 4", "takes no --images-per-class"),
        ("--run x --analyse cka --images-per-class 1", "at least 2"),
    ],
)
def test_options_that_do_not_go_together_are_answered_in_two_lines(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(arguments.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and words in error


def test_a_run_in_the_place_of_a_checkpoint_is_named_as_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path / "a", 1)
    for given in (folder, str(tmp_path / "nowhere" / "checkpoints" / "task_00")):
        assert evaluation.main(["--checkpoint", given]) == 2
        assert f"{given} is no checkpoint" in capsys.readouterr().err


def finished(
    folder: Path, seed: int, made_with: dict[str, Any] | None = None, file: str = "smoke", **changes: Any
) -> str:
    """The folder of a finished run of a shipped file with these changes."""
    config = load_config(shipped_file(file), [], SCHEMAS, [("test", {"seed": seed, **changes})]).config
    record(folder, **(made_with or {}))
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "result.json").write_text(json.dumps(invented(seed, 40)))
    return str(folder)


def refused(capsys: pytest.CaptureFixture[str], *folders: str) -> str:
    assert evaluation.main(["--run", *folders]) == 2
    shown = capsys.readouterr()
    assert "Mean" not in shown.out and len(shown.err.splitlines()) == 1
    return shown.err


def test_keys_that_change_no_number_may_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = finished(tmp_path / "a", 1), {"prefix": "other", "description": "other", "cache_root": "x"}
    other |= {"eval_batch_size": 3, "cache_gb": 1.0, "num_workers": 0, "checkpoints": "last"}
    second = finished(tmp_path / "b", 2, logs_root="elsewhere", data_root="y", **other)
    assert evaluation.main(["--run", first, second]) == 0
    shown = capsys.readouterr().out
    assert "over seeds 1, 2" in shown and "note" not in shown


def test_the_note_on_weights_stands_beside_a_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [finished(tmp_path / str(seed), seed) for seed in (1, 2)]
    assert evaluation.main(["--run", *folders]) == 0
    assert capsys.readouterr().out.lower().count(NOTE.lower()) == 1


def test_an_option_that_is_given_twice_has_all_of_its_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (finished(tmp_path / str(seed), seed) for seed in (1, 2))
    assert evaluation.main(["--run", first, "--run", second]) == 0
    assert "over seeds 1, 2" in capsys.readouterr().out
    assert evaluation.parse(["--run", first, "--analyse", "cka", "--analyse", "gate"]).analyse == [
        "cka",
        "gate",
    ]
    extended = main.parse(["--extend", first, "--data", "a", "b", "--data", "c"])
    assert extended.data == ["a", "b", "c"]
    assert main.parse(["--sweep", "exps/sweeps/smoke.json", "--seeds", "1", "--seeds", "2"]).seeds == [1, 2]


@pytest.mark.parametrize(
    "changes", [{"batch_size": 2}, {"cache_views": 1}, {"rd_dim": 3, "precision": "bf16"}]
)
def test_other_keys_are_named(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = finished(tmp_path / "a", 1), finished(tmp_path / "b", 2), finished(tmp_path / "c", 3, **changes)
    message = refused(capsys, *folders)
    for key, value in changes.items():
        assert key in message and json.dumps(value) in message
    assert folders[0] in message and folders[2] in message and "prefix" not in message


def test_another_method_is_another_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = finished(tmp_path / "b", 2, file="shared_subspace_small")
    message = refused(capsys, finished(tmp_path / "a", 1), second)
    assert 'model_name ("sema" and "shared_subspace")' in message


def test_a_seed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = finished(tmp_path / "a", 1), finished(tmp_path / "a_2", 1)
    for twice in (second, first):
        message = refused(capsys, first, finished(tmp_path / "b", 2), twice)
        assert "seed 1" in message and twice in message


@pytest.mark.parametrize(("kind", "changed"), CHANGES)
def test_other_data_and_weights_are_refused_and_other_code_is_told(
    kind: str, changed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = finished(tmp_path / "a", 1), finished(tmp_path / "b", 2, changed)
    if kind in ("data", "weights"):
        assert kind in refused(capsys, *folders)
    else:
        assert evaluation.main(["--run", *folders]) == 0
        shown = capsys.readouterr().out
        assert f"The {kind} changed" in shown and "over seeds 1, 2" in shown


def test_a_damaged_result_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = finished(tmp_path / "a", 1), finished(tmp_path / "b", 2)
    changes = (
        {"metrics": 3},
        {"metrics": {"final": None}},
        {"curve": None},
        {"curve": [1, None]},
        {"cost": None},
    )
    for content in ("[]", "{}", "{", *(json.dumps(invented(2, 40) | change) for change in changes)):
        (tmp_path / "b/result.json").write_text(content)
        assert str(tmp_path / "b") in refused(capsys, *folders)
