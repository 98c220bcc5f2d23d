"""Q-Filters: keys along the mean direction of the model's queries stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy


@dataclass(frozen=True, kw_only=True)
class QFilters(Policy):
    """`S[j] = f . K_j` [L, R, H, N], f [L, H, d] of the calibration file. Godey et al., arXiv 2503.02812.

    f is the mean over the group of the first right singular vectors of sampled queries after RoPE, each with the sign
    on which most of them project positively (`query_statistics.QFilters`).

    Attributes:
        calibration: file of the model.
    """

    name: ClassVar[str] = "q_filters"
    variant: ClassVar[str] = "Q-Filters"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02812"

    calibration: str = ""

    @property
    def calibration_arrays(self) -> tuple[str, ...]:
        return ("filters",)

    def rank(self, event: Event) -> Tensor:
        return event.key_forms(event.calibration["filters"][:, None, :, None]).squeeze(3)
