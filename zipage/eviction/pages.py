"""Eviction of whole pages: what page policies share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from zipage.checks import Count, one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import HUGE, Policy, option


@dataclass(frozen=True, kw_only=True)
class PagePolicy(Policy):
    """Aligned runs of `page_size` slots go or stay whole.

    *Native*: a page is a block, the same pages go in all layers and heads, and survivors keep their order, so the
    engine may drop table entries (those of the worst pages by `page_scores`, never a page of `must_pages`) and copy
    nothing. *Emulated*: pages are smaller than a block and survivors are compacted like a token policy's.

    Both follow from one `score`: a page's entries share its score, and every entry of a page that must stay ranks above
    all others. The engine compresses when the last page is full; were it not, one page would be cut, of which the
    younger entries stay.

    Attributes:
        page_size: p, slots of a page.
        native: a page is a block of the engine; False: p divides the block size.
        share (option `scope`): "shared": one set of pages for all layers and heads; "head": each has its own (emulated
            only).
    """

    page_size: Count = 256
    native: bool = True
    share: Annotated[str, one_of("shared", "head")] = option("shared", "scope")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.native and self.share == "head":
            raise ValueError(f"{self.name}.scope='head': a native page goes in all heads at once; set native=False")

    @property
    def scope(self) -> Literal["token", "page"]:
        return "page"

    @property
    def page(self) -> int:
        return self.page_size

    @property
    def drops_blocks(self) -> bool:
        return self.native

    @property
    def shared_heads(self) -> bool:
        return self.share == "shared"

    @property
    def shared_layers(self) -> bool:
        return self.share == "shared"

    @abstractmethod
    def page_scores(self, event: Event) -> Tensor:
        """Score of each page, float32 [L, R, H, pages], or [1, R, 1, pages] where all layers and heads share."""

    def forced_pages(self, event: Event) -> Tensor:
        """Pages that hold an entry that must stay: bool [R, pages]."""
        return self._paged(event.forced, False).any(dim=-1)

    def rank(self, event: Event) -> Tensor:
        scores = self.page_scores(event)
        scores = torch.where(self.forced_pages(event)[:, None], HUGE, scores)
        return scores.repeat_interleave(self.page_size, dim=-1)[..., : event.num_slots]

    def check(self, *, block_size: int, recent: int) -> None:
        super().check(block_size=block_size, recent=recent)
        if self.native and self.page_size != block_size:
            raise ValueError(
                f"{self.name}: page_size={self.page_size} is not the block_size={block_size}: "
                "set them equal, or native=False"
            )
        if block_size % self.page_size:
            raise ValueError(f"{self.name}: page_size={self.page_size} must divide block_size={block_size}")

    def _paged(self, values: Tensor, fill: float | bool) -> Tensor:
        """[..., N] -> [..., pages, page_size], the last page filled up."""
        missing = -values.shape[-1] % self.page_size
        return pad(values, (0, missing), value=fill).unflatten(-1, (-1, self.page_size))
