"""Blocks of paused requests to host memory and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zipage.tile_table import TileTable
from zipage.transfer import to_device
from zipage.worker.kv_cache import KVCache

SLAB_ENTRIES = 256
"""Entries of a request that are copied at once: enough for the link's full speed, and few beside what they wait for."""
PINNED_BYTES = 2**30
"""Host memory that is pinned at once: PyTorch takes the next power of two."""


def slab_blocks(block_size: int) -> int:
    """Blocks that a slab holds, or columns of tiles."""
    return max(1, SLAB_ENTRIES // block_size)


@dataclass(frozen=True, eq=False)
class HostCopy:
    """What a paused request's blocks, query slot and row held, on the host.

    Attributes:
        num_units: blocks, or tiles; and blocks of sliding layers.
        slabs: uint8 each; entries as in `Swapper._views`, in the order of the table, then of that of sliding layers.
        queries: [L, w, Hq, d], or None.
        states: of recurrent layers, [L, ...] each; none where there are none.
    """

    num_units: tuple[int, int]
    slabs: list[Tensor]
    queries: Tensor | None
    states: list[Tensor]


class _Part(NamedTuple):
    """Blocks of one cache that go into a slab; `first` is the place of the first of them in their table."""

    cache: KVCache
    first: int
    ids: np.ndarray


class Swapper:
    """Copies of paused requests in slabs of pinned host memory.

    On CUDA the copies run on a stream of their own, in the order in which they are asked for, beside the step that is
    launched next: `begin` lets them start behind what is queued on the current stream, `wait_for` keeps what is queued
    there next behind those of some blocks, and `wait` behind all.

    Args:
        cache: whose blocks these are.
        num_units: blocks, or tiles, of a slab; if the cache has sliding layers and a slab of these takes more bytes, it
            has as many of their blocks and so more of these.
        num_slabs: to pin now. Where more are needed, more are pinned then, and kept.

    Attributes:
        copies: by the number of their request.
    """

    def __init__(self, cache: KVCache, num_units: int, num_slabs: int = 0) -> None:
        self._cache = cache
        units = [cache.unit_bytes] if cache.sliding is None else [cache.unit_bytes, cache.sliding.unit_bytes]
        self._slab_bytes = num_units * max(units)
        self.copies: dict[int, HostCopy] = {}
        self._free: list[Tensor] = []
        self._stream = torch.cuda.Stream(cache.k.device) if cache.k.is_cuda else None
        self._staged: Tensor | None = None
        self._marks: list[tuple[frozenset[int] | None, torch.cuda.Event]] = []
        """What has been queued since `wait`, in order: the blocks that it reads or writes, those of sliding layers
        below 0 (`~block`); None for queries, states."""
        at_once = max(1, PINNED_BYTES // self._slab_bytes)
        while num_slabs > 0:
            self._pin(min(num_slabs, at_once))
            num_slabs -= at_once

    def _pin(self, num_slabs: int) -> None:
        size = num_slabs * self._slab_bytes
        self._free += torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None).split(self._slab_bytes)

    @property
    def num_free_slabs(self) -> int:
        return len(self._free)

    # Copies

    def save(
        self,
        number: int,
        table: Sequence[int] | TileTable,
        query_slot: int,
        row: int = -1,
        sliding_ids: Sequence[int] = (),
    ) -> None:
        """Copy all that blocks, a query slot and a row hold, those first that a pool hands out first.

        Args:
            query_slot: -1 for none.
            row: of recurrent layers, where there are any.
            sliding_ids: blocks of sliding layers, where there are any.
        """
        cache, ids = self._cache, _ids(table)
        parts = self._parts(ids, sliding_ids)
        if len(self._free) < len(parts):
            self._pin(len(parts) - len(self._free))
        slabs = [self._free.pop() for _ in parts]
        try:
            with self._beside():
                queries = None
                if query_slot >= 0 and cache.queries is not None:
                    queries = _to_host(cache.queries[:, query_slot])
                    self._mark(None)
                states = []
                if cache.recurrent is not None:
                    states = [_to_host(x[:, row]) for x in cache.recurrent.tensors]
                    self._mark(None)
                for part, slab in zip(reversed(parts), reversed(slabs), strict=True):
                    places = to_device(part.ids, cache.k.device)
                    for x, staged, host in zip(part.cache.entry_tensors, *self._views(slab, part), strict=True):
                        torch.index_select(x, 1, places, out=staged)
                        if staged is not host:
                            host.copy_(staged, non_blocking=True)
                    self._mark(part)
        except BaseException:
            self._free += slabs
            raise
        self.copies[number] = HostCopy((len(ids), len(sliding_ids)), slabs, queries, states)

    def restore(
        self,
        number: int,
        table: Sequence[int] | TileTable,
        first: int,
        query_slot: int,
        row: int = -1,
        sliding_ids: Sequence[int] = (),
    ) -> None:
        """Copy back into tables as long as the saved ones, into `query_slot` and into `row`. The copy is gone then.

        Args:
            first: leading blocks of the first table to leave alone, because they hold the same already.
            query_slot: any slot, as a ring does not depend on it; -1 leaves the queries behind.

        Raises:
            RuntimeError: the table is not as long as the saved one.
        """
        cache, copy, ids = self._cache, self.copies.pop(number), _ids(table)
        self._free += copy.slabs  # whatever is saved there next is queued behind this
        units = len(ids), len(sliding_ids)
        if units != copy.num_units:
            raise RuntimeError(f"{sum(copy.num_units)} blocks were saved and {sum(units)} are to take them")
        with self._beside():
            if query_slot >= 0 and copy.queries is not None:
                cache.queries[:, query_slot].copy_(copy.queries, non_blocking=True)
                self._mark(None)
            if copy.states:
                for x, host in zip(cache.recurrent.tensors, copy.states, strict=True):
                    x[:, row].copy_(host, non_blocking=True)
                self._mark(None)
            for part, slab in zip(self._parts(ids, sliding_ids), copy.slabs, strict=True):
                same = max(0, first - part.first) if part.cache is cache else 0
                if same >= len(part.ids):
                    continue
                places = to_device(part.ids[same:], cache.k.device)
                for x, staged, host in zip(part.cache.entry_tensors, *self._views(slab, part), strict=True):
                    if staged is not host:
                        staged.copy_(host, non_blocking=True)
                    x.index_copy_(1, places, staged[:, same:])
                self._mark(part)

    def drop(self, number: int) -> None:
        """Forget a copy; there is none where `save` failed."""
        copy = self.copies.pop(number, None)
        if copy is not None:
            self._free += copy.slabs

    def _parts(self, ids: np.ndarray, sliding_ids: Sequence[int]) -> list[_Part]:
        """Of each slab."""
        parts = []
        for cache, some in ((self._cache, ids), (self._cache.sliding, _ids(sliding_ids))):
            if len(some):
                count = self._slab_bytes // cache.unit_bytes
                parts += [_Part(cache, begin, some[begin : begin + count]) for begin in range(0, len(some), count)]
        return parts

    def _views(self, slab: Tensor, part: _Part) -> tuple[list[Tensor], list[Tensor]]:
        """[L, blocks, ...] for each of `KVCache.entry_tensors`: of the device's buffer, and of a slab. On a CPU both
        are the slab.
        """
        if self._stream is None:
            views = self._divide(slab, part)
            return views, views
        if self._staged is None:
            self._staged = torch.empty(self._slab_bytes, dtype=torch.uint8, device=self._cache.k.device)
        return self._divide(self._staged, part), self._divide(slab, part)

    @staticmethod
    def _divide(memory: Tensor, part: _Part) -> list[Tensor]:
        views, end, count = [], 0, len(part.ids)
        for x in part.cache.entry_tensors:
            begin, end = end, end + count * x[:, 0].nbytes
            views.append(memory[begin:end].view(x.dtype).view(x.shape[0], count, *x.shape[2:]))
        return views

    # Streams

    def begin(self) -> None:
        """Copies to come find what is queued on the current stream done."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def wait_for(self, blocks: Iterable[int], sliding_blocks: Iterable[int] = ()) -> None:
        """What is queued on the current stream from now on finds copies of these blocks, queries and states done."""
        blocks = {*blocks, *(~block for block in sliding_blocks)}
        for ids, event in reversed(self._marks):  # the last one is behind all before it
            if ids is None or not ids.isdisjoint(blocks):
                event.wait(torch.cuda.current_stream(self._stream.device))
                return

    def wait(self) -> None:
        """What is queued on the current stream from now on finds all copies done."""
        if self._marks:
            self._marks[-1][1].wait(torch.cuda.current_stream(self._stream.device))
            self._marks.clear()

    def _beside(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _mark(self, part: _Part | None) -> None:
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
            blocks = None
            if part is not None:
                blocks = frozenset((part.ids if part.cache is self._cache else ~part.ids).tolist())
            self._marks.append((blocks, event))


def _ids(table: Sequence[int] | TileTable) -> np.ndarray:
    return np.asarray(table.ids if isinstance(table, TileTable) else table, dtype=np.int64)


def _to_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)
