"""TOVA, block-triggered: the last query decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from zipage.checks import one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Tova(Policy):
    """`S` = attention of the last query, mean over all query heads of the layer. Oren et al., arXiv 2401.06104.

    [L, R, 1, N] for `reduce = layer`: every KV head keeps the same entries. The original evicts one entry a step and
    protects nothing (`recent = 0`); here one query decides a block's worth of evictions.

    Attributes:
        reduce: "layer": mean over all query heads; "group": over those of the KV head.
    """

    name: ClassVar[str] = "tova"
    variant: ClassVar[str] = "block-triggered TOVA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.06104"

    window: ClassVar[int] = 1
    reduce: Annotated[str, one_of("layer", "group")] = "layer"

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def shared_heads(self) -> bool:
        return self.reduce == "layer"

    @property
    def comparable(self) -> bool:
        return self.reduce == "group"

    def rank(self, event: Event) -> Tensor:
        # Groups are of one size, so the mean of their means is the mean over all query heads.
        scores = event.attention("all", group="mean", window="mean")
        return event.mean_over_heads(scores) if self.reduce == "layer" else scores
