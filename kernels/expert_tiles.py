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


MOST_TOKENS = 512
"""Of which Triton's products are the faster ones where PyTorch's grouped product reads the groups on the device."""
SMALL = ExpertTile(16, 64, 32, 3)
"""For float32 and for GPUs of little shared memory."""
BY_ROWS = {
    16: (ExpertTile(16, 64, 128, 4), ExpertTile(16, 64, 128, 4)),
    32: (ExpertTile(32, 64, 128, 3), ExpertTile(32, 64, 128, 3)),
    64: (ExpertTile(64, 128, 64, 3), ExpertTile(64, 128, 64, 3)),
}
"""Of the two products, by rows; measured by `tests/gpu/profile_experts.py`."""
ROWS_PER_TOKEN = 2
"""Rows of a tile over an expert's tokens, if all experts had as many: few experts then need two tiles."""


def find_tiles(tokens: int, active: int, num_experts: int, large: bool) -> tuple[ExpertTile, ExpertTile]:
    """Tiles of the two products of so many tokens with `active` of `num_experts` each.

    Args:
        large: numbers of 16 bits on a GPU of `tiles.LARGE_SHARED_MEMORY`.
    """
    if not large:
        return SMALL, SMALL
    wanted = ROWS_PER_TOKEN * tokens * active / num_experts
    return next((tiles for rows, tiles in BY_ROWS.items() if rows >= wanted), BY_ROWS[max(BY_ROWS)])
