"""R-KV: attention against redundancy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, Odd, Positive, Unit
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy, option
from zipage.eviction.pooling import Pooling, pooled


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    """`S = lambda * maxpool7(A_logit) - (1 - lambda) * R` [L, R, H, N], R over all n keys, S for j < n-w.

    Cai et al., arXiv 2505.24133. `A_logit`: maximum of the logits over the group, softmax over j < n-w, mean over the
    window. The cost is O(n^2) per head. Published results differ in lambda (0.1 in the README, 0.07 in the code, 0.5 in
    others' tables), so the label always shows it. The published code gathers survivors in the order of their scores and
    leaves them so; here they stay in time order. Its pooling, and what counts as the last near-duplicate, therefore see
    other neighbours from the second event on.

    Attributes:
        window: w.
        weight (option `lambda`): of attention against redundancy.
        tau: temperature of the redundancy.
        threshold: cosine above which two keys are near-duplicates.
        pooling: "never", "first" (at a request's first event) or "always".
        pool_width: odd.
    """

    name: ClassVar[str] = "r_kv"
    variant: ClassVar[str] = "R-KV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.24133"
    always_labelled: ClassVar[tuple[str, ...]] = ("lambda",)

    window: Count = 8
    weight: Unit = option(0.1, "lambda")
    tau: Positive = 1.0
    threshold: Unit = 0.5
    pooling: Pooling = "always"
    pool_width: Odd = 7

    @property
    def leaves_window_unscored(self) -> bool:
        return True

    @property
    def comparable(self) -> bool:
        return True

    def rank(self, event: Event) -> Tensor:
        attention = event.attention("group_cut", group="max", window="mean")
        attention = pooled(event, attention, self.pooling, self.pool_width, "max", event.window_start)
        redundancy = event.redundancy(self.tau, None, self.threshold)
        scores = self.weight * attention - (1 - self.weight) * redundancy
        return torch.where(event.before_window, scores, 0.0)
