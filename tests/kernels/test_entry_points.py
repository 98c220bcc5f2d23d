import subprocess
import sys

import pytest
import torch

from kernels.attention_score import attention_score, attention_score_reference
from kernels.cache_view import shared
from kernels.compact_stable import compact_stable
from kernels.paged_decode import paged_decode, paged_decode_reference
from kernels.paged_prefill import paged_prefill, paged_prefill_reference
from kernels.pool_scores import pool_scores, pool_scores_reference
from kernels.redundancy import redundancy, redundancy_reference
from kernels.select import select, select_reference
from kernels.store_kv import store_kv, store_kv_reference
from kernels.store_positions import store_positions
from kernels.store_step import store_step
from tests.kernels.events import difference, make_event
from tests.kernels.paged import BOUNDS, DEVICE, error, make_paged, starts, upcast

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from kernels.add_rms_norm import add_rms_norm
from kernels.cache_view import CacheView
from kernels.causal_conv import causal_conv
from kernels.compact_stable import compact_stable
from kernels.copy_blocks import copy_blocks
from kernels.expert_mlp import expert_mlp
from kernels.delta_gates import DeltaGates
from kernels.gated_delta import gated_delta
from kernels.gated_norm import gated_norm
from kernels.linear import linear
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import paged_prefill
from kernels.qk_norm_rope import qk_norm_rope
from kernels.redundancy import redundancy
from kernels.sample_from_logits import sample_from_logits
from kernels.select import select
from kernels.silu_mul import silu_mul
from kernels.spans import Spans
from kernels.store_kv import store_kv
from kernels.store_predictions import store_predictions
from kernels.store_step import store_step
from kernels.route import route
cache, tables, lens = torch.randn(2, 1, 16, 32), torch.ones(1, 1).int(), torch.full((1,), 5).int()
store_kv(torch.randn(1, 1, 32), torch.randn(1, 1, 32), cache, cache, torch.tensor([[20]]))
view = CacheView.shared(cache, cache, tables, lens)
store_predictions(torch.randn(1, 8), torch.ones(1, 8), torch.ones(1), torch.ones(2, 1, 16), torch.tensor([[20]]))
layers = CacheView.shared(cache[None], cache[None], tables, lens)
paged_decode(torch.randn(1, 1, 32), view, 1.0)
paged_prefill(torch.randn(1, 1, 32), view, torch.tensor([0, 1]).int(), 1, 1.0)
copy_blocks(cache[None], cache[None], torch.tensor([0]), torch.tensor([1]))
scores = redundancy(layers, tau=0.4)
forced, keep = torch.zeros(1, 1, 1, 16, dtype=torch.bool), layers.lens - 1
kept = select(scores, forced, layers.lens, keep, 4)
compact_stable(layers, [], kept, layers.block_tables)
normed = add_rms_norm(torch.randn(1, 128), torch.randn(1, 128), torch.ones(128), 1e-6)
q, k, v = qk_norm_rope(normed, None, None, 1e-6, torch.ones(1, 1, 32), torch.zeros(1, 1, 16), 2, 1)
store_step(k, v, q, cache, cache, torch.randn(1, 4, 2, 32), torch.tensor([[20]]), torch.tensor([3]))
shares, experts = route(normed, torch.randn(2, 128), None, 1, True)
expert_mlp(normed, experts, shares, torch.randn(2, 8, 128), torch.randn(2, 128, 4))
spans, heads = Spans(torch.tensor([0]), torch.tensor([0, 1]).int()), normed.view(1, 4, 32)
causal_conv(normed, torch.randn(128, 4), torch.randn(1, 3, 128), spans)
gates = DeltaGates(*torch.randn(2, 1, 4), *torch.randn(2, 4))
gated_norm(gated_delta(heads, heads, heads, gates, torch.randn(1, 4, 32, 32), spans), heads, torch.ones(32), 1e-6)
logits = linear(silu_mul(normed), torch.randn(9, 64))
sample_from_logits(logits, torch.ones(1), torch.full((1,), 0.5, dtype=torch.float64))
"""


def test_runs_on_a_cpu_without_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_a_step_of_a_layer(device):
    """Store the new entries, then prefill one request, then decode it, all through the engine's entry points."""
    view = make_paged([40], 16, 2, 64, torch.float32, device)
    k_cache, v_cache, tables = view.k_cache, view.v_cache, view.block_tables[:, 0]
    bounds = starts([10], device)
    slots = (tables[0, [1, 2]].long()[:, None] * 16 + torch.arange(16, device=device)).flatten()[14:24]
    k, v, q = torch.randn(10, 2, 64), torch.randn(10, 2, 64), torch.randn(10, 6, 64)
    k_ref, v_ref = k_cache.cpu().clone(), v_cache.cpu().clone()
    slots = shared(slots, 2)
    store_kv(k.to(device), v.to(device), k_cache, v_cache, slots)
    store_kv_reference(k, v, k_ref, v_ref, slots.cpu())
    torch.testing.assert_close(k_cache.cpu(), k_ref, rtol=0, atol=0, equal_nan=True)

    host = upcast(view)
    out = paged_prefill(q.to(device), view, bounds, 10, 0.1)
    assert error(out, paged_prefill_reference(q, host, bounds.cpu(), 10, 0.1)) < BOUNDS[torch.float32]
    out = paged_decode(q[:1].to(device), view, 0.1)
    assert error(out, paged_decode_reference(q[:1], host, 0.1)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_a_compression_of_some_layers(device):
    """Zipage's whole event, 75 entries to 32, through the engine's entry points; attention then reads what is left."""
    event = make_event([75], 16, 2, 2, 32, torch.float32, device)
    positions = torch.full(event.k_cache.shape[:4], -1, dtype=torch.int32, device=device)
    stored = torch.zeros(event.k_cache.shape[:4], device=device)
    tables = event.view.block_tables[0, :, 0]
    slots = (tables[0, :5].long()[:, None] * 16 + torch.arange(16, device=device)).flatten()[:75]
    store_positions(torch.arange(75, dtype=torch.int32, device=device), positions, shared(slots, 2, 2))
    q_cache = torch.zeros(2, 3, 16, 6, 32, device=device)
    for layer, k_layer, v_layer in zip(q_cache, event.k_cache, event.v_cache):
        (k, v), q = torch.randn(2, 16, 2, 32, device=device), torch.randn(16, 6, 32, device=device)
        places = 16 + (59 + torch.arange(16, device=device)) % 16
        store_step(k, v, q, k_layer, v_layer, layer, shared(slots[59:], 2), places)
    one, keep = torch.ones(1, dtype=torch.int32, device=device), torch.full((1,), 32, dtype=torch.int32, device=device)
    forced = torch.zeros(1, event.width, dtype=torch.bool, device=device)
    forced[:, 59:75] = True

    def choose(attention_score, pool_scores, redundancy, select, q_cache, view, one, forced, keep):
        score = attention_score(q_cache, view, one, 75 * one, 0.2)
        pooled = pool_scores(score, view.lens, 5, "max", view.lens)
        pooled = 0.2 * pooled - 0.8 * redundancy(view, tau=0.4, chunk=16)
        return score, select(pooled, event.shared(forced), view.lens, event.shared(keep), 32)

    args = one, forced, keep
    score, kept = choose(attention_score, pool_scores, redundancy, select, q_cache, event.view, *args)
    references = attention_score_reference, pool_scores_reference, redundancy_reference, select_reference
    expected_score, expected = choose(*references, q_cache.cpu(), upcast(event.view), *(x.cpu() for x in args))
    assert difference(score, expected_score) < 5e-6
    assert torch.equal(kept.cpu(), expected)

    survivors = [x.cpu().clone() for x in (event.k_cache, event.v_cache)]
    states, updates = [positions, stored], [None, score]
    compact_stable(event.view, states, kept, event.view.block_tables[..., :2], updates)
    blocks = tables[0, :2].long()
    held = positions[:, blocks].transpose(1, 2).flatten(2).cpu()
    assert torch.equal(held, expected[:, 0])
    source = tables[0].cpu().long()
    for layer in range(2):
        for head in range(2):
            where = held[layer, head].long()
            for cache, before in zip((event.k_cache, event.v_cache), survivors):
                now = cache[layer, blocks, head].flatten(0, 1).cpu()
                assert torch.equal(now, before[layer, source[where // 16], head, where % 16])
            scores_now = stored[layer, blocks, head].flatten().cpu()
            assert torch.equal(scores_now, score.cpu()[layer, 0, head, where])
