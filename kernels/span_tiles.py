"""Which tokens of which span a program has, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

SPANS = tl.constexpr(64)
"""Spans that are looked at together."""


@triton.jit
def _tiles(starts_ptr, first, count, TILE: tl.constexpr):
    """Of SPANS spans from `first` on: how many tiles each has."""
    places = first + tl.arange(0, SPANS)
    begins = tl.load(starts_ptr + places, mask=places < count, other=0)
    ends = tl.load(starts_ptr + places + 1, mask=places < count, other=0)
    return (ends - begins + TILE - 1) // TILE


@triton.jit
def find_tile(starts_ptr, index, count, TILE: tl.constexpr):
    """Spans are cut into tiles of TILE tokens, the last of a span shorter; all tiles have a number.

    Returns:
        Of tile `index` the span, at least `count` where there is no such tile; and its place in the span.
    """
    span, before, seen = 0, 0, 0
    for first in range(0, count, SPANS):
        tiles = _tiles(starts_ptr, first, count, TILE)
        behind = seen + tl.cumsum(tiles, 0) <= index
        span += tl.sum(behind.to(tl.int32), 0)
        before += tl.sum(tl.where(behind, tiles, 0), 0)
        seen += tl.sum(tiles, 0)
    return span, index - before


@triton.jit
def first_tile(starts_ptr, span, TILE: tl.constexpr):
    """The number of the first tile of a span."""
    number = 0
    for first in range(0, span, SPANS):
        number += tl.sum(_tiles(starts_ptr, first, span, TILE), 0)
    return number


def most_tiles(tokens: int, spans: int, tile: int) -> int:
    """Tiles that so many spans of so many tokens in all are cut into at most."""
    return (tokens + spans * (tile - 1)) // tile
