"""LagKV: entries that stand out against those that came after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, at_least
from zipage.eviction.event import Event
from zipage.eviction.policy import HUGE, Policy
from zipage.eviction.ties import tied


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """`S` = rank of `(softmax std y^K + softmax std y^V) / 2` in its partition [L, R, H, N]. arXiv 2504.04704.

    From slot `s = max(sink, protected)` on, the entries are cut into partitions of B. `y_c` is channel c of a key or
    value over the range that the channel has in the *next* partition, the std is over channels, the softmax over the
    partition. What has no whole partition after it stays before all others, and so do the first s: up to 2B - 1 of the
    latest entries stay because they are the latest. The original cuts each partition once, to a ratio, so that its
    cache grows; here survivors are ranked again at every event, at a fixed budget.

    Attributes:
        partition: B. The authors' is 1024, with 16 sinks; kvpress has 128 and 4.
        sink: leading entries that nothing ranks.
        cross: compare the raw scores of all partitions instead of the ranks in each.
    """

    name: ClassVar[str] = "lagkv"
    variant: ClassVar[str] = "LagKV"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.04704"
    always_labelled: ClassVar[tuple[str, ...]] = ("partition",)

    partition: Count = 128
    sink: Annotated[int, at_least(0)] = 4
    cross: bool = False

    def check_budget(self, *, keep: int, protected: int) -> None:
        unranked = max(self.sink, protected) + 2 * self.partition
        if keep <= unranked:
            raise ValueError(
                f"{self.name}: {keep} entries kept leave nothing to rank beside {max(self.sink, protected)} leading "
                f"ones and two partitions of {self.partition}: raise budget_tokens above {unranked} or lower partition"
            )

    @property
    def comparable(self) -> bool:
        return self.cross

    def rank(self, event: Event) -> Tensor:
        size = self.partition
        start = event.protected.long().clamp_min(self.sink)
        whole = torch.div(event.lens - start, size, rounding_mode="floor")  # partitions of each request
        most = event.num_slots // size
        if most < 2:
            return torch.full((), HUGE, device=event.device)
        slots = start[:, None] + torch.arange((most - 1) * size, device=event.device)
        inside = slots.clamp_max(event.num_slots - 1)[:, None].expand(2, *event.shape[:3], -1)
        of_keys, of_values = event.lag_spread(start, size).gather(-1, inside).unflatten(-1, (-1, size)).softmax(dim=-1)
        raw = tied(of_keys + of_values)
        scores = raw if self.cross else _ranks(raw) / size
        # The last whole partition and the rest have no reference.
        ranked = torch.arange(most - 1, device=event.device) < whole[:, None] - 1
        scores = torch.where(ranked[..., None, :, None], scores, HUGE).flatten(3)
        result = scores.new_full((*event.shape[:3], event.num_slots + 1), HUGE)
        index = slots.clamp_max(event.num_slots)[:, None].expand_as(scores)
        return result.scatter_(-1, index, scores)[..., :-1]


def _ranks(raw: Tensor) -> Tensor:
    """Place of each in the last axis, 0 the least; of equal ones the younger is higher."""
    order = raw.argsort(dim=-1, stable=True)
    places = torch.arange(raw.shape[-1], device=raw.device, dtype=raw.dtype).expand_as(raw)
    return torch.empty_like(raw).scatter_(-1, order, places)
