"""A compression as the scheduler has it: of a live request, into which blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.request import Request
from zipage.tile_table import Table


@dataclass(slots=True, eq=False)
class Compression:
    """A request that is being compressed: its lengths, history and query slot stay as they are until that is done.

    Attributes:
        number: of its order.
        block_ids, new_ids: as in `CompressionOrder`.
        fresh: blocks of `new_ids` that are not in `block_ids`.
    """

    number: int
    request: Request
    block_ids: Table
    new_ids: list[int]
    fresh: list[int]


class Compressed(NamedTuple):
    """What a compression changed. `round` counts the request's compressions before it; `block_ids` is its table now."""

    request: Request
    round: int
    entries_before: int
    entries_after: int
    blocks_before: int
    blocks_after: int
    block_ids: Table


def num_fresh_blocks(request: Request, pool: BlockPool) -> int:
    """Blocks that a compression of the request takes from the pool, since it may not write to shared ones."""
    rule = request.rule
    if rule.cuts_table:
        return 0
    written = request.block_ids[rule.pinned_blocks : rule.kept_blocks]
    return sum(pool.ref_counts[block] > 1 for block in written)


def has_window(request: Request) -> bool:
    """Whether all queries that a compression of the request reads now are kept."""
    window = request.rule.window
    if not window:
        return True
    return request.query_slot >= 0 and request.queries_from <= request.num_computed - window
