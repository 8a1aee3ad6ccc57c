"""Renderings of a report's table: for the terminal, as LaTeX (booktabs), as Markdown.

terminal_table(table)      # aligned columns; strong fields end in *
latex_table(table)         # \\begin{tabular} ... \\end{tabular}, strong fields in bold
markdown_table(table)
"""

import re
import textwrap
from itertools import zip_longest

import pandas as pd

from utils.metric_catalogue import ABSENT
from utils.reports.tables import Entry, Table
from utils.wording import columns

LATEX_SIGNS = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    | {"±": "$\\pm$", ABSENT: "--"}
)
LATEX_SYMBOL = re.compile(r"\b([A-Z])\\_([A-Z])\b(?!\\_)")  # A_N
HEADING = 12  # characters in a line of a heading on a terminal; longer ones fill several
MARKDOWN_SIGNS = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # not inside a word
    r"|<(?=[a-zA-Z/!?])|&(?=#?\w+;)"  # tags and entities
    r"|^[>#]|^[-+](?=\s)"
)


def terminal_table(table: Table) -> str:
    """Columns aligned for a terminal, the first to the left, under the caption."""
    headings = [textwrap.wrap(heading, HEADING, break_long_words=False) for heading in table.headings]
    from_below = zip_longest(*map(reversed, headings), fillvalue="")
    lines = [[name, *(f"{text}  " for text in others)] for name, *others in from_below][::-1]
    for name, *others in table.rows:
        lines.append([name.text, *(f"{entry.text}{' *' if entry.strong else '  '}" for entry in others)])
    first, *widths = (max(map(columns, column)) for column in zip(*lines, strict=True))
    names = [name + " " * (first - columns(name)) for name, *_ in lines]
    texts = [
        "  ".join([name, *map(str.rjust, row[1:], widths)]) for name, row in zip(names, lines, strict=True)
    ]
    return "\n".join(filter(None, [table.caption, *map(str.rstrip, texts), table.note]))


def latex_table(table: Table) -> str:
    """A `tabular` with the rules of the package booktabs; strong fields in bold."""
    rows = [[_latex(entry) for entry in row] for row in table.rows]
    frame = pd.DataFrame(rows, columns=list(map(latex_text, table.headings)))
    return frame.to_latex(index=False, column_format="l" + "r" * (len(table.headings) - 1)).rstrip()


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is written; A_N and its like as symbols."""
    return LATEX_SYMBOL.sub(r"$\1_\2$", text.translate(LATEX_SIGNS))


def markdown_table(table: Table) -> str:
    """A Markdown table, and its note; strong fields in bold."""
    rows = [[_markdown(entry) for entry in row] for row in table.rows]
    rule = ["---", *["---:"] * (len(table.headings) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in [list(map(markdown_text, table.headings)), rule, *rows]]
    return "\n".join([*lines, *(["", markdown_text(table.note)] if table.note else [])])


def markdown_text(text: str) -> str:
    """Text in one line that Markdown shows as it is, in a table too."""
    return MARKDOWN_SIGNS.sub(r"\\\g<0>", " ".join(text.split()))


def _markdown(entry: Entry) -> str:
    text = markdown_text(entry.text)
    return f"**{text}**" if entry.strong else text


def _latex(entry: Entry) -> str:
    text = latex_text(entry.text)
    return f"\\textbf{{{text}}}" if entry.strong else text
