"""Zipage's composite: attention, global score, pooling and redundancy, each with a switch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, Odd, Positive, Unit, one_of, power_of_two
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy, option
from zipage.eviction.pooling import Pooling, pooled


@dataclass(frozen=True, kw_only=True)
class Zipage(Policy):
    """`S = lambda * pool(max(A_max, alpha * stored)) - (1 - lambda) * R`. Liao et al., arXiv 2603.08743.

    `A_max` [L, R, H, N]: softmax over all entries, maximum over the group, mean over the window. The global score is
    G-KV's (arXiv 2512.00504), the redundancy R-KV's (arXiv 2505.24133) in chunks ("lightning").

    Attributes:
        window: w.
        global_score (option `global`): entries of earlier events keep `alpha` times their stored score; what is stored
            is the score of all n entries, the window included, before pooling and redundancy.
        alpha: decay per event.
        pooling: maximum over `pool_width` neighbours: "never", "first" (at a request's first event) or "always".
        pool_width: odd.
        redundancy: "none", "full" or "chunk". Without it `S` is the attention part alone.
        chunk: slots compared with each other, a power of two from 16.
        weight (option `lambda`): of attention against redundancy.
        tau: temperature of the redundancy.
        max_norm: divide the attention score, and the redundancy, each by its maximum over a request's entries per layer
            and KV head. The published code reads it only where the global score is on.
    """

    name: ClassVar[str] = "zipage"
    variant: ClassVar[str] = "Zipage"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.08743"

    window: Count = 16
    global_score: bool = option(True, "global")
    alpha: Unit = 0.8
    pooling: Pooling = "first"
    pool_width: Odd = 5
    redundancy: Annotated[str, one_of("none", "full", "chunk")] = "chunk"
    chunk: Annotated[int, power_of_two(16)] = 256
    weight: Unit = option(0.2, "lambda")
    tau: Positive = 0.4
    max_norm: bool = False

    @property
    def state(self) -> bool:
        return self.global_score

    @property
    def comparable(self) -> bool:
        return not self.max_norm

    def rank(self, event: Event) -> Tensor:
        scores = event.attention("all", group="max", window="mean")
        if self.max_norm:
            scores = _over_maximum(event, scores)
        if self.global_score:
            # Entries without a stored score carry -1, which no attention score is below.
            scores = torch.maximum(scores, self.alpha * event.stored)
            event.store(scores)
        scores = pooled(event, scores, self.pooling, self.pool_width, "max", event.lens)
        if self.redundancy == "none":
            return scores
        redundancy = event.redundancy(self.tau, self.chunk if self.redundancy == "chunk" else None)
        if self.max_norm:
            redundancy = _over_maximum(event, redundancy)
        return self.weight * scores - (1 - self.weight) * redundancy


def _over_maximum(event: Event, values: Tensor) -> Tensor:
    """`values` [L, R, H, N] > 0 over their maximum among a request's entries."""
    return values / torch.where(event.valid, values, 0.0).amax(dim=-1, keepdim=True)
