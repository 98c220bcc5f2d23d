"""Pack the survivors of a selection in slot order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.layout import PAD_SLOT, STATE_DTYPES, check_all_layers, check_index, check_state, check_tables, fail


def compact_stable(
    k_cache: Tensor,
    v_cache: Tensor,
    states: Sequence[Tensor],
    kept: Tensor,
    block_tables: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """Pack each layer and head's survivors, in slot order, into the request's destination blocks.

    Args:
        k_cache, v_cache: [L, num_blocks, H, b, d], any range of layers, laid out alike; written in place.
        states: int32 or float32 [L, num_blocks, H, b], each layer contiguous; moved along, written in place.
        kept: int32 [L, R, H, max_keep], contiguous, `select`'s.
        block_tables: int32 [R, max_blocks], the source; read where a survivor is.
        dst_tables: int32 [R, dst_blocks], the destination; read up to ceil(survivors / b). A block of it is the
            request's own source block of the same place or an earlier one, or one that no request reads, or -1: then
            the survivors of its slots are already there, and nothing is written, as others share the block.
        updates: for each state None or [L, R, H, max_blocks * b] of its dtype, contiguous: values by source slot that
            are stored instead of the old ones.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(k_cache, v_cache, states, kept, block_tables, dst_tables, updates)
    args = k_cache, v_cache, states, kept, block_tables, dst_tables, updates
    if k_cache.is_cuda:
        with torch.cuda.device(k_cache.device):
            _triton()(*args)
    else:
        compact_stable_torch(*args)


def _check(
    k_cache: Tensor,
    v_cache: Tensor,
    states: Sequence[Tensor],
    kept: Tensor,
    block_tables: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None,
) -> None:
    """Check the arguments of a compaction. Raises ValueError naming the argument, its value and the remedy."""
    check_all_layers(k_cache, v_cache)
    layers, blocks, heads, block_size, _ = k_cache.shape
    requests, width = check_tables(block_tables, -1, k_cache.device)
    check_index("kept", kept, torch.int32, (layers, requests, heads, -1), k_cache.device)
    if not kept.is_contiguous():
        fail("kept", "stride", kept.stride(), "make it contiguous")
    check_index("dst_tables", dst_tables, torch.int32, (requests, -1), k_cache.device)
    most = min(dst_tables.shape[1], width) * block_size
    if kept.shape[3] > most:
        fail("kept", "shape", tuple(kept.shape), f"keep up to {most} entries, or give more blocks")
    if updates is not None and len(updates) != len(states):
        fail("updates", "length", len(updates), f"give {len(states)}, one for each state")
    for i, state in enumerate(states):
        check_state(f"states[{i}]", state, (layers, blocks, heads, block_size), STATE_DTYPES, k_cache.device)
        update = updates[i] if updates is not None else None
        if update is not None:
            shape = layers, requests, heads, width * block_size
            check_index(f"updates[{i}]", update, state.dtype, shape, k_cache.device)
            if not update.is_contiguous():
                fail(f"updates[{i}]", "stride", update.stride(), "make it contiguous")


def compact_stable_reference(
    k_cache: Tensor,
    v_cache: Tensor,
    states: Sequence[Tensor],
    kept: Tensor,
    block_tables: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """`compact_stable`, entry by entry."""
    block_size = k_cache.shape[3]
    written = [k_cache, v_cache, *states]
    before = [x.clone() for x in written]
    updates = [None, None, *(updates or [None] * len(states))]
    for layer, row, head in product(*map(range, kept.shape[:3])):
        for index, slot in enumerate(kept[layer, row, head].tolist()):
            if slot == PAD_SLOT:
                break
            target = int(dst_tables[row, index // block_size])
            source = int(block_tables[row, slot // block_size])
            if target < 0:
                continue
            for x, old, update in zip(written, before, updates):
                entry = old[layer, source, head, slot % block_size]
                x[layer, target, head, index % block_size] = entry if update is None else update[layer, row, head, slot]


def compact_stable_torch(
    k_cache: Tensor,
    v_cache: Tensor,
    states: Sequence[Tensor],
    kept: Tensor,
    block_tables: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """`compact_stable`, all survivors at once."""
    block_size = k_cache.shape[3]
    layer, row, head, index = (kept >= 0).nonzero(as_tuple=True)
    source = kept[layer, row, head, index].long()
    to_block = dst_tables[row, index.div(block_size, rounding_mode="floor")].long()
    written = to_block >= 0
    layer, row, head, index, source, to_block = (x[written] for x in (layer, row, head, index, source, to_block))
    from_block = block_tables[row, source.div(block_size, rounding_mode="floor")].long()
    offset = index % block_size
    moved = (from_block != to_block) | (source % block_size != offset)
    reads = layer[moved], from_block[moved], head[moved], source[moved] % block_size
    writes = layer[moved], to_block[moved], head[moved], offset[moved]
    for x in (k_cache, v_cache):
        x.index_put_(writes, x[reads])
    for state, update in zip(states, updates or [None] * len(states), strict=True):
        if update is None:
            state.index_put_(writes, state[reads])
        else:
            state.index_put_((layer, to_block, head, offset), update[layer, row, head, source])


@cache
def _triton() -> Callable:
    from kernels.compact_stable_triton import compact_stable_triton

    return compact_stable_triton
