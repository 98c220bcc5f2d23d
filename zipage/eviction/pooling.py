"""Sequence pooling of attention scores: an axis of its own."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from zipage.checks import one_of
from zipage.eviction.event import Event
from zipage.transfer import to_device

Pooling = Annotated[str, one_of("never", "first", "always")]


def pooled(
    event: Event, scores: Tensor, pooling: str, width: int, kind: Literal["max", "mean"], limit: Tensor
) -> Tensor:
    """Pool slots j < limit [R] of `scores` [L, R, H, N] for the requests that `pooling` names; [L, R, H, N].

    Args:
        pooling: "never"; "first": at a request's first event only; "always".
        width, kind: as `Event.pool` takes them.
    """
    first = [count == 0 for count in event.rounds]
    if pooling == "never" or (pooling == "first" and not any(first)):
        return scores
    smooth = event.pool(scores, width, kind, limit)
    if pooling == "always" or all(first):
        return smooth
    return torch.where(to_device(first, scores.device)[:, None, None], smooth, scores)
