"""Key norms: the smallest stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy
from zipage.eviction.ties import tied


@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """`S[j] = -|K_j|_2` [L, R, H, N], norms to a precision of 2^-13. Devoto et al., arXiv 2406.11430.

    Equal tokens tie in the first layer, and the younger stays (`ties`). Models that normalise keys per head (Qwen3)
    leave little variation at all.
    """

    name: ClassVar[str] = "knorm"
    variant: ClassVar[str] = "key norm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11430"

    def rank(self, event: Event) -> Tensor:
        return -tied(event.key_norms())
