"""Predict and store, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS = 8
COLUMNS = 512
"""Tokens of one program, and the columns of their hidden states that it reads at once. A token's sum is taken in the
same order whatever stands beside it."""


@triton.jit(do_not_specialize=["hidden_ptr", "slots_ptr", "tokens"])
def _store_prediction_tiles(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    slots_ptr,
    tokens,
    hidden_stride,
    slots_token_stride,
    slots_head_stride,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One head and TOKENS tokens."""
    head = tl.program_id(0)
    index = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rows = hidden_ptr + index.to(tl.int64)[:, None] * hidden_stride
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (index < tokens)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=0.0)
        total += tl.sum(x * w[None, :], 1)
    total += tl.load(bias_ptr + head)
    slot_ptrs = slots_ptr + index * slots_token_stride + head * slots_head_stride
    slots = tl.load(slot_ptrs, mask=index < tokens, other=-1)
    entry = slots // BLOCK_SIZE * (HEADS * BLOCK_SIZE) + head * BLOCK_SIZE + slots % BLOCK_SIZE
    tl.store(state_ptr + entry, total, mask=slots >= 0)


def store_predictions_triton(hidden: Tensor, weight: Tensor, bias: Tensor, state: Tensor, slots: Tensor) -> None:
    """`store_predictions` in one launch.

    Args:
        hidden: [T, width].
        weight, bias: float32 [H, width] and [H].
        state: float32 [num_blocks, H, b], one layer; written in place.
        slots: int64 [T, H]; -1 stores nothing.
    """
    (tokens, width), (_, heads, block_size) = hidden.shape, state.shape
    if tokens == 0:
        return
    _store_prediction_tiles[(heads, triton.cdiv(tokens, TOKENS))](
        hidden, weight, bias, state, slots, tokens, hidden.stride(0), *slots.stride(),
        WIDTH=width, HEADS=heads, BLOCK_SIZE=block_size, TOKENS=TOKENS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
