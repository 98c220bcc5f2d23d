"""The entries of a request, out of their blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def entries_reference(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` entries of a request: [H, length, d] float32."""
    block_size = cache.shape[2]
    tiles = []
    for start in range(0, length, block_size):
        block = int(table[start // block_size])
        tiles.append(cache[block, :, : min(block_size, length - start)])
    return torch.cat(tiles, dim=1).float()


def gather_entries(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` entries of a request: [H, 1, length, d], a view where one block holds them."""
    _, kv_heads, block_size, head_dim = cache.shape
    if length <= block_size:
        return cache[int(table[0]), :, None, :length]
    blocks = table[: (length + block_size - 1) // block_size].long()
    tiles = cache.view(-1, block_size * head_dim)
    index = blocks * kv_heads + torch.arange(kv_heads)[:, None]
    return tiles.index_select(0, index.view(-1)).view(kv_heads, 1, -1, head_dim)[:, :, :length]


def scores_like(k_cache: Tensor, block_tables: Tensor) -> Tensor:
    """Scores of all -inf: float32 [L, R, H, max_blocks * b]."""
    layers, _, kv_heads, block_size, _ = k_cache.shape
    requests, blocks = block_tables.shape
    return torch.full((layers, requests, kv_heads, blocks * block_size), float("-inf"))
