"""Page-wise eviction by attention: a coarse baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, one_of
from zipage.eviction.event import Event
from zipage.eviction.pages import PagePolicy


@dataclass(frozen=True, kw_only=True)
class PageAttention(PagePolicy):
    """Page score = mean over layers and heads of the sum over its slots of `A_mean`. This project's own control.

    Attributes:
        window: w.
        agg: "sum", or "max": the best slot speaks for its page.
    """

    name: ClassVar[str] = "page_attention"
    variant: ClassVar[str] = "whole pages by attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.08743"
    always_labelled: ClassVar[tuple[str, ...]] = ("page_size",)

    window: Count = 16
    agg: Annotated[str, one_of("sum", "max")] = "sum"

    @property
    def all_layers(self) -> bool:
        return self.share == "shared"

    def page_scores(self, event: Event) -> Tensor:
        attention = event.attention("all", group="mean", window="mean")
        attention = self._paged(torch.where(event.valid, attention, 0.0), 0.0)
        scores = attention.sum(dim=-1) if self.agg == "sum" else attention.amax(dim=-1)
        return event.mean_over_layers_and_heads(scores) if self.share == "shared" else scores
