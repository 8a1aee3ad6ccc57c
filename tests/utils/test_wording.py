"""Words of logs: counts, spans of numbers, shortened lists, durations."""

import pytest

from utils.wording import columns, duration, shortened, some, spans


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
