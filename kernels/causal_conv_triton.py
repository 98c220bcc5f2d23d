"""A short causal convolution of each channel, in spans of sequences, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs
from kernels.span_tiles import find_tile, most_tiles
from kernels.spans import Spans

TOKENS = 16
CHANNELS = 256


@triton.jit
def _inputs(x_ptr, state_ptr, place, inside, known_to, token_stride, channels, TAPS: tl.constexpr):
    """At some places of a span; what comes before `known_to` is in the state."""
    value = tl.load(x_ptr + place * token_stride, mask=inside & (place >= 0), other=0.0)
    old = inside & (place < known_to)
    return value + tl.load(state_ptr + (place + TAPS - 1) * channels, mask=old, other=0.0)


@triton.jit(do_not_specialize=["count", "rows_ptr", "starts_ptr", "fresh_ptr"])
def _convolve(
    x_ptr,
    weight_ptr,
    state_ptr,
    rows_ptr,
    starts_ptr,
    fresh_ptr,
    out_ptr,
    token_stride,
    count,
    channels,
    TAPS: tl.constexpr,
    TAPS_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A few tokens of a span, and CHANNELS channels. Whoever has the first tokens takes the state on."""
    wait_for_inputs(DEPENDENT)
    if starts_ptr is None:
        span = tl.program_id(0)
        begin = span
        tile = 0
        end = span + 1
    else:
        span, tile = find_tile(starts_ptr, tl.program_id(0), count, TOKENS)
        if span >= count:
            return
        begin = tl.load(starts_ptr + span)
        end = tl.load(starts_ptr + span + 1)
    row = tl.load(rows_ptr + span)
    if row < 0:
        return
    known_to = 0  # what comes before this place is in the state: of a fresh span nothing
    if fresh_ptr is not None:
        known_to = -TAPS * tl.load(fresh_ptr + span).to(tl.int32)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    exists = channel < channels
    x_ptr += begin.to(tl.int64) * token_stride + channel
    state_ptr += row * (TAPS - 1) * channels + channel

    place = tile * TOKENS + tl.arange(0, TOKENS)[:, None]
    inside = (place < end - begin) & exists
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for tap in tl.static_range(TAPS):
        source = place + tap - (TAPS - 1)
        value = _inputs(x_ptr, state_ptr, source, inside, known_to, token_stride, channels, TAPS)
        factor = tl.load(weight_ptr + channel * TAPS + tap, mask=exists, other=0.0)
        total += value.to(tl.float32) * factor.to(tl.float32)
    rounded = total.to(out_ptr.dtype.element_ty).to(tl.float32)
    result = (rounded / (1.0 + tl.exp(-rounded))).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (begin + place).to(tl.int64) * channels + channel, result, mask=inside)

    if (tile == 0) & (TAPS > 1):
        kept = tl.arange(0, TAPS_PAD)[:, None]
        lasting = (kept < TAPS - 1) & exists
        last = end - begin - (TAPS - 1) + kept
        inputs = _inputs(x_ptr, state_ptr, last, lasting, known_to, token_stride, channels, TAPS)
        tl.debug_barrier()  # all threads have read the state
        tl.store(state_ptr + kept * channels, inputs, mask=lasting)


def causal_conv_triton(x: Tensor, weight: Tensor, state: Tensor, spans: Spans, out: Tensor) -> None:
    """`causal_conv` in one launch.

    Args:
        x: [T, C], last dimension contiguous; out: [T, C], contiguous.
        weight: [C, K]; state: [rows, K - 1, C], contiguous; written in place.
    """
    (tokens, channels), taps, count = x.shape, weight.shape[1], len(spans.rows)
    if not (tokens and count):
        return
    tile = 1 if spans.starts is None else TOKENS
    grid = most_tiles(tokens, count, tile) if tile > 1 else tokens, triton.cdiv(channels, CHANNELS)
    _convolve[grid](
        x, weight, state, spans.rows, spans.starts, spans.fresh_bytes, out, x.stride(0), count, channels,
        TAPS=taps, TAPS_PAD=triton.next_power_of_2(max(1, taps - 1)),
        TOKENS=tile, CHANNELS=CHANNELS, num_warps=4, **dependent_launch(x),
    )  # fmt: skip
