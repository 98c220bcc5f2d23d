"""Window-accumulated H2O: attention mass summed over events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from zipage.checks import Count, Unit, one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """`F <- decay * F + w * A_mean`, `S = F` [L, R, H, N]. Zhang et al., arXiv 2306.14048.

    The original adds the attention of every query at every step; here an entry gains what the w window queries of each
    event give it, so early entries are favoured by construction, as there. Half of the original's budget is recent
    entries (`recent = k / 2`).

    Attributes:
        window: w.
        accumulate: "window", the only form.
        decay: of the sum per event.
        group: "mean" or "max" over the query heads of a KV head. The original has no rule for grouped queries.
    """

    name: ClassVar[str] = "h2o"
    variant: ClassVar[str] = "window-accumulated H2O"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"

    window: Count = 16
    accumulate: Annotated[str, one_of("window")] = "window"
    decay: Unit = 1.0
    group: Annotated[str, one_of("mean", "max")] = "mean"

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def state(self) -> bool:
        return True

    @property
    def comparable(self) -> bool:
        return True

    def rank(self, event: Event) -> Tensor:
        gained = event.window * event.attention("all", group=self.group, window="mean")
        total = gained + self.decay * event.stored.clamp_min(0.0)
        event.store(total)
        return total
