"""Gates of a gated delta rule, and lengths of its queries and keys, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact where exp(x) is small, and x above 20, as torch has it."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    return tl.where(x > 20.0, x, tl.where(u == 1.0, e, tl.log(u) * (e / tl.maximum(u - 1.0, 1e-30))))


@triton.jit
def gates_of(a, b, decay_log, decay_bias):
    """decay and beta of `DeltaGates`."""
    decay = -tl.exp(decay_log) * softplus(a.to(tl.float32) + decay_bias)
    return decay, 1.0 / (1.0 + tl.exp(-b.to(tl.float32)))


@triton.jit
def inverse_length(x, EPS: tl.constexpr):
    """Of the rows of x: 1 / sqrt(x . x + EPS)."""
    return tl.rsqrt(tl.sum(x * x, 1) + EPS)
