"""Spans of many sequences through the gated delta rule, a chunk at once, in Triton.

Source: "Gated Delta Networks" (arXiv:2412.06464), 3.3, with the WY representation of "Parallelizing Linear Transformers
with the Delta Rule" (arXiv:2406.06484). One launch solves all chunks side by side, another takes the states on through
them, one after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.delta_gates import CHUNK, EPS, DeltaGates
from kernels.delta_tiles import gates_of, inverse_length
from kernels.span_tiles import find_tile, first_tile, most_tiles
from kernels.spans import Spans

COLUMNS = 32
"""Of a state that one program takes through a span."""
VARYING = ["count", "rows_ptr", "starts_ptr", "fresh_ptr"]


@triton.jit
def _inverse(below, CHUNK: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """Of the identity plus `below`, which is 0 on the diagonal and above it.

    Blocks on the diagonal are inverted, then pairs of them: [[A, 0], [C, B]] has -B^-1 C A^-1 below.
    """
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where((row == column + 1) & (column % 2 == 0), below, 0.0)
    for level in range(1, LEVELS):  # a loop of the program: unrolled it would take a minute to compile
        of_pair = (row >> level == (column >> level) + 1) & ((column >> level) % 2 == 0)
        between = tl.dot(tl.where(of_pair, below, 0.0), inverse, input_precision=PRECISION)
        inverse -= tl.dot(inverse, between, input_precision=PRECISION)
    return inverse


@triton.jit(do_not_specialize=VARYING)
def _solve_chunks(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
    log_ptr,
    bias_ptr,
    rows_ptr,
    starts_ptr,
    erased_ptr,
    written_ptr,
    seen_ptr,
    factors_ptr,
    scale,
    count,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    a_stride,
    b_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk and value head: all that its tokens do that does not depend on the state before it.

    What they add to the state, each times its key, is `written` less `erased` times the state. Of that a query sees
    `seen`; and `factors` are those of queries and of keys, decay included.
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    span, tile = find_tile(starts_ptr, tl.program_id(0), count, CHUNK)
    if span >= count:
        return
    if tl.load(rows_ptr + span) < 0:
        return
    place = tl.arange(0, CHUNK)
    token = (tl.load(starts_ptr + span) + tile * CHUNK + place).to(tl.int64)
    inside = token < tl.load(starts_ptr + span + 1)
    dims, value_dims = tl.arange(0, DIM_PAD)[None, :], tl.arange(0, VALUE_PAD)[None, :]
    known = inside[:, None] & (dims < DIM)
    k_ptr += token[:, None] * k_token_stride + head // GROUP * k_head_stride + dims
    k = tl.load(k_ptr, mask=known, other=0.0).to(tl.float32)
    k_factor = inverse_length(k, EPS)
    a = tl.load(a_ptr + token * a_stride + head, mask=inside, other=0.0)
    b = tl.load(b_ptr + token * b_stride + head, mask=inside, other=0.0)
    decay, beta = gates_of(a, b, tl.load(log_ptr + head), tl.load(bias_ptr + head))
    decay, beta = tl.where(inside, decay, 0.0), tl.where(inside, beta, 0.0)  # what comes after a span changes nothing
    past, last = tl.cumsum(decay, 0), tl.sum(decay, 0)
    row, column = place[:, None], place[None, :]
    between = tl.exp(tl.where(row >= column, past[:, None] - past[None, :], float("-inf"))) * k_factor[None, :]
    keys = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    below = tl.where(row > column, (beta * k_factor)[:, None] * between * keys, 0.0)

    own = chunk * HEADS + head
    q = tl.load(q_ptr + token[:, None] * q_token_stride + head // GROUP * q_head_stride + dims, mask=known, other=0.0)
    q = q.to(tl.float32)
    q_factor = inverse_length(q, EPS) * scale
    seen = tl.dot(q, tl.trans(k), input_precision=PRECISION) * between * q_factor[:, None]
    tl.store(seen_ptr + (own * CHUNK + row) * CHUNK + column, seen)
    factors_ptr += own * 3 * CHUNK + place
    tl.store(factors_ptr, q_factor * tl.exp(past))
    tl.store(factors_ptr + CHUNK, k_factor * tl.exp(last - past))
    tl.store(factors_ptr + 2 * CHUNK, tl.exp(last) + tl.zeros_like(past))

    inverse = _inverse(below, CHUNK, LEVELS, PRECISION)
    k = tl.load(k_ptr, mask=known, other=0.0).to(tl.float32)  # again, since registers are too few to hold it
    erased = tl.dot(inverse * (beta * tl.exp(past) * k_factor)[None, :], k, input_precision=PRECISION)
    tl.store(erased_ptr + (own * CHUNK + row) * DIM + dims, erased, mask=dims < DIM)
    wanted = inside[:, None] & (value_dims < VALUE_DIM)
    v = tl.load(v_ptr + token[:, None] * v_token_stride + head * v_head_stride + value_dims, mask=wanted, other=0.0)
    written = tl.dot(inverse * beta[None, :], v.to(tl.float32), input_precision=PRECISION)
    tl.store(written_ptr + (own * CHUNK + row) * VALUE_DIM + value_dims, written, mask=value_dims < VALUE_DIM)


@triton.jit(do_not_specialize=VARYING)
def _pass_chunks(
    q_ptr,
    k_ptr,
    erased_ptr,
    written_ptr,
    seen_ptr,
    factors_ptr,
    state_ptr,
    rows_ptr,
    starts_ptr,
    fresh_ptr,
    out_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One span, a value head and COLUMNS columns of its state."""
    tile, head = tl.program_id(0), tl.program_id(1)
    span = tl.program_id(2)
    begin, end = tl.load(starts_ptr + span), tl.load(starts_ptr + span + 1)
    span_row = tl.load(rows_ptr + span)
    if (span_row < 0) | (begin == end):
        return
    chunk = first_tile(starts_ptr, span, CHUNK).to(tl.int64)
    place, dims = tl.arange(0, CHUNK), tl.arange(0, DIM_PAD)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    row, wanted = place[:, None], (columns < VALUE_DIM)[None, :]
    inside = (dims < DIM)[:, None] & wanted
    states = state_ptr + (span_row * HEADS + head) * DIM * VALUE_DIM + dims[:, None] * VALUE_DIM + columns[None, :]
    known = DIM
    if fresh_ptr is not None:
        known = DIM * (1 - tl.load(fresh_ptr + span).to(tl.int32))
    state = tl.load(states, mask=wanted & (dims < known)[:, None], other=0.0)
    q_ptr += head // GROUP * q_head_stride + dims[None, :]
    k_ptr += head // GROUP * k_head_stride + dims[:, None]
    for first in range(begin, end, CHUNK):
        own = chunk * HEADS + head
        erased_places = erased_ptr + (own * CHUNK + row) * DIM + dims[None, :]
        erased = tl.load(erased_places, mask=(dims < DIM)[None, :], other=0.0).to(tl.float32)
        written = tl.load(written_ptr + (own * CHUNK + row) * VALUE_DIM + columns[None, :], mask=wanted, other=0.0)
        added = written.to(tl.float32) - tl.dot(erased, state, input_precision=PRECISION)
        token = (first + place).to(tl.int64)
        given = token < end
        q_mask, k_mask = given[:, None] & (dims < DIM)[None, :], given[None, :] & (dims < DIM)[:, None]
        q = tl.load(q_ptr + token[:, None] * q_token_stride, mask=q_mask, other=0.0).to(tl.float32)
        q_factor = tl.load(factors_ptr + own * 3 * CHUNK + place)
        out = tl.dot(q, state, input_precision=PRECISION) * q_factor[:, None]
        seen = tl.load(seen_ptr + (own * CHUNK + row) * CHUNK + place[None, :]).to(tl.float32)
        out += tl.dot(seen, added, input_precision=PRECISION)
        outs = out_ptr + (token[:, None] * HEADS + head) * VALUE_DIM + columns[None, :]
        tl.store(outs, out, mask=given[:, None] & wanted)
        k = tl.load(k_ptr + token[None, :] * k_token_stride, mask=k_mask, other=0.0).to(tl.float32)
        k_factor = tl.load(factors_ptr + own * 3 * CHUNK + CHUNK + place)
        state *= tl.load(factors_ptr + own * 3 * CHUNK + 2 * CHUNK)
        state += tl.dot(k, added * k_factor[:, None], input_precision=PRECISION)
        chunk += 1
    tl.store(states, state, mask=inside)


