"""What a swap brings back, and what it leaves alone."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zipage.models.attention import AttentionSpec
from zipage.models.delta_net_spec import DeltaNetSpec
from zipage.models.spec import ModelSpec
from zipage.tile_table import TileTable
from zipage.worker import swap
from zipage.worker.kv_cache import NOWHERE, KVCache
from zipage.worker.recurrent_states import RecurrentStates
from zipage.worker.swap import Swapper

SPEC = SimpleNamespace(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, sliding_layers=())
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
def test_recurrent_states_come_back_in_another_row(device):
    net = DeltaNetSpec(layers=(0, 2), num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=3, taps=3, grouped=False)
    states = RecurrentStates(net, 4, torch.bfloat16, torch.device(device))
    cache = make_cache(torch.bfloat16, device, recurrent=states)
    fill(cache, [7])
    for x in states.tensors:
        x.copy_(torch.randn(x.shape))
    saved = [bits(x[:, 1]) for x in states.tensors]
    swapper = Swapper(cache, 1)
    swapper.begin()
    swapper.save(4, [7], -1, 1)
    swapper.wait()
    states.poison([1])  # by whoever gets the row
    others = [bits(x[:, [0, 1, 2]]) for x in states.tensors]
    swapper.begin()
    swapper.restore(4, [5], 0, -1, 3)
    swapper.wait()
    for x, row, rest in zip(states.tensors, saved, others, strict=True):
        assert torch.equal(bits(x[:, 3]), row)
        assert torch.equal(bits(x[:, [0, 1, 2]]), rest)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_units", [1, 2, 3, 8])
def test_blocks_and_queries_come_back_elsewhere_bit_for_bit(num_units, dtype, device):
    cache = make_cache(dtype, device)
    old, new = [7, 2, 5], [1, 5, 9]
    fill(cache, old, query_slot=3)
    entries = [bits(x[:, old]) for x in cache.entry_tensors]
    queries = bits(cache.queries[:, 3])
    swapper = Swapper(cache, num_units)
    swapper.begin()
    swapper.save(4, old, 3)
    swapper.wait()
    # Whoever gets the blocks next writes to them.
    cache.poison(slice(None))
    cache.poison_queries(slice(None))
    swapper.begin()
    swapper.restore(4, new, 0, 0)
    swapper.wait()
    assert all(torch.equal(bits(x[:, new]), saved) for x, saved in zip(cache.entry_tensors, entries, strict=True))
    assert torch.equal(bits(cache.queries[:, 0]), queries)
    others = [i for i in range(10) if i not in new]
    assert cache.k[:, others].isnan().all()
    assert cache.v[:, others].isnan().all()
    assert cache.scores[0][:, others].isnan().all()
    assert (cache.positions[:, others] == NOWHERE).all()
    assert cache.queries[:, 1:].isnan().all()


@on_every_device
@pytest.mark.parametrize(("num_units", "slabs"), [(1, 3 + 2), (2, 1 + 1)])
def test_blocks_of_sliding_layers_go_with_the_others(num_units, slabs, device):
    """Two layers slide and one does not: a slab takes one block of theirs, or nearly two of its own."""
    make = partial(AttentionSpec, num_heads=4, num_kv_heads=2, head_dim=8, scale=1.0)
    spec = ModelSpec(
        architecture="gpt_oss", vocab_size=9, width=8, mlp_width=8, rms_norm_eps=1e-6, inv_freq=(1.0,) * 4,
        max_position=64, attention=[make(window=window) for window in (20, None, 20)],
    )  # fmt: skip
    cache = KVCache(spec, 10, 16, torch.float32, torch.device(device), positions=True, num_sliding_blocks=9)
    old, new = ([7, 2, 5], [8, 1]), ([1, 5, 9], [2, 8])
    for part, blocks in zip((cache, cache.sliding), old, strict=True):
        part.poison(slice(None))
        fill(part, blocks)
    saved = [[bits(x[:, ids]) for x in part.entry_tensors] for part, ids in zip((cache, cache.sliding), old)]
    swapper = Swapper(cache, num_units)
    swapper.begin()
    swapper.save(4, old[0], -1, sliding_ids=old[1])
    swapper.wait()
    assert len(swapper.copies[4].slabs) == slabs
    cache.poison(slice(None))
    cache.sliding.poison(slice(None))
    swapper.begin()
    swapper.restore(4, new[0], 0, -1, sliding_ids=new[1])
    swapper.wait()
    for part, ids, tensors in zip((cache, cache.sliding), new, saved):
        assert all(torch.equal(bits(x[:, ids]), expected) for x, expected in zip(part.entry_tensors, tensors))
        others = [i for i in range(part.k.shape[1]) if i not in ids]
        assert part.k[:, others].isnan().all()


@on_every_device
@pytest.mark.parametrize("num_units", [1, 2, 4])
def test_leading_blocks_are_left_alone(num_units, device):
    cache = make_cache(torch.float32, device)
    fill(cache, [0, 1, 2])
    swapper = Swapper(cache, num_units)
    swapper.begin()
    swapper.save(0, [0, 1, 2], -1)
    swapper.wait()
    expected = bits(cache.k[:, 2])
    cache.poison(slice(None))
    swapper.begin()
    swapper.restore(0, [3, 4, 5], 2, -1)
    swapper.wait()
    assert cache.k[:, [3, 4]].isnan().all()
    assert torch.equal(bits(cache.k[:, 5]), expected)
    assert cache.queries.isnan().all()


@on_every_device
def test_tiles_come_back_in_other_tiles(device):
    cache = make_cache(torch.float32, device, tiled=True)
    fill(cache, [*range(60)])
    lines = 6
    old = TileTable.of_columns(np.arange(3 * lines).reshape(lines, 3))
    old, _ = old.cut(np.array([48, 16, 33, 1, 20, 48]), 32, 16)
    new = old.like(np.arange(40, 40 + len(old.ids))[::-1])
    saved = [bits(x[:, old.ids.tolist()]) for x in cache.entry_tensors]
    swapper = Swapper(cache, lines)
    swapper.begin()
    swapper.save(0, old, -1)
    swapper.wait()
    cache.poison(slice(0, 40))
    swapper.begin()
    swapper.restore(0, new, 0, -1)
    swapper.wait()
    for x, expected in zip(cache.entry_tensors, saved, strict=True):
        assert torch.equal(bits(x[:, new.ids.tolist()]), expected)


def test_a_table_of_another_length_is_an_error():
    swapper = Swapper(make_cache(torch.float32, "cpu"), 1)
    swapper.save(0, [1, 2], -1)
    with pytest.raises(RuntimeError, match="2 blocks were saved and 1"):
        swapper.restore(0, [3], 0, -1)
    assert swapper.num_free_slabs == 2


@on_every_device
def test_slabs_are_pinned_once_and_used_again(monkeypatch, device):
    monkeypatch.setattr(swap, "PINNED_BYTES", 1)
    cache = make_cache(torch.float32, device)
    fill(cache, [*range(10)])
    swapper = Swapper(cache, 2, num_slabs=3)
    for number, table in enumerate(([0, 1, 2], [3], [4, 5, 6, 7, 8])):
        swapper.save(number, table, -1)
    assert swapper.num_free_slabs == 0, "six are needed, so three more came"
    swapper.drop(0)
    swapper.drop(7)
    assert swapper.num_free_slabs == 2
    swapper.restore(2, [0, 1, 2, 3, 4], 0, -1)
    assert swapper.num_free_slabs == 5
    swapper.wait()


def test_what_fails_keeps_no_slab(monkeypatch):
    swapper = Swapper(make_cache(torch.float32, "cpu"), 1, num_slabs=2)

    def no_memory(*options, **more):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(swap, "to_device", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        swapper.save(0, [1, 2], -1)
    assert swapper.num_free_slabs == 2
    swapper.drop(0)
    assert swapper.num_free_slabs == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are CUDA's")
def test_copies_run_beside_what_is_queued_next_and_before_what_takes_their_blocks():
    cache = make_cache(torch.float32, "cuda")
    fill(cache, [*range(10)])
    expected = bits(cache.k[:, [0, 1, 2, 3]])
    swapper = Swapper(cache, 1)
    for _ in range(20):
        torch.cuda._sleep(10**7)
        swapper.begin()
        swapper.save(0, [0, 1, 2, 3], -1)
        swapper.wait_for([3])
        cache.poison(3)  # the last block is the first to be handed out
        swapper.wait()
        cache.poison(slice(0, 3))
        swapper.begin()
        swapper.restore(0, [0, 1, 2, 3], 0, -1)
        swapper.wait()
        assert torch.equal(bits(cache.k[:, [0, 1, 2, 3]]), expected)
