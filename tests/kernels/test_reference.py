"""The reference against dense attention on tensors that were never paged."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.cache_view import CacheView, shared
from kernels.paged_decode import paged_decode_reference
from kernels.paged_prefill import paged_prefill_reference
from kernels.store_kv import store_kv_reference
from tests.kernels.paged import GARBAGE, error

SCALE = 0.3


def page(dense: list[torch.Tensor], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay [c, H, d] tensors out in blocks, taken from the pool's end backwards, through `store_kv`."""
    _, heads, head_dim = dense[0].shape
    counts = [-(-len(x) // block_size) for x in dense]
    cache = torch.full((sum(counts), heads, block_size, head_dim), float("nan"))
    tables = torch.full((len(dense), max(counts)), GARBAGE, dtype=torch.int32)
    free = sum(counts)
    for row, x in enumerate(dense):
        for column in range(counts[row]):
            free -= 1
            tables[row, column] = free
            part = x[column * block_size : (column + 1) * block_size]
            store_kv_reference(part, part, cache, cache, shared(free * block_size + torch.arange(len(part)), heads))
    return cache, tables


def dense_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q [n, Hq, d] are the last n of the c positions of keys, values [c, H, d]."""
    n, c = len(q), len(keys)
    seen = torch.ones(n, c, dtype=torch.bool).tril(c - n)
    q, keys, values = (x.transpose(0, 1)[None].double() for x in (q, keys, values))
    out = scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=SCALE, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("group", [1, 3])
def test_decode_is_dense_attention_of_the_last_position(block_size, group):
    contexts = [1, 63, 64, 130]
    keys, values = ([torch.randn(n, 2, 32) for n in contexts] for _ in range(2))
    (k_cache, tables), (v_cache, _) = page(keys, block_size), page(values, block_size)
    q, lens = torch.randn(4, 2 * group, 32), torch.tensor(contexts, dtype=torch.int32)
    out = paged_decode_reference(q, CacheView.shared(k_cache, v_cache, tables, lens), SCALE)
    expected = torch.cat([dense_attention(q[r : r + 1], keys[r], values[r]) for r in range(4)])
    assert error(out, expected) < 5e-6


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("group", [1, 3])
def test_prefill_is_dense_causal_attention(block_size, group):
    contexts, queries = [1, 63, 64, 130], [1, 63, 10, 129]
    keys, values = ([torch.randn(n, 2, 32) for n in contexts] for _ in range(2))
    (k_cache, tables), (v_cache, _) = page(keys, block_size), page(values, block_size)
    qs = [torch.randn(n, 2 * group, 32) for n in queries]
    bounds = torch.tensor([0, 1, 64, 74, 203], dtype=torch.int32)
    lens = torch.tensor(contexts, dtype=torch.int32)
    out = paged_prefill_reference(torch.cat(qs), CacheView.shared(k_cache, v_cache, tables, lens), bounds, 129, SCALE)
    expected = torch.cat([dense_attention(q, k, v) for q, k, v in zip(qs, keys, values)])
    assert error(out, expected) < 5e-6


def test_empty_context_gives_zeros():
    cache = torch.full((1, 1, 16, 32), float("nan"))
    tables, lens = torch.full((1, 1), GARBAGE, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert (
        paged_decode_reference(torch.randn(1, 2, 32), CacheView.shared(cache, cache, tables, lens), SCALE).eq(0).all()
    )


def test_store_writes_the_named_slots_only():
    k, v = torch.randn(2, 3, 2, 32)
    k_cache, v_cache = torch.zeros(2, 4, 2, 16, 32)
    store_kv_reference(k, v, k_cache, v_cache, shared(torch.tensor([17, -1, 63]), 2))
    expected = torch.zeros(4, 2, 16, 32)
    expected[1, :, 1], expected[3, :, 15] = k[0], k[2]
    assert torch.equal(k_cache, expected)
    assert torch.equal(v_cache[1, :, 1], v[0])
    assert torch.equal(v_cache[3, :, 15], v[2])
