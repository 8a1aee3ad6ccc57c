"""utils.command_line: arguments of other tools are answered with the form that works."""

import os
from pathlib import Path

import pytest

import eval as evaluation
import main
from utils.command_line import given_path


def refused(capsys: pytest.CaptureFixture[str], command: object, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        command.main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--nested_lora_rank", "8"], "--set nested_lora_rank=8"),
        (["--nested_lora_rank=8", "--config", "exps/smoke.json"], "--set nested_lora_rank=8"),
        (["nested_lora_rank=8"], "--set nested_lora_rank=8"),
        (["--seed", "1", "2"], "--set 'seed=[1,2]'"),
        (["--optimizer", "adam"], "--set optimizer=adam"),
        (["--shuffle", "False"], "--set shuffle=false"),
        (["--lambda_sparsity", "-1"], "--set lambda_sparsity=-1"),
        (["--nested_lora_alpha", "0.1"], "--set nested_lora_consolidation_alpha=0.1"),
        (["--nested_lora_interval", "5"], "--set nested_lora_update_interval_slow=5"),
        (["--use_nested_lora", "True"], "--set ffn_adapter_type=nested_lora"),
        (["--use_nested_lora", "False"], "--set ffn_adapter_type=VALUE"),
        (["--nested_lora"], "--set ffn_adapter_type=nested_lora"),
        (["--nested_lora_use_consolidation"], "--set nested_lora_use_consolidation=true"),
        (["--nested_lora_rank"], "--set nested_lora_rank=VALUE"),
        (["--few_shot_step"], "--set few_shot_steps=VALUE"),
        (["exps/smoke.json", "exps/smoke.json"], "one file"),
        (["--confg", "exps/smoke.json"], "--config"),
        (["--eval", "True"], "eval.py --run FOLDER"),
        (["--predict", "photos"], "eval.py --run FOLDER"),
        (["--qqqq", "1"], "--set KEY=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_of_other_tools_are_answered_with_the_form_that_works(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, main, *arguments)
    assert answer in message.split("error: ")[1]


@pytest.mark.parametrize("arguments", [["--eval", "True"], ["--config", "x.json"], ["--resume", "."], ["x"]])
def test_eval_answers_with_its_own_form(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, evaluation, *arguments)
    assert f"python eval.py --run {'.' if '.' in arguments else 'FOLDER'}" in message


def test_paths_are_taken_as_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert given_path("~/logs") == tmp_path / "logs" and given_path("logs/x") == Path("logs/x")
    assert (
        given_path(".") == tmp_path and given_path("..") == tmp_path.parent and given_path("a/..") == tmp_path
    )


@pytest.mark.parametrize("arguments", [["--config", ""], ["--resume", ""], ["--sweep", "\0"], [""]])
def test_no_path_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "allowed: a path" in refused(capsys, main, *arguments)


def test_a_folder_that_no_file_can_name_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page, the manifest and exports of a run have its path in UTF-8."""
    path = os.path.join(tmp_path, os.fsdecode(b"caf\xe9"))
    for program, *arguments in ((main, "--extend", path), (evaluation, "--run", path), (main, path)):
        message = refused(capsys, program, *arguments)
        assert "not UTF-8" in message and r"caf\udce9" in message
