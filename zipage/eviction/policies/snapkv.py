"""SnapKV at decode time: pooled attention of the latest queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, Odd, one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy
from zipage.eviction.pooling import Pooling, pooled


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """`S = avgpool5(A_mean)` [L, R, H, N], anew at every event. Li et al., arXiv 2404.14469.

    The original compresses the prompt once, per query head; at decode time it is the baseline of the R-KV paper. Pooled
    over j < n-w; scores of the window's entries are not pooled.

    Attributes:
        window: w. The original's is 64.
        softmax: "all", "cut" or "group_cut" (as R-KV's own code for SnapKV), as `Event.attention` takes it.
        group: "mean" or "max" over the query heads of a KV head.
        pooling: "never", "first" (at a request's first event) or "always".
        pool_width: odd.
        pool_kind: "mean" or "max".
    """

    name: ClassVar[str] = "snapkv"
    variant: ClassVar[str] = "SnapKV-D"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"

    window: Count = 16
    softmax: Annotated[str, one_of("all", "cut", "group_cut")] = "all"
    group: Annotated[str, one_of("mean", "max")] = "mean"
    pooling: Pooling = "always"
    pool_width: Odd = 5
    pool_kind: Annotated[str, one_of("mean", "max")] = "mean"

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def leaves_window_unscored(self) -> bool:
        return self.softmax != "all"

    @property
    def comparable(self) -> bool:
        return True

    def rank(self, event: Event) -> Tensor:
        scores = event.attention(self.softmax, group=self.group, window="mean")
        if self.leaves_window_unscored:
            scores = torch.where(event.before_window, scores, 0.0)
        return pooled(event, scores, self.pooling, self.pool_width, self.pool_kind, event.window_start)
