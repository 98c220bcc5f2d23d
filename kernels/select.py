"""The best slots of each layer and KV head, in slot order."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import once
from kernels.layout import PAD_SLOT, check_index, check_numbers, check_scores, fail


def select(scores: Tensor, forced: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> Tensor:
    """The slots that survive in each layer and KV head: those of `forced`, then the best, ties to the higher slot.

    Args:
        scores: float32 [L, R, H, N], contiguous, no NaN in a request's n entries; those past n are never used.
        forced: bool [L, R, H, N], last dimension contiguous; at most `keep` of a request's n entries.
        lens: int32 [L, R, H], n; with strides of 0 where layers or heads share them, as in a `CacheView`, and so may
            `forced` and `keep`.
        keep: int32 [L, R, H], up to max_keep; all n entries survive where n is smaller.
        max_keep: of all requests, up to N.

    Returns:
        int32 [L, R, H, max_keep]: slots in ascending order, then -1.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(scores, forced, lens, keep, max_keep)
    if scores.is_cuda:
        with torch.cuda.device(scores.device):
            return _triton()(scores, forced, lens, keep, max_keep)
    return select_torch(scores, forced, lens, keep, max_keep)


def _check(scores: Tensor, forced: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> None:
    """Check the arguments of `select`. Raises ValueError naming the argument, its value and the remedy."""
    *shape, width = check_scores(scores)
    check_index("forced", forced, torch.bool, (*shape, width), scores.device, "scores")
    check_numbers("lens", lens, torch.int32, tuple(shape), scores.device, "scores")
    check_numbers("keep", keep, torch.int32, tuple(shape), scores.device, "scores")
    if not isinstance(max_keep, int) or not 0 <= max_keep <= width:
        fail("max_keep", "value", max_keep, f"give the most that a request keeps, an int up to {width}")


def select_reference(scores: Tensor, forced: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> Tensor:
    """`select`, sorting each line."""
    kept = torch.full((*scores.shape[:3], max_keep), PAD_SLOT, dtype=torch.int32)
    for line in product(*map(range, lens.shape)):
        length = int(lens[line])
        count = min(int(keep[line]), length)
        required, values = forced[line].tolist(), scores[line].tolist()
        best = sorted(range(length), key=lambda j: (required[j], values[j], j), reverse=True)
        kept[line][:count] = torch.tensor(sorted(best[:count]), dtype=torch.int32)
    return kept.to(scores.device)


def select_torch(scores: Tensor, forced: Tensor, lens: Tensor, keep: Tensor, max_keep: int) -> Tensor:
    """`select`, as the largest of integers that order slots by (forced, score, slot) and are all different."""
    width = scores.shape[3]
    lens = once(lens)[..., None]
    bits = scores.masked_fill(scores == 0, 0).view(torch.int32)
    order = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long()
    order = torch.where(once(forced), 1 << 32, order)
    slots = torch.arange(width)
    order = (order * width + slots).masked_fill(slots >= lens, torch.iinfo(torch.int64).min)
    best = order.topk(max_keep, dim=-1).indices
    count = torch.minimum(once(keep)[..., None], lens)
    best = best.masked_fill(torch.arange(max_keep) >= count, width).sort(dim=-1).values
    return best.masked_fill(best == width, -1).int()


@cache
def _triton() -> Callable:
    from kernels.select_triton import select_triton

    return select_triton
