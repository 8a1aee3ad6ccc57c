"""Words of logs: counts, spans of numbers, shortened lists, durations."""

from pathlib import Path

import pytest

from utils.wording import as_typed, columns, duration, shortened, some, spans


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([], ""), ([4], "4"), (range(10), "0-9"), ([0, 1, 3, 5, 6, 7], "0-1, 3, 5-7")],
)
def test_spans_are_inclusive(numbers: list[int], words: str) -> None:
    assert spans(numbers) == words


def test_long_lists_are_shortened_to_whole_names() -> None:
    names = [f"class_{number}" for number in range(20)]
    assert shortened(names[:3]) == "class_0, class_1, class_2"
    assert shortened(names, width=20) == "class_0, class_1 and 18 more"
    assert shortened(["a" * 60, "b"]) == "a" * 60 + " and 1 more" and shortened([]) == ""
    assert some(["a", "b"], "; ") == "a; b" and some(list("abcdef")) == "a, b, c, d and 2 more"


def test_durations_have_one_unit() -> None:
    assert [duration(seconds) for seconds in (0.31, 42.4, 600, 9000)] == ["0.3 s", "42 s", "10 min", "2.5 h"]


def test_columns_on_a_terminal() -> None:
    """East Asian characters take two, an accent of its own none."""
    assert [columns(text) for text in ("", "rank", "入れ子 4", "e\u0301")] == [0, 4, 8, 1]


@pytest.mark.parametrize(
    ("called", "script"),
    [
        ("main.py", "main.py"),
        ("../project/main.py", "../project/main.py"),
        ("../project/eval.py", "../project/main.py"),
        ("../here/main.py", "main.py"),
        ("gone/main.py", "main.py"),
        ("/bin/pytest", "main.py"),
    ],
)
def test_commands_can_be_given_where_the_program_was_called(
    called: str, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "project"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.argv", [called])
    assert as_typed("main.py", "--resume", "a b") == f"python {script} --resume 'a b'"
