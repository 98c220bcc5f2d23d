"""Pool scores along the sequence."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from kernels.cache_view import once
from kernels.layout import check_choice, check_numbers, check_scores, fail


def pool_scores(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> Tensor:
    """Pool scores along the sequence, so that neighbours survive together (SnapKV, arXiv 2404.14469).

    Args:
        scores: float32 [L, R, H, N], contiguous.
        lens: int32 [L, R, H], n; with strides of 0 where layers or heads share them, as in a `CacheView`.
        width: odd number of slots, stride 1.
        kind: "max", over fewer slots at the ends; "avg", with zeros past the ends and the divisor always `width`.
        limit: int32 [L, R, H], likewise; the slots below min(limit, n) are pooled, among themselves.

    Returns:
        float32 [L, R, H, N]; slots from the limit on are as they were.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(scores, lens, width, kind, limit)
    slots = torch.arange(scores.shape[3], device=scores.device)
    pooled = slots < torch.minimum(once(limit), once(lens))[..., None]
    lines = torch.where(pooled, scores, float("-inf") if kind == "max" else 0.0).flatten(0, 2)[:, None]
    pool = torch.nn.functional.max_pool1d if kind == "max" else torch.nn.functional.avg_pool1d
    return torch.where(pooled, pool(lines, width, 1, width // 2).view(scores.shape), scores)


def _check(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> None:
    """Check the arguments of `pool_scores`. Raises ValueError naming the argument, its value and the remedy."""
    shape = check_scores(scores)[:3]
    check_numbers("lens", lens, torch.int32, shape, scores.device, "scores")
    check_numbers("limit", limit, torch.int32, shape, scores.device, "scores")
    if not isinstance(width, int) or width < 1 or width % 2 == 0:
        fail("width", "value", width, "give an odd number of slots")
    check_choice("kind", kind, ("max", "avg"))


def pool_scores_reference(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> Tensor:
    """`pool_scores`, slot by slot."""
    out = scores.clone()
    for line in product(*map(range, lens.shape)):
        slots = min(int(limit[line]), int(lens[line]))
        for slot in range(slots):
            near = scores[line][max(0, slot - width // 2) : min(slots, slot + width // 2 + 1)]
            out[line][slot] = near.amax() if kind == "max" else near.sum() / width
    return out
