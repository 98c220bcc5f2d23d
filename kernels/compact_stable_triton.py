"""Pack the survivors of a selection in slot order, in Triton.

`kept` names the source slot of each destination slot. An entry that stays in its slot, in a block that stays in its
place, is never touched.

Source: Zipage (arXiv 2603.08743).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView

ENTRIES = 128
"""Entries that a program moves at a time."""

SLICE_BYTES = 128
"""Of a K or V row: what one program moves, so that a few requests fill a GPU."""

STATE_ENTRIES = 1024

POINTERS = ("kept_ptr", "table_ptr", "dst_ptr")
TABLE_STRIDES = ("table_layer_stride", "table_row_stride", "table_head_stride")
DST_STRIDES = ("dst_layer_stride", "dst_row_stride", "dst_head_stride")
NUMBERS = ("max_keep", "steps", *TABLE_STRIDES, *DST_STRIDES)


@triton.jit(do_not_specialize=[*POINTERS, *NUMBERS])
def _move_entries(
    k_ptr,
    v_ptr,
    kept_ptr,
    table_ptr,
    dst_ptr,
    max_keep,
    steps,
    layer_stride,
    block_stride,
    head_stride,
    table_layer_stride,
    table_row_stride,
    table_head_stride,
    dst_layer_stride,
    dst_row_stride,
    dst_head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One layer, request, KV head and slice of the head's dimensions, for `steps` times ENTRIES destination slots.

    In place this is safe, since `kept` ascends (kept[i] >= i): a program owns its column of bytes; its later steps read
    slots above those that this step writes, and its earlier ones, like this one, have read theirs at the barrier.
    """
    dims = tl.program_id(0) * DIMS + tl.arange(0, DIMS)
    pair = tl.program_id(1)
    row = (pair // HEADS).to(tl.int64)
    head = pair % HEADS
    layer = tl.program_id(2).to(tl.int64)
    column = layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row * table_row_stride + head * table_head_stride
    dst = dst_ptr + layer * dst_layer_stride + row * dst_row_stride + head * dst_head_stride
    kept_row = kept_ptr + (layer * tl.num_programs(1) + pair) * max_keep
    for step in range(0, steps):
        index = step * ENTRIES + tl.arange(0, ENTRIES)
        source = tl.load(kept_row + index, mask=index < max_keep, other=-1)
        held = source >= 0
        from_block = tl.load(table + source // BLOCK_SIZE, mask=held, other=0)
        to_block = tl.load(dst + index // BLOCK_SIZE, mask=held, other=-1)
        moved = (to_block >= 0) & ((from_block != to_block) | (source % BLOCK_SIZE != index % BLOCK_SIZE))
        read = column + from_block.to(tl.int64) * block_stride + source % BLOCK_SIZE * HEAD_DIM
        write = column + to_block.to(tl.int64) * block_stride + index % BLOCK_SIZE * HEAD_DIM
        mask = moved[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + read[:, None] + dims[None, :], mask=mask)
        v = tl.load(v_ptr + read[:, None] + dims[None, :], mask=mask)
        tl.debug_barrier()
        tl.store(k_ptr + write[:, None] + dims[None, :], k, mask=mask)
        tl.store(v_ptr + write[:, None] + dims[None, :], v, mask=mask)


@triton.jit(do_not_specialize=[*POINTERS, *NUMBERS])
def _move_states(
    state_ptr,
    update_ptr,
    kept_ptr,
    table_ptr,
    dst_ptr,
    max_keep,
    steps,
    layer_stride,
    width,
    table_layer_stride,
    table_row_stride,
    table_head_stride,
    dst_layer_stride,
    dst_row_stride,
    dst_head_stride,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UPDATED: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One layer, request and KV head: `_move_entries` for four-byte states, or their new values."""
    pair = tl.program_id(0)
    row = (pair // HEADS).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    line = layer * tl.num_programs(0) + pair
    head = pair % HEADS
    column = state_ptr + layer * layer_stride + head * BLOCK_SIZE
    table = table_ptr + layer * table_layer_stride + row * table_row_stride + head * table_head_stride
    dst = dst_ptr + layer * dst_layer_stride + row * dst_row_stride + head * dst_head_stride
    for step in range(0, steps):
        index = step * ENTRIES + tl.arange(0, ENTRIES)
        source = tl.load(kept_ptr + line * max_keep + index, mask=index < max_keep, other=-1)
        held = source >= 0
        to_block = tl.load(dst + index // BLOCK_SIZE, mask=held, other=-1)
        if UPDATED:
            value = tl.load(update_ptr + line * width + source, mask=held, other=0)
        else:
            from_block = tl.load(table + source // BLOCK_SIZE, mask=held, other=0)
            read = from_block.to(tl.int64) * (HEADS * BLOCK_SIZE) + source % BLOCK_SIZE
            value = tl.load(column + read, mask=held, other=0)
        tl.debug_barrier()
        write = to_block.to(tl.int64) * (HEADS * BLOCK_SIZE) + index % BLOCK_SIZE
        tl.store(column + write, value, mask=to_block >= 0)


def compact_stable_triton(
    view: CacheView,
    states: Sequence[Tensor],
    kept: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """`compact_stable` in one launch, and one more for each state; `kept` ascends, then -1."""
    k_cache, v_cache, block_tables, _ = view
    layers, requests, heads, max_keep = kept.shape
    if kept.numel() == 0:
        return
    block_size, head_dim = k_cache.shape[3:]
    dims = min(SLICE_BYTES // k_cache.element_size(), triton.next_power_of_2(head_dim))
    tables = *block_tables.stride()[:3], *dst_tables.stride()[:3]
    _move_entries[(triton.cdiv(head_dim, dims), requests * heads, layers)](
        k_cache, v_cache, kept, block_tables, dst_tables, max_keep, triton.cdiv(max_keep, ENTRIES),
        *k_cache.stride()[:3], *tables,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, DIMS=dims, ENTRIES=ENTRIES,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    for state, update in zip(states, updates or [None] * len(states), strict=True):
        state = state.view(torch.int32)
        values = state if update is None else update.view(torch.int32)
        _move_states[(requests * heads, layers)](
            state, values, kept, block_tables, dst_tables, max_keep, triton.cdiv(max_keep, STATE_ENTRIES),
            state.stride(0), values.shape[3], *tables,
            HEADS=heads, BLOCK_SIZE=block_size, UPDATED=update is not None, ENTRIES=STATE_ENTRIES,
            num_warps=8, num_stages=1,
        )  # fmt: skip
