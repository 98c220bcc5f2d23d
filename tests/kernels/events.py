"""Batches of requests to compress, over several layers, as hostile as the engine's may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.paged import GARBAGE


@dataclass(frozen=True)
class Event:
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    lens: Tensor
    free: Tensor
    """Blocks that no request holds, int32."""

    @property
    def width(self) -> int:
        return self.block_tables.shape[1] * self.k_cache.shape[3]

    def upcast(self) -> Event:
        """The same numbers on the CPU in float32, for the reference."""
        caches = self.k_cache.cpu().float(), self.v_cache.cpu().float()
        return Event(*caches, self.block_tables.cpu(), self.lens.cpu(), self.free.cpu())

    def slots(self) -> Tensor:
        """bool [R, N]: those that hold an entry."""
        return torch.arange(self.width) < self.lens.cpu()[:, None]


def make_event(
    lens: list[int], block_size: int, layers: int, heads: int, head_dim: int, dtype=torch.float32, device="cpu", spare=0
) -> Event:
    """Random entries in shuffled blocks, `spare` of them free. Every other slot is NaN; tables end in garbage.

    The layers are a slice of a cache of more, as a compression by groups of layers gives them.
    """
    counts = [-(-n // block_size) for n in lens]
    total = sum(counts) + spare + 2
    ids = torch.randperm(total).int()
    tables = torch.full((len(lens), max(counts) + 1), GARBAGE, dtype=torch.int32)
    caches = torch.full((2, layers + 2, total, heads, block_size, head_dim), float("nan"))
    first = 0
    for row, (count, length) in enumerate(zip(counts, lens)):
        tables[row, :count] = ids[first : first + count]
        first += count
        for column, block in enumerate(tables[row, :count].tolist()):
            held = min(block_size, length - column * block_size)
            caches[:, :, block, :, :held] = torch.randn(2, layers + 2, heads, held, head_dim)
    k_cache, v_cache = caches.to(device, dtype)
    lens = torch.tensor(lens, dtype=torch.int32, device=device)
    return Event(k_cache[1:-1], v_cache[1:-1], tables.to(device), lens, ids[first : first + spare].to(device))


def scatter(values: Tensor, event: Event) -> Tensor:
    """Lay values [L, R, H, N] out as a per-entry state [L, num_blocks, H, b], NaN (or -7) where no entry is."""
    layers, blocks, heads, block_size = event.k_cache.shape[:4]
    nothing = float("nan") if values.is_floating_point() else -7
    state = torch.full((layers + 2, blocks, heads, block_size), nothing, dtype=values.dtype)
    for row, length in enumerate(event.lens.tolist()):
        for slot in range(length):
            block = int(event.block_tables[row, slot // block_size])
            state[1:-1, block, :, slot % block_size] = values[:, row, :, slot].cpu()
    return state.to(values.device)[1:-1]


def difference(out: Tensor, expected: Tensor) -> float:
    """Largest difference relative to a row's largest number; infinite where NaN is, or infinities are not the same."""
    out, expected = out.cpu().flatten(0, -2), expected.cpu().flatten(0, -2)
    if not torch.equal(out.isinf(), expected.isinf()):
        return float("inf")
    finite = expected.masked_fill(expected.isinf(), 0)
    apart = (out.masked_fill(out.isinf(), 0) - finite).abs().amax(-1) / finite.abs().amax(-1).clamp(min=1e-30)
    return apart.nan_to_num(nan=float("inf")).max().item()