def gated_delta_triton(
    q: Tensor, k: Tensor, v: Tensor, gates: DeltaGates, state: Tensor, spans: Spans, out: Tensor
) -> None:
    """`gated_delta` of spans of any length, in two launches.

    Args:
        q, k: [T, Hk, dk]; v: [T, Hv, dv]; last dimension contiguous.
        gates: of T tokens and Hv heads.
        state: float32 [rows, Hv, dk, dv], contiguous; written in place.
        spans: with `starts`.
        out: float32 [T, Hv, dv], contiguous.
    """
    (tokens, heads, dim), (value_heads, value_dim), count = q.shape, v.shape[1:], len(spans.rows)
    if not (tokens and count):
        return
    chunks = most_tiles(tokens, count, CHUNK)
    exact = q.dtype == torch.float32
    parts = [
        torch.empty((chunks, value_heads, CHUNK, width), dtype=q.dtype, device=q.device)
        for width in (dim, value_dim, CHUNK)
    ]
    factors = torch.empty((chunks, value_heads, 3, CHUNK), dtype=torch.float32, device=q.device)
    shape = {
        "HEADS": value_heads, "GROUP": value_heads // heads, "DIM": dim, "VALUE_DIM": value_dim, "CHUNK": CHUNK,
        "DIM_PAD": max(16, triton.next_power_of_2(dim)),
        "PRECISION": "tf32x3" if exact else "tf32",
    }  # fmt: skip
    strides = *q.stride()[:2], *k.stride()[:2]
    _solve_chunks[(chunks, value_heads)](
        q, k, v, *gates, spans.rows, spans.starts, *parts, factors, dim**-0.5, count,
        *strides, *v.stride()[:2], gates.a.stride(0), gates.b.stride(0),
        **shape, VALUE_PAD=max(16, triton.next_power_of_2(value_dim)), LEVELS=CHUNK.bit_length() - 1, EPS=EPS,
        num_warps=4,
    )  # fmt: skip
    columns = min(COLUMNS, max(16, triton.next_power_of_2(value_dim)))
    _pass_chunks[(triton.cdiv(value_dim, columns), value_heads, count)](
        q, k, *parts, factors, state, spans.rows, spans.starts, spans.fresh_bytes, out, *strides,
        **shape, COLUMNS=columns, num_warps=4, num_stages=1 if exact else 2,
    )  # fmt: skip
