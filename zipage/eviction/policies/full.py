"""Full KV: nothing is ever evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keeps every entry. Budget, protection and window are ignored; no event happens, so nothing is scored."""

    name: ClassVar[str] = "full"
    variant: ClassVar[str] = "full KV"
    paper: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    evicts: ClassVar[bool] = False

    def rank(self, event: Event) -> Tensor:
        raise RuntimeError("policy 'full' never evicts: no event may reach it")
