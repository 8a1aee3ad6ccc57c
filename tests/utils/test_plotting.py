"""utils.plotting: what a figure is saved as."""

import logging
import warnings

import pytest

from utils.plotting import picture, titled_figure


def test_characters_without_a_glyph_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """In one line of the log, not in a warning for each at every figure."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="nested_lora"):
        warnings.simplefilter("error")
        for form in ("png", "svg", "pdf"):
            picture(titled_figure(4, 3, "\U0001f9ff入れ子", "plain"), form)
    (record,) = caplog.records
    assert "font.family" in record.getMessage()
