"""MorphKV: attention of the window, fused by sum or maximum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class MorphKV(Policy):
    """`S = fuse over window queries of max over the group of A_cut` [L, R, H, N]. Ghadia et al., arXiv 2503.00979.

    `A_cut`: softmax over j < n-w per query head. The last w entries always stay, so `recent >= window`. The published
    code evicts at every step and leaves out the newest of its w stored queries, so w - 1 count; here all w do.

    Attributes:
        window: w. The original's scripts use 3 (max) and 30 to 200.
        fuse: "sum" or "max".
    """

    name: ClassVar[str] = "morphkv"
    variant: ClassVar[str] = "MorphKV, block-triggered"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.00979"

    window: Count = 16
    fuse: Annotated[str, one_of("sum", "max")] = "sum"

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def leaves_window_unscored(self) -> bool:
        return True

    @property
    def comparable(self) -> bool:
        return True

    def rank(self, event: Event) -> Tensor:
        return torch.where(event.before_window, event.attention("cut", group="max", window=self.fuse), 0.0)
