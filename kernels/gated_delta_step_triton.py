"""One token of each of many sequences through the gated delta rule, in Triton: a state is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.delta_gates import EPS, DeltaGates
from kernels.delta_tiles import gates_of
from kernels.dependent_launch import dependent_launch, wait_for_inputs
from kernels.spans import Spans

COLUMNS = 32
"""Of a state that one program has: of 128 rows of float32 they are 16 KiB."""


@triton.jit(do_not_specialize=["rows_ptr", "fresh_ptr"])
def _step(
    q_ptr,
    k_ptr,
    v_ptr,
    a_ptr,
    b_ptr,
    log_ptr,
    bias_ptr,
    state_ptr,
    rows_ptr,
    fresh_ptr,
    out_ptr,
    scale,
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
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token, a value head, and COLUMNS columns of its state."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(rows_ptr + token)
    if row < 0:
        return
    dims = tl.arange(0, DIM_PAD)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    held, wanted = dims < DIM, columns < VALUE_DIM
    inside = held[:, None] & wanted[None, :]
    places = state_ptr + (row * HEADS + head) * DIM * VALUE_DIM + dims[:, None] * VALUE_DIM + columns[None, :]
    known = DIM
    if fresh_ptr is not None:
        known = DIM * (1 - tl.load(fresh_ptr + token).to(tl.int32))
    state = tl.load(places, mask=wanted[None, :] & (dims < known)[:, None], other=0.0)

    q = tl.load(q_ptr + token * q_token_stride + head // GROUP * q_head_stride + dims, mask=held, other=0.0)
    k = tl.load(k_ptr + token * k_token_stride + head // GROUP * k_head_stride + dims, mask=held, other=0.0)
    v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + columns, mask=wanted, other=0.0)
    q, k = q.to(tl.float32), k.to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    a, b = tl.load(a_ptr + token * a_stride + head), tl.load(b_ptr + token * b_stride + head)
    decay, beta = gates_of(a, b, tl.load(log_ptr + head), tl.load(bias_ptr + head))

    state *= tl.exp(decay)
    added = beta * (v.to(tl.float32) - tl.sum(state * k[:, None], 0))
    state += k[:, None] * added[None, :]
    tl.store(places, state, mask=inside)
    out = tl.sum(state * q[:, None], 0)
    tl.store(out_ptr + (token * HEADS + head) * VALUE_DIM + columns, out, mask=wanted)


def gated_delta_step_triton(
    q: Tensor, k: Tensor, v: Tensor, gates: DeltaGates, state: Tensor, spans: Spans, out: Tensor
) -> None:
    """`gated_delta` of spans of one token each, in one launch.

    Args:
        q, k: [T, Hk, dk]; v: [T, Hv, dv]; last dimension contiguous.
        gates: of T tokens and Hv heads.
        state: float32 [rows, Hv, dk, dv], contiguous; written in place.
        spans: without `starts`.
        out: float32 [T, Hv, dv], contiguous.
    """
    (tokens, heads, dim), (value_heads, value_dim) = q.shape, v.shape[1:]
    if not tokens:
        return
    columns = min(COLUMNS, triton.next_power_of_2(value_dim))
    _step[(tokens, value_heads, triton.cdiv(value_dim, columns))](
        q, k, v, *gates, state, spans.rows, spans.fresh_bytes, out, dim**-0.5,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], gates.a.stride(0), gates.b.stride(0),
        HEADS=value_heads, GROUP=value_heads // heads, DIM=dim, DIM_PAD=triton.next_power_of_2(dim),
        VALUE_DIM=value_dim, COLUMNS=columns, EPS=EPS, num_warps=4, **dependent_launch(q),
    )  # fmt: skip
