"""The tile tables of running requests: tables and lengths by layer and KV head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zipage.scheduling.plan import TableGrowth
from zipage.transfer import to_device


class TileTables:
    """As `BlockTables`, where heads hold unequal lengths. The host knows a token's entry, the device its slots.

    Args:
        num_rows: most requests at a time. Row `num_rows` belongs to no request.
        num_columns: blocks of the longest request.
        block_size: entries in a tile.
        num_layers, num_heads: of the cache.

    Attributes:
        tables: int32 [L, num_rows + 1, H, num_columns], as of the last `upload`.
        extra: int32 [L, num_rows + 1, H], entries that a head holds beyond the request's cache length.
    """

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        block_size: int,
        device: torch.device,
        *,
        num_layers: int,
        num_heads: int,
    ) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_layers, num_rows + 1, num_heads, num_columns), dtype=np.int32)
        self._extra = np.zeros((num_layers, num_rows + 1, num_heads), dtype=np.int32)
        self._counts = np.zeros((num_rows + 1, num_layers, num_heads), dtype=np.int64)
        self._changed: dict[int, None] = {}
        on_host = torch.from_numpy(self._tables), torch.from_numpy(self._extra)
        self.tables, self.extra = on_host if device.type == "cpu" else (x.to(device) for x in on_host)

    @property
    def empty_row(self) -> int:
        """The row that belongs to no request."""
        return self._tables.shape[1] - 1

    @property
    def nbytes(self) -> int:
        """Of the device's."""
        return self.tables.nbytes + self.extra.nbytes

    def write(self, growth: TableGrowth) -> None:
        """Take over the tiles that a row's lines have gained; all of them where its table was replaced."""
        row, first, table = growth
        shape = self._counts.shape[1:]
        if first == 0:
            self._counts[row] = 0
            self._extra[:, row] = table.extra.reshape(shape)
        places = self._counts[row][..., None] + np.arange(table.tiles.shape[1])
        tiles = table.tiles.reshape(*shape, -1)
        layer, head, place = (tiles >= 0).nonzero()
        self._tables[layer, row, head, places[layer, head, place]] = tiles[layer, head, place]
        self._counts[row] += table.counts.reshape(shape)
        self._changed[row] = None

    def upload(self) -> None:
        """Bring the device up to date, behind what is queued on the current stream."""
        if self.tables.is_cuda:
            for row in self._changed:
                width = int(self._counts[row].max())
                self.tables[:, row, :, :width].copy_(to_device(self._tables[:, row, :, :width], self.tables.device))
                self.extra[:, row].copy_(to_device(self._extra[:, row], self.extra.device))
        self._changed.clear()

    def slots(self, rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """int64 `entries`, numbers by the requests' cache lengths: what `slots_of` takes."""
        return np.asarray(entries, dtype=np.int64)

    def width(self, rows: np.ndarray) -> int:
        """Tiles of the longest line of some rows."""
        return int(self._counts[rows].max())

    def of(self, layer: int, rows: Tensor, width: int | None = None) -> Tensor:
        """int32 [n, H, width], a layer's tables of `rows` int64 [n]; None: as wide as can be."""
        return self.tables[layer, ..., :width].index_select(0, rows)

    def lens_of(self, rows: Tensor, lens: Tensor) -> Tensor:
        """int32 [L, n, H], entries of each head of `rows` int64 [n] where `lens` [n] are cache lengths; 0 where 0."""
        return torch.where(lens[:, None] > 0, self.extra.index_select(1, rows) + lens.int()[:, None], 0)

    def slots_of(self, rows: Tensor, entries: Tensor) -> Tensor:
        """int64 [L, n, H], where each head stores the `entries` [n] of `rows` int64 [n]; -1 where they are negative."""
        layers, num_rows, heads, columns = self.tables.shape
        lines = torch.arange(layers, device=rows.device)[:, None, None] * num_rows + rows[:, None]
        lines = lines * heads + torch.arange(heads, device=rows.device)
        places = self.extra.view(-1)[lines] + entries[:, None]
        stored = entries[:, None] >= 0
        tile = torch.where(stored, places, 0).div(self._block_size, rounding_mode="floor")
        slots = self.tables.view(-1)[lines * columns + tile].long() * self._block_size + places % self._block_size
        return torch.where(stored, slots, -1)
