"""How products of few rows are cut on Hopper: by shape, as `tests/gpu/tune_linear.py` measured it, never in a run."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("linear_tiles.json")

MOST_ROWS = 64
"""Of a product that the table may hold. cuBLAS is faster with more."""


class Tile(NamedTuple):
    """What a program does at a time.

    Attributes:
        outputs: columns of the output, which are rows of the weight.
        depth: columns of the weight.
        stages: tiles that are on their way.
    """

    outputs: int
    depth: int
    stages: int


def padded_rows(rows: int) -> int:
    """16, 32 or 64: rows of a tile of matrix units, at least `rows`."""
    return next(padded for padded in (16, 32, 64) if rows <= padded)


def find_tile(rows: int, outputs: int, width: int) -> Tile | None:
    """The tile of x [rows, width] @ weight [outputs, width].T.

    None: cuBLAS is faster, or nobody has measured the shape.
    """
    return _table().get((padded_rows(rows), outputs, width)) if 0 < rows <= MOST_ROWS else None


@cache
def _table() -> dict[tuple[int, int, int], Tile]:
    rows = json.loads(TABLE.read_text())["tiles"]
    return {(padded, outputs, width): Tile(*tile) for padded, outputs, width, *tile in rows}
