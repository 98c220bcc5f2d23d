"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464): attention with a state of fixed size, in pieces of a
sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layout import check_index, fail

CHUNK = 64
"""Tokens that are computed together."""
EPS = 1e-6
"""Added to the squared length of a query or key."""


def gated_delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """B pieces of sequences, each from the state S that the piece before it left. Of a token of a value head:

        S = exp(decay) S,   S = S + k (beta (v - S^T k))^T,   out = S^T q / sqrt(dk)

    with q and k scaled to length 1. In float32; torch alone, and nothing waits for the device.

    Args:
        q, k: [B, T, Hk, dk], T at least 1. Each head serves Hv / Hk value heads, one after another.
        v: [B, T, Hv, dv].
        decay: float32 [B, T, Hv], at most 0.
        beta: float32 [B, T, Hv].
        state: float32 [B, Hv, dk, dv]; zero before the beginning of a sequence.

    Returns:
        float32 [B, T, Hv, dv], and the state after the piece, a tensor of its own.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    _check(q, k, v, decay, beta, state)
    q, k, v = _prepared(q, k, v)
    decay, beta, tokens = decay.transpose(1, 2), beta.transpose(1, 2), v.shape[2]
    if tokens == 1:
        out, state = _step(q, k, v, decay[..., None], beta[..., None], state)
        return out.transpose(1, 2), state
    parts = []
    for part in zip(*(x.split(CHUNK, dim=2) for x in (q, k, v, decay, beta)), strict=True):
        out, state = _chunk(*part, state)
        parts.append(out)
    return torch.cat(parts, dim=2).transpose(1, 2), state


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> None:
    """Check the arguments of `gated_delta`. Raises ValueError naming the argument, its value and the remedy."""
    for name, x in (("q", q), ("v", v)):
        if x.dim() != 4:
            fail(name, "shape", tuple(x.shape), "give [pieces, tokens, heads, dimensions]")
    (pieces, tokens, heads, dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    if not tokens:
        fail("q", "shape", tuple(q.shape), "give at least one token")
    if value_heads % heads:
        fail("v", "heads", value_heads, f"give a multiple of q's {heads}")
    check_index("k", k, q.dtype, (pieces, tokens, heads, dim), q.device, "q")
    check_index("v", v, q.dtype, (pieces, tokens, value_heads, value_dim), q.device, "q")
    check_index("decay", decay, torch.float32, (pieces, tokens, value_heads), q.device, "q")
    check_index("beta", beta, torch.float32, (pieces, tokens, value_heads), q.device, "q")
    check_index("state", state, torch.float32, (pieces, value_heads, dim, value_dim), q.device, "q")


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [B, Hv, T, ...]: q and k of length 1, q scaled."""
    group, scale = v.shape[2] // q.shape[2], q.shape[3] ** -0.5
    q, k = (x.float() for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) for x in (q, k))
    q, k = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (q * scale, k))
    return q, k, v.float().transpose(1, 2)


def _step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, Hv, 1, dk], v [B, Hv, 1, dv], decay and beta [B, Hv, 1, 1]."""
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
    """`gated_delta`, a token at a time."""
    q, k, v = _prepared(q, k, v)
    out = torch.zeros_like(v)
    for t in range(v.shape[2]):
        state = state * decay[:, t, :, None, None].exp()
        error = v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
        state = state + torch.einsum("bhk,bhv,bh->bhkv", k[:, :, t], error, beta[:, t])
        out[:, :, t] = torch.einsum("bhkv,bhk->bhv", state, q[:, :, t])
    return out.transpose(1, 2), state
