"""utils.console: any encoding, closed pipes, full disks, progress bars on terminals only."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
from tests.conftest import ROOT, TINY, command
from utils.cache import __main__ as cache
from utils.console import attach_console, logger, prepare_console, progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No console is attached to the program's messages yet."""
    monkeypatch.setattr(logger, "handlers", [])


def without_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output becomes a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w", encoding="utf-8"))  # noqa: SIM115


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


def test_what_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch, no_handlers: None) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    prepare_console()
    attach_console()
    logger.info("mean ± std of class 猫")
    print("→")
    assert ascii_only.buffer.getvalue().endswith(b"mean \\xb1 std of class \\u732b\n\\u2192\n")


@pytest.mark.parametrize(
    ("stream", "no_colour", "coloured"),
    [(Terminal, "", True), (Terminal, "1", False), (io.StringIO, "", False)],
    ids=["terminal", "NO_COLOR", "pipe"],
)
def test_warnings_look_like_warnings(
    stream: type[io.StringIO],
    no_colour: str,
    coloured: bool,
    monkeypatch: pytest.MonkeyPatch,
    no_handlers: None,
) -> None:
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setenv("TERM", "xterm")
    attach_console()
    logger.info("the story")
    logger.warning("look  here")
    story, warning = sys.stdout.getvalue().splitlines()
    assert story.endswith("  the story") and "\x1b" not in story
    assert "  WARNING: look  here" in warning and ("\x1b[" in warning) == coloured


def test_a_command_that_nobody_reads_ends_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_reader(monkeypatch)
    assert cache.main(["--root", str(tmp_path)]) == 141
    print("nor does what comes later fail", flush=True)
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)  # as Python has it under `>&- 2>&-`
    assert cache.main(["--root", str(tmp_path)]) == 0


def test_a_run_goes_on_without_a_reader_and_other_commands_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_handlers: None
) -> None:
    without_reader(monkeypatch)
    prepare_console()
    attach_console(goes_on=False)
    with pytest.raises(BrokenPipeError):
        logger.info("to nobody")
    logger.handlers.clear()
    attach_console()
    logger.info("into the text log alone")
    logger.info("more")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no disk that is always full")
def test_output_to_a_full_disk_hides_neither_run_nor_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, no_handlers: None
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        prepare_console()
        assert evaluation.main(["--run", str(tmp_path)]) == 2
    logger.handlers.clear()
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        prepare_console()
        attach_console()
        logger.info("into the text log alone")
        logger.info("more")
    told = capsys.readouterr().err
    assert told.count("No space left") == 1 and "Traceback" not in told


def test_a_piped_run_writes_clean_lines_and_outlives_its_reader(tmp_path: Path) -> None:
    """As in `main.py 2>&1 | head -1` on a console that knows ASCII alone."""
    words = [sys.executable, str(ROOT / "main.py"), *command("smoke.json", tmp_path, **TINY, max_tasks=1)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    environment.pop("TQDM_DISABLE", None)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, **streams, env=environment) as process:
        first = process.stdout.readline()
        rest = process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert first.endswith(b"\n") and b"\r" not in first + rest and b"Traceback" not in first + rest
    (result,) = tmp_path.rglob("result.json")
    log = result.parent.with_name(result.parent.name + ".log").read_text(encoding="utf-8")
    assert "everything is in" in log and "\r" not in log
