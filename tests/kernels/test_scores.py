"""Attention scores, redundancy and pooling, each against the reference."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from kernels.attention_score import attention_score_reference, attention_score_torch
from kernels.attention_score_triton import attention_score_triton
from kernels.cache_view import shared
from kernels.pool_scores import pool_scores, pool_scores_reference
from kernels.redundancy import redundancy_reference, redundancy_torch
from kernels.redundancy_triton import redundancy_triton
from tests.kernels.events import difference, make_event
from tests.kernels.grid import half
from tests.kernels.paged import BACKENDS, DEVICE, device_of, upcast

SCORE = {"triton": attention_score_triton, "torch": attention_score_torch, "reference": attention_score_reference}
REDUNDANCY = {"triton": redundancy_triton, "torch": redundancy_torch, "reference": redundancy_reference}
BOUNDS = {torch.float32: 5e-6, torch.float16: 2e-5, torch.bfloat16: 2e-5}
"""Products of half-precision numbers are exact in float32: only the order of sums differs."""

KINDS = {
    "zipage": {"softmax": "all", "group": "max", "window": "mean"},
    "snapkv": {"softmax": "all", "group": "mean", "window": "mean"},
    "r_kv": {"softmax": "group_cut", "group": "max", "window": "mean"},
    "r_kv_mean": {"softmax": "group_cut", "group": "mean", "window": "max"},
    "morphkv": {"softmax": "cut", "group": "max", "window": "sum"},
    "morphkv_max": {"softmax": "cut", "group": "max", "window": "max"},
    "vase": {"softmax": "cut", "group": "mean", "window": "mean"},
}


def window_queries(event, window: int, query_heads: int):
    """(query cache, slots, ends): every slot that no request has is NaN."""
    requests, (layers, *_, head_dim) = event.view.lens.shape[1], event.k_cache.shape
    q_cache = torch.full((layers + 2, requests + 3, window, query_heads, head_dim), float("nan"))
    slots = torch.randperm(requests + 3)[:requests]
    q_cache[:, slots] = torch.randn(layers + 2, requests, window, query_heads, head_dim)
    ends = event.view.lens.cpu().amax((0, 2)).clamp(min=window) + 7 * torch.arange(requests)
    device = event.k_cache.device
    q_cache = q_cache.to(device, event.k_cache.dtype)[1:-1]
    return q_cache, slots.int().to(device), ends.int().to(device)


def check_score(score, event, window, group_size, kind, bound=None, **form):
    q_cache, slots, ends = window_queries(event, window, event.k_cache.shape[2] * group_size)
    scale = 2 * event.k_cache.shape[-1] ** -0.5
    out = score(q_cache, event.view, slots, ends, scale, **KINDS[kind], **form)
    assert out.dtype == torch.float32
    host = q_cache.cpu().float(), upcast(event.view), slots.cpu(), ends.cpu(), scale
    expected = attention_score_reference(*host, **KINDS[kind], **on_host(form))
    assert difference(out, expected) < (bound or BOUNDS[event.k_cache.dtype])


def made_form(event, query_heads: int) -> dict:
    """A soft cap that most logits feel, and sinks of about the logits' size, in the caches' dtype."""
    sinks = 2 * torch.randn(len(event.k_cache), query_heads)
    return {"soft_cap": 2.0, "sinks": sinks.to(event.k_cache)}


def on_host(form: dict) -> dict:
    return form | {"sinks": form["sinks"].cpu().float()} if form else form


@pytest.mark.usefixtures("poisoned_empty")
@half(
    (("backend", "dtype"), BACKENDS),
    (
        ("lens", "block_size", "layers", "heads", "group", "head_dim", "window", "kind"),
        [
            pytest.param([37, 0, 16, 70], 16, 2, 1, 3, 40, 16, "zipage", id="mixed-b16-g3-zipage"),
            pytest.param([130], 64, 1, 1, 4, 64, 8, "snapkv", id="b64-g4-snapkv"),
            pytest.param([70, 257], 256, 1, 2, 1, 64, 16, "r_kv", id="b256-mha-r_kv"),
            pytest.param([100, 33], 64, 1, 1, 7, 32, 5, "r_kv", id="b64-g7-w5-r_kv"),
            pytest.param([61, 40], 16, 1, 1, 3, 32, 33, "r_kv_mean", id="b16-g3-w33-r_kv_mean"),
            pytest.param([50, 16], 16, 1, 2, 2, 32, 16, "morphkv", id="no-past-morphkv"),
            pytest.param([90], 64, 1, 1, 4, 32, 40, "morphkv_max", id="b64-g4-w40-morphkv_max"),
            pytest.param([80, 20], 64, 1, 1, 5, 32, 1, "vase", id="b64-g5-w1-vase"),
        ],
    ),
    ("apart", [pytest.param(False, id="shared"), pytest.param(True, id="apart")]),
)
def test_attention_score(backend, dtype, apart, lens, block_size, layers, heads, group, head_dim, window, kind):
    device, heads = device_of(backend), heads + apart
    event = make_event(lens, block_size, layers, heads, head_dim, dtype, device, apart=apart, shortest=window)
    check_score(SCORE[backend], event, window, group, kind)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("kind", ["zipage", "r_kv_mean", "morphkv_max"])
def test_soft_caps_and_sinks(backend, dtype, kind):
    """One request is no longer than the window: where the past alone is scored, the sink has all of its softmax."""
    event = make_event([37, 0, 9], 16, 2, 2, 32, dtype, device_of(backend), shortest=9)
    check_score(SCORE[backend], event, 9, 3, kind, **made_form(event, 6))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_sink_takes_the_share_of_a_key_that_is_not_scored(backend):
    """Of a query whose logits are all 0, e^x of n + e^x. None, and one that takes nothing, are the same."""
    event = make_event([20], 16, 1, 1, 32, torch.float32, device_of(backend))
    q_cache, slots, ends = window_queries(event, 4, 2)
    args = event.view, slots, ends, 1.0
    sinks = torch.tensor([[1.0, 2.0]], device=event.k_cache.device)
    for kind, sink in (("morphkv_max", 1.0), ("r_kv", 2.0)):  # the larger share; the larger sink of the group
        scores = SCORE[backend](torch.zeros_like(q_cache), *args, **KINDS[kind], sinks=sinks)[0, 0, 0, :16].cpu()
        expected = torch.full((16,), 1 / (16 + torch.tensor(sink).exp().item()))
        torch.testing.assert_close(scores, expected)
    none = SCORE[backend](q_cache, *args, **KINDS["zipage"])
    idle = SCORE[backend](q_cache, *args, **KINDS["zipage"], sinks=torch.full_like(sinks, -1e4))
    assert difference(idle, none) < 1e-6


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize("kind", ["zipage", "r_kv"])
def test_splits_change_nothing(num_splits, kind):
    event = make_event([230, 17], 64, 1, 1, 32, torch.float32, DEVICE)

    def score(*args, **kinds):
        return attention_score_triton(*args, **kinds, num_splits=num_splits)

    check_score(score, event, 16, 3, kind, **(made_form(event, 3) if num_splits == 3 else {}))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_large_logits_stay_finite(backend):
    event = make_event([60], 16, 1, 1, 64, torch.float32, device_of(backend))
    event = replace(event, view=event.view._replace(k_cache=event.k_cache * 100))
    check_score(SCORE[backend], event, 16, 2, "zipage", bound=1e-3)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_score_properties(backend):
    """What policies.md promises: SnapKV's scores sum to 1; Zipage's to at least 1; a group's order means nothing."""
    event = make_event([70], 16, 1, 1, 32, torch.float32, device_of(backend))
    q_cache, slots, ends = window_queries(event, 16, 4)
    args = event.view, slots, ends, 1.0
    snapkv = SCORE[backend](q_cache, *args, **KINDS["snapkv"])[0, 0, 0, :70]
    assert abs(snapkv.sum().item() - 1) < 1e-5
    zipage = SCORE[backend](q_cache, *args, **KINDS["zipage"])
    assert zipage[0, 0, 0, :70].sum() >= 1
    flipped = SCORE[backend](q_cache.flip(3), *args, **KINDS["zipage"])
    assert difference(flipped, zipage) < 1e-6
    cut = SCORE[backend](q_cache, *args, **KINDS["vase"])[0, 0, 0]
    assert abs(cut[:54].sum().item() - 1) < 1e-5
    assert cut[54:].eq(float("-inf")).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_layers_and_requests_do_not_depend_on_company(backend):
    event = make_event([64, 23, 48], 64, 3, 1, 16, torch.float32, device_of(backend))
    q_cache, slots, ends = window_queries(event, 8, 4)
    together = SCORE[backend](q_cache, event.view, slots, ends, 0.3)
    repeated = REDUNDANCY[backend](event.view, tau=0.4, chunk=32)
    for layer in range(3):
        one = slice(layer, layer + 1)
        alone = SCORE[backend](q_cache[one], event.view.layers(layer, layer + 1), slots, ends, 0.3)
        assert torch.equal(alone, together[one])
        alone = REDUNDANCY[backend](event.view.layers(layer, layer + 1), tau=0.4, chunk=32)
        assert torch.equal(alone, repeated[one])
    for row in range(3):
        one = slice(row, row + 1)
        view = event.view._replace(block_tables=event.view.block_tables[:, one], lens=event.view.lens[:, one])
        alone = SCORE[backend](q_cache, view, slots[one], ends[one], 0.3)
        assert difference(alone, together[:, one]) < 1e-6
        alone = REDUNDANCY[backend](view, tau=0.4, chunk=32)
        assert difference(alone, repeated[:, one]) < 1e-6


