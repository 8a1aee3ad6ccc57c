"""A report's table as text: for the terminal, as LaTeX (booktabs), as Markdown.

terminal_table(table)      # aligned columns; what is strong in the report ends in *
latex_table(table)         # \\begin{tabular} ... \\end{tabular}, strong fields in bold
markdown_table(table)
"""

import re
import textwrap
from collections.abc import Sequence

import pandas as pd

from utils.metric_catalogue import ABSENT
from utils.reports.tables import Entry, Table

LATEX_SIGNS = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    ABSENT: "--",
}
HEADING = 12  # characters in a line of a heading on a terminal
MARKDOWN_SIGNS = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # not inside a word
    r"|<(?=[a-zA-Z/!?])|&(?=#?\w+;)"  # tags and entities
    r"|^[>#]|^[-+](?=\s)"
)
SYMBOL = re.compile(r"\b([A-Z])_([A-Z])\b")  # A_N


def terminal_table(table: Table) -> str:
    """Columns aligned for a terminal, the first to the left, under the caption."""
    rows = [[f"{entry.text}{' *' if entry.strong else '  '}" for entry in row] for row in table.rows]
    rows = [[row[0].rstrip(), *row[1:]] for row in rows]
    lines = aligned(table.headings, rows, gap=2, margin=2)
    return "\n".join(filter(None, [table.caption, *lines, table.note]))


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]], gap: int, margin: int = 0) -> list[str]:
    """Lines of a table, its first column to the left; headings longer than `HEADING` fill several.

    margin: what a heading leaves free to its right.
    """
    stacks = [textwrap.wrap(heading, HEADING, break_long_words=False) or [""] for heading in headings]
    depth = max(map(len, stacks))
    names, *others = ([""] * (depth - len(stack)) + stack for stack in stacks)
    others = [[line + margin * " " for line in stack] for stack in others]
    table = [*map(list, zip(names, *others, strict=True)), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        (gap * " ").join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


def latex_table(table: Table) -> str:
    """A `tabular` with the rules of the package booktabs; strong fields in bold."""
    rows = [[_latex(entry) for entry in row] for row in table.rows]
    frame = pd.DataFrame(rows, columns=list(map(latex_text, table.headings)))
    return frame.to_latex(index=False, column_format="l" + "r" * (len(table.headings) - 1)).rstrip()


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is written; A_N and its like as symbols."""
    parts = SYMBOL.split(text)
    plain = ["".join(LATEX_SIGNS.get(sign, sign) for sign in part) for part in parts]
    return "".join(
        f"{plain[i]}${parts[i + 1]}_{parts[i + 2]}$" if i + 2 < len(parts) else plain[i]
        for i in range(0, len(parts), 3)
    )


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
