"""Batches of requests to compress, over several layers, as hostile as the engine's may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import CacheView, shared
from tests.kernels.paged import GARBAGE


@dataclass(frozen=True)
class Event:
    view: CacheView
    free: Tensor
    """Blocks that no request holds, int32."""

    @property
    def k_cache(self) -> Tensor:
        return self.view.k_cache

    @property
    def v_cache(self) -> Tensor:
        return self.view.v_cache

    @property
    def width(self) -> int:
        return self.view.width

    def shared(self, x: Tensor) -> Tensor:
        """`x` [R, ...] for every layer and head."""
        return shared(x, self.k_cache.shape[2], len(self.k_cache))

    def slots(self) -> Tensor:
        """bool [L, R, H, N]: those that hold an entry."""
        return torch.arange(self.width) < self.view.lens.cpu()[..., None]


def make_event(
    lens: Sequence[int], block_size: int, layers: int, heads: int, head_dim: int, dtype=torch.float32, device="cpu",
    spare=0, apart=False, shortest=0,
) -> Event:  # fmt: skip
    """Random entries in shuffled blocks, `spare` of them free. Every other slot is NaN; tables end in garbage.

    The layers are a slice of a cache of more, as a compression by groups of layers gives them.

    Args:
        lens: of each request, in every layer and head.
        apart: each layer and head of a request has blocks of its own, and of its entries all, or fewer, or none.
        shortest: entries that those keep, which keep any.
    """
    shape = (layers, len(lens), heads) if apart else (1, len(lens), 1)
    lens = torch.tensor(lens, dtype=torch.int32)[:, None].expand(shape).contiguous()
    if apart:
        fewer = (lens * torch.rand(shape)).int().maximum(lens.clamp(max=shortest))
        kinds = torch.randint(0, 4, shape)
        kinds.view(-1)[0] = 0
        lens = torch.where(kinds == 0, lens, torch.where(kinds == 1, 0, fewer))
    counts = -(-lens // block_size)
    total = int(counts.sum()) + spare + 2
    ids = torch.randperm(total).int()
    tables = torch.full((*shape, int(counts.max()) + 1), GARBAGE, dtype=torch.int32)
    caches = torch.full((2, layers + 2, total, heads, block_size, head_dim), float("nan"))
    first = 0
    for line in product(*map(range, shape)):
        layer, head = (1 + line[0], line[2]) if apart else (slice(None), slice(None))
        tables[line][: counts[line]] = ids[first : first + counts[line]]
        first += int(counts[line])
        for column, block in enumerate(tables[line][: counts[line]].tolist()):
            held = caches[:, layer, block, head, : max(0, int(lens[line]) - column * block_size)]
            held.copy_(torch.randn(held.shape))
    k_cache, v_cache = caches.to(device, dtype)
    tables, lens = tables.to(device), lens.to(device)
    if not apart:
        tables, lens = (shared(x[0, :, 0], heads, layers) for x in (tables, lens))
    free = ids[first : first + spare].to(device)
    return Event(CacheView(k_cache[1:-1], v_cache[1:-1], tables, lens), free)


def scatter(values: Tensor, event: Event) -> Tensor:
    """Lay values [L, R, H, N] out as a per-entry state [L, num_blocks, H, b], NaN (or -7) where no entry is."""
    layers, blocks, heads, block_size = event.k_cache.shape[:4]
    nothing = float("nan") if values.is_floating_point() else -7
    state = torch.full((layers + 2, blocks, heads, block_size), nothing, dtype=values.dtype)
    lens, tables = event.view.lens.cpu(), event.view.block_tables.cpu()
    for layer, row, head in product(*map(range, lens.shape)):
        for slot in range(int(lens[layer, row, head])):
            block = int(tables[layer, row, head, slot // block_size])
            state[1 + layer, block, head, slot % block_size] = values[layer, row, head, slot]
    return state.to(values.device)[1:-1]


def difference(out: Tensor, expected: Tensor) -> float:
    """Largest difference relative to a row's largest number; infinite where NaN is, or infinities are not the same."""
    out, expected = out.cpu().flatten(0, -2), expected.cpu().flatten(0, -2)
    if not torch.equal(out.isinf(), expected.isinf()):
        return float("inf")
    finite = expected.masked_fill(expected.isinf(), 0)
    apart = (out.masked_fill(out.isinf(), 0) - finite).abs().amax(-1) / finite.abs().amax(-1).clamp(min=1e-30)
    return apart.nan_to_num(nan=float("inf")).max().item()
