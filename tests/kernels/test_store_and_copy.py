"""Stores and copies are exact, and touch nothing else."""

import pytest
import torch

from kernels.cache_view import shared
from kernels.copy_blocks import copy_blocks_reference, copy_blocks_torch
from kernels.copy_blocks_triton import copy_blocks_triton
from kernels.store_kv import store_kv_reference, store_kv_torch
from kernels.store_kv_triton import store_kv_triton
from tests.kernels.paged import BACKENDS, device_of, fused

STORE = {"triton": store_kv_triton, "torch": store_kv_torch}
COPY = {"triton": copy_blocks_triton, "torch": copy_blocks_torch}


def assert_same(actual, expected):
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("block_size", "heads", "head_dim", "slots"),
    [
        pytest.param(16, 3, 64, [5, 16, -1, 31, 79, 40], id="b16-d64-padding"),
        pytest.param(64, 1, 80, [0, 319], id="b64-d80-ends"),
        pytest.param(256, 20, 128, [300, 299, 1279], id="b256-d128-many-heads"),
        pytest.param(16, 2, 96, [-1, -1], id="b16-d96-nothing"),
        pytest.param(16, 2, 96, [], id="b16-d96-no-tokens"),
    ],
)
def test_store(backend, dtype, block_size, heads, head_dim, slots):
    device = device_of(backend)
    k, v = (fused(len(slots), heads, head_dim, dtype, device) for _ in range(2))
    layers = torch.full((2, 3, 5, heads, block_size, head_dim), float("nan"), dtype=dtype, device=device)
    expected = layers.clone()
    index = torch.tensor(slots, dtype=torch.int64, device=device)
    # The heads share their slots; or each has its own, and padding at tokens of its own.
    apart = torch.stack([index.roll(h) for h in range(heads)], dim=1)
    for own in (shared(index, heads), apart):
        STORE[backend](k, v, layers[0, 1], layers[1, 1], own)
        store_kv_reference(k, v, expected[0, 1], expected[1, 1], own)
        assert_same(layers, expected)
        layers.fill_(float("nan"))
        expected.fill_(float("nan"))


def test_reference_stores_each_head_where_it_says():
    k, v = torch.randn(2, 3, 2, 8)
    k_cache, v_cache = torch.zeros(2, 2, 2, 16, 8)
    store_kv_reference(k, v, k_cache, v_cache, torch.tensor([[3, 17], [-1, 0], [31, -1]]))
    expected = torch.zeros_like(v_cache)
    expected[0, 0, 3], expected[1, 1, 1], expected[0, 1, 0], expected[1, 0, 15] = v[0, 0], v[0, 1], v[1, 1], v[2, 0]
    assert torch.equal(v_cache, expected)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(
    ("block_size", "heads", "head_dim", "pairs"),
    [
        pytest.param(16, 3, 80, [(4, 0), (1, 3)], id="b16-d80"),
        pytest.param(256, 2, 64, [(2, 4), (2, 1), (0, 3)], id="b256-d64-one-source-twice"),
        pytest.param(16, 1, 32, [], id="nothing"),
    ],
)
def test_copy(backend, dtype, block_size, heads, head_dim, pairs):
    device = device_of(backend)
    caches = torch.randn(2, 3, 5, heads, block_size, head_dim).to(device, dtype)
    expected = caches.clone()
    src, dst = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2).T.contiguous()
    COPY[backend](caches[0], caches[1], src, dst)
    copy_blocks_reference(expected[0], expected[1], src, dst)
    assert_same(caches, expected)
