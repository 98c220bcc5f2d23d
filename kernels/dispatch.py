"""The kernels as the engine calls them: arguments checked, then Triton for CUDA tensors and PyTorch for the others.

Triton is imported at the first CUDA call, so that a machine without it runs everything on its CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import cpu, layout

if TYPE_CHECKING:
    from kernels.decode_pieces import Pieces


@functools.cache
def _triton() -> SimpleNamespace:
    from kernels.attention_score import attention_score_triton
    from kernels.block_copy import copy_blocks_triton
    from kernels.compaction import compact_stable_triton
    from kernels.kv_store import store_kv_triton
    from kernels.paged_decode import decode_pieces_triton, paged_decode_triton
    from kernels.paged_prefill import paged_prefill_triton
    from kernels.qk_norm_rope import qk_norm_rope_triton
    from kernels.redundancy import redundancy_triton
    from kernels.rms_norm import add_rms_norm_triton
    from kernels.sampling import sample_from_logits_triton
    from kernels.selection import select_triton
    from kernels.silu_mul import silu_mul_triton
    from kernels.step_store import store_step_triton
    from kernels.window_store import store_positions_triton

    return SimpleNamespace(
        store_kv=store_kv_triton,
        decode_pieces=decode_pieces_triton,
        paged_decode=paged_decode_triton,
        paged_prefill=paged_prefill_triton,
        copy_blocks=copy_blocks_triton,
        store_positions=store_positions_triton,
        store_step=store_step_triton,
        add_rms_norm=add_rms_norm_triton,
        silu_mul=silu_mul_triton,
        qk_norm_rope=qk_norm_rope_triton,
        sample_from_logits=sample_from_logits_triton,
        attention_score=attention_score_triton,
        redundancy=redundancy_triton,
        select=select_triton,
        compact_stable=compact_stable_triton,
    )


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write each token's K and V into its slot.

    Args:
        k, v: [T, H, d], last dimension contiguous, of the caches' dtype.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; float32, float16 or bfloat16; written in place.
        slots: int64 [T], `block_id * b + offset`; -1 stores nothing. Two tokens never share a slot.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_store(k, v, k_cache, v_cache, slots)
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton().store_kv(k, v, k_cache, v_cache, slots)
    else:
        cpu.store_kv_torch(k, v, k_cache, v_cache, slots)


def decode_pieces(cache_lens: Tensor, k_cache: Tensor, max_blocks: int) -> Pieces | None:
    """How `paged_decode` cuts the requests of a step, to be given to it in every layer.

    Args:
        cache_lens: int32 [B].
        k_cache: [num_blocks, H, b, d], of any layer.
        max_blocks: columns of the block tables.

    Returns:
        The pieces; None on a CPU, which cuts nothing.
    """
    if not k_cache.is_cuda:
        return None
    with torch.cuda.device(k_cache.device):
        return _triton().decode_pieces(cache_lens, k_cache, max_blocks)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cache_lens: Tensor,
    scale: float,
    pieces: Pieces | None = None,
) -> Tensor:
    """Attention of one query a request over its entries.

    Args:
        q: [B, Hq, d], last dimension contiguous, of the caches' dtype; Hq a multiple of H.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; float32, float16 or bfloat16.
        block_tables: int32 [B, max_blocks]; never read past ceil(cache_len / b).
        cache_lens: int32 [B], the current token's entry included; 0 gives zeros.
        scale: of the scores, before the softmax.
        pieces: `decode_pieces` of these lengths, caches and tables; None: they are made here.

    Returns:
        [B, Hq, d], q's dtype. The softmax is in float32.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_decode(q, k_cache, v_cache, block_tables, cache_lens)
    if q.is_cuda:
        with torch.cuda.device(q.device):
            return _triton().paged_decode(q, k_cache, v_cache, block_tables, cache_lens, scale, pieces)
    return cpu.paged_decode_torch(q, k_cache, v_cache, block_tables, cache_lens, scale)


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
        q: [T, Hq, d], requests one after the other, last dimension contiguous, of the caches' dtype.
        k_cache, v_cache: [num_blocks, H, b, d], one layer; float32, float16 or bfloat16.
        block_tables: int32 [B, max_blocks]; never read past ceil(cache_len / b).
        cu_seqlens: int32 [B + 1]; request r's queries are q[cu_seqlens[r] : cu_seqlens[r + 1]].
        cache_lens: int32 [B], the chunk included. Query i of n sees entries 0 .. cache_len - n + i.
        max_seqlen: queries of the longest request.
        scale: of the scores, before the softmax.

    Returns:
        [T, Hq, d], q's dtype. The softmax is in float32. Rows of tokens that belong to no request are undefined.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen)
    if q.is_cuda:
        with torch.cuda.device(q.device):
            return _triton().paged_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen, scale)
    return cpu.paged_prefill_torch(q, k_cache, v_cache, block_tables, cu_seqlens, cache_lens, max_seqlen, scale)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks in every layer.

    Args:
        k_cache, v_cache: [L, num_blocks, H, b, d], all layers; float32, float16 or bfloat16; written in place.
        src, dst: int64 [N]; no block is in both.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_copy(k_cache, v_cache, src, dst)
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton().copy_blocks(k_cache, v_cache, src, dst)
    else:
        cpu.copy_blocks_torch(k_cache, v_cache, src, dst)


