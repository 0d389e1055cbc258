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
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, *column in zip(head, *cells, strict=False):
        texts = [cell.plain for cell in column]
        figures = any(map(_is_figure, texts)) and all(_is_figure(text) or text in ("", "-", "?", "void") for text in texts)
        least = min(max(map(len, texts)), 34) if not table.columns and texts else None  # what the row is about is broken last
        table.add_column(title, justify="right" if figures else "left", no_wrap=figures, overflow="fold", min_width=least)
    for row in cells:
        table.add_row(*row)
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_wrapped(text: str, indent: str = "  ") -> None:
    """One line of text, broken between words where it is too long; `indent` is of what follows the first line."""
    print(textwrap.fill(printable(text), Console().width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def _is_figure(text: str) -> bool:
    return re.fullmatch(r"[+-]?[\d.,]+( ?(%|x|M|MB|ms|points))?", text) is not None
