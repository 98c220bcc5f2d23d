"""The paged cache's layout: what a valid argument of a kernel is.

One layer's K (or V) is `[num_blocks, kv_head, slot, head_dim]`, contiguous. The checks read shapes,
strides and dtypes only: they never wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAD_SLOT = -1
"""Slot of a token whose K and V are stored nowhere."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256
STATE_DTYPES = (torch.int32, torch.float32)
MAX_WIDTH = 16384
"""Of a hidden state: a program of `add_rms_norm` holds a whole row."""


def check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Check the arguments of `store_kv`. Raises ValueError naming the argument, its value and the remedy."""
    _check_caches(k_cache, v_cache)
    heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[1] != heads or x.shape[2] != head_dim:
            _fail(name, "shape", tuple(x.shape), f"give [tokens, {heads}, {head_dim}], as the cache has them")
        _check_values(name, x, k_cache)
    if v.shape[0] != k.shape[0]:
        _fail("v", "shape", tuple(v.shape), f"give {k.shape[0]} tokens, as k has")
    _check_index("slots", slots, torch.int64, (k.shape[0],), k_cache.device)


def check_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cache_lens: Tensor) -> None:
    """Check the arguments of `paged_decode`. Raises ValueError naming the argument, its value and the remedy."""
    _check_caches(k_cache, v_cache)
    _check_queries(q, k_cache)
    _check_tables(block_tables, q.shape[0], k_cache.device)
    _check_index("cache_lens", cache_lens, torch.int32, (q.shape[0],), k_cache.device)


def check_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
) -> None:
    """Check the arguments of `paged_prefill`. Raises ValueError naming the argument, its value and the remedy."""
    _check_caches(k_cache, v_cache)
    _check_queries(q, k_cache)
    _check_index("cache_lens", cache_lens, torch.int32, (-1,), k_cache.device)
    batch = cache_lens.shape[0]
    _check_index("cu_seqlens", cu_seqlens, torch.int32, (batch + 1,), k_cache.device)
    _check_tables(block_tables, batch, k_cache.device)
    if not isinstance(max_seqlen, int) or not 0 <= max_seqlen <= q.shape[0]:
        _fail("max_seqlen", "value", max_seqlen, f"give the longest request's queries, an int up to {q.shape[0]}")


def check_copy(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Check the arguments of `copy_blocks`. Raises ValueError naming the argument, its value and the remedy."""
    _check_all_layers(k_cache, v_cache)
    _check_index("src", src, torch.int64, (src.numel(),), k_cache.device)
    _check_index("dst", dst, torch.int64, (src.numel(),), k_cache.device)


def check_store_positions(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """Check the arguments of `store_positions`. Raises ValueError naming the argument, its value and the remedy."""
    if state.dim() != 4 or state.shape[3] not in BLOCK_SIZES:
        _fail("state", "shape", tuple(state.shape), "give [layers, num_blocks, heads, slots], 16 to 256 slots")
    _check_state("state", state, tuple(state.shape), (torch.int32,), state.device)
    _check_index("positions", positions, torch.int32, (positions.numel(),), state.device, "state")
    _check_index("slots", slots, torch.int64, (positions.numel(),), state.device, "state")


def check_store_step(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_cache: Tensor,
    slots: Tensor,
    indices: Tensor,
) -> None:
    """Check the arguments of `store_step`. Raises ValueError naming the argument, its value and the remedy."""
    check_store(k, v, k_cache, v_cache, slots)
    if q_cache.dim() != 4 or 0 in q_cache.shape[1:]:
        _fail("q_cache", "shape", tuple(q_cache.shape), "give one layer, [slots, window, heads, head_dim]")
    _check_like("q_cache", q_cache, k_cache)
    if not q_cache.is_contiguous():
        _fail("q_cache", "stride", q_cache.stride(), "make the layer contiguous")
    heads, head_dim = q_cache.shape[2:]
    if q.dim() != 3 or tuple(q.shape[1:]) != (heads, head_dim):
        _fail("q", "shape", tuple(q.shape), f"give [tokens, {heads}, {head_dim}], as the cache has them")
    _check_values("q", q, q_cache, "q_cache")
    _check_index("indices", indices, torch.int64, (q.shape[0],), q_cache.device, "q_cache")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        _fail("q", "shape", tuple(q.shape), f"give {k.shape[0]} tokens of {k.shape[2]} dimensions, as k has")


def check_add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor) -> None:
    """Check the arguments of `add_rms_norm`. Raises ValueError naming the argument, its value and the remedy."""
    tokens, width = _check_rows("hidden", hidden)
    if width > MAX_WIDTH:
        _fail("hidden", "width", width, f"use up to {MAX_WIDTH}")
    if delta is not None:
        _check_index("delta", delta, hidden.dtype, (tokens, width), hidden.device, "hidden")
    _check_index("weight", weight, hidden.dtype, (width,), hidden.device, "hidden")


