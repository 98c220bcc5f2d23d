"""What each kernel means, in float32 PyTorch written to be read: the spec, and the oracle of the tests.

Every entry is reached through the block table and by slicing, so nothing past a request's cache length is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layout import PAD_SLOT


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write each token's K and V into its slot.

    Args:
        k, v: [T, H, d].
        k_cache, v_cache: [num_blocks, H, b, d], one layer; written in place.
        slots: int64 [T], `block_id * b + offset`; -1 stores nothing.
    """
    block_size = k_cache.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot == PAD_SLOT:
            continue
        block, offset = divmod(slot, block_size)
        k_cache[block, :, offset] = k[token]
        v_cache[block, :, offset] = v[token]


def paged_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cache_lens: Tensor, scale: float
) -> Tensor:
    """Attention of one query a request over its entries.

    Args:
        q: [B, Hq, d].
        k_cache, v_cache: [num_blocks, H, b, d], one layer.
        block_tables: int32 [B, max_blocks]; read up to ceil(cache_len / b).
        cache_lens: int32 [B], the current token's entry included; 0 gives zeros.
        scale: of the scores, before the softmax.

    Returns:
        [B, Hq, d], q's dtype.
    """
    out = torch.zeros_like(q)
    for row, length in enumerate(cache_lens.tolist()):
        if length == 0:
            continue
        keys = _entries(k_cache, block_tables[row], length)
        values = _entries(v_cache, block_tables[row], length)
        out[row] = _attend(q[row : row + 1], keys, values, scale, first_limit=length)[0]
    return out


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """Causal attention of each request's new queries, which are its last entries, over all its entries.

    Args:
        q: [T, Hq, d], requests one after the other.
        k_cache, v_cache: [num_blocks, H, b, d], one layer.
        block_tables: int32 [B, max_blocks]; read up to ceil(cache_len / b).
        cu_seqlens: int32 [B + 1]; request r's queries are q[cu_seqlens[r] : cu_seqlens[r + 1]].
        cache_lens: int32 [B], the chunk included. Query i of n sees entries 0 .. cache_len - n + i.
        max_seqlen: queries of the longest request.
        scale: of the scores, before the softmax.

    Returns:
        [T, Hq, d], q's dtype.
    """
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for row, length in enumerate(cache_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        keys = _entries(k_cache, block_tables[row], length)
        values = _entries(v_cache, block_tables[row], length)
        out[begin:end] = _attend(q[begin:end], keys, values, scale, first_limit=length - (end - begin) + 1)
    return out


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks in every layer.

    Args:
        k_cache, v_cache: [L, num_blocks, H, b, d], all layers; written in place.
        src, dst: int64 [N]; no block is in both.
    """
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        k_cache[:, target] = k_cache[:, source]
        v_cache[:, target] = v_cache[:, source]


def _entries(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` entries of a request: [H, length, d] float32."""
    block_size = cache.shape[2]
    tiles = []
    for start in range(0, length, block_size):
        block = int(table[start // block_size])
        tiles.append(cache[block, :, : min(block_size, length - start)])
    return torch.cat(tiles, dim=1).float()


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, first_limit: int) -> Tensor:
    """q [n, Hq, d]; keys, values [H, c, d]. Query i sees the first `first_limit + i` entries. Returns [n, Hq, d]."""
    queries, query_heads, _ = q.shape
    group = query_heads // keys.shape[0]
    keys = keys.repeat_interleave(group, dim=0)
    values = values.repeat_interleave(group, dim=0)
    scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * scale
    limits = first_limit + torch.arange(queries, device=q.device)
    hidden = torch.arange(keys.shape[1], device=q.device) >= limits[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(0, 1).to(q.dtype)
