"""G-KV: attention normalised by its maximum, with a decaying global score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, Positive, Unit
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy, option


@dataclass(frozen=True, kw_only=True)
class GKV(Policy):
    """`S = lambda * max(a, alpha * stored) - (1 - lambda) * R / max R` [L, R, H, N]. Liao et al., arXiv 2512.00504.

    `a = A_max / max A_max`; both maxima are over j < n-w of a KV head. What is stored is the score before redundancy;
    entries of the window store none and come back at the next event as new. The scores start at the first event; so do
    those of the published code, except its H2O mode (sums without decay), which seeds them at prefill.

    Attributes:
        window: w.
        alpha: decay per event.
        weight (option `lambda`): of attention against redundancy.
        tau: temperature of the redundancy.
    """

    name: ClassVar[str] = "g_kv"
    variant: ClassVar[str] = "G-KV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.00504"

    window: Count = 16
    alpha: Unit = 0.8
    weight: Unit = option(0.5, "lambda")
    tau: Positive = 1.0

    @property
    def state(self) -> bool:
        return True

    def rank(self, event: Event) -> Tensor:
        scores = _over_maximum(event, event.attention("all", group="max", window="mean"))
        # Entries without a stored score carry -1, which no attention score is below.
        scores = torch.maximum(scores, self.alpha * event.stored)
        event.store(torch.where(event.before_window, scores, -1.0))
        redundancy = _over_maximum(event, event.redundancy(self.tau))
        return self.weight * scores - (1 - self.weight) * redundancy


def _over_maximum(event: Event, values: Tensor) -> Tensor:
    """`values` [L, R, H, N] >= 0 over their maximum among j < n-w."""
    largest = torch.where(event.before_window, values, 0.0).amax(dim=-1, keepdim=True)
    return values / largest.clamp_min(torch.finfo(torch.float32).tiny)
