"""Which tokens of which span a program has, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(starts_ptr, index, count, COUNT_PAD: tl.constexpr, TILE: tl.constexpr):
    """Spans are cut into tiles of TILE tokens, the last of a span shorter; all tiles have a number.

    Returns:
        Of tile `index` the span, or COUNT_PAD where there is no such tile; and its first token.
    """
    places = tl.arange(0, COUNT_PAD)
    begins = tl.load(starts_ptr + places, mask=places < count, other=0)
    ends = tl.load(starts_ptr + places + 1, mask=places < count, other=0)
    tiles = (ends - begins + TILE - 1) // TILE
    behind = tl.cumsum(tiles, 0) <= index
    span = tl.sum(behind.to(tl.int32), 0)
    first = tl.sum(tl.where(behind, tiles, 0), 0)
    begin = tl.sum(tl.where(places == span, begins, 0), 0)
    return span, begin + (index - first) * TILE


@triton.jit
def first_tile(starts_ptr, span, COUNT_PAD: tl.constexpr, TILE: tl.constexpr):
    """The number of the first tile of a span."""
    places = tl.arange(0, COUNT_PAD)
    begins = tl.load(starts_ptr + places, mask=places < span, other=0)
    ends = tl.load(starts_ptr + places + 1, mask=places < span, other=0)
    return tl.sum((ends - begins + TILE - 1) // TILE, 0)


def most_tiles(tokens: int, spans: int, tile: int) -> int:
    """Tiles that so many spans of so many tokens in all are cut into at most."""
    return (tokens + spans * (tile - 1)) // tile
