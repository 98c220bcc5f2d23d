"""Expected attention: what queries of a known mean and covariance will attend to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from zipage.checks import Count, at_least, one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import HUGE, Policy, option


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """`S = (mean over the group of softmax z + eps) * |V|` [L, R, H, N]. Devoto et al., arXiv 2510.00636.

    `z_j = mu'.K_j / sqrt(d) + K_j^T C' K_j / (2d)`: the logarithm of the mean of `exp(q.K_j / sqrt(d))` over Gaussian
    queries. mu and C are those before RoPE, turned by the mean turn of the next T positions. The softmax is over the
    entries behind the sinks, which stay before all others. The published code turns from the number of hidden states in
    its buffer on, which is not the position while it decodes.

    Attributes:
        stats: where mu and C come from: "file": the model's calibration; "window": the latest queries.
        calibration: that file.
        window: w, for `window`. Few queries underestimate C.
        cov: C in "full", in 2 x 2 blocks of the rotary "pairs", or "none".
        horizon (option `T`): positions ahead.
        sink: leading entries that nothing ranks.
        eps: share of attention that every entry has.
        vnorm: whether the length of the value counts.
    """

    name: ClassVar[str] = "expected_attention"
    variant: ClassVar[str] = "Expected Attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.00636"
    always_labelled: ClassVar[tuple[str, ...]] = ("stats", "cov")

    stats: Annotated[str, one_of("file", "window")] = "file"
    calibration: str = ""
    window: Count = 16
    cov: Annotated[str, one_of("full", "pairs", "none")] = "full"
    horizon: Count = option(512, "T")
    sink: Annotated[int, at_least(0)] = 4
    eps: Annotated[float, at_least(0)] = 0.0
    vnorm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("calibration", self.stats == "file" or not self.calibration, "left out without stats=file")

    @property
    def nonnegative(self) -> bool:
        return True

    @property
    def num_queries(self) -> int:
        return self.window if self.stats == "window" else 0

    @property
    def calibration_arrays(self) -> tuple[str, ...]:
        if self.stats == "window":
            return ()
        return ("mean", *{"full": ["covariance"], "pairs": ["pairs"], "none": []}[self.cov])

    @property
    def needs_rotary_pairs(self) -> bool:
        return True

    @property
    def comparable(self) -> bool:
        return True

    def rank(self, event: Event) -> Tensor:
        turn = self._turn(event)
        mean, spread = self._of_file(event) if self.stats == "file" else self._of_window(event)
        linear = turned(mean, turn[:, None, None]) / math.sqrt(event.head_dim)
        if self.cov == "full":
            # K^T C' K / (2d) = K"^T C K" where K" is the key, turned back and shortened.
            logits = event.key_squares(linear, spread, turn.conj() / math.sqrt(2 * event.head_dim))
        elif self.cov == "pairs":
            logits = event.key_forms(linear, squares=_turned_pairs(spread, turn[:, None, None]) / (2 * event.head_dim))
        else:
            logits = event.key_forms(linear)
        ranked = event.valid & (event.slots >= self.sink)
        shares = logits.masked_fill(~ranked[:, :, None], float("-inf")).softmax(dim=-1).mean(dim=3)
        scores = shares + self.eps
        if self.vnorm:
            scores = scores * event.value_norms()
        return torch.where(event.slots < self.sink, HUGE, scores)

    def _turn(self, event: Event) -> Tensor:
        """`rho_f`: mean of `a e^{i w_f t}` over t = N .. N + T - 1, complex [R, d / 2]."""
        ahead = torch.arange(self.horizon, dtype=torch.float64, device=event.device)
        turn = torch.exp(1j * ahead[:, None] * event.inv_freq).mean(dim=0)
        return event.rope_factor * turn * torch.exp(1j * event.logical_lens.double()[:, None] * event.inv_freq)

    def _of_file(self, event: Event) -> tuple[Tensor, Tensor | None]:
        """mu [L, 1, H, G, d] and C: in "pairs" [L, 1, H, G, 3, d / 2], "full" [L, 1, H, G, d, d]."""
        known = {name: array.unflatten(1, (event.num_heads, -1))[:, None] for name, array in event.calibration.items()}
        if self.cov == "pairs":
            return known["mean"], known["pairs"].mT
        return known["mean"], known.get("covariance")

    def _of_window(self, event: Event) -> tuple[Tensor, Tensor]:
        """The same, [L, R, ...], of the window's queries."""
        places = event.logical_lens[:, None] - self.window + torch.arange(self.window, device=event.device)
        back = torch.exp(-1j * places.double()[..., None] * event.inv_freq) / event.rope_factor
        queries = turned(event.queries(), back[:, :, None]).unflatten(3, (event.num_heads, -1)).movedim(2, 4)
        mean = queries.mean(dim=4)
        apart = queries - mean[..., None, :]
        if self.cov == "pairs":
            real, imaginary = apart.chunk(2, dim=-1)
            return mean, torch.stack((real * real, real * imaginary, imaginary * imaginary), dim=-2).mean(dim=4)
        return mean, apart.mT @ apart / self.window


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary pairs of `x` [L, R, ..., d], float32, times `turn`, complex [R, ..., d / 2]."""
    real, imaginary = x.chunk(2, dim=-1)
    cos, sin = turn.real.float(), turn.imag.float()
    return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)


def _turned_pairs(pairs: Tensor, turn: Tensor) -> Tensor:
    """Covariances (xx, xy, yy) [L, R or 1, H, G, 3, d / 2] of rotary pairs, once these are turned."""
    xx, xy, yy = pairs.unbind(dim=-2)
    cos, sin = turn.real.float(), turn.imag.float()
    mixed = cos * sin
    return torch.stack(
        (
            cos * cos * xx - 2 * mixed * xy + sin * sin * yy,
            mixed * (xx - yy) + (cos * cos - sin * sin) * xy,
            sin * sin * xx + 2 * mixed * xy + cos * cos * yy,
        ),
        dim=-2,
    )
