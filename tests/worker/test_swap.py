"""What a swap brings back, and what it leaves alone."""

from types import SimpleNamespace

import pytest
import torch

from zipage.worker.kv_cache import NOWHERE, KVCache
from zipage.worker.swap import restore, save

SPEC = SimpleNamespace(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()

on_every_device = pytest.mark.parametrize("device", DEVICES)


def make_cache(dtype, device, **options) -> KVCache:
    options = {"positions": True, "scores": True, "predictions": True, "num_query_slots": 4, "window": 5} | options
    cache = KVCache(SPEC, 10, 16, dtype, torch.device(device), **options)
    cache.poison(slice(None))
    cache.poison_queries(slice(None))
    return cache


def fill(cache: KVCache, blocks: list[int], query_slot: int | None = None) -> None:
    """Random entries, with a slot of NaN such as a request's last block has."""
    for x in cache.entry_tensors:
        for block in blocks:
            x[:, block] = torch.randint(0, 1000, x[:, block].shape, device=x.device).to(x.dtype)
    cache.poison(blocks[-1], 11)
    if query_slot is not None:
        cache.queries[:, query_slot] = torch.randn(cache.queries[:, 0].shape).to(cache.queries)


def bits(x: torch.Tensor) -> torch.Tensor:
    """A copy whose NaNs compare."""
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32).clone()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_and_queries_come_back_elsewhere_bit_for_bit(dtype, device):
    cache = make_cache(dtype, device)
    old, new = [7, 2, 5], [1, 5, 9]
    fill(cache, old, query_slot=3)
    entries = [bits(x[:, old]) for x in cache.entry_tensors]
    queries = bits(cache.queries[:, 3])
    copy = save(cache, old, 3)
    # Whoever gets the blocks next writes to them.
    cache.poison(slice(None))
    cache.poison_queries(slice(None))
    restore(cache, copy, new, 0, 0)
    assert all(torch.equal(bits(x[:, new]), saved) for x, saved in zip(cache.entry_tensors, entries, strict=True))
    assert torch.equal(bits(cache.queries[:, 0]), queries)
    others = [i for i in range(10) if i not in new]
    assert cache.k[:, others].isnan().all()
    assert cache.v[:, others].isnan().all()
    assert cache.scores[0][:, others].isnan().all()
    assert (cache.positions[:, others] == NOWHERE).all()
    assert cache.queries[:, 1:].isnan().all()


@on_every_device
def test_leading_blocks_are_left_alone(device):
    cache = make_cache(torch.float32, device)
    fill(cache, [0, 1, 2])
    copy = save(cache, [0, 1, 2], -1)
    expected = bits(cache.k[:, 2])
    cache.poison(slice(None))
    restore(cache, copy, [3, 4, 5], 2, -1)
    assert cache.k[:, [3, 4]].isnan().all()
    assert torch.equal(bits(cache.k[:, 5]), expected)
    assert cache.queries.isnan().all()


def test_a_table_of_another_length_is_an_error():
    cache = make_cache(torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="2 blocks were saved and 1"):
        restore(cache, save(cache, [1, 2], -1), [3], 0, -1)
