"""Where the pieces of cut decode requests lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pieces(NamedTuple):
    """Where each piece lies.

    Attributes:
        ranges: int32 [3, P], of each piece its request (-1: no piece), its first tile and the tile after its last. The
            pieces of a request stand side by side, in order, all but the last of the same length; one without entries
            has an empty piece. All heads of a request are cut alike, as its longest one.
        starts: int32 [B + 1], each request's first piece, and the number of pieces.
        arrived: int32 [B, H], zeros: how many pieces of a request and KV head are computed, while they are.
    """

    ranges: Tensor
    starts: Tensor
    arrived: Tensor

    def layer(self, index: int) -> Pieces:
        """One layer, where each tensor has a leading dimension L."""
        return Pieces(*(x[index] for x in self))
