"""Draw tokens from logits that are read once, and one chunk of each row a second time, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Columns that one program sums."""


@triton.jit
def _first_past(running, weights, target, places, NONE: tl.constexpr):
    """The lowest place of a weight above 0 whose running sum passes `target`; the last such weight's if none does."""
    last = tl.max(tl.where(weights > 0, places, 0), 0)
    found = tl.min(tl.where((running > target) & (weights > 0), places, NONE), 0)
    return tl.minimum(found, last)


@triton.jit(do_not_specialize=["temperature_ptr"])
def _sum_chunk(logits_ptr, temperature_ptr, max_ptr, sum_ptr, row_stride, vocab, CHUNK: tl.constexpr):
    """One row and chunk: its largest logit m, and the sum of exp((logit - m) / temperature)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * row_stride + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    largest = tl.max(logits, 0)
    # Where the whole chunk is -inf, or the row is greedy, there is no sum.
    shifted = tl.where(logits > float("-inf"), (logits - largest) / tl.where(temperature > 0, temperature, 1.0), logits)
    part = row * tl.num_programs(1) + chunk
    tl.store(max_ptr + part, largest)
    tl.store(sum_ptr + part, tl.sum(tl.exp(shifted).to(tl.float64), 0))


@triton.jit(do_not_specialize=["temperature_ptr", "u_ptr"])
def _pick_token(
    logits_ptr,
    temperature_ptr,
    u_ptr,
    max_ptr,
    sum_ptr,
    token_ptr,
    row_stride,
    vocab,
    CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row: the chunk where the running sum passes its share, then the token in it."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0
    divisor = tl.where(greedy, 1.0, temperature)
    chunks = tl.arange(0, CHUNKS_PAD)
    maxima = tl.load(max_ptr + row * CHUNKS + chunks, mask=chunks < CHUNKS, other=float("-inf"))
    sums = tl.load(sum_ptr + row * CHUNKS + chunks, mask=chunks < CHUNKS, other=0.0)
    largest = tl.max(maxima, 0)
    shares = tl.exp(tl.where(maxima > float("-inf"), (maxima - largest) / divisor, maxima)).to(tl.float64)
    weights = sums * shares
    total = tl.sum(weights, 0)
    target = tl.load(u_ptr + row) * total
    drawn = _first_past(tl.cumsum(weights, 0), weights, target, chunks, CHUNKS)
    best = tl.min(tl.where(maxima == largest, chunks, CHUNKS - 1), 0)
    chunk = tl.where(greedy, best, drawn)

    inside = tl.arange(0, CHUNK)
    columns = chunk * CHUNK + inside
    logits = tl.load(logits_ptr + row * row_stride + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, 0)
    shifted = tl.where(logits > float("-inf"), (logits - largest) / divisor, logits)
    rest = target - tl.sum(tl.where(chunks < chunk, weights, 0.0), 0)
    share = tl.sum(tl.where(chunks == chunk, shares, 0.0), 0)
    weights = tl.exp(shifted).to(tl.float64)
    drawn = _first_past(tl.cumsum(weights, 0), weights, rest / share, inside, CHUNK)
    best = tl.min(tl.where(logits == largest, inside, CHUNK - 1), 0)
    token = tl.minimum(chunk * CHUNK + tl.where(greedy, best, drawn), vocab - 1)
    # NaN and +inf make the sum NaN, a row without a finite logit makes it 0: each comparison is then false.
    tl.store(token_ptr + row, tl.where((total > 0) & (total < float("inf")), token, -1).to(tl.int64))


def sample_from_logits_triton(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """`sample_from_logits` in two launches.

    Args:
        logits: [N, vocab], last dimension contiguous.
        temperature: float32 [N].
        u: float64 [N].

    Returns:
        int64 [N].
    """
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    chunks = triton.cdiv(vocab, CHUNK)
    maxima = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    sums = torch.empty((rows, chunks), dtype=torch.float64, device=logits.device)
    _sum_chunk[(rows, chunks)](logits, temperature, maxima, sums, logits.stride(0), vocab, CHUNK=CHUNK, num_warps=8)
    _pick_token[(rows,)](
        logits, temperature, u, maxima, sums, tokens, logits.stride(0), vocab,
        CHUNKS=chunks, CHUNKS_PAD=triton.next_power_of_2(chunks), CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    return tokens
