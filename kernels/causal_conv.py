"""A short causal convolution of each channel, in spans of sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import check_index, check_rows, fail, given_or_new
from kernels.spans import NO_ROW, Spans


def causal_conv(x: Tensor, weight: Tensor, state: Tensor, spans: Spans, out: Tensor | None = None) -> Tensor:
    """Each channel's own convolution of spans of sequences, and silu of it, in one launch.

    It is a sum over the K taps, in float32 and rounded once before silu: a span gives the same in any batch.

    Args:
        x: [T, C], last dimension contiguous; float32, float16 or bfloat16.
        weight: [C, K], of x's dtype, contiguous; the last tap is that of the token itself.
        state: [rows, K - 1, C], of x's dtype, contiguous: the inputs before each span; becomes those before the next.
        spans: of x's tokens.
        out: [T, C], contiguous, to write into: the tokens of the spans alone; None: new.

    Returns:
        [T, C], x's dtype; unwritten where no span is.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    check_rows("x", x)
    taps = weight.shape[-1]
    check_index("weight", weight, x.dtype, (x.shape[1], taps), x.device, "x")
    check_index("state", state, x.dtype, (-1, taps - 1, x.shape[1]), x.device, "x")
    for name, given in (("weight", weight), ("state", state)):
        if not given.is_contiguous():
            fail(name, "stride", given.stride(), "make it contiguous")
    spans.check(len(x), x.device)
    out = given_or_new(out, x)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            _triton()(x, weight, state, spans, out)
    else:
        causal_conv_torch(x, weight, state, spans, out)
    return out


def causal_conv_reference(x: Tensor, before: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of one span, by torch's convolution in float32.

    Args:
        x: [T, C]; before: [K - 1, C], the inputs before it; weight: [C, K].

    Returns:
        [T, C], and the inputs before the next span, [K - 1, C]; x's dtype.
    """
    inputs = torch.cat((before, x))
    out = F.conv1d(inputs.float().T, weight.float()[:, None], groups=x.shape[1]).T
    return F.silu(out).to(x.dtype), inputs[len(x) :]


def causal_conv_torch(x: Tensor, weight: Tensor, state: Tensor, spans: Spans, out: Tensor) -> None:
    """`causal_conv`; spans of one token at once, others one after another."""
    if spans.starts is None and spans.fresh is None:
        rows, held = spans.rows, spans.rows != NO_ROW
        before = state[rows]
        result, after = _piece(x[:, None], before, weight)
        out[held], state[rows[held]] = result[held, 0], after[held]
        return
    for row, begin, end, fresh in spans.each():
        before = torch.zeros_like(state[row]) if fresh else state[row]
        result, after = _piece(x[None, begin:end], before[None], weight)
        out[begin:end], state[row] = result[0], after[0]


def _piece(x: Tensor, before: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """B spans of as many tokens: x [B, T, C], before [B, K - 1, C]."""
    inputs, tokens = torch.cat((before, x), dim=1), x.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for tap, factors in enumerate(weight.float().unbind(1)):
        out.addcmul_(inputs[:, tap : tap + tokens].float(), factors)
    return F.silu(out.to(x.dtype)), inputs[:, tokens:]


@cache
def _triton() -> Callable:
    from kernels.causal_conv_triton import causal_conv_triton

    return causal_conv_triton
