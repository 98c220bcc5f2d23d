"""The pool where heads hold unequal lengths: blocks are handed out by the column and come back tile by tile.

A tile is a block of one layer and KV head. A line is a layer and KV head; a column is a tile for each line, as much
memory as a block elsewhere. The scheduler counts columns: every head gains an entry with every token, so that a table
grows by whole columns, and only events shorten lines by amounts of their own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from zipage.scheduling.block_pool import BlockPool
from zipage.tile_table import TileTable


class TilePool(BlockPool):
    """Tiles that are free or one request's: nothing is shared, and there is no prefix index.

    Args:
        num_blocks: columns.
        lines: layers times KV heads.

    Attributes:
        num_tiles: of all columns.
    """

    shares_blocks = False

    def __init__(self, num_blocks: int, block_size: int, lines: int) -> None:
        super().__init__(0, block_size, enable_prefix_caching=False)
        self.num_blocks = num_blocks
        self.lines = lines
        self.num_tiles = num_blocks * lines
        self._free_tiles = np.arange(self.num_tiles - 1, -1, -1, dtype=np.int32)
        """The last `_num_free_tiles` to be given back are at the front, the next to be handed out last of them."""
        self._num_free_tiles = self.num_tiles
        self._is_used = np.zeros(self.num_tiles, dtype=bool)

    @property
    def num_free(self) -> int:
        """Whole columns that free tiles make up."""
        return self._num_free_tiles // self.lines

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_free_tiles(self) -> int:
        return self._num_free_tiles

    def unindexed_free_blocks(self) -> list[int]:
        """Free tiles."""
        return self._free_tiles[: self._num_free_tiles].tolist()

    def allocate(self, num_new: int, shared: Sequence[int] = (), reserve: int = 0) -> TileTable | None:
        """`num_new` columns, or None where the pool cannot give that many and leave `reserve`."""
        if self.num_free < num_new + reserve:
            return None
        return TileTable.of_columns(self._take(num_new * self.lines).reshape(self.lines, num_new))

    def allocate_again(self, table: TileTable, shared: Sequence[int] = (), reserve: int = 0) -> TileTable | None:
        if self.num_free < table.num_blocks + reserve:
            return None
        return table.like(self._take(int(table.counts.sum())))

    def free(self, blocks: TileTable | np.ndarray | Iterable[int]) -> None:
        """Take back the tiles of a table, or those named. Raises RuntimeError where one is free already."""
        ids = blocks.ids if isinstance(blocks, TileTable) else np.asarray(blocks, dtype=np.int32)
        if len(np.unique(ids)) != len(ids) or not self._is_used[ids].all():
            raise RuntimeError("a tile was freed more often than it was allocated")
        self._is_used[ids] = False
        self._free_tiles[self._num_free_tiles : self._num_free_tiles + len(ids)] = ids
        self._num_free_tiles += len(ids)

    def register(self, block: int, parent_id: int, token_ids: array) -> int:
        raise RuntimeError("tiles hold no prefix that others can use")

    def check_integrity(self, tables: Iterable[TileTable | Sequence[int]]) -> None:
        """Compare the pool with the tables of all running requests. Raises RuntimeError where they disagree."""
        held = [table.ids for table in tables if len(table)]
        held = np.concatenate(held) if held else np.zeros(0, dtype=np.int32)
        if len(np.unique(held)) != len(held):
            raise RuntimeError("a tile stands in two tables, or twice in one")
        free = self._free_tiles[: self._num_free_tiles]
        if not np.array_equal(np.sort(np.concatenate((held, free))), np.arange(self.num_tiles)):
            raise RuntimeError(f"{len(held)} tiles are held and {len(free)} free, of {self.num_tiles}")
        if self._is_used.sum() != len(held) or not self._is_used[held].all():
            raise RuntimeError("the pool and the tables disagree on which tiles are used")

    def _take(self, count: int) -> np.ndarray:
        self._num_free_tiles -= count
        ids = self._free_tiles[self._num_free_tiles : self._num_free_tiles + count].copy()
        self._is_used[ids] = True
        return ids
