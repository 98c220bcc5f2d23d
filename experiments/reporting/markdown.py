"""The one writer of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table with columns padded to one width, so that it reads well in a terminal too.

    Pipes are escaped, and a line break in a cell is a space.
    """
    cells = [[" ".join(str(cell).split("\n")).replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
