"""The kernels as vectorised PyTorch, for tensors on a CPU.

Attention copies the entries it needs out of their blocks, a piece at a time that stays in the processor's cache, and
multiplies matrices over the copy. Slots past a request's cache length may hold NaN (0 * NaN is NaN), so their scores
are masked and their V is zeroed in the copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

SPAN = 16
"""Slots copied together: the smallest block, so a short request copies little of a large block."""

PIECE_BYTES = 2 << 20
"""K copied at a time: still in the caches when it is multiplied, and worth the calls."""

MASKED_QUERIES = 512
"""Queries whose causal mask is built at a time."""


def store_kv_torch(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """`reference.store_kv`, all tokens at once."""
    stored = slots >= 0
    if not stored.all():
        k, v, slots = k[stored], v[stored], slots[stored]
    blocks = slots.div(k_cache.shape[2], rounding_mode="floor")
    offsets = slots - blocks * k_cache.shape[2]
    heads = torch.arange(k_cache.shape[1])
    index = (blocks[:, None], heads, offsets[:, None])
    k_cache.index_put_(index, k)
    v_cache.index_put_(index, v)


def copy_blocks_torch(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """`reference.copy_blocks`, all layers at once."""
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        k_cache[:, target].copy_(k_cache[:, source])
        v_cache[:, target].copy_(v_cache[:, source])


def paged_decode_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cache_lens: Tensor, scale: float
) -> Tensor:
    """`reference.paged_decode`, in pieces of requests of about the same length, longest first.

    A request's spans are taken with the last, partly filled one first, so that it sits in one place for all; the
    order of entries means nothing to attention.
    """
    batch, query_heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    out = torch.zeros((batch, query_heads, head_dim), dtype=q.dtype)
    lens, order = cache_lens.long().sort(descending=True, stable=True)
    spans = (lens + SPAN - 1).div(SPAN, rounding_mode="floor")
    counts = spans.tolist()
    live = batch - counts.count(0)
    if live == 0:
        return out
    lens, order, spans = lens[:live], order[:live], spans[:live]

    index = _span_index(block_tables[order], spans, counts[0], kv_heads, block_size)
    rows = _pad_rows((q[order].float() * scale).view(live, kv_heads, -1, head_dim))
    k_spans, v_spans = k_cache.view(-1, SPAN * head_dim), v_cache.view(-1, SPAN * head_dim)
    tail_unused = torch.arange(SPAN) >= (lens - (spans - 1) * SPAN)[:, None]
    unused = torch.cat((tail_unused, torch.arange(SPAN, counts[0] * SPAN) >= (spans * SPAN)[:, None]), dim=1)

    span_bytes = kv_heads * SPAN * head_dim * k_cache.element_size()
    piece_spans = max(counts[0], PIECE_BYTES // span_bytes)
    copied = torch.empty((min(piece_spans, live * counts[0]) * kv_heads, SPAN * head_dim), dtype=k_cache.dtype)
    pieces = []
    first = 0
    while first < live:
        width = counts[first]
        last = min(live, first + piece_spans // width)
        masked = SPAN if counts[last - 1] == width else width * SPAN  # of equal lengths, only the last spans have gaps
        piece_index, piece_unused = index[first:last, :, :width], unused[first:last, :masked]
        pieces.append(_attend_piece(rows[first:last], k_spans, v_spans, piece_index, piece_unused, copied))
        first = last
    heads = torch.cat(pieces).view(live, kv_heads, -1, head_dim)[:, :, : query_heads // kv_heads]
    out[order] = heads.reshape(live, query_heads, head_dim).to(q.dtype)
    return out


def _attend_piece(q: Tensor, k_spans: Tensor, v_spans: Tensor, index: Tensor, unused: Tensor, copied: Tensor) -> Tensor:
    """Attention of q [B, H, G, d], scaled, over the spans `index` [B, H, width]. Returns [B * H, G, d].

    `unused` bool [B, n] marks the places of the first n that hold nothing; `copied` is memory for the copy.
    """
    requests, kv_heads, group, head_dim = q.shape
    copied = copied[: index.numel()]
    entries = copied.view(requests * kv_heads, -1, head_dim)
    index = index.reshape(-1)
    torch.index_select(k_spans, 0, index, out=copied)
    scores = torch.bmm(q.reshape(-1, group, head_dim), entries.float().transpose(1, 2))
    by_request = scores.view(requests, kv_heads * group, -1)
    by_request[:, :, : unused.shape[1]].masked_fill_(unused[:, None], float("-inf"))
    weights = scores.softmax(dim=-1)
    torch.index_select(v_spans, 0, index, out=copied)
    last_spans = entries.view(requests, kv_heads, -1, head_dim)[:, :, :SPAN]
    last_spans.masked_fill_(unused[:, None, :SPAN, None], 0)
    return torch.bmm(weights, entries.float())


def _span_index(block_tables: Tensor, spans: Tensor, width: int, kv_heads: int, block_size: int) -> Tensor:
    """Numbers of the spans of each request and head in a cache seen as [spans, SPAN * d]: int64 [B, H, width].

    The last span comes first, then 0, 1, ...; the longest request is row 0. Places past a request's spans name some
    full span of row 0's first block: any finite V will do there, as its weight is 0.
    """
    per_block = block_size // SPAN
    place = torch.arange(-1, width - 1).repeat(len(spans), 1)
    place[:, 0] = spans - 1
    block = block_tables[:, : (width + per_block - 1) // per_block].long()
    block = block.gather(1, place.div(per_block, rounding_mode="floor"))
    missing = torch.arange(width) >= spans[:, None]
    block = torch.where(missing, block_tables[0, 0].long(), block)
    tile = (block * kv_heads)[:, None] + torch.arange(kv_heads)[:, None]
    return tile * per_block + place.remainder(per_block)[:, None]


def _pad_rows(q: Tensor) -> Tensor:
    """Pad q [B, H, G, d] to a multiple of 4 rows: matrix products of 3 rows take longer than of 4."""
    group = q.shape[2]
    return q if group <= 2 else torch.nn.functional.pad(q, (0, 0, 0, -group % 4))


def paged_prefill_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """`reference.paged_prefill`, request by request through PyTorch's fused attention."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    out = torch.zeros(q.shape, dtype=q.dtype)
    bounds = cu_seqlens.tolist()
    for row, length in enumerate(cache_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        # The KV heads are the batch and the query heads of each are the heads: K and V need no repeating.
        queries = q[begin:end].view(end - begin, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        keys = _entries(k_cache, block_tables[row], length)
        values = _entries(v_cache, block_tables[row], length)
        heads = _causal(queries, keys, values, scale)
        out[begin:end] = heads.permute(2, 0, 1, 3).reshape(end - begin, -1, head_dim)
    return out


def _entries(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` entries of a request: [H, 1, length, d], a view where one block holds them."""
    _, kv_heads, block_size, head_dim = cache.shape
    if length <= block_size:
        return cache[int(table[0]), :, None, :length]
    blocks = table[: (length + block_size - 1) // block_size].long()
    tiles = cache.view(-1, block_size * head_dim)
    index = blocks * kv_heads + torch.arange(kv_heads)[:, None]
    return tiles.index_select(0, index.view(-1)).view(kv_heads, 1, -1, head_dim)[:, :, :length]


def _causal(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [H, G, n, d], the last n of the c entries; keys, values [H, 1, c, d]. Returns [H, G, n, d]."""
    group, queries = q.shape[1:3]
    length = keys.shape[2]
    keys, values = keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1)
    if queries == length:
        return scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)
    if queries == 1:
        return scaled_dot_product_attention(q, keys, values, scale=scale)
    parts = []
    for first in range(0, queries, MASKED_QUERIES):
        last = min(queries, first + MASKED_QUERIES)
        limit = length - queries + last
        seen = torch.arange(limit) <= torch.arange(limit - (last - first), limit)[:, None]
        part = q[:, :, first:last], keys[:, :, :limit], values[:, :, :limit]
        parts.append(scaled_dot_product_attention(*part, attn_mask=seen, scale=scale))
    return torch.cat(parts, dim=2)


def store_queries_torch(q: Tensor, q_cache: Tensor, indices: Tensor) -> None:
    """`reference.store_queries`, all tokens at once."""
    stored = indices >= 0
    if not stored.all():
        q, indices = q[stored], indices[stored]
    q_cache.view(-1, *q_cache.shape[2:]).index_copy_(0, indices, q)


def store_positions_torch(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """`reference.store_positions`, all tokens at once."""
    stored = slots >= 0
    if not stored.all():
        positions, slots = positions[stored], slots[stored]
    blocks = slots.div(state.shape[3], rounding_mode="floor")
    state[:, blocks, :, slots - blocks * state.shape[3]] = positions[:, None, None]


def store_step_torch(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_cache: Tensor,
    slots: Tensor,
    indices: Tensor,
) -> None:
    """`reference.store_step`, all tokens at once."""
    store_kv_torch(k, v, k_cache, v_cache, slots)
    store_queries_torch(q, q_cache, indices)


def add_rms_norm_torch(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """`reference.add_rms_norm`."""
    if delta is not None:
        hidden += delta
    return rms_norm(hidden, weight.shape, weight, eps)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """`reference.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


def qk_norm_rope_torch(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.qk_norm_rope`, all heads together: q and k are views of one new tensor, v of qkv."""
    head_dim, half = cos.shape[2], sin.shape[2]
    heads = qkv.unflatten(1, (-1, head_dim))
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None:
        q = rms_norm(qk[:, :num_heads], (head_dim,), q_weight, eps)
        k = rms_norm(qk[:, num_heads:], (head_dim,), k_weight, eps)
        qk = torch.cat((q, k), dim=1)
    rotated = qk * cos
    rotated[..., :half].addcmul_(qk[..., half:], sin, value=-1)
    rotated[..., half:].addcmul_(qk[..., :half], sin)
    q, k = rotated.to(qkv.dtype).split((num_heads, num_kv_heads), dim=1)
    return q, k, v


def sample_from_logits_torch(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """`reference.sample_from_logits`, all rows at once."""
    greedy = temperature == 0
    largest, best = logits.max(dim=-1)
    probs = (logits.float() / temperature.masked_fill(greedy, 1.0)[:, None]).softmax(dim=-1)
    tokens = torch.where(greedy, best, invert(probs, u[:, None]).squeeze(1))
    return torch.where(largest.isfinite(), tokens, -1)


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index [N, 1] at which the running sum of `weights` [N, V] (>= 0) passes the share `u` [N, 1] of its total.

    Sums are float64: in float32 the tail of a large vocabulary would never be drawn. Runs on any device. A row with NaN
    gives an index that means nothing, but is one.
    """
    running = weights.cumsum(dim=-1, dtype=torch.float64)
    total = running[:, -1:]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, target, right=True).clamp_(max=weights.shape[1] - 1)


def attention_score_torch(
    q_cache: Tensor,
    k_cache: Tensor,
    query_slots: Tensor,
    window_ends: Tensor,
    block_tables: Tensor,
    lens: Tensor,
    scale: float,
    *,
    softmax: str = "all",
    group: str = "max",
    window: str = "mean",
) -> Tensor:
    """`reference.attention_score`, a matrix product for each layer and request."""
    layers, _, kv_heads, _, head_dim = k_cache.shape
    queries, query_heads = q_cache.shape[2:4]
    out = _scores_like(k_cache, block_tables)
    ends, slots = window_ends.tolist(), query_slots.tolist()
    reduce_group = torch.amax if group == "max" else torch.mean
    for row, length in enumerate(lens.tolist()):
        if length == 0:
            continue
        past = length - queries
        scored = length if softmax == "all" else past
        ring = torch.arange(ends[row] - queries, ends[row]) % queries
        hidden = torch.arange(past, length) > torch.arange(past, length)[:, None]
        for layer in range(layers):
            q = q_cache[layer, slots[row]].index_select(0, ring).view(queries, kv_heads, -1, head_dim)
            q = (q.float() * scale).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
            keys = _entries(k_cache[layer], block_tables[row], length)[:, 0, :scored].float()
            logits = torch.bmm(q, keys.transpose(1, 2)).view(kv_heads, query_heads // kv_heads, queries, scored)
            if softmax == "all":
                logits[..., past:].masked_fill_(hidden, float("-inf"))
            if softmax == "group_cut":
                weights = reduce_group(logits, 1).softmax(dim=-1)
            else:
                weights = reduce_group(logits.softmax(dim=-1), 1)
            if window == "max":
                out[layer, row, :, :scored] = weights.amax(dim=1)
            else:
                out[layer, row, :, :scored] = weights.sum(dim=1) / (queries if window == "mean" else 1)
    return out


def redundancy_torch(
    k_cache: Tensor, block_tables: Tensor, lens: Tensor, *, tau: float, threshold: float = 0.5, chunk: int | None = None
) -> Tensor:
    """`reference.redundancy`, the runs of a request together as far as their cosines stay small."""
    out = _scores_like(k_cache, block_tables)
    for row, length in enumerate(lens.tolist()):
        if length == 0:
            continue
        run = min(chunk or length, length)
        compared = torch.full((length,), run)
        compared[length // run * run :] = length % run
        for layer in range(k_cache.shape[0]):
            keys = _entries(k_cache[layer], block_tables[row], length)[:, 0].float()
            keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            runs = torch.nn.functional.pad(keys, (0, 0, 0, -length % run)).view(-1, run, keys.shape[-1])
            pieces = runs.split(max(1, PIECE_BYTES // (4 * run * run)))
            raw = torch.cat([_unexcused_sums(piece, threshold) for piece in pieces]).view(keys.shape[0], -1)
            out[layer, row, :, :length] = (raw[:, :length] / (tau * compared)).softmax(dim=-1)
    return out


def _unexcused_sums(keys: Tensor, threshold: float) -> Tensor:
    """For normalised keys [M, n, d], the sum of each one's cosines but those that it excuses: [M, n]."""
    cosine = torch.bmm(keys, keys.transpose(1, 2))
    cosine.diagonal(dim1=1, dim2=2).zero_()
    slots = torch.arange(cosine.shape[1])
    last = torch.where(cosine > threshold, slots, -1).amax(dim=2)
    excused = cosine.gather(2, last.clamp(min=0)[..., None])[..., 0].masked_fill_(last < 0, 0)
    return cosine.sum(dim=2).scatter_add_(1, last.clamp(min=0), -excused)


def select_torch(scores: Tensor, must: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> Tensor:
    """`reference.select`, as the largest of integers that order slots by (must, score, slot) and are all different."""
    width = scores.shape[3]
    must = must[:, None] if must.dim() == 2 else must
    bits = scores.masked_fill(scores == 0, 0).view(torch.int32)
    order = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long()
    order = torch.where(must, 1 << 32, order)
    slots = torch.arange(width)
    order = (order * width + slots).masked_fill(slots >= lens[:, None, None], torch.iinfo(torch.int64).min)
    best = order.topk(max_keep, dim=-1).indices
    count = torch.minimum(keep, lens)[:, None, None]
    best = best.masked_fill(torch.arange(max_keep) >= count, width).sort(dim=-1).values
    return best.masked_fill(best == width, -1).int()


def compact_stable_torch(
    k_cache: Tensor,
    v_cache: Tensor,
    states: Sequence[Tensor],
    kept: Tensor,
    block_tables: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """`reference.compact_stable`, all survivors at once."""
    block_size = k_cache.shape[3]
    layer, row, head, index = (kept >= 0).nonzero(as_tuple=True)
    source = kept[layer, row, head, index].long()
    to_block = dst_tables[row, index.div(block_size, rounding_mode="floor")].long()
    written = to_block >= 0
    layer, row, head, index, source, to_block = (x[written] for x in (layer, row, head, index, source, to_block))
    from_block = block_tables[row, source.div(block_size, rounding_mode="floor")].long()
    offset = index % block_size
    moved = (from_block != to_block) | (source % block_size != offset)
    reads = layer[moved], from_block[moved], head[moved], source[moved] % block_size
    writes = layer[moved], to_block[moved], head[moved], offset[moved]
    for x in (k_cache, v_cache):
        x.index_put_(writes, x[reads])
    for state, update in zip(states, updates or [None] * len(states), strict=True):
        if update is None:
            state.index_put_(writes, state[reads])
        else:
            state.index_put_((layer, to_block, head, offset), update[layer, row, head, source])


def _scores_like(k_cache: Tensor, block_tables: Tensor) -> Tensor:
    """Scores of all -inf: float32 [L, R, H, max_blocks * b]."""
    layers, _, kv_heads, block_size, _ = k_cache.shape
    requests, blocks = block_tables.shape
    return torch.full((layers, requests, kv_heads, blocks * block_size), float("-inf"))