def cluster(event, slots: list[int], row: int = 0, noise: float = 0.02) -> None:
    """Make the keys of some slots near-duplicates, of different lengths."""
    block_size, head_dim = event.k_cache.shape[3:]
    direction = torch.randn(event.k_cache.shape[0], event.k_cache.shape[2], head_dim)
    for i, slot in enumerate(slots):
        key = (1 + i) * (direction + noise * torch.randn_like(direction))
        for layer, head in product(range(len(key)), range(key.shape[1])):
            if slot < event.view.lens[layer, row, head]:
                block = int(event.view.block_tables[layer, row, head, slot // block_size])
                event.k_cache[layer, block, head, slot % block_size] = key[layer, head].to(event.k_cache)


@pytest.mark.usefixtures("poisoned_empty")
@half(
    (("backend", "dtype"), BACKENDS),
    (
        ("lens", "block_size", "layers", "heads", "head_dim", "chunk"),
        [
            pytest.param([70, 0, 33], 16, 2, 2, 64, 32, id="mixed-b16-chunk32"),
            pytest.param([150], 64, 1, 1, 80, 64, id="b64-d80-chunk64"),
            pytest.param([40, 90], 256, 1, 2, 64, 16, id="b256-chunk16"),
            pytest.param([300], 64, 1, 1, 128, 256, id="b64-d128-chunk256"),
            pytest.param([100, 21], 64, 1, 2, 64, None, id="b64-full"),
            pytest.param([1, 2], 16, 1, 1, 32, None, id="b16-full-tiny"),
        ],
    ),
    ("apart", [pytest.param(False, id="shared"), pytest.param(True, id="apart")]),
)
def test_redundancy(backend, dtype, apart, lens, block_size, layers, heads, head_dim, chunk):
    device, heads = device_of(backend), heads + apart
    event = make_event(lens, block_size, layers, heads, head_dim, dtype, device, apart=apart)
    if lens[0] > 40:
        cluster(event, [0, 5, 9, 31, 40])
        cluster(event, [lens[0] - 1, 12])
    out = REDUNDANCY[backend](event.view, tau=0.05, chunk=chunk)
    expected = redundancy_reference(upcast(event.view), tau=0.05, chunk=chunk)
    assert difference(out, expected) < 2e-5


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("chunk", [16, 64])
def test_triton_chunks_either_way(chunk):
    """Chunks too large for one program take the way of whole requests."""
    event = make_event([75, 130], 16, 1, 1, 32, torch.float32, DEVICE)
    cluster(event, [3, 9, 70, 71, 74])
    split = redundancy_triton(event.view, tau=0.1, chunk=chunk, fused=False)
    assert difference(split, redundancy_triton(event.view, tau=0.1, chunk=chunk)) < 5e-6


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("sums", [[0, 0], [2, 1, 0], [4, 4, 4, 3, 0]], ids=lambda sums: f"{len(sums)}-copies")
@pytest.mark.parametrize("first", [2, 40])
def test_cluster_sums(backend, chunk, sums, first):
    """Identical keys among orthogonal ones: the youngest is free, the second youngest gets one pair off."""
    event = make_event([64], 16, 1, 1, 64, torch.float32, device_of(backend))
    slots = [first + 4 * i for i in range(len(sums))]
    keys = torch.eye(64)
    keys[slots] = keys[slots[0]].clone()
    for slot in range(64):
        event.k_cache[0, int(event.view.block_tables[0, 0, 0, slot // 16]), 0, slot % 16] = keys[slot] * (1 + slot)
    out = REDUNDANCY[backend](event.view, tau=0.5, chunk=chunk)[0, 0, 0, :64].cpu()
    raw = torch.zeros(64)
    raw[slots] = torch.tensor(sums, dtype=torch.float32)
    torch.testing.assert_close(out, (raw / (0.5 * 64)).softmax(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_chunk_of_a_short_request_is_all_of_it(backend):
    event = make_event([110], 64, 1, 1, 32, torch.float32, device_of(backend))
    cluster(event, [1, 70, 109])
    full = REDUNDANCY[backend](event.view, tau=0.4)
    assert difference(REDUNDANCY[backend](event.view, tau=0.4, chunk=256), full) < 2e-6


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_keys_are_compared_by_direction_only(backend):
    event = make_event([48], 16, 1, 1, 32, torch.float32, device_of(backend))
    cluster(event, [1, 30, 44])
    scaled = event.k_cache * (0.1 + torch.rand(event.k_cache.shape[:4]).to(event.k_cache)[..., None])
    one, other = (
        REDUNDANCY[backend](view, tau=0.1, chunk=16) for view in (event.view, event.view._replace(k_cache=scaled))
    )
    assert difference(one, other) < 5e-6


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_keys_of_zero_are_nothing_like_others(backend):
    event = make_event([20], 16, 1, 1, 32, torch.float32, device_of(backend))
    out = REDUNDANCY[backend](event.view._replace(k_cache=torch.zeros_like(event.k_cache)), tau=0.1, chunk=16)
    torch.testing.assert_close(out[..., :20].cpu(), torch.full((1, 1, 1, 20), 1 / 20))


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("width", [1, 5, 7])
@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
def test_pool(device, apart, kind, width):
    lens = torch.tensor([40, 3, 0, 25], dtype=torch.int32)
    limit = torch.tensor([32, 3, 5, 100], dtype=torch.int32)
    if apart:
        lens, limit = (x[:, None] * torch.rand(2, 4, 3) for x in (lens, limit))
        lens, limit = lens.int(), limit.int()
    else:
        lens, limit = shared(lens, 3, 2), shared(limit, 3, 2)
    scores = torch.randn(2, 4, 3, 48).masked_fill(torch.arange(48) >= lens[..., None], float("-inf"))
    out = pool_scores(*(x.to(device) for x in (scores, lens)), width, kind, limit.to(device))
    expected = pool_scores_reference(scores, lens, width, kind, limit)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_pool_at_the_ends():
    scores, lens = torch.tensor([5.0, 0, 0, 0, 0, 10, 7]).view(1, 1, 1, 7), torch.tensor([[[7]]], dtype=torch.int32)
    limit = torch.tensor([[[6]]], dtype=torch.int32)
    out = pool_scores_reference(scores, lens, 5, "avg", limit).flatten().tolist()
    assert out == [1, 1, 1, 2, 2, 2, 7]
    out = pool_scores_reference(scores, lens, 5, "max", limit).flatten().tolist()
    assert out == [5, 5, 5, 10, 10, 10, 7]
