"""The pool of KV blocks: who holds which, and which hold a prefix that others can use."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = 0
"""Prefix id of the empty prefix."""


class BlockPool:
    """Reference-counted blocks with an index of full blocks by prefix.

    The index is a chain: a full block's key is the id of the prefix before it and its own tokens, and the id it gets is
    never used again. A dictionary look-up hashes the key and then compares it whole, so a hit is the same prefix and
    never merely the same hash.

    A freed block keeps its place in the index until it is allocated again. Free blocks are reused in the order they
    were freed, and a request's are freed last first, so that the ends of prefixes go before their beginnings.
    """

    shares_blocks = True
    """Requests may hold a block together."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._keys: list[tuple[int, bytes] | None] = [None] * num_blocks
        self._index: dict[tuple[int, bytes], tuple[int, int]] = {}
        self._next_prefix_id = ROOT + 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that the prefix index can find, in use or free."""
        return len(self._index)

    def unindexed_free_blocks(self) -> list[int]:
        """Free blocks whose contents are never read again."""
        return [block for block in self._free if self._keys[block] is None]

    def allocate(self, num_new: int, shared: Sequence[int] = (), reserve: int = 0) -> list[int] | None:
        """Take a reference on each `shared` block and `num_new` fresh ones, or do nothing.

        Args:
            num_new: blocks to take from the free ones.
            shared: blocks to share, as `find_prefix` or a sibling's table gave them.
            reserve: free blocks that must be left over.

        Returns:
            `shared` followed by the new blocks, or None where the pool cannot give that many.
        """
        revived = sum(self.ref_counts[block] == 0 for block in shared)
        if len(self._free) < num_new + revived + reserve:
            return None
        for block in shared:
            if self.ref_counts[block] == 0:
                del self._free[block]
            self.ref_counts[block] += 1
        blocks = list(shared)
        for _ in range(num_new):
            block, _ = self._free.popitem(last=False)
            self.forget(block)
            self.ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def allocate_again(self, table: Sequence[int], shared: Sequence[int] = (), reserve: int = 0) -> list[int] | None:
        """Blocks for a table that was given up, the leading `shared` ones among them, as `allocate`."""
        return self.allocate(len(table) - len(shared), shared, reserve)

    def free(self, blocks: Iterable[int]) -> None:
        """Drop one reference on each block of a table.

        Raises:
            RuntimeError: a block is not in use (freed twice).
        """
        for block in reversed(list(blocks)):
            count = self.ref_counts[block] - 1
            if count < 0:
                raise RuntimeError(f"block {block} was freed more often than it was allocated")
            self.ref_counts[block] = count
            if count == 0:
                self._free[block] = None

    def discard(self, blocks: Iterable[int]) -> None:
        """As `free`. Those that nobody holds any more leave the prefix index, and are the next to be handed out."""
        for block in blocks:
            self.free([block])
            if self.ref_counts[block] == 0:
                self.forget(block)
                self._free.move_to_end(block, last=False)

    def find_prefix(self, token_ids: array, max_blocks: int) -> tuple[list[int], list[int]]:
        """Longest run of indexed blocks that holds the beginning of `token_ids` (C ints), `max_blocks` at most.

        Returns:
            The blocks (no reference taken), and the prefix id at the end of each.
        """
        blocks: list[int] = []
        prefix_ids: list[int] = []
        if not self.enable_prefix_caching:
            return blocks, prefix_ids
        size, prefix_id = self.block_size, ROOT
        for i in range(max_blocks):
            hit = self._index.get((prefix_id, token_ids[i * size : (i + 1) * size].tobytes()))
            if hit is None:
                break
            block, prefix_id = hit
            blocks.append(block)
            prefix_ids.append(prefix_id)
        return blocks, prefix_ids

    def find_block(self, parent_id: int, token_ids: array) -> int | None:
        """The block that was registered so (no reference taken), if it is still there."""
        hit = self._index.get((parent_id, token_ids.tobytes()))
        return None if hit is None else hit[0]

    def register(self, block: int, parent_id: int, token_ids: array) -> int:
        """Enter a full block, whose entries are computed, under the prefix it extends.

        Returns:
            The prefix id of its end. Where an equal prefix is already indexed, that one's; this block stays private.
        """
        key = (parent_id, token_ids.tobytes())
        hit = self._index.get(key)
        if hit is not None:
            return hit[1]
        self.forget(block)
        prefix_id = self._next_prefix_id
        self._next_prefix_id += 1
        self._index[key] = (block, prefix_id)
        self._keys[block] = key
        return prefix_id

    def is_indexed(self, block: int) -> bool:
        """Whether the prefix index can find the block."""
        return self._keys[block] is not None

    def forget(self, block: int) -> None:
        """Take a block out of the prefix index, since its contents change."""
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the pool with the block tables of all running requests.

        Raises:
            RuntimeError: a block's reference count, the free list or the prefix index disagrees.
        """
        held = [0] * self.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise RuntimeError(f"a block stands twice in one table: {table}")
            for block in table:
                held[block] += 1
        for block, count in enumerate(held):
            if self.ref_counts[block] != count:
                raise RuntimeError(f"block {block}: {self.ref_counts[block]} references, {count} tables hold it")
            if (count == 0) != (block in self._free):
                raise RuntimeError(f"block {block}: {count} references, free list says {block in self._free}")
        for key, (block, _) in self._index.items():
            if self._keys[block] != key:
                raise RuntimeError(f"block {block}: the prefix index and the block disagree on its key")
        if len(self._index) != sum(key is not None for key in self._keys):
            raise RuntimeError("the prefix index has lost a block")
