"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464): attention with a state of fixed size, in spans of
sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.delta_gates import CHUNK, EPS, DeltaGates
from kernels.layout import DTYPES, check_index, fail
from kernels.spans import NO_ROW, Spans


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, gates: DeltaGates, state: Tensor, spans: Spans, out: Tensor | None = None
) -> Tensor:
    """Spans of sequences, each from the state S that the span before it left. Of a token of a value head:

        S = exp(decay) S,   S = S + k (beta (v - S^T k))^T,   out = S^T q / sqrt(dk)

    with q and k scaled to length 1. In float32, but products of longer spans in 16 bits are in TF32 on a GPU. Spans of
    one token each take one launch, which reads and writes a state once; others take two, 64 tokens at once.

    Args:
        q, k: [T, Hk, dk], last dimension contiguous; float32, float16 or bfloat16. Each head serves Hv / Hk value
            heads, one after another.
        v: [T, Hv, dv], of the same.
        gates: of their T tokens and Hv heads; `a` and `b` of q's dtype.
        state: float32 [rows, Hv, dk, dv], contiguous; written in place.
        spans: of the tokens.
        out: float32 [T, Hv, dv], contiguous, to write into: the tokens of the spans alone; None: new.

    Returns:
        float32 [T, Hv, dv]; unwritten where no span is.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    _check(q, k, v, gates, state, spans)
    if out is None:
        out = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    check_index("out", out, torch.float32, tuple(v.shape), v.device, "q")
    for name, x in (("state", state), ("out", out)):
        if not x.is_contiguous():
            fail(name, "stride", x.stride(), "make it contiguous")
    if q.is_cuda:
        with torch.cuda.device(q.device):
            _triton(spans.starts is None)(q, k, v, gates, state, spans, out)
    else:
        gated_delta_torch(q, k, v, gates, state, spans, out)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, gates: DeltaGates, state: Tensor, spans: Spans) -> None:
    """Check the arguments of `gated_delta`. Raises ValueError naming the argument, its value and the remedy."""
    for name, x in (("q", q), ("v", v)):
        if x.dim() != 3:
            fail(name, "shape", tuple(x.shape), "give [tokens, heads, dimensions]")
    if q.dtype not in DTYPES:
        fail("q", "dtype", q.dtype, "use float32, float16 or bfloat16")
    (tokens, heads, dim), (value_heads, value_dim) = q.shape, v.shape[1:]
    if value_heads % heads:
        fail("v", "heads", value_heads, f"give a multiple of q's {heads}")
    check_index("q", q, q.dtype, (tokens, heads, dim), q.device, "q")
    check_index("k", k, q.dtype, (tokens, heads, dim), q.device, "q")
    check_index("v", v, q.dtype, (tokens, value_heads, value_dim), q.device, "q")
    gates.check(tokens, value_heads, q.dtype, q.device)
    check_index("state", state, torch.float32, (-1, value_heads, dim, value_dim), q.device, "q")
    spans.check(tokens, q.device)


def gated_delta_torch(
    q: Tensor, k: Tensor, v: Tensor, gates: DeltaGates, state: Tensor, spans: Spans, out: Tensor
) -> None:
    """`gated_delta`; spans of one token at once, others one after another, a chunk at once."""
    q, k, v = _prepared(q, k, v)
    decay, beta = (x.T for x in gates.computed())
    if spans.starts is None and spans.fresh is None:
        rows, held = spans.rows, spans.rows != NO_ROW
        tokens = (x.transpose(0, 1)[:, :, None] for x in (q, k, v, decay[..., None], beta[..., None]))
        result, after = _step(*tokens, state[rows])
        out[held], state[rows[held]] = result[held, :, 0], after[held]
        return
    for row, begin, end, fresh in spans.each():
        each = torch.zeros_like(state[row]) if fresh else state[row]
        tokens = (x[:, begin:end].split(CHUNK, dim=1) for x in (q, k, v, decay, beta))
        for part in zip(*tokens, strict=True):
            result, each = _chunk(*part, each)
            out[begin : begin + result.shape[1]] = result.transpose(0, 1)
            begin += result.shape[1]
        state[row] = each


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [Hv, T, ...]: q and k of length 1, q scaled."""
    group, scale = v.shape[1] // q.shape[1], q.shape[2] ** -0.5
    q, k = (x.float() for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) for x in (q, k))
    q, k = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (q * scale, k))
    return q, k, v.float().transpose(0, 1)


def _step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token each: q, k [B, Hv, 1, dk], v [B, Hv, 1, dv], decay and beta [B, Hv, 1, 1], state [B, Hv, dk, dv]."""
    state = state * decay.exp()
    state = torch.baddbmm(*(x.flatten(0, 1) for x in (state, k.mT, beta * (v - k @ state)))).view(state.shape)
    return q @ state, state


def _chunk(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A few tokens at once: what token i adds, k_i u_i^T, depends on u_j of those before it, so that all u solve a
    triangular system.
    """
    past = decay.cumsum(-1)
    between = (past[..., None] - past[..., None, :]).tril().exp().tril()  # from token j to i, 0 where j is later
    beta, past = beta[..., None], past[..., None]
    system = beta * between * (k @ k.mT)
    added = torch.linalg.solve_triangular(
        system, beta * (v - past.exp() * (k @ state)), upper=False, unitriangular=True
    )
    out = past.exp() * (q @ state) + (between * (q @ k.mT)) @ added
    last = past[..., -1:, :]
    return out, last.exp() * state + ((last - past).exp() * k).mT @ added


def gated_delta_reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One span, a token at a time.

    Args:
        q, k: [T, Hk, dk]; v: [T, Hv, dv].
        decay, beta: float32 [T, Hv], of `DeltaGates.computed`.
        state: float32 [Hv, dk, dv].

    Returns:
        float32 [T, Hv, dv], and the state after the span.
    """
    q, k, v = _prepared(q, k, v)
    out = torch.zeros_like(v)
    for t in range(v.shape[1]):
        state = state * decay[t, :, None, None].exp()
        error = v[:, t] - torch.einsum("hkv,hk->hv", state, k[:, t])
        state = state + torch.einsum("hk,hv,h->hkv", k[:, t], error, beta[t])
        out[:, t] = torch.einsum("hkv,hk->hv", state, q[:, t])
    return out.transpose(0, 1), state


@cache
def _triton(single: bool) -> Callable:
    if single:
        from kernels.gated_delta_step_triton import gated_delta_step_triton

        return gated_delta_step_triton
    from kernels.gated_delta_triton import gated_delta_triton

    return gated_delta_triton
