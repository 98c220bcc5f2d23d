"""Random eviction: uniform over the entries held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy

STREAM = 1


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """`S[j] = u(t, layer, head, j)` [L, R, H, N], fresh at every event. arXiv 2609.03430.

    With protection "prompt" this is Random Attention; with "none" its unprotected control.
    """

    name: ClassVar[str] = "random"
    variant: ClassVar[str] = "random per head"
    paper: ClassVar[str] = "https://arxiv.org/abs/2609.03430"

    def rank(self, event: Event) -> Tensor:
        return event.uniform(STREAM)
