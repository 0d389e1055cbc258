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

GAP = 2  # spaces between columns


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned and without a frame, figures to the right and never broken; plain where the output is piped.

    Args:
        head: titles of the columns.
        rows: cells are shown as text; a `Text` keeps its style.
    """
    cells = [[cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row] for row in rows]
    columns = [(title, [cell.plain for cell in column]) for title, *column in zip(head, *cells, strict=False)]
    figures = [any(map(_is_figure, texts)) and all(_is_figure(t) or t in ("", "-", "?", "void") for t in texts) for _, texts in columns]
    console = Console(highlight=False)
    widths = _widths(columns, figures, console.width)
    console.width = max(console.width, sum(widths) + GAP * len(widths))  # a line that the terminal breaks is better than figures cut off
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
    for (title, _), whole, width in zip(columns, figures, widths, strict=True):
        table.add_column(title, justify="right" if whole else "left", no_wrap=whole, overflow="fold", width=width)
    for row in cells:
        table.add_row(*row)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_wrapped(text: str, indent: str = "  ") -> None:
    """One line of text, broken between words where it is too long; `indent` is of what follows the first line."""
    print(textwrap.fill(printable(text), Console().width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def _widths(columns: Sequence[tuple[str, Sequence[str]]], figures: Sequence[bool], most: int) -> list[int]:
    """Of each column. Not rich's own: where little is left it cuts what it was told to keep whole.

    Figures are never broken, words seldom, and last what the row is about, the first column; the narrowest then gets what is left.
    """
    wanted = [max(map(len, (title, *texts))) for title, texts in columns]
    widths = [
        want if whole else max(map(_word, (title, *texts))) for want, whole, (title, texts) in zip(wanted, figures, columns, strict=True)
    ]
    spare = most - sum(widths) - GAP * (len(widths) - 1)
    if columns and (more := min(wanted[0], 34) - widths[0]) > 0:
        widths[0] += (given := max(0, min(more, spare)))
        spare -= given
    while spare > 0 and (narrow := [i for i, width in enumerate(widths) if width < wanted[i]]):
        widths[min(narrow, key=widths.__getitem__)] += 1
        spare -= 1
    return widths


def _word(text: str) -> int:
    """The length of its longest word, of a long one as much as can stand alone."""
    return min(max(map(len, text.split()), default=0), 10)


def _is_figure(text: str) -> bool:
    return re.fullmatch(r"[+-]?[\d.,]+( ?(%|x|M|MB|ms|points))?", text) is not None
