"""VaSE: a reserve of wide values and a draw weighted by attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, Odd, Unit, one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import HUGE, Policy
from zipage.eviction.ties import tied

SINKS = 4
FLOOR = 1e-12
COLUMNS = 20
DRAW_STREAM = 3
PROJECTION_STREAM = 4


@dataclass(frozen=True, kw_only=True)
class VaSE(Policy):
    """Value-aware stochastic eviction, arXiv 2606.03928. Scores [L, R, H, N].

    `attn`: the `reserve * k` entries of widest values (max - min over d, to 2^-13; the first four count as infinitely
    wide) stay; the rest of the free budget is drawn without replacement, with probability proportional to
    `p = mean over the group of avgpool5(mean over the window of A_cut)`: the top-k of `log p` + Gumbel noise. Entries
    that must stay anyway are in neither pool, and where fewer than the reserve are free, it takes what there is.

    `dkv`: `S = |G^T K|^2 * |G^T V|^2` under one Gaussian G [d, 20] / sqrt(20) per request and event, the same in all
    layers; the first four entries before all others; no queries. The published code draws a G per layer.

    Attributes:
        mode: "attn" or "dkv".
        window: w, for `attn`. The original's is 64, with as many recent entries kept.
        reserve: share of k.
        pool_width: odd.
    """

    name: ClassVar[str] = "vase"
    variant: ClassVar[str] = "VaSE"
    paper: ClassVar[str] = "https://arxiv.org/abs/2606.03928"
    always_labelled: ClassVar[tuple[str, ...]] = ("mode",)

    mode: Annotated[str, one_of("attn", "dkv")] = "attn"
    window: Count = 16
    reserve: Unit = 0.25
    pool_width: Odd = 5

    @property
    def num_queries(self) -> int:
        return self.window if self.mode == "attn" else 0

    @property
    def leaves_window_unscored(self) -> bool:
        return self.mode == "attn"

    def rank(self, event: Event) -> Tensor:
        return self._drawn(event) if self.mode == "attn" else self._projected(event)

    def _drawn(self, event: Event) -> Tensor:
        pool = event.valid & ~event.forced[:, None]
        widths = tied(event.value_ranges()).masked_fill(event.slots < SINKS, float("inf"))
        free = (event.keep - event.forced.sum(dim=-1)).clamp_min(0)
        reserve = torch.minimum((event.keep * self.reserve).floor().to(free.dtype), free)
        reserved = event.top(torch.where(pool, widths, float("-inf")), reserve)
        attention = event.attention("cut", group="mean", window="mean")
        attention = event.pool(attention, self.pool_width, "mean", event.window_start)
        chances = torch.where(pool, attention, 0.0).clamp_min(FLOOR).log()
        gumbel = -torch.log(-torch.log(event.uniform(DRAW_STREAM)))
        return torch.where(reserved, HUGE, chances + gumbel)

    def _projected(self, event: Event) -> Tensor:
        matrix = event.gaussian(PROJECTION_STREAM, event.head_dim, COLUMNS) / math.sqrt(COLUMNS)
        scores = (event.projected_norms("keys", matrix) * event.projected_norms("values", matrix)).square()
        return scores.clamp_max(HUGE / 2).masked_fill(event.slots < SINKS, HUGE)
