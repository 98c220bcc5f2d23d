"""Page-wise random eviction: a coarse control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.pages import PagePolicy

STREAM = 5


@dataclass(frozen=True, kw_only=True)
class PageRandom(PagePolicy):
    """Uniform over free pages, without replacement: page score = `u(t, page)`. This project's own control."""

    name: ClassVar[str] = "page_random"
    variant: ClassVar[str] = "whole pages at random"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.08743"
    always_labelled: ClassVar[tuple[str, ...]] = ("page_size",)

    def page_scores(self, event: Event) -> Tensor:
        own = self.share == "head"
        return event.uniform(STREAM, per_layer=own, per_head=own, run=self.page_size)[..., :: self.page_size]
