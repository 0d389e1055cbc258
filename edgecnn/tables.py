"""Tables and lines of text for a terminal, as wide as it is; 80 columns where there is none, or as many as COLUMNS says."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgecnn.errors import printable


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned and without a frame, figures to the right and never broken; plain where the output is piped.

    Args:
        head: titles of the columns.
        rows: cells are shown as text; a `Text` keeps its style.
    """
    cells = [[cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row] for row in rows]
    columns = [(title, [cell.plain for cell in column]) for title, *column in zip(head, *cells, strict=False)]
    figures = [any(map(_is_figure, texts)) and all(_is_figure(t) or t in ("", "-", "?", "void") for t in texts) for _, texts in columns]
    # What can be broken gets a few columns at least; the first, what the row is about, as many as are left to it.
    least = [
        max(map(len, (title, *texts)) if whole else map(_word, (title, *texts)))
        for (title, texts), whole in zip(columns, figures, strict=True)
    ]
    console = Console(highlight=False)
    room = console.width - sum(least[1:]) - 2 * (len(least) - 1)
    if least and not figures[0]:
        least[0] = max(least[0], min(max(map(len, columns[0][1]), default=0), 34, room))
    console.width = max(console.width, sum(least) + 2 * (len(least) - 1))  # a line that the terminal breaks is better than figures cut off
    table = Table(box=None, header_style="bold", pad_edge=False)
    for (title, _), whole, width in zip(columns, figures, least, strict=True):
        table.add_column(title, justify="right" if whole else "left", no_wrap=whole, overflow="fold", min_width=width)
    for row in cells:
        table.add_row(*row)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_wrapped(text: str, indent: str = "  ") -> None:
    """One line of text, broken between words where it is too long; `indent` is of what follows the first line."""
    print(textwrap.fill(printable(text), Console().width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def _word(text: str) -> int:
    """The length of its longest word, of a long one as much as can stand alone."""
    return min(max(map(len, text.split()), default=0), 10)


def _is_figure(text: str) -> bool:
    return re.fullmatch(r"[+-]?[\d.,]+( ?(%|x|M|MB|ms|points))?", text) is not None
