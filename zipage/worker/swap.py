"""Blocks of a paused request to host memory and back, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zipage.tile_table import TileTable
from zipage.transfer import to_device
from zipage.worker.kv_cache import KVCache


@dataclass(frozen=True, eq=False)
class HostCopy:
    """What a paused request's blocks and query slot held, on the host: pinned where the cache is on a GPU.

    Attributes:
        blocks: for each block, in the order of the table, one tensor [L, ...] for each of `KVCache.entry_tensors`; of
            tiles, [1, n, ...] of some at a time.
        queries: [L, w, Hq, d], or None.
    """

    blocks: list[list[Tensor]]
    queries: Tensor | None


def save(cache: KVCache, block_ids: Sequence[int] | TileTable, query_slot: int) -> HostCopy:
    """Copy all that blocks and a query slot hold.

    On CUDA the copies are queued on the current stream and nothing waits for them: what is queued there later may
    overwrite the blocks, and `restore` on that stream finds them whole. One block at a time is packed on the GPU.

    Args:
        query_slot: -1 for none.
    """
    blocks = [[_to_host(x[:, block]) for x in cache.entry_tensors] for block in _units(cache, block_ids)]
    keeps_queries = query_slot >= 0 and cache.queries is not None
    return HostCopy(blocks, _to_host(cache.queries[:, query_slot]) if keeps_queries else None)


def restore(cache: KVCache, copy: HostCopy, block_ids: Sequence[int] | TileTable, first: int, query_slot: int) -> None:
    """Copy back into `block_ids`, a table as long as the saved one, and into `query_slot`.

    Args:
        first: leading blocks to leave alone, because they hold the same already.
        query_slot: any slot, as a ring does not depend on it; -1 leaves the queries behind.

    Raises:
        RuntimeError: the table is not as long as the saved one.
    """
    units = _units(cache, block_ids)
    if len(units) != len(copy.blocks):
        raise RuntimeError(f"{len(copy.blocks)} blocks were saved and {len(units)} are to take them")
    for block, saved in list(zip(units, copy.blocks, strict=True))[first:]:
        for x, host in zip(cache.entry_tensors, saved, strict=True):
            if cache.tiled:
                x.index_copy_(1, block, host.to(x.device, non_blocking=True))
            else:
                x[:, block].copy_(host, non_blocking=True)
    if query_slot >= 0 and copy.queries is not None:
        cache.queries[:, query_slot].copy_(copy.queries, non_blocking=True)


def _units(cache: KVCache, table: Sequence[int] | TileTable) -> Sequence[int] | Sequence[Tensor]:
    """What is copied at once: a block, or as many tiles as there are in a column."""
    if not cache.tiled:
        return table
    ids = to_device(table.ids, cache.k.device, np.int64)
    return ids.split(len(table.counts))


def _to_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
