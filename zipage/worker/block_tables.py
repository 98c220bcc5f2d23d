"""The block tables of running requests, on the host and, as they change, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zipage.scheduling.plan import TableGrowth
from zipage.transfer import to_device


class BlockTables:
    """One row a running request, written as its table grows.

    A row is read up to the request's entries and no further, so what a former owner left behind them does not matter.

    Args:
        num_rows: most requests at a time. Row `num_rows` belongs to no request.
        num_columns: blocks of the longest request.
        block_size: tokens in a block.

    Attributes:
        device: int32 [num_rows + 1, num_columns], as of the last `upload`.
    """

    def __init__(self, num_rows: int, num_columns: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._host = np.zeros((num_rows + 1, num_columns), dtype=np.int32)
        self._changed: list[np.ndarray] = []
        on_host = torch.from_numpy(self._host)
        self.device = on_host if device.type == "cpu" else on_host.to(device)

    @property
    def nbytes(self) -> int:
        """Of the device's."""
        return self.device.nbytes

    @property
    def empty_row(self) -> int:
        """The row that belongs to no request."""
        return len(self._host) - 1

    def write(self, growth: TableGrowth) -> None:
        """Take over the blocks that a row's table has gained."""
        row, begin, block_ids = growth
        end = begin + len(block_ids)
        self._host[row, begin:end] = block_ids
        first = row * self._host.shape[1]
        self._changed.append(np.arange(first + begin, first + end))

    def slots(self, rows: np.ndarray | int, entries: np.ndarray) -> np.ndarray:
        """int64 slots of `entries`, numbers of entries in the requests of `rows`."""
        size = self._block_size
        return self._host[rows, entries // size].astype(np.int64) * size + entries % size

    def upload(self) -> None:
        """Bring the device up to date, behind what is queued on the current stream."""
        if self._changed and self.device.is_cuda:
            places = np.concatenate(self._changed)
            both = to_device(np.stack((places, self._host.reshape(-1)[places])), self.device.device)
            self.device.view(-1).index_copy_(0, both[0], both[1].int())
        self._changed.clear()

    def of(self, rows: Sequence[int], num_entries: int) -> Tensor:
        """int32 [len(rows), columns] of the device's tables, wide enough for `num_entries`."""
        places = to_device(rows, self.device.device, np.int64)
        return self.device[:, : -(-num_entries // self._block_size)].index_select(0, places)
