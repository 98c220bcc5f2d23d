"""Blocks of sliding layers: a request holds those of its window, and of a prompt's chunk while it is computed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.request import Request
from zipage.sliding_table import SlidingTable, most_blocks

_WHOLE = array("i")
"""A block is registered under the id of the prefix that ends with it, and nothing else."""


class SlidingPrefix(NamedTuple):
    """What of a prefix sliding layers need: the blocks of its window, from place `first` of the table on, and a
    sibling's last one, not full, to copy; or None.
    """

    first: int = 0
    shared: Sequence[int] = ()
    tail: int | None = None


class SlidingBlocks:
    """Tables of running requests in a pool of their own, which never runs short.

    Between two steps a request holds the blocks of its window, `per_request` at most, and as many are kept for each of
    the requests that may run. Chunks of prompts share the others, and are as long as these allow. So nobody waits or
    leaves for want of blocks here.

    Blocks of prompts that are out of the window stay in the prefix index until they are allocated again, and so do
    those of the window that a request ends with. A prefix is found where all blocks of its window still are.

    Args:
        pool: of these blocks alone.
        window: entries that a query sees, its own included.
        num_requests: that may run at once.
        max_model_len: tokens of the longest request; None: there is no bound.
    """

    def __init__(self, pool: BlockPool, window: int, num_requests: int, max_model_len: int | None = None) -> None:
        self.pool = pool
        self.window = window
        self.num_requests = num_requests
        self.per_request = most_blocks(window, pool.block_size, max_model_len)
        self._spare = pool.num_blocks - num_requests * self.per_request
        if self._spare < 0:
            raise ValueError(
                f"{pool.num_blocks} sliding blocks are too few for {num_requests} requests of {self.per_request}"
            )

    # Steps

    def extend(self, request: Request, num_tokens: int) -> int:
        """Give a request blocks for its next tokens. Returns for how many: as there is room for, at least one."""
        table, size = request.sliding, self.pool.block_size
        missing = -(-(request.num_computed + num_tokens) // size) - table.end
        if missing <= 0:
            return num_tokens
        room = self.per_request - len(table.block_ids) + self._spare
        self._take(request, min(missing, room))
        return min(num_tokens, table.end * size - request.num_computed)

    def slide(self, requests: Iterable[Request]) -> None:
        """Take back the blocks that nobody needs who goes on from `num_computed`."""
        for request in requests:
            self._slide(request)

    def _slide(self, request: Request) -> None:
        table = request.sliding
        gone = self._first_seen(request.num_computed) - table.first
        if gone > 0:
            before = self._beyond(table)
            # Those that hold output alone would crowd out prompts, and nobody begins behind them.
            of_prompt = -(-request.num_prompt_tokens // self.pool.block_size) - table.first
            of_prompt = min(gone, max(0, of_prompt))
            self._free(table.block_ids[:of_prompt])
            self.pool.discard(table.block_ids[of_prompt:gone])
            del table.block_ids[:gone]
            table.first += gone
            self._spare += before - self._beyond(table)

    def _free(self, blocks: Sequence[int]) -> None:
        """Those that hold what another block holds, or no whole prefix, are taken before those that may be found."""
        self.pool.free([block for block in blocks if self.pool.is_indexed(block)])
        self.pool.discard([block for block in blocks if not self.pool.is_indexed(block)])

    def _first_seen(self, position: int) -> int:
        """Place of the first block that the query of the first position in a block sees. No more blocks are held so at
        most, and another request can begin at the block.
        """
        size = self.pool.block_size
        return max(0, position // size * size - self.window + 1) // size

    def _take(self, request: Request, num_new: int, shared: Sequence[int] = ()) -> list[int]:
        """Fresh blocks at a table's end."""
        table = request.sliding
        taken = self.pool.allocate(num_new, shared)
        if taken is None:
            raise RuntimeError(f"{request}: sliding layers have {self.pool.num_free} blocks left of {num_new} promised")
        before = self._beyond(table)
        table.block_ids += taken
        self._spare -= self._beyond(table) - before
        request.peak_sliding_blocks = max(request.peak_sliding_blocks, len(table.block_ids))
        return taken

    def _beyond(self, table: SlidingTable) -> int:
        """Blocks that others might use, beyond those that are kept for each request."""
        return max(0, len(table.block_ids) - self.per_request)

    # Coming and going

    def release(self, request: Request) -> None:
        """A running request ends or leaves. Its table stays, as a record of what it held."""
        self._spare += self._beyond(request.sliding)
        self._free(request.sliding.block_ids)

    def come_back(self, request: Request) -> list[int]:
        """Other blocks for the table that a paused request had."""
        saved = request.sliding
        request.sliding = SlidingTable(saved.first, num_registered=saved.end, num_told=saved.first)
        return self._take(request, len(saved.block_ids)).copy()

    # Prefixes

    def register(self, request: Request) -> None:
        """Tell the prefix index of the full blocks whose prefixes have ids."""
        table = request.sliding
        for place in range(max(table.first, table.num_registered), min(len(request.prefix_ids), table.end)):
            self.pool.register(table.block_ids[place - table.first], request.prefix_ids[place], _WHOLE)
            table.num_registered = place + 1

    def find(self, prefix_ids: Sequence[int]) -> SlidingPrefix:
        """The longest of the prefixes, each a block longer than the one before, whose window is there."""
        size = self.pool.block_size
        found: dict[int, int] = {}
        for count in range(len(prefix_ids), 0, -1):
            first = self._first_seen(count * size)
            for place in range(count - 1, first - 1, -1):
                if place not in found:
                    block = self.pool.find_block(prefix_ids[place], _WHOLE)
                    if block is None:
                        break
                    found[place] = block
            else:
                return SlidingPrefix(first, [found[place] for place in range(first, count)])
        return SlidingPrefix()

    def share(self, donor: Request, num_cached: int) -> SlidingPrefix | None:
        """What a sibling needs of a running request's blocks to begin behind `num_cached` tokens, the last of them in
        a block that is to be copied if it is not full; None where that is gone.
        """
        table, full = donor.sliding, num_cached // self.pool.block_size
        first = self._first_seen(num_cached)
        if first < table.first:
            return None
        tail = table.block_ids[full - table.first] if num_cached % self.pool.block_size else None
        return SlidingPrefix(first, table.block_ids[first - table.first : full - table.first], tail)

    def adopt(self, request: Request, prefix: SlidingPrefix) -> list[tuple[int, int]]:
        """A request begins to run, with a prefix. Returns what is to be copied: (source, destination)."""
        first, shared, tail = prefix
        request.sliding = SlidingTable(first, num_registered=first + len(shared), num_told=first)
        taken = self._take(request, int(tail is not None), shared)
        return [] if tail is None else [(tail, taken[-1])]

    # Invariants

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Raises RuntimeError where a block is lost, a table lacks what its request sees, or it holds too much."""
        self.pool.check_integrity([request.sliding.block_ids for request in running])
        size = self.pool.block_size
        for request in running:
            table, seen = request.sliding, self._first_seen(request.num_computed)
            if table.first != seen or not 0 <= table.end * size - request.num_computed < size:
                raise RuntimeError(f"{request}: sliding layers hold blocks {table.first} to {table.end}")
            if len(table.block_ids) > self.per_request:
                raise RuntimeError(f"{request}: {len(table.block_ids)} blocks of sliding layers")
            written = table.block_ids[request.num_computed // size - table.first :]
            if any(self.pool.ref_counts[block] != 1 for block in written):
                raise RuntimeError(f"{request}: a block of sliding layers that it will write into is shared")
        if self._spare != self.pool.num_blocks - self.num_requests * self.per_request:
            raise RuntimeError(f"{self._spare} spare blocks of sliding layers")
