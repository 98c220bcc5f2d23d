"""Host memory for requests that leave the pool, and whether to copy one there or to compute it again."""

from __future__ import annotations

from dataclasses import dataclass

from zipage.scheduling.request import Request
from zipage.tile_table import num_blocks

OPERATIONS_PER_BYTE = 10_000
"""Operations of a prompt that a GPU computes while it copies a byte to host memory or back. An H100 makes 600 TFLOP/s
in products and copies 50 GB/s over PCIe 5, an A100 makes 200 and copies 25."""


@dataclass(frozen=True, slots=True)
class SwapCosts:
    """What a copy and a computation of a request take; of one rank, where several share the model.

    Attributes:
        block_bytes: of a block over all layers.
        token_operations: of the products that a token of a prompt goes through.
        pair_operations: of the attention of a token to one entry, over all layers.
        state_bytes: of what recurrent layers keep of a request, and goes with its blocks.
        sliding_block_bytes: of a block over all sliding layers.
    """

    block_bytes: int
    token_operations: int
    pair_operations: int
    state_bytes: int = 0
    sliding_block_bytes: int = 0

    def is_copy_cheaper(self, num_blocks: int, num_entries: int, num_sliding: int = 0) -> bool:
        """Whether blocks go to the host and back in less time than their entries are computed in.

        As if no step ran beside the copies, and as if the prefix index would find nothing.
        """
        held = num_blocks * self.block_bytes + num_sliding * self.sliding_block_bytes + self.state_bytes
        copied = 2 * held
        computed = num_entries * (self.token_operations + num_entries / 2 * self.pair_operations)
        return copied * OPERATIONS_PER_BYTE < computed


class SwapSpace:
    """Counts the slabs of host memory that paused requests take.

    A request that was compressed is copied whatever there is, for it can't be computed again. Others are copied where
    that is cheaper and their slabs are free.

    Args:
        num_slabs: that there are.
        slab_blocks: blocks that a slab holds. No two requests share one.
        costs: None: nothing is copied that can be computed again.
        slab_sliding_blocks: blocks of sliding layers that a slab holds, where there are any.

    Attributes:
        num_used: slabs taken, more than there are where compressed requests need them.
        blocks_out, blocks_in: blocks that were copied to host memory and back.
        sliding_out, sliding_in: the same of sliding layers.
    """

    def __init__(
        self, num_slabs: int = 0, slab_blocks: int = 1, costs: SwapCosts | None = None, slab_sliding_blocks: int = 1
    ) -> None:
        self.num_slabs = num_slabs
        self.slab_blocks = slab_blocks
        self.slab_sliding_blocks = slab_sliding_blocks
        self.costs = costs
        self.num_used = 0
        self.blocks_out = self.blocks_in = 0
        self.sliding_out = self.sliding_in = 0
        self._dropped: list[int] = []

    def slabs_of(self, request: Request) -> int:
        slabs = -(-num_blocks(request.block_ids) // self.slab_blocks)
        return slabs - (-len(request.sliding.block_ids) // self.slab_sliding_blocks)

    def prefers_copy(self, request: Request) -> bool:
        """Whether a running request that was never compressed is to be copied."""
        if self.costs is None or self.num_used + self.slabs_of(request) > self.num_slabs:
            return False
        num_sliding = len(request.sliding.block_ids)
        return self.costs.is_copy_cheaper(num_blocks(request.block_ids), request.cache_len, num_sliding)

    def copies_blocks(self, block_size: int) -> bool:
        """Whether a request of one full block would be copied, if slabs were free."""
        return self.num_slabs > 0 and self.costs is not None and self.costs.is_copy_cheaper(1, block_size, 1)

    def take(self, request: Request) -> None:
        """A running request leaves with its entries."""
        self.num_used += self.slabs_of(request)
        self.blocks_out += num_blocks(request.block_ids)
        self.sliding_out += len(request.sliding.block_ids)

    def bring_back(self, request: Request, num_shared: int) -> None:
        """A paused request gets blocks again, of which the leading `num_shared` are unchanged."""
        self.num_used -= self.slabs_of(request)
        self.blocks_in += num_blocks(request.block_ids) - num_shared
        self.sliding_in += len(request.sliding.block_ids)

    def drop(self, request: Request) -> None:
        """A paused request has ended."""
        self.num_used -= self.slabs_of(request)
        self._dropped.append(request.number)

    def take_dropped(self) -> list[int]:
        """Numbers of the requests that were dropped since the last time."""
        dropped, self._dropped = self._dropped, []
        return dropped
