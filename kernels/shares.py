"""How programs share the work of decode attention evenly."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Shares(NamedTuple):
    """Each program's tiles, of all tiles of all lines in order. A line is a request and KV head: line = request * H + head.

    A line has ceil(n / TILE) tiles, and one if it has no entries. With T tiles in all, the p-th of P programs takes
    those from p * T // P to (p + 1) * T // P. So it begins and ends within lines, and shares those with its neighbours.
    Of more programs than tiles, only the first T have any.

    Attributes:
        starts: int32 [2, P + 1], the line and the tile in it that each program begins with; at the end (B * H, 0).
        tiles: int32 [1], T.
        arrived: int32 [B * H], zeros: how many programs have computed their part of a line, while they do.
    """

    starts: Tensor
    tiles: Tensor
    arrived: Tensor

    def layer(self, index: int) -> Shares:
        """One layer, where each tensor has a leading dimension L."""
        return Shares(*(x[index] for x in self))
