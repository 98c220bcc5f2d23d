"""Memory of several GPUs that each of them can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """Memory of all ranks that this one can read.

    Attributes:
        parts: of each rank, in order, [rows, width], contiguous; a rank's own is on its device.
        rank: the reader.
        signals: of each rank, int32 [rows, N], zero between calls: rank r sets element (row, r) when it has written its
            part. None: the parts are there already.
        part_pointers, signal_pointers: int64 [N], on the reader's device, where these begin.
    """

    parts: Sequence[Tensor]
    rank: int
    signals: Sequence[Tensor] | None
    part_pointers: Tensor
    signal_pointers: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor], rank: int, signals: Sequence[Tensor] | None = None) -> Peers:
        """Of tensors that lie where this process sees them."""
        tables = (
            torch.tensor([x.data_ptr() for x in table], dtype=torch.int64, device=parts[rank].device)
            for table in (parts, signals or parts)
        )
        return cls(parts, rank, signals, *tables)
