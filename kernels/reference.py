"""What each kernel means, in float32 PyTorch written to be read: the spec, and the oracle of the tests.

Every entry is reached through the block table and by slicing, so nothing past a request's cache length is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from kernels.layout import PAD_SLOT

REDUCTIONS = {"max": torch.amax, "mean": torch.mean, "sum": torch.sum}


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


def store_queries(q: Tensor, q_cache: Tensor, indices: Tensor) -> None:
    """Write each token's queries into its place of a query slot.

    Args:
        q: [T, Hq, d].
        q_cache: [num_query_slots, w, Hq, d], one layer; written in place. A slot is a ring: the queries of logical
            position p lie at p % w.
        indices: int64 [T], `query_slot * w + p % w`; -1 stores nothing.
    """
    window = q_cache.shape[1]
    for token, index in enumerate(indices.tolist()):
        if index != PAD_SLOT:
            q_cache[index // window, index % window] = q[token]


def store_positions(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """Write each token's logical position beside its K and V, in every layer and head.

    Args:
        positions: int32 [T].
        state: int32 [L, num_blocks, H, b], written in place.
        slots: int64 [T], `block_id * b + offset`; -1 stores nothing.
    """
    block_size = state.shape[3]
    for position, slot in zip(positions.tolist(), slots.tolist(), strict=True):
        if slot != PAD_SLOT:
            state[:, slot // block_size, :, slot % block_size] = position


def store_step(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_cache: Tensor,
    slots: Tensor,
    indices: Tensor,
) -> None:
    """`store_kv` and `store_queries` of the same tokens.

    Args:
        k, v: [T, H, d]; q: [T, Hq, d].
        k_cache, v_cache: [num_blocks, H, b, d], one layer; q_cache: [num_query_slots, w, Hq, d]; written in place.
        slots, indices: int64 [T]; -1 stores nothing.
    """
    store_kv(k, v, k_cache, v_cache, slots)
    store_queries(q, q_cache, indices)


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `hidden` in place, then x / sqrt(mean(x^2) + eps) * weight of each row x.

    The sum is rounded to hidden's dtype, the norm computed from what was rounded, and rounded once.

    Args:
        hidden, delta: [T, width]; without a delta hidden stays as it is.
        weight: [width].
        eps: added to the mean square.

    Returns:
        [T, width], hidden's dtype.
    """
    if delta is not None:
        hidden.copy_(hidden.float() + delta.float())
    return _rms_norm(hidden, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in float32, rounded once to x's dtype."""
    exact = x.float()
    scale = 1 / (exact.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return (exact * scale * weight.float()).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(x) = x / (1 + exp(-x)) is rounded before the product.

    Args:
        gate_up: [T, 2 * width]: a row is gate, then up.

    Returns:
        [T, width], gate_up's dtype.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    activated = (gate / (1 + torch.exp(-gate))).to(gate_up.dtype)
    return (activated.float() * up).to(gate_up.dtype)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of each query and key head, rounded, then the rotation of its pairs (i, i + d / 2), in float32.

    Args:
        qkv: [T, (Hq + 2 H) * d]: a row is the query heads, the key heads, the value heads.
        q_weight, k_weight: [d], or None for both: no norm.
        eps: of the norms.
        cos: float32 [T, 1, d], each half the same; sin: float32 [T, 1, d / 2].
        num_heads, num_kv_heads: Hq and H.

    Returns:
        q [T, Hq, d], k and v [T, H, d], qkv's dtype.
    """
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None:
        q, k = _rms_norm(q, q_weight, eps), _rms_norm(k, k_weight, eps)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        cosine = cos[..., : sin.shape[2]]
        turned = torch.cat((first * cosine - second * sin, second * cosine + first * sin), dim=-1)
        return turned.to(x.dtype)

    return rotate(q), rotate(k), v


def sample_from_logits(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """The token at which the running sum of exp(logit / temperature) passes the share u of its total.

    Args:
        logits: [N, vocab]; -inf is never drawn.
        temperature: float32 [N]; 0 takes the largest logit, of several the first.
        u: float64 [N], in (0, 1).

    Returns:
        int64 [N]; -1 for a row with NaN or +inf, or without a finite logit.
    """
    tokens = []
    for row, divisor, share in zip(logits.float(), temperature, u):
        if not row.max().isfinite():
            tokens.append(torch.tensor(-1, device=logits.device))
            continue
        if divisor == 0:
            tokens.append((row == row.max()).nonzero()[0, 0])
            continue
        weights = ((row - row.max()) / divisor).exp()
        running = weights.double().cumsum(dim=0)
        passed = (running > share * running[-1]).nonzero()
        tokens.append(passed[0, 0] if len(passed) else weights.nonzero()[-1, 0])
    return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64)


def attention_score(
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
    """What a request's last w queries, the tokens of its last w entries, think of each of its n entries.

    A softmax of each query over the entries, then `group` over the query heads of a KV head, then `window` over the
    queries. Zipage and G-KV use (all, max, mean), SnapKV (all, mean, mean), R-KV (group_cut, max, mean), MorphKV
    (cut, max, sum or max), VaSE (cut, mean, mean).

    Args:
        q_cache: [L, num_query_slots, w, Hq, d]; the queries of logical position p lie at p % w.
        k_cache: [L, num_blocks, H, b, d].
        query_slots, window_ends: int32 [R]; the last query of the window is that of logical position end - 1.
        block_tables: int32 [R, max_blocks]; read up to ceil(n / b).
        lens: int32 [R], n: at least w, or 0 for a row that is left out.
        scale: of the logits, before the softmax.
        softmax: "all": over the entries that a query sees, itself included; "cut": over the entries before the
            window; "group_cut": the same of the logits reduced by `group`, one softmax a KV head.
        group: "max" or "mean".
        window: "mean", "sum" or "max".

    Returns:
        float32 [L, R, H, max_blocks * b]; -inf past n, and in the window's own columns where they are cut.
    """
    layers, _, kv_heads, block_size, _ = k_cache.shape
    width = q_cache.shape[2]
    reduce_group, reduce_window = REDUCTIONS[group], REDUCTIONS[window]
    out = torch.full((layers, len(lens), kv_heads, block_tables.shape[1] * block_size), float("-inf"))
    for layer, row in product(range(layers), range(len(lens))):
        length = int(lens[row])
        if length == 0:
            continue
        places = (int(window_ends[row]) - width + torch.arange(width)) % width
        queries = q_cache[layer, int(query_slots[row])].cpu()[places].float()
        queries = queries.view(width, kv_heads, -1, queries.shape[-1])
        keys = _entries(k_cache[layer], block_tables[row], length).cpu()
        logits = torch.einsum("qhgd,hjd->hgqj", queries, keys) * scale
        past = length - width
        if softmax == "all":
            hidden = torch.arange(length) > past + torch.arange(width)[:, None]
            weights = reduce_group(logits.masked_fill(hidden, float("-inf")).softmax(dim=-1), 1)
        elif softmax == "cut":
            weights = reduce_group(logits[..., :past].softmax(dim=-1), 1)
        else:
            weights = reduce_group(logits[..., :past], 1).softmax(dim=-1)
        out[layer, row, :, : weights.shape[-1]] = reduce_window(weights, 1)
    return out.to(k_cache.device)


def redundancy(
    k_cache: Tensor, block_tables: Tensor, lens: Tensor, *, tau: float, threshold: float = 0.5, chunk: int | None = None
) -> Tensor:
    """How much each key repeats others (R-KV, arXiv 2505.24133; in chunks: Zipage, arXiv 2603.08743).

    With c(m, j) the cosine of two keys and c(j, j) = 0, last(j) is the highest slot m with c(m, j) > threshold, and
    raw[m] the sum over j of c(m, j), leaving out each j with last(j) = m. The result is the softmax over the request
    of raw / (tau * keys compared).

    Args:
        k_cache: [L, num_blocks, H, b, d].
        block_tables: int32 [R, max_blocks]; read up to ceil(n / b).
        lens: int32 [R], n.
        tau: temperature.
        threshold: cosine above which a key is a near-duplicate.
        chunk: keys are compared within aligned runs of so many slots, the last one partial; None: with all.

    Returns:
        float32 [L, R, H, max_blocks * b], summing to 1 over a request's n entries; -inf past n.
    """
    layers, _, kv_heads, block_size, _ = k_cache.shape
    out = torch.full((layers, len(lens), kv_heads, block_tables.shape[1] * block_size), float("-inf"))
    for layer, row in product(range(layers), range(len(lens))):
        length = int(lens[row])
        if length == 0:
            continue
        keys = _entries(k_cache[layer], block_tables[row], length).cpu()
        keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        runs = keys.split(length if chunk is None else chunk, dim=1)
        logits = [_unexcused_sums(run, threshold) / (tau * run.shape[1]) for run in runs]
        out[layer, row, :, :length] = torch.cat(logits, dim=1).softmax(dim=-1)
    return out.to(k_cache.device)


def _unexcused_sums(keys: Tensor, threshold: float) -> Tensor:
    """raw of each of the normalised keys [H, n, d]: [H, n]."""
    heads, length, _ = keys.shape
    cosine = keys @ keys.transpose(1, 2)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    raw = cosine.sum(dim=2)
    for head, j in product(range(heads), range(length)):
        duplicates = (cosine[head, :, j] > threshold).nonzero()
        if len(duplicates):
            last = int(duplicates.max())
            raw[head, last] -= cosine[head, last, j]
    return raw


def pool_scores(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> Tensor:
    """Pool scores along the sequence, so that neighbours survive together (SnapKV, arXiv 2404.14469).

    Args:
        scores: float32 [L, R, H, N].
        lens: int32 [R], n.
        width: odd number of slots, stride 1.
        kind: "max", over fewer slots at the ends; "avg", with zeros past the ends and the divisor always `width`.
        limit: int32 [R]; the slots below min(limit, n) are pooled, among themselves.

    Returns:
        float32 [L, R, H, N]; slots from the limit on are as they were.
    """
    out = scores.clone()
    for row, slots in enumerate(torch.minimum(limit, lens).tolist()):
        for slot in range(slots):
            near = scores[:, row, :, max(0, slot - width // 2) : min(slots, slot + width // 2 + 1)]
            out[:, row, :, slot] = near.amax(dim=-1) if kind == "max" else near.sum(dim=-1) / width
    return out


def select(scores: Tensor, must: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> Tensor:
    """The slots that survive in each layer and KV head: those of `must`, then the best, ties to the higher slot.

    Args:
        scores: float32 [L, R, H, N], no NaN in a request's n entries.
        must: bool [R, N] or [L, R, H, N]; at most keep[r] of a request's n entries.
        lens: int32 [R], n.
        keep: int32 [R]; all n entries survive where n is smaller.
        max_keep: of all requests.

    Returns:
        int32 [L, R, H, max_keep]: slots in ascending order, then -1.
    """
    layers, requests, heads, _ = scores.shape
    must = must.expand(layers, heads, -1, -1).transpose(1, 2) if must.dim() == 2 else must
    kept = torch.full((layers, requests, heads, max_keep), PAD_SLOT, dtype=torch.int32)
    for row in range(requests):
        length = int(lens[row])
        count = min(int(keep[row]), length)
        for layer, head in product(range(layers), range(heads)):
            required, values = must[layer, row, head].tolist(), scores[layer, row, head].tolist()
            best = sorted(range(length), key=lambda j: (required[j], values[j], j), reverse=True)
            kept[layer, row, head, :count] = torch.tensor(sorted(best[:count]), dtype=torch.int32)
    return kept.to(scores.device)


def compact_stable(
    k_cache: Tensor,
    v_cache: Tensor,
    states: Sequence[Tensor],
    kept: Tensor,
    block_tables: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """Pack each layer and head's survivors, in slot order, into the request's destination blocks.

    Args:
        k_cache, v_cache: [L, num_blocks, H, b, d], written in place.
        states: tensors [L, num_blocks, H, b] of four-byte elements, moved along; written in place.
        kept: int32 [L, R, H, max_keep], `select`'s.
        block_tables: int32 [R, max_blocks], the source; read where a survivor is.
        dst_tables: int32 [R, dst_blocks], the destination; read up to ceil(survivors / b). A block of it is the
            request's own source block of the same place or an earlier one, or one that no request reads, or -1: then
            the survivors of its slots are already there, and nothing is written, as others share the block.
        updates: for each state None or [L, R, H, N], values by source slot that are stored instead of the old ones.
    """
    block_size = k_cache.shape[3]
    written = [k_cache, v_cache, *states]
    before = [x.clone() for x in written]
    updates = [None, None, *(updates or [None] * len(states))]
    for layer, row, head in product(*map(range, kept.shape[:3])):
        for index, slot in enumerate(kept[layer, row, head].tolist()):
            if slot == PAD_SLOT:
                break
            target = int(dst_tables[row, index // block_size])
            source = int(block_tables[row, slot // block_size])
            if target < 0:
                continue
            for x, old, update in zip(written, before, updates):
                entry = old[layer, source, head, slot % block_size]
                x[layer, target, head, index % block_size] = entry if update is None else update[layer, row, head, slot]


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
