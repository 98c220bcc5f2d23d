"""The memory of one request where heads hold unequal lengths."""

from __future__ import annotations

import numpy as np


class TileTable:
    """The tiles of a request, and how far its heads are from its cache length.

    Its length is what the scheduler counts: columns that there would be under uniform budgets. Of its slices there are
    those from a place on: the tiles that the lines have gained since the table was as long.

    Attributes:
        tiles: int32 [lines, places], -1 past a line's own.
        counts: int64 [lines], tiles of each.
        extra: int64 [lines], entries that each holds beyond the request's cache length, negative where fewer.
    """

    __slots__ = ("_length", "counts", "extra", "tiles")

    def __init__(self, tiles: np.ndarray, counts: np.ndarray, extra: np.ndarray, length: int) -> None:
        self.tiles, self.counts, self.extra, self._length = tiles, counts, extra, length

    @classmethod
    def of_columns(cls, tiles: np.ndarray) -> TileTable:
        """A table of whole columns, [lines, columns]."""
        lines, columns = tiles.shape
        counts = np.full(lines, columns, dtype=np.int64)
        return cls(tiles.astype(np.int32), counts, np.zeros(lines, dtype=np.int64), columns)

    def __len__(self) -> int:
        return self._length

    def __iadd__(self, columns: TileTable) -> TileTable:
        """Give every line the tiles of whole columns."""
        room = int(self.counts.max(initial=0)) + len(columns) - self.tiles.shape[1]
        if room > 0:
            self.tiles = np.pad(self.tiles, ((0, 0), (0, room)), constant_values=-1)
        places = self.counts[:, None] + np.arange(len(columns))
        np.put_along_axis(self.tiles, places, columns.tiles, axis=1)
        self.counts = self.counts + len(columns)
        self._length += len(columns)
        return self

    def __getitem__(self, part: slice) -> TileTable:
        first = part.start or 0
        if part.stop is not None or part.step is not None or not 0 <= first <= self._length:
            raise IndexError(f"{part} of a table of {self._length} columns: only what follows a place")
        if first == 0:
            return TileTable(self.tiles.copy(), self.counts, self.extra, self._length)
        places = self.counts[:, None] + np.arange(first - self._length, 0)
        return TileTable.of_columns(np.take_along_axis(self.tiles, places, axis=1))

    @property
    def num_blocks(self) -> int:
        """Columns that its tiles fill."""
        return -(-int(self.counts.sum()) // len(self.counts))

    @property
    def ids(self) -> np.ndarray:
        """int32 [tiles], all, line by line."""
        return self.tiles[self.tiles >= 0]

    def lens(self, cache_len: int) -> np.ndarray:
        """int64 [lines], entries of each where the request's cache length is `cache_len`."""
        return self.extra + cache_len

    def cut(self, kept: np.ndarray, cache_len: int, block_size: int) -> tuple[TileTable, np.ndarray]:
        """What an event leaves, and the tiles that it returns.

        Args:
            kept: int [lines], entries that each line holds now, in its first tiles.
            cache_len: of the request from now on, in whole blocks.
        """
        kept = np.asarray(kept, dtype=np.int64)
        counts = -(-kept // block_size)
        stays = np.arange(self.tiles.shape[1]) < counts[:, None]
        tiles = np.where(stays, self.tiles, -1)[:, : int(counts.max())]
        left = self.tiles[~stays & (self.tiles >= 0)]
        return TileTable(tiles, counts, kept - cache_len, cache_len // block_size), left

    def like(self, ids: np.ndarray) -> TileTable:
        """The same table in other tiles, given in the order of `ids`."""
        tiles = np.full_like(self.tiles, -1)
        tiles[self.tiles >= 0] = ids
        return TileTable(tiles, self.counts, self.extra, self._length)

    def unwritten(self, cache_len: int, block_size: int) -> list[tuple[int, int]]:
        """Each tile with room, and its first empty slot."""
        found = []
        for line, length in enumerate(self.lens(cache_len).tolist()):
            for place in range(length // block_size, int(self.counts[line])):
                found.append((int(self.tiles[line, place]), max(0, length - place * block_size)))
        return found

    def check(self, cache_len: int, block_size: int) -> None:
        """Raises RuntimeError where a line lacks room for what it holds, or for what the table counts as room."""
        room = self.counts * block_size - self.lens(cache_len)
        if (self.lens(cache_len) < 0).any() or (room < self._length * block_size - cache_len).any():
            raise RuntimeError(f"lines of {self.counts} tiles hold {self.lens(cache_len)} entries")
        if ((self.tiles >= 0).sum(axis=1) != self.counts).any():
            raise RuntimeError("a line of a tile table has a hole")


Table = list[int] | TileTable
"""What a request holds: blocks, or tiles where heads hold unequal lengths."""


def num_blocks(table: Table) -> int:
    """Blocks, or columns of tiles, that a table takes."""
    return table.num_blocks if isinstance(table, TileTable) else len(table)
