"""What figures look like once drawn: their texts, and whether they can be read."""

from unittest.mock import patch

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text


def drawn_texts(figure: Figure) -> list[tuple[str, np.ndarray]]:
    """Every text that reaches the picture, with its corners [x0, y0, x1, y1] in pixels."""
    found = {}
    real = Text.draw

    def draw(self, renderer, *args, **kwargs):
        real(self, renderer, *args, **kwargs)
        if self.get_visible() and self.get_text().strip():
            found[id(self)] = (self.get_text(), self.get_window_extent(renderer).extents)

    with patch.object(Text, "draw", draw):
        figure.canvas.draw()
    return list(found.values())


def assert_readable(figure: Figure) -> None:
    """No text overlaps another or leaves the picture; there are at least five."""
    texts, (width, height) = drawn_texts(figure), figure.bbox.size
    assert len(texts) >= 5
    for i, (text, (x0, y0, x1, y1)) in enumerate(texts):
        assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height, f"{text!r} leaves the picture"
        for other, (u0, v0, u1, v1) in texts[:i]:
            apart = x1 <= u0 + 1 or u1 <= x0 + 1 or y1 <= v0 + 1 or v1 <= y0 + 1
            assert apart, f"{text!r} runs into {other!r}"
