"""KeyDiff: keys unlike the mean direction stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """`S[j] = -cos(K_j, anchor)` [L, R, H, N], anchor = mean of K / |K| over the entries. arXiv 2504.15364."""

    name: ClassVar[str] = "keydiff"
    variant: ClassVar[str] = "KeyDiff"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.15364"

    def rank(self, event: Event) -> Tensor:
        return -event.key_cosines(event.mean_unit_key())
