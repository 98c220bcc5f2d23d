"""KVzap: a trained scorer predicts from an entry's hidden state how much will be attended to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zipage.eviction.event import Event
from zipage.eviction.policy import Policy
from zipage.eviction.ties import tied_logs


@dataclass(frozen=True, kw_only=True)
class KVzap(Policy):
    """`S[j] = w_h . x_j + b_h` [L, R, H, N], to a precision of 2^-12. arXiv 2601.07891, the linear scorer.

    x_j is the input of the layer's attention, after its norm. The score is made once, when K and V are stored, and
    stays beside them (4 bytes). It estimates the logarithm of the most that any later query adds of the entry to the
    residual stream (`entry_targets`). The published method keeps what is above a threshold; here it is one scorer more
    under the budget. Equal tokens tie in the first layer, and the younger stays (`ties`).

    Attributes:
        calibration: file of the model, with the scorer of each layer.
    """

    name: ClassVar[str] = "kvzap"
    variant: ClassVar[str] = "KVzap, linear"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.07891"

    calibration: str = ""

    @property
    def calibration_arrays(self) -> tuple[str, ...]:
        return ("weight", "bias")

    @property
    def calibration_command(self) -> str:
        return "python -m experiments.train_scorer MODEL --out FILE"

    @property
    def predicts(self) -> bool:
        return True

    @property
    def comparable(self) -> bool:
        return True

    def rank(self, event: Event) -> Tensor:
        return tied_logs(event.predictions())
