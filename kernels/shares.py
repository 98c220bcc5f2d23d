"""How programs share the work of decode attention evenly."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Shares(NamedTuple):
    """Each program's part of all lines in order. A line is a request and KV head: line = request * H + head.

    A line costs LINE_COST units and one more for each of its ceil(n / TILE) tiles; without entries, for one tile. With
    T units in all, the p-th of P programs has those from p * T // P to (p + 1) * T // P, and so begins and ends within
    lines. Of more programs than units, only the first T have any.

    Attributes:
        starts: int32 [2, P + 1], the line and the unit in it that each program begins with; at the end (B * H, 0).
        units: int32 [1], T.
        arrived: int32 [B * H], zeros: how many programs have computed their part of a line, while they do.
        fresh: int32 [1]. 0: of each line, a step writes the last entry alone. 1: it may write others too, as where the
            tokens of a prompt attend as decodes.
    """

    starts: Tensor
    units: Tensor
    arrived: Tensor
    fresh: Tensor

    def layer(self, index: int) -> Shares:
        """One layer, where each tensor has a leading dimension L."""
        return Shares(*(x[index] for x in self))
