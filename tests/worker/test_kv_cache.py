"""The tensors of the cache: those that are asked for, and poison."""

from types import SimpleNamespace

import torch

from zipage.worker.kv_cache import NOWHERE, KVCache

TINY = SimpleNamespace(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, sliding_layers=())


def test_what_is_not_asked_for_is_not_there():
    cache = KVCache(TINY, 3, 16, torch.float32, torch.device("cpu"), num_query_slots=4)
    assert cache.positions is cache.queries is None
    assert cache.scores == []
    assert len(cache.entry_tensors) == 2
    cache.poison(slice(None))
    cache.poison_queries(0)
    assert cache.v.isnan().all()


def test_poison_covers_all_that_a_block_holds_from_a_slot_on():
    cache = KVCache(
        TINY, 4, 16, torch.bfloat16, torch.device("cpu"), positions=True, scores=True, num_query_slots=2, window=5
    )
    for x in (*cache.entry_tensors, cache.queries):
        x.zero_()
    cache.poison(2, 5)
    cache.poison_queries(1)
    for x in (cache.k[..., 0], cache.v[..., 7], *cache.scores, cache.positions == NOWHERE):
        bad = x if x.dtype == torch.bool else x.isnan()
        assert bad[:, 2, :, 5:].all()
        assert bad.sum() == 2 * 2 * 11
    assert cache.queries[:, 1].isnan().all()
    assert (cache.queries[:, 0] == 0).all()
