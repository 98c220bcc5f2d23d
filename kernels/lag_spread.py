"""How far an entry's channels spread over the range that they have in the partition after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import CacheView, check_view, entries_reference
from kernels.layout import check_numbers, fail

LEAST_RANGE = 2.0**-12
"""Of the larger bound: what rounding leaves of equal values is no range."""


def lag_spread(view: CacheView, starts: Tensor, partition: int) -> Tensor:
    """std over channels of (x - low) / (high - low), for keys and for values (LagKV, arXiv 2504.04704).

    From slot `starts` on a request's entries are cut into whole partitions. low and high are the least and the greatest
    of a channel in the next partition. A channel without a range there counts as 0. The std divides by d - 1.

    Args:
        view: any range of layers.
        starts: int32 [L, R, H], at least 0; with strides of 0 where layers or heads share them.
        partition: slots of a partition, B.

    Returns:
        float32 [2, L, R, H, N], N = max_blocks * b: of keys and of values. 0 before `starts`, in the last whole
        partition, and behind it.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    check_view(view, all_layers=True)
    check_numbers("starts", starts, torch.int32, tuple(view.lens.shape), view.lens.device, "lens")
    if partition < 1:
        fail("partition", "value", partition, "give at least one slot")
    if view.lens.is_cuda:
        with torch.cuda.device(view.lens.device):
            return _triton()(view, starts, partition, LEAST_RANGE)
    return lag_spread_reference(view, starts, partition)


def spread(entries: Tensor) -> Tensor:
    """Of entries in whole partitions [..., P, B, d], all but the last: float32 [..., P - 1, B]."""
    low, high = entries[..., 1:, :, :].aminmax(dim=-2, keepdim=True)
    width = high - low
    scale = torch.where(width <= LEAST_RANGE * torch.maximum(low.abs(), high.abs()), 0.0, 1 / width)
    return ((entries[..., :-1, :, :] - low) * scale).std(dim=-1)


def lag_spread_reference(view: CacheView, starts: Tensor, partition: int) -> Tensor:
    """`lag_spread`, layer by layer, request by request and head by head."""
    out = torch.zeros(2, *view.lens.shape, view.width, device=view.lens.device)
    for layer, row, head in product(*map(range, view.lens.shape)):
        length, start = int(view.lens[layer, row, head]), int(starts[layer, row, head])
        whole = (length - start) // partition
        if whole < 2:
            continue
        for number, cache_ in enumerate((view.k_cache, view.v_cache)):
            entries = entries_reference(cache_[layer], view.block_tables[layer, row, head], length, head)
            parts = entries[start : start + whole * partition].unflatten(0, (whole, partition))
            out[number, layer, row, head, start : start + (whole - 1) * partition] = spread(parts).flatten()
    return out


@cache
def _triton() -> Callable[..., Tensor]:
    from kernels.lag_spread_triton import lag_spread_triton

    return lag_spread_triton
