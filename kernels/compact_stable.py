"""Pack the survivors of a selection in slot order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import CacheView, check_view, look_up
from kernels.layout import PAD_SLOT, STATE_DTYPES, check_index, check_state, fail


def compact_stable(
    view: CacheView,
    states: Sequence[Tensor],
    kept: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """Pack each layer and head's survivors, in slot order, into the request's destination blocks.

    Args:
        view: any range of layers; K and V are laid out alike, and written in place. Its tables are the source, read
            where a survivor is.
        states: int32 or float32 [L, num_blocks, H, b], each layer contiguous; moved along, written in place.
        kept: int32 [L, R, H, max_keep], contiguous, `select`'s.
        dst_tables: int32 [L, R, H, dst_blocks], the destination, of any strides but the last; read up to
            ceil(survivors / b). A block of it is the head's own source block of the same place or an earlier one, or
            one that no request reads, or -1: then the survivors of its slots are already there, and nothing is written,
            as others share the block.
        updates: for each state None or [L, R, H, max_blocks * b] of its dtype, contiguous: values by source slot that
            are stored instead of the old ones.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(view, states, kept, dst_tables, updates)
    args = view, states, kept, dst_tables, updates
    if kept.is_cuda:
        with torch.cuda.device(kept.device):
            _triton()(*args)
    else:
        compact_stable_torch(*args)


def _check(
    view: CacheView,
    states: Sequence[Tensor],
    kept: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None,
) -> None:
    """Check the arguments of a compaction. Raises ValueError naming the argument, its value and the remedy."""
    check_view(view, all_layers=True)
    layers, blocks, heads, block_size, _ = view.k_cache.shape
    lines, device = tuple(view.lens.shape), view.lens.device
    check_index("kept", kept, torch.int32, (*lines, -1), device)
    if not kept.is_contiguous():
        fail("kept", "stride", kept.stride(), "make it contiguous")
    check_index("dst_tables", dst_tables, torch.int32, (*lines, -1), device)
    most = min(dst_tables.shape[3] * block_size, view.width)
    if kept.shape[3] > most:
        fail("kept", "shape", tuple(kept.shape), f"keep up to {most} entries, or give more blocks")
    if updates is not None and len(updates) != len(states):
        fail("updates", "length", len(updates), f"give {len(states)}, one for each state")
    for i, state in enumerate(states):
        check_state(f"states[{i}]", state, (layers, blocks, heads, block_size), STATE_DTYPES, device)
        update = updates[i] if updates is not None else None
        if update is not None:
            check_index(f"updates[{i}]", update, state.dtype, (*lines, view.width), device)
            if not update.is_contiguous():
                fail(f"updates[{i}]", "stride", update.stride(), "make it contiguous")


def compact_stable_reference(
    view: CacheView,
    states: Sequence[Tensor],
    kept: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """`compact_stable`, entry by entry."""
    block_size = view.k_cache.shape[3]
    written = [view.k_cache, view.v_cache, *states]
    before = [x.clone() for x in written]
    updates = [None, None, *(updates or [None] * len(states))]
    for layer, row, head in product(*map(range, kept.shape[:3])):
        for index, slot in enumerate(kept[layer, row, head].tolist()):
            if slot == PAD_SLOT:
                break
            target = int(dst_tables[layer, row, head, index // block_size])
            source = int(view.block_tables[layer, row, head, slot // block_size])
            if target < 0:
                continue
            for x, old, update in zip(written, before, updates):
                entry = old[layer, source, head, slot % block_size]
                x[layer, target, head, index % block_size] = entry if update is None else update[layer, row, head, slot]


def compact_stable_torch(
    view: CacheView,
    states: Sequence[Tensor],
    kept: Tensor,
    dst_tables: Tensor,
    updates: Sequence[Tensor | None] | None = None,
) -> None:
    """`compact_stable`, all survivors at once."""
    block_size = view.k_cache.shape[3]
    layer, row, head, index = (kept >= 0).nonzero(as_tuple=True)
    source = kept[layer, row, head, index].long()
    to_block = look_up(dst_tables, layer, row, head, index.div(block_size, rounding_mode="floor")).long()
    written = to_block >= 0
    layer, row, head, index, source, to_block = (x[written] for x in (layer, row, head, index, source, to_block))
    from_block = look_up(view.block_tables, layer, row, head, source.div(block_size, rounding_mode="floor")).long()
    offset = index % block_size
    moved = (from_block != to_block) | (source % block_size != offset)
    reads = layer[moved], from_block[moved], head[moved], source[moved] % block_size
    writes = layer[moved], to_block[moved], head[moved], offset[moved]
    for x in (view.k_cache, view.v_cache):
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
