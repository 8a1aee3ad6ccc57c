"""Pages filled from the templates of this folder, which need no other file and no network.

    render("run.html", {"title": "...", "pictures": [Picture.of("norms.png", content, "caption")], ...})

Text is escaped for HTML, or in Markdown by the filters `markdown` and `markdown_table`.
"""

import base64
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from utils.plotting import DPI
from utils.reports.renderings import markdown_table, markdown_text

CSS_DPI = 96  # pixels an inch on a page


class Picture(NamedTuple):
    """A figure on a page; width and height in CSS pixels."""

    name: str
    caption: str
    base64: str
    width: int
    height: int

    @classmethod
    def of(cls, name: str, png: bytes, caption: str) -> "Picture":
        """The picture of a PNG file's content."""
        sides = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))  # of its header
        size = (round(side * CSS_DPI / DPI) for side in sides)
        return cls(name, caption, base64.b64encode(png).decode(), *size)


def render(template: str, page: dict[str, Any]) -> bytes:
    """A filled template; a name in it that the page lacks is an error."""
    return _environment().get_template(template).render(page).encode()


@functools.cache
def _environment() -> Environment:
    """The templates, each compiled once a process."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "markdown": markdown_text,
        "markdown_table": markdown_table,
        "words": breakable,
    }
    return environment


def breakable(text: str) -> Markup:
    """Text that a browser may also break after an underscore or a slash, as in names of keys."""
    return Markup(re.sub(r"([_/])(?=\w)", r"\1<wbr>", str(Markup.escape(text))))
