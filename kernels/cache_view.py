"""Where the entries of requests lie: K and V, and block tables and lengths that may differ by layer and KV head.

A kernel that reads or moves entries takes a view and its strides. What every layer or head has in common is expanded:
one copy in memory, reached with a stride of 0 (`shared`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.layout import check_all_layers, check_caches, check_index, check_numbers


class CacheView(NamedTuple):
    """The entries of R requests in L layers, or in one: then no tensor has the dimension L.

    Attributes:
        k_cache, v_cache: [L, num_blocks, H, b, d], each layer contiguous; float32, float16 or bfloat16.
        block_tables: int32 [L, R, H, max_blocks], last dimension contiguous; never read past ceil(n / b).
        lens: int32 [L, R, H], n: entries of each request in each layer and head.
    """

    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    lens: Tensor

    @classmethod
    def shared(cls, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, lens: Tensor) -> CacheView:
        """A view in which tables [R, max_blocks] and lengths [R] are those of every layer and head."""
        layers = k_cache.shape[0] if k_cache.dim() == 5 else None
        heads = k_cache.shape[-3]
        return cls(k_cache, v_cache, shared(block_tables, heads, layers), shared(lens, heads, layers))

    def layer(self, index: int) -> CacheView:
        """One layer."""
        return CacheView(*(x[index] for x in self))

    def layers(self, first: int, last: int) -> CacheView:
        """Layers first .. last-1."""
        return CacheView(*(x[first:last] for x in self))

    @property
    def width(self) -> int:
        """Entries that a block table has room for: N = max_blocks * b."""
        return self.block_tables.shape[-1] * self.k_cache.shape[-2]

    @property
    def heads_differ(self) -> bool:
        """Whether tables or lengths are stored for each head."""
        return self.lens.shape[-1] > 1 and (self.lens.stride(-1) != 0 or self.block_tables.stride(-2) != 0)

    def head_groups(self) -> list[slice]:
        """The heads that share tables and lengths: all of them, or each alone."""
        heads = self.lens.shape[-1]
        return [slice(h, h + 1) for h in range(heads)] if self.heads_differ else [slice(0, heads)]

    def lines(self) -> Iterator[tuple[int, int, slice, int, Tensor]]:
        """What has entries, of all layers: layer, request, heads that share what follows, n, block table."""
        lengths = self.lens.tolist()
        for heads in self.head_groups():
            for layer, tables in enumerate(self.block_tables[:, :, heads.start].unbind()):
                for row, table in enumerate(tables.unbind()):
                    length = lengths[layer][row][heads.start]
                    if length:
                        yield layer, row, heads, length, table

    def by_head(self) -> CacheView:
        """Of one layer: each request and head as a request of its own, in a cache of one KV head."""
        blocks, heads, block_size, head_dim = self.k_cache.shape
        tables = self.block_tables.long() * heads + torch.arange(heads, device=self.lens.device)[:, None]
        caches = (x.view(blocks * heads, 1, block_size, head_dim) for x in (self.k_cache, self.v_cache))
        return CacheView(*caches, tables.flatten(0, 1)[:, None], self.lens.reshape(-1, 1))


def shared(x: Tensor, heads: int, layers: int | None = None) -> Tensor:
    """`x` [R, ...] as [R, H, ...], or as [L, R, H, ...]: the same for every head and layer, not copied."""
    sizes, strides = (x.shape[0], heads, *x.shape[1:]), (x.stride(0), 0, *x.stride()[1:])
    if layers is not None:
        sizes, strides = (layers, *sizes), (0, *strides)
    return x.as_strided(sizes, strides)  # one call of torch, where `unsqueeze` and `expand` are two


def once(x: Tensor) -> Tensor:
    """`x` with a single place in each dimension that it is expanded along: the same values, broadcast."""
    strides = x.stride()
    return x.as_strided([size if stride else 1 for size, stride in zip(x.shape, strides)], strides)


def groups(x: Tensor, dim: int) -> list[slice]:
    """What shares the values of `x` along a dimension: all of it where `x` is expanded, or each place alone."""
    size = x.shape[dim]
    return [slice(i, i + 1) for i in range(size)] if x.stride(dim) else [slice(0, size)]


def look_up(x: Tensor, *index: Tensor) -> Tensor:
    """`x[index]`, without the dimensions that `x` is expanded along."""
    own = [dim for dim, stride in enumerate(x.stride()) if stride]
    some = x.as_strided([x.shape[dim] for dim in own], [x.stride(dim) for dim in own])
    return some[tuple(index[dim] for dim in own)]


def check_view(view: CacheView, all_layers: bool) -> None:
    """Check a view of all layers, or of one. Raises ValueError naming the field, its value and the remedy."""
    k_cache, v_cache, block_tables, lens = view
    if all_layers:
        check_all_layers(k_cache, v_cache)
    else:
        check_caches(k_cache, v_cache)
    requests = lens.shape[-2] if lens.dim() > 1 else -1
    max_blocks = block_tables.shape[-1] if block_tables.dim() else -1
    lines = *k_cache.shape[:-4], requests, k_cache.shape[-3]
    check_numbers("lens", lens, torch.int32, lines, k_cache.device)
    check_index("block_tables", block_tables, torch.int32, (*lines, max_blocks), k_cache.device)


def entries_reference(cache: Tensor, table: Tensor, length: int, head: int) -> Tensor:
    """The first `length` entries of a request and head of one layer: [length, d] float32, block by block."""
    block_size = cache.shape[2]
    tiles = []
    for start in range(0, length, block_size):
        block = int(table[start // block_size])
        tiles.append(cache[block, head, : min(block_size, length - start)])
    return torch.cat(tiles).float()


def gather_entries(cache: Tensor, table: Tensor, length: int, heads: slice) -> Tensor:
    """The first `length` entries of a request in some heads of one layer, that share its table [max_blocks].

    Returns:
        [heads, 1, length, d], a view where one block holds them.
    """
    _, kv_heads, block_size, head_dim = cache.shape
    count = heads.stop - heads.start
    if length <= block_size:
        return cache[int(table[0]), heads, None, :length]
    blocks = table[: (length + block_size - 1) // block_size].long()
    tiles = cache.view(-1, block_size * head_dim)
    index = blocks * kv_heads + torch.arange(heads.start, heads.stop)[:, None]
    return tiles.index_select(0, index.view(-1)).view(count, 1, -1, head_dim)[:, :, :length]


def scores_like(view: CacheView) -> Tensor:
    """Scores of all -inf: float32 [L, R, H, N]."""
    return torch.full((*view.lens.shape, view.width), float("-inf"), device=view.lens.device)
