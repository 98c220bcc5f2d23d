"""Pool scores along the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layout import check_choice, check_index, check_scores, fail


def pool_scores(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> Tensor:
    """Pool scores along the sequence, so that neighbours survive together (SnapKV, arXiv 2404.14469).

    Args:
        scores: float32 [L, R, H, N], contiguous.
        lens: int32 [R], n.
        width: odd number of slots, stride 1.
        kind: "max", over fewer slots at the ends; "avg", with zeros past the ends and the divisor always `width`.
        limit: int32 [R]; the slots below min(limit, n) are pooled, among themselves.

    Returns:
        float32 [L, R, H, N]; slots from the limit on are as they were.

    Raises:
        ValueError: an argument's shape, dtype, device, layout or value is not as above.
    """
    _check(scores, lens, width, kind, limit)
    slots = torch.arange(scores.shape[3], device=scores.device)
    pooled = slots < torch.minimum(limit, lens)[:, None, None]
    lines = torch.where(pooled, scores, float("-inf") if kind == "max" else 0.0).flatten(0, 2)[:, None]
    pool = torch.nn.functional.max_pool1d if kind == "max" else torch.nn.functional.avg_pool1d
    return torch.where(pooled, pool(lines, width, 1, width // 2).view(scores.shape), scores)


def _check(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> None:
    """Check the arguments of `pool_scores`. Raises ValueError naming the argument, its value and the remedy."""
    requests = check_scores(scores)[1]
    check_index("lens", lens, torch.int32, (requests,), scores.device, "scores")
    check_index("limit", limit, torch.int32, (requests,), scores.device, "scores")
    if not isinstance(width, int) or width < 1 or width % 2 == 0:
        fail("width", "value", width, "give an odd number of slots")
    check_choice("kind", kind, ("max", "avg"))


def pool_scores_reference(scores: Tensor, lens: Tensor, width: int, kind: str, limit: Tensor) -> Tensor:
    """`pool_scores`, slot by slot."""
    out = scores.clone()
    for row, slots in enumerate(torch.minimum(limit, lens).tolist()):
        for slot in range(slots):
            near = scores[:, row, :, max(0, slot - width // 2) : min(slots, slot + width // 2 + 1)]
            out[:, row, :, slot] = near.amax(dim=-1) if kind == "max" else near.sum(dim=-1) / width
    return out
