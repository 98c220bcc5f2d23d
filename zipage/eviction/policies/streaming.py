"""StreamingLLM: attention sinks and the most recent entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """`S[j] = j` [1, 1, 1, N], with four sinks where the run protects nothing else. Xiao et al., arXiv 2309.17453.

    The original re-assigns positions inside the cache; here an entry keeps the rotary position of its token.
    """

    name: ClassVar[str] = "streaming"
    variant: ClassVar[str] = "sink + recent"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    implied_protection: ClassVar[str] = "sink:4"

    @property
    def shared_heads(self) -> bool:
        return True

    @property
    def shared_layers(self) -> bool:
        return True

    def rank(self, event: Event) -> Tensor:
        return event.slots.float()
