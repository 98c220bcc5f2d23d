"""How the products of a mixture of experts are cut into programs."""

from __future__ import annotations

from typing import NamedTuple


class ExpertTile(NamedTuple):
    """What a program does at a time.

    Attributes:
        rows: tokens of one expert, a power of two from 16 on.
        outputs: columns of the output, which are rows of the expert's weight.
        depth: columns of the weight.
        stages: tiles that are on their way.
        warps: of a program.
    """

    rows: int
    outputs: int
    depth: int
    stages: int
    warps: int = 4

    def most_tiles(self, pairs: int, num_experts: int) -> int:
        """Tiles of rows that `pairs` of tokens and experts can need, however they are routed."""
        touched = min(pairs, num_experts)
        return touched + (pairs - touched) // self.rows


TILES = (
    ExpertTile(16, 64, 128, 3),
    ExpertTile(32, 64, 128, 3),
    ExpertTile(64, 128, 64, 4, 8),
    ExpertTile(128, 256, 64, 4, 8),
)
"""Of 16 bits, by rows: within 3 % of the fastest of 30 on an H200 (`tests/gpu/profile_experts.py`). The last wants
`tiles.LARGE_SHARED_MEMORY`."""
EXACT = ExpertTile(16, 64, 32, 3)
"""Of float32."""
ROWS_PER_TOKEN = 2
"""Rows of a tile over an expert's tokens if all experts have as many: few experts then need two tiles."""


def find_tile(tokens: int, active: int, num_experts: int, itemsize: int, large: bool) -> ExpertTile:
    """The tile of both products of so many tokens with `active` of `num_experts` each.

    Args:
        itemsize: bytes of a number.
        large: `tiles.has_large_shared_memory`.
    """
    if itemsize == 4:
        return EXACT
    wanted, tiles = ROWS_PER_TOKEN * tokens * active / num_experts, TILES if large else TILES[:-1]
    return next((tile for tile in tiles if tile.rows >= wanted), tiles[-1])
