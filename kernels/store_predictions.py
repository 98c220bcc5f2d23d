"""Predict a number for each new entry from its hidden state, and write it beside K and V."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.layout import BLOCK_SIZES, PAD_SLOT, check_numbers, check_rows, fail


def store_predictions(hidden: Tensor, weight: Tensor, bias: Tensor, state: Tensor, slots: Tensor) -> None:
    """Write `hidden @ weight.T + bias`, one number for each token and head, into the tokens' slots.

    Args:
        hidden: [T, width], last dimension contiguous; float32, float16 or bfloat16. Sums are in float32.
        weight: float32 [H, width], contiguous.
        bias: float32 [H].
        state: float32 [num_blocks, H, b], one layer, contiguous; written in place.
        slots: int64 [T, H], `block_id * b + offset`, with a stride of 0 where heads share them; -1 stores nothing.
            Two tokens never share a slot of a head.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(hidden, weight, bias, state, slots)
    if state.is_cuda:
        with torch.cuda.device(state.device):
            _triton()(hidden, weight, bias, state, slots)
    else:
        store_predictions_torch(hidden, weight, bias, state, slots)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, state: Tensor, slots: Tensor) -> None:
    """Check the arguments of `store_predictions`. Raises ValueError naming the argument, its value and the remedy."""
    if state.dim() != 3 or state.shape[2] not in BLOCK_SIZES:
        fail("state", "shape", tuple(state.shape), "give [num_blocks, heads, slots], 16 to 256 slots")
    heads = state.shape[1]
    check_numbers("state", state, torch.float32, tuple(state.shape), state.device, "state")
    tokens, width = check_rows("hidden", hidden)
    if hidden.device != state.device:
        fail("hidden", "device", hidden.device, f"move it to {state.device}, where state is")
    check_numbers("weight", weight, torch.float32, (heads, width), state.device, "state")
    check_numbers("bias", bias, torch.float32, (heads,), state.device, "state")
    check_numbers("slots", slots, torch.int64, (tokens, heads), state.device, "state")
    for name, x in (("state", state), ("weight", weight), ("bias", bias)):
        if not x.is_contiguous():
            fail(name, "stride", x.stride(), "make it contiguous")


def store_predictions_reference(hidden: Tensor, weight: Tensor, bias: Tensor, state: Tensor, slots: Tensor) -> None:
    """`store_predictions`, token by token and head by head."""
    block_size = state.shape[2]
    for token, head in product(*map(range, slots.shape)):
        slot = int(slots[token, head])
        if slot != PAD_SLOT:
            state[slot // block_size, head, slot % block_size] = hidden[token].float() @ weight[head] + bias[head]


def store_predictions_torch(hidden: Tensor, weight: Tensor, bias: Tensor, state: Tensor, slots: Tensor) -> None:
    """`store_predictions`, all tokens at once."""
    values = linear(hidden.float(), weight, bias)
    token, head = (slots >= 0).nonzero(as_tuple=True)
    own = slots[token, head]
    blocks = own.div(state.shape[2], rounding_mode="floor")
    state[blocks, head, own - blocks * state.shape[2]] = values[token, head]


@cache
def _triton() -> Callable:
    from kernels.store_predictions_triton import store_predictions_triton

    return store_predictions_triton