def check_silu_mul(gate_up: Tensor) -> None:
    """Check the argument of `silu_mul`. Raises ValueError naming it, its value and the remedy."""
    width = _check_rows("gate_up", gate_up)[1]
    if width % 2:
        _fail("gate_up", "width", width, "give as many columns of up as of gate")


def check_qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    """Check the arguments of `qk_norm_rope`. Raises ValueError naming the argument, its value and the remedy."""
    tokens, width = _check_rows("qkv", qkv)
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if not isinstance(count, int) or count < 1:
            _fail(name, "value", count, "give an int from 1")
    head_dim, left_over = divmod(width, num_heads + 2 * num_kv_heads)
    if left_over or head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        heads = num_heads + 2 * num_kv_heads
        _fail("qkv", "width", width, f"give {heads} heads of one even head_dim up to {MAX_HEAD_DIM}")
    for name, x, columns in (("cos", cos, head_dim), ("sin", sin, head_dim // 2)):
        _check_index(name, x, torch.float32, (tokens, 1, columns), qkv.device, "qkv")
        if not x.is_contiguous():
            _fail(name, "stride", x.stride(), "make it contiguous")
    if (q_weight is None) != (k_weight is None):
        _fail("k_weight", "value", "None" if k_weight is None else "a tensor", "give both norms' weights or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _check_index(name, weight, qkv.dtype, (head_dim,), qkv.device, "qkv")


def check_sample(logits: Tensor, temperature: Tensor, u: Tensor) -> None:
    """Check the arguments of `sample_from_logits`. Raises ValueError naming the argument, its value and the remedy."""
    rows = _check_rows("logits", logits)[0]
    _check_index("temperature", temperature, torch.float32, (rows,), logits.device, "logits")
    _check_index("u", u, torch.float64, (rows,), logits.device, "logits")


def check_attention_score(
    q_cache: Tensor,
    k_cache: Tensor,
    query_slots: Tensor,
    window_ends: Tensor,
    block_tables: Tensor,
    lens: Tensor,
    softmax: str,
    group: str,
    window: str,
) -> None:
    """Check the arguments of `attention_score`. Raises ValueError naming the argument, its value and the remedy."""
    _check_all_layers(k_cache, k_cache)
    layers, _, heads, _, head_dim = k_cache.shape
    shape = tuple(q_cache.shape)
    if q_cache.dim() != 5 or shape[0] != layers or shape[4] != head_dim or 0 in shape[2:] or shape[3] % heads:
        _fail("q_cache", "shape", shape, f"give [{layers}, slots, window, a multiple of {heads} heads, {head_dim}]")
    _check_like("q_cache", q_cache, k_cache)
    if not q_cache[0].is_contiguous():
        _fail("q_cache", "stride", q_cache.stride(), "make each layer contiguous")
    _check_requests(block_tables, lens, k_cache.device)
    _check_index("query_slots", query_slots, torch.int32, tuple(lens.shape), k_cache.device)
    _check_index("window_ends", window_ends, torch.int32, tuple(lens.shape), k_cache.device)
    _check_choice("softmax", softmax, ("all", "cut", "group_cut"))
    _check_choice("group", group, ("max", "mean"))
    _check_choice("window", window, ("mean", "sum", "max"))


def check_redundancy(k_cache: Tensor, block_tables: Tensor, lens: Tensor, tau: float, chunk: int | None) -> None:
    """Check the arguments of `redundancy`. Raises ValueError naming the argument, its value and the remedy."""
    _check_all_layers(k_cache, k_cache)
    _check_requests(block_tables, lens, k_cache.device)
    if not tau > 0:
        _fail("tau", "value", tau, "give a temperature above 0")
    if chunk is not None and (chunk < 16 or chunk & (chunk - 1)):
        _fail("chunk", "value", chunk, "give a power of two from 16, or None for the whole request")


def check_pool(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> None:
    """Check the arguments of `pool_scores`. Raises ValueError naming the argument, its value and the remedy."""
    requests = _check_scores(scores)[1]
    _check_index("lens", lens, torch.int32, (requests,), scores.device, "scores")
    _check_index("limit", limit, torch.int32, (requests,), scores.device, "scores")
    if not isinstance(width, int) or width < 1 or width % 2 == 0:
        _fail("width", "value", width, "give an odd number of slots")
    _check_choice("kind", kind, ("max", "avg"))


def check_select(scores: Tensor, must: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> None:
    """Check the arguments of `select`. Raises ValueError naming the argument, its value and the remedy."""
    layers, requests, heads, width = _check_scores(scores)
    shape = (requests, width) if must.dim() == 2 else (layers, requests, heads, width)
    _check_index("must", must, torch.bool, shape, scores.device, "scores")
    _check_index("lens", lens, torch.int32, (requests,), scores.device, "scores")
    _check_index("keep", keep, torch.int32, (requests,), scores.device, "scores")
    if not isinstance(max_keep, int) or not 0 <= max_keep <= width:
        _fail("max_keep", "value", max_keep, f"give the most that a request keeps, an int up to {width}")


def check_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    states: Sequence[Tensor],
    kept: Tensor,
    block_tables: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None,
) -> None:
    """Check the arguments of a compaction. Raises ValueError naming the argument, its value and the remedy."""
    _check_all_layers(k_cache, v_cache)
    layers, blocks, heads, block_size, _ = k_cache.shape
    requests, width = _check_tables(block_tables, -1, k_cache.device)
    _check_index("kept", kept, torch.int32, (layers, requests, heads, -1), k_cache.device)
    if not kept.is_contiguous():
        _fail("kept", "stride", kept.stride(), "make it contiguous")
    _check_index("dst_tables", dst_tables, torch.int32, (requests, -1), k_cache.device)
    most = min(dst_tables.shape[1], width) * block_size
    if kept.shape[3] > most:
        _fail("kept", "shape", tuple(kept.shape), f"keep up to {most} entries, or give more blocks")
    if updates is not None and len(updates) != len(states):
        _fail("updates", "length", len(updates), f"give {len(states)}, one for each state")
    for i, state in enumerate(states):
        _check_state(f"states[{i}]", state, (layers, blocks, heads, block_size), STATE_DTYPES, k_cache.device)
        update = updates[i] if updates is not None else None
        if update is not None:
            shape = layers, requests, heads, width * block_size
            _check_index(f"updates[{i}]", update, state.dtype, shape, k_cache.device)
            if not update.is_contiguous():
                _fail(f"updates[{i}]", "stride", update.stride(), "make it contiguous")


def _check_rows(name: str, x: Tensor) -> tuple[int, int]:
    if x.dim() != 2 or x.shape[1] == 0:
        _fail(name, "shape", tuple(x.shape), "give [rows, columns], at least one column")
    if x.dtype not in DTYPES:
        _fail(name, "dtype", x.dtype, "use float32, float16 or bfloat16")
    if x.stride(1) != 1 and x.shape[1] > 1:
        _fail(name, "stride", x.stride(), "make its last dimension contiguous")
    return tuple(x.shape)


def _check_scores(scores: Tensor) -> tuple[int, ...]:
    if scores.dim() != 4:
        _fail("scores", "shape", tuple(scores.shape), "give [layers, requests, heads, slots]")
    if scores.dtype != torch.float32:
        _fail("scores", "dtype", scores.dtype, "convert it to torch.float32")
    if not scores.is_contiguous():
        _fail("scores", "stride", scores.stride(), "make it contiguous")
    return tuple(scores.shape)


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], dtypes: tuple, device: torch.device) -> None:
    if tuple(state.shape) != shape:
        _fail(name, "shape", tuple(state.shape), f"give [{', '.join(map(str, shape))}]")
    if state.dtype not in dtypes:
        _fail(name, "dtype", state.dtype, f"use {' or '.join(map(str, dtypes))}")
    if state.device != device:
        _fail(name, "device", state.device, f"move it to {device}, where the other arguments are")
    if state.shape[0] == 0 or not state[0].is_contiguous():
        _fail(name, "stride", state.stride(), "give at least one layer, each contiguous")


def _check_requests(block_tables: Tensor, lens: Tensor, device: torch.device, where: str = "k_cache") -> None:
    _check_index("lens", lens, torch.int32, (-1,), device, where)
    _check_tables(block_tables, lens.shape[0], device, where)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _fail(name, "value", repr(value), f"use one of {', '.join(choices)}")


def _check_all_layers(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 5 or cache.shape[0] == 0:
            _fail(name, "shape", tuple(cache.shape), "give all layers, [layers, num_blocks, heads, slots, head_dim]")
    _check_caches(k_cache[0], v_cache[0])
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride():
        _fail("v_cache", "shape", tuple(v_cache.shape), f"lay it out as k_cache, {tuple(k_cache.shape)}")


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4:
            _fail(name, "shape", tuple(cache.shape), "give one layer, [num_blocks, heads, slots, head_dim]")
        if cache.dtype not in DTYPES:
            _fail(name, "dtype", cache.dtype, "use float32, float16 or bfloat16")
        if not cache.is_contiguous():
            _fail(name, "stride", cache.stride(), "make the layer contiguous")
    block_size, head_dim = k_cache.shape[2:]
    if block_size not in BLOCK_SIZES:
        _fail("k_cache", "block size", block_size, "use a power of two from 16 to 256")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        _fail("k_cache", "head_dim", head_dim, f"use 1 to {MAX_HEAD_DIM}")
    if v_cache.shape != k_cache.shape:
        _fail("v_cache", "shape", tuple(v_cache.shape), f"lay it out as k_cache, {tuple(k_cache.shape)}")
    _check_like("v_cache", v_cache, k_cache)


def _check_queries(q: Tensor, k_cache: Tensor) -> None:
    heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] == 0 or q.shape[1] % heads:
        _fail("q", "shape", tuple(q.shape), f"give [queries, a multiple of {heads} heads, {head_dim}]")
    _check_values("q", q, k_cache)


def _check_values(name: str, x: Tensor, cache: Tensor, where: str = "k_cache") -> None:
    _check_like(name, x, cache, where)
    if x.stride(2) != 1 and x.shape[2] != 1:
        _fail(name, "stride", x.stride(), "make its last dimension contiguous")


def _check_like(name: str, x: Tensor, cache: Tensor, where: str = "k_cache") -> None:
    if x.dtype != cache.dtype:
        _fail(name, "dtype", x.dtype, f"convert it to {cache.dtype}, as {where} is")
    if x.device != cache.device:
        _fail(name, "device", x.device, f"move it to {cache.device}, where {where} is")


def _check_tables(block_tables: Tensor, batch: int, device: torch.device, where: str = "k_cache") -> tuple[int, int]:
    width = block_tables.shape[1] if block_tables.dim() == 2 else -1
    _check_index("block_tables", block_tables, torch.int32, (batch, width), device, where)
    return tuple(block_tables.shape)


def _check_index(
    name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, where: str = "k_cache"
) -> None:
    """A length of -1 in `shape` stands for any."""
    if x.dim() != len(shape) or any(n not in (-1, m) for n, m in zip(shape, x.shape)):
        _fail(name, "shape", tuple(x.shape), f"give [{', '.join('any' if n < 0 else str(n) for n in shape)}]")
    if x.dtype != dtype:
        _fail(name, "dtype", x.dtype, f"convert it to {dtype}")
    if x.device != device:
        _fail(name, "device", x.device, f"move it to {device}, where {where} is")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        _fail(name, "stride", x.stride(), "make its last dimension contiguous")


def _fail(name: str, what: str, value: object, remedy: str) -> None:
    raise ValueError(f"{name} has {what} {value}: {remedy}")
