"""Write the logical positions of new entries beside their K and V."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import groups
from kernels.layout import BLOCK_SIZES, PAD_SLOT, check_index, check_numbers, check_state, fail


def store_positions(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """Write each token's logical position beside its K and V, in every layer and head.

    Args:
        positions: int32 [T].
        state: int32 [L, num_blocks, H, b], each layer contiguous; written in place.
        slots: int64 [L, T, H], `block_id * b + offset`, with strides of 0 where layers or heads share them; -1 stores
            nothing. Two tokens never share a slot of a layer and head.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(positions, state, slots)
    if state.is_cuda:
        with torch.cuda.device(state.device):
            _triton()(positions, state, slots)
    else:
        store_positions_torch(positions, state, slots)


def _check(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """Check the arguments of `store_positions`. Raises ValueError naming the argument, its value and the remedy."""
    if state.dim() != 4 or state.shape[3] not in BLOCK_SIZES:
        fail("state", "shape", tuple(state.shape), "give [layers, num_blocks, heads, slots], 16 to 256 slots")
    check_state("state", state, tuple(state.shape), (torch.int32,), state.device)
    check_index("positions", positions, torch.int32, (positions.numel(),), state.device, "state")
    layers, _, heads, _ = state.shape
    check_numbers("slots", slots, torch.int64, (layers, positions.numel(), heads), state.device, "state")


def store_positions_reference(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """`store_positions`, layer by layer, token by token and head by head."""
    block_size = state.shape[3]
    for layer, token, head in product(*map(range, slots.shape)):
        slot = int(slots[layer, token, head])
        if slot != PAD_SLOT:
            state[layer, slot // block_size, head, slot % block_size] = positions[token]


def store_positions_torch(positions: Tensor, state: Tensor, slots: Tensor) -> None:
    """`store_positions`, all tokens, and the layers and heads that share slots, at once."""
    for layers, heads in product(groups(slots, 0), groups(slots, 2)):
        own, values = slots[layers.start, :, heads.start], positions
        stored = own >= 0
        if not stored.all():
            own, values = own[stored], values[stored]
        blocks = own.div(state.shape[3], rounding_mode="floor")
        state[layers, blocks, heads, own - blocks * state.shape[3]] = values.view(-1, 1, 1)


@cache
def _triton() -> Callable:
    from kernels.store_positions_triton import store_positions_triton

    return store_positions_triton
