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