def store_positions(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """Write each token's logical position beside its K and V, in every layer and head.

    Args:
        positions: int32 [T].
        state: int32 [L, num_blocks, H, b], each layer contiguous; written in place.
        slots: int64 [T], `block_id * b + offset`; -1 stores nothing. Two tokens never share a slot.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_store_positions(positions, state, slots)
    if state.is_cuda:
        with torch.cuda.device(state.device):
            _triton().store_positions(positions, state, slots)
    else:
        cpu.store_positions_torch(positions, state, slots)


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
    """`store_kv`, and each token's queries into its place of a query slot, in one launch.

    Args:
        k, v, k_cache, v_cache, slots: as in `store_kv`.
        q: [T, Hq, d], of the same tokens, head_dim and dtype, last dimension contiguous.
        q_cache: [num_query_slots, w, Hq, d], one layer; written in place. A slot is a ring: the queries of logical
            position p lie at p % w.
        indices: int64 [T], `query_slot * w + p % w`; -1 stores nothing. Two tokens never share a place: of a longer
            chunk of a request, only the last w tokens are stored.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_store_step(k, v, q, k_cache, v_cache, q_cache, slots, indices)
    args = k, v, q, k_cache, v_cache, q_cache, slots, indices
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton().store_step(*args)
    else:
        cpu.store_step_torch(*args)


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add to the residual stream, then RMSNorm (arXiv:1910.07467) of the sum.

    Args:
        hidden: [T, width], last dimension contiguous, width up to 16384; float32, float16 or bfloat16; `delta` is added
            in place.
        delta: [T, width], last dimension contiguous, of hidden's dtype; None: hidden is only read.
        weight: [width], of hidden's dtype.
        eps: added to the mean square.

    Returns:
        [T, width], hidden's dtype: computed in float32 from the rounded sum, and rounded once.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_add_rms_norm(hidden, delta, weight)
    if hidden.is_cuda:
        with torch.cuda.device(hidden.device):
            return _triton().add_rms_norm(hidden, delta, weight, eps)
    return cpu.add_rms_norm_torch(hidden, delta, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the gate of a SwiGLU (arXiv:2002.05202).

    Args:
        gate_up: [T, 2 * width], last dimension contiguous, a row gate and then up; float32, float16 or bfloat16.

    Returns:
        [T, width], gate_up's dtype; silu(gate) is rounded to it before the product.

    Raises:
        ValueError: the argument's shape, dtype or layout is not as above.
    """
    layout.check_silu_mul(gate_up)
    if gate_up.is_cuda:
        with torch.cuda.device(gate_up.device):
            return _triton().silu_mul(gate_up)
    return cpu.silu_mul_torch(gate_up)


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
    """RMSNorm of each query and key head, then rotary embedding (arXiv:2104.09864) of the pairs (i, i + d / 2).

    Args:
        qkv: [T, (Hq + 2 H) * d], last dimension contiguous, a row the heads of q, k and v; float32, float16 or
            bfloat16. Its memory is taken over: it may be overwritten, and v lies in it.
        q_weight, k_weight: [d], of qkv's dtype; None for both: no norm.
        eps: added to the mean square.
        cos: float32 [T, 1, d], each half the same, contiguous.
        sin: float32 [T, 1, d / 2], contiguous.
        num_heads, num_kv_heads: Hq and H.

    Returns:
        q [T, Hq, d], k and v [T, H, d], views whose last two dimensions are contiguous, of qkv's dtype. The norm is
        rounded to it before the rotation, which is in float32.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    layout.check_qk_norm_rope(qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads)
    args = qkv, q_weight, k_weight, eps, cos, sin, num_heads, num_kv_heads
    if qkv.is_cuda:
        with torch.cuda.device(qkv.device):
            return _triton().qk_norm_rope(*args)
    return cpu.qk_norm_rope_torch(*args)


def sample_from_logits(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """Draw a token a row: where the running sum of the probabilities passes u.

    Args:
        logits: [N, vocab], last dimension contiguous; float32, float16 or bfloat16.
        temperature: float32 [N], by which logits are divided; 0 takes the largest, of several the first.
        u: float64 [N], in (0, 1).

    Returns:
        int64 [N], never a token of probability 0; -1 for a row with NaN or +inf, or without a finite logit.
        Exponentials are float32, sums float64.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_sample(logits, temperature, u)
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            return _triton().sample_from_logits(logits, temperature, u)
    return cpu.sample_from_logits_torch(logits, temperature, u)


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
    queries. Zipage (arXiv 2603.08743) and G-KV (2512.00504) use (all, max, mean), SnapKV (2404.14469) (all, mean,
    mean), R-KV (2505.24133) (group_cut, max, mean), MorphKV (2503.00979) (cut, max, sum or max).

    Args:
        q_cache: [L, num_query_slots, w, Hq, d], each layer contiguous, of k_cache's dtype; Hq a multiple of H.
        k_cache: [L, num_blocks, H, b, d], any range of layers; float32, float16 or bfloat16.
        query_slots: int32 [R].
        window_ends: int32 [R]; the last query of the window is that of logical position end - 1, and end >= w.
        block_tables: int32 [R, max_blocks]; never read past ceil(n / b).
        lens: int32 [R], n: at least w, or 0 for a row that is left out.
        scale: of the logits, before the softmax.
        softmax: "all": over the entries that a query sees, itself included; "cut": over the entries before the
            window; "group_cut": the same of the logits reduced by `group`, one softmax a KV head.
        group: "max" or "mean".
        window: "mean", "sum" or "max".

    Returns:
        float32 [L, R, H, max_blocks * b]; -inf past n, and in the window's own columns where they are cut.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    layout.check_attention_score(
        q_cache, k_cache, query_slots, window_ends, block_tables, lens, softmax, group, window
    )  # fmt: skip
    args = q_cache, k_cache, query_slots, window_ends, block_tables, lens, scale
    kinds = {"softmax": softmax, "group": group, "window": window}
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            return _triton().attention_score(*args, **kinds)
    return cpu.attention_score_torch(*args, **kinds)


def redundancy(
    k_cache: Tensor, block_tables: Tensor, lens: Tensor, *, tau: float, threshold: float = 0.5, chunk: int | None = None
) -> Tensor:
    """How much each key repeats others (R-KV, arXiv 2505.24133; in chunks: Zipage, arXiv 2603.08743).

    With c(m, j) the cosine of two keys and c(j, j) = 0, last(j) is the highest slot m with c(m, j) > threshold, and
    raw[m] the sum over j of c(m, j), leaving out each j with last(j) = m. The result is the softmax over the request
    of raw / (tau * keys compared).

    Args:
        k_cache: [L, num_blocks, H, b, d], any range of layers; float32, float16 or bfloat16.
        block_tables: int32 [R, max_blocks]; never read past ceil(n / b).
        lens: int32 [R], n.
        tau: temperature.
        threshold: cosine above which a key is a near-duplicate.
        chunk: keys are compared within aligned runs of so many slots, a power of two from 16, the last one partial;
            None: with all.

    Returns:
        float32 [L, R, H, max_blocks * b], summing to 1 over a request's n entries; -inf past n.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    layout.check_redundancy(k_cache, block_tables, lens, tau, chunk)
    kinds = {"tau": tau, "threshold": threshold, "chunk": chunk}
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            return _triton().redundancy(k_cache, block_tables, lens, **kinds)
    return cpu.redundancy_torch(k_cache, block_tables, lens, **kinds)


def pool_scores(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> Tensor:
    """Pool scores along the sequence, so that neighbours survive together (SnapKV, arXiv 2404.14469).

    Args:
        scores: float32 [L, R, H, N], contiguous.
        lens: int32 [R], n.
        width: odd number of slots, stride 1.
        kind: "max", over fewer slots at the ends; "avg", with zeros past the ends and the divisor always `width`.
        limit: int32 [R]; the slots below min(limit, n) are pooled, among themselves.

    Returns:
        float32 [L, R, H, N]; slots from the limit on are as they were.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    layout.check_pool(scores, lens, width, kind, limit)
    slots = torch.arange(scores.shape[3], device=scores.device)
    pooled = slots < torch.minimum(limit, lens)[:, None, None]
    lines = torch.where(pooled, scores, float("-inf") if kind == "max" else 0.0).flatten(0, 2)[:, None]
    pool = torch.nn.functional.max_pool1d if kind == "max" else torch.nn.functional.avg_pool1d
    return torch.where(pooled, pool(lines, width, 1, width // 2).view(scores.shape), scores)


def select(scores: Tensor, must: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> Tensor:
    """The slots that survive in each layer and KV head: those of `must`, then the best, ties to the higher slot.

    Args:
        scores: float32 [L, R, H, N], contiguous, no NaN in a request's n entries; those past n are never used.
        must: bool [R, N] or [L, R, H, N], last dimension contiguous; at most keep[r] of a request's n entries.
        lens: int32 [R], n.
        keep: int32 [R], up to max_keep; all n entries survive where n is smaller.
        max_keep: of all requests, up to N.

    Returns:
        int32 [L, R, H, max_keep]: slots in ascending order, then -1.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    layout.check_select(scores, must, lens, keep, max_keep)
    if scores.is_cuda:
        with torch.cuda.device(scores.device):
            return _triton().select(scores, must, lens, keep, max_keep)
    return cpu.select_torch(scores, must, lens, keep, max_keep)


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
        k_cache, v_cache: [L, num_blocks, H, b, d], any range of layers, laid out alike; written in place.
        states: int32 or float32 [L, num_blocks, H, b], each layer contiguous; moved along, written in place.
        kept: int32 [L, R, H, max_keep], contiguous, `select`'s.
        block_tables: int32 [R, max_blocks], the source; read where a survivor is.
        dst_tables: int32 [R, dst_blocks], the destination; read up to ceil(survivors / b). A block of it is the
            request's own source block of the same place or an earlier one, or one that no request reads, or -1: then
            the survivors of its slots are already there, and nothing is written, as others share the block.
        updates: for each state None or [L, R, H, max_blocks * b] of its dtype, contiguous: values by source slot that
            are stored instead of the old ones.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    layout.check_compact(k_cache, v_cache, states, kept, block_tables, dst_tables, updates)
    args = k_cache, v_cache, states, kept, block_tables, dst_tables, updates
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton().compact_stable(*args)
    else:
        cpu.compact_stable_torch(*args)
