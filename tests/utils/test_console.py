"""Tests of `utils.console` and `utils.command_line`: any encoding, closed pipes, bars on terminals, old arguments."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import main
from tests.conftest import ROOT, TINY
from utils.cache import __main__ as cache
from utils.command_line import given_path
from utils.console import attach_console, logger, prepare_console, progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def without_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output becomes a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the test


# ---------------------------------------------------------------------------------------------------------------------
# Output


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    shown = {}
    for name, stream in (("pipe", io.StringIO()), ("terminal", Terminal())):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress(range(3), desc="scan")) == [0, 1, 2]
        shown[name] = stream.getvalue()
    assert shown["pipe"] == "" and "scan" in shown["terminal"]
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress(range(3)))
    assert sys.stderr.getvalue() == ""


def test_every_bar_is_made_in_one_place() -> None:
    sources = [path for path in ROOT.rglob("*.py") if "tests" not in path.parts]
    makers = {path.name for path in sources if "import tqdm" in path.read_text(encoding="utf-8")}
    assert makers == {"console.py"}


def test_what_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(logger, "handlers", [])
    prepare_console()
    attach_console()
    logger.info("mean ± std of class 猫")
    print("→")
    assert ascii_only.buffer.getvalue().endswith(b"mean \\xb1 std of class \\u732b\n\\u2192\n")


def test_a_command_that_nobody_reads_ends_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_reader(monkeypatch)
    assert cache.main(["--root", str(tmp_path)]) == 141
    print("nor does what comes later fail", flush=True)


def test_a_run_goes_on_without_a_reader_and_other_commands_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_reader(monkeypatch)
    prepare_console()
    monkeypatch.setattr(logger, "handlers", [])
    attach_console(goes_on=False)
    with pytest.raises(BrokenPipeError):
        logger.info("to nobody")
    monkeypatch.setattr(logger, "handlers", [])
    attach_console()
    logger.info("into the text log alone")
    logger.info("more")
    assert capsys.readouterr().err == ""


def test_closed_streams_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)  # as Python has it under `>&- 2>&-`
    assert cache.main(["--root", str(tmp_path)]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_output_to_a_full_disk_hides_neither_run_nor_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        prepare_console()
        assert evaluation.main(["--run", str(tmp_path)]) == 2
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(logger, "handlers", [])
        prepare_console()
        attach_console()
        logger.info("into the text log alone")
        logger.info("more")
    told = capsys.readouterr().err
    assert told.count("No space left") == 1 and "Traceback" not in told


def test_a_piped_run_writes_clean_lines_and_outlives_its_reader(tmp_path: Path) -> None:
    """As in `main.py 2>&1 | head -1` on a console that knows ASCII alone."""
    changes = {**TINY, "max_tasks": 1, "logs_root": str(tmp_path), "cache_root": str(tmp_path / "cache")}
    settings = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, str(ROOT / "main.py"), "--config", str(ROOT / "exps/smoke.json"), *settings]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    environment.pop("TQDM_DISABLE", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        first = process.stdout.readline()
        rest = process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert first.endswith(b"\n") and b"\r" not in first + rest and b"Traceback" not in first + rest
    (result,) = tmp_path.rglob("result.json")
    log = result.parent.with_name(result.parent.name + ".log").read_text(encoding="utf-8")
    assert "everything is in" in log and "\r" not in log


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


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
        (["exps/smoke.json"], "--config exps/smoke.json"),
        (["--confg", "exps/smoke.json"], "--config"),
        (["--eval", "True"], "eval.py --run FOLDER"),
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


def test_eval_needs_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--run FOLDER" in refused(capsys, evaluation)


def test_the_argument_that_is_named_does_what_was_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every key with a value in a config file, written as an option, is answered with a setting of that value."""
    values = json.loads((ROOT / "exps/smoke.json").read_text(encoding="utf-8"))
    del values["description"]
    arguments = [part for key, value in values.items() for part in (f"--{key}", json.dumps(value))]
    lines = refused(capsys, main, *arguments).split("error: ")[1].splitlines()
    assert len(lines) == len(values)
    for line, (key, value) in zip(lines, values.items(), strict=True):
        setting = line.split("--set ")[-1].strip("'")
        assert setting in (f"{key}={json.dumps(value)}", f"{key}={value}")


def test_paths_are_taken_as_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert given_path("~/logs") == tmp_path / "logs" and given_path("logs/x") == Path("logs/x")
    assert (
        given_path(".") == tmp_path and given_path("..") == tmp_path.parent and given_path("a/..") == tmp_path
    )


@pytest.mark.parametrize("arguments", [["--config", ""], ["--resume", ""], ["--sweep", "\0"]])
def test_no_path_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "allowed: a path" in refused(capsys, main, *arguments)
