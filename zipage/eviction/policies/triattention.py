"""TriAttention: attention that calibrated mean queries will pay from now on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from zipage.checks import one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy, option

DOUBLINGS = 17
"""The queries that will come are 1, 2, 4 .. 65536 positions behind the next token."""
LEAST_STD = 1e-6


@dataclass(frozen=True, kw_only=True)
class TriAttention(Policy):
    """`S` = max over the group of the z-scores of `T` [L, R, H, N]. arXiv 2604.04921.

    `T[j] = Re sum_f m_f W_f e^{i w_f N} conj(K_f) + sum_f (e_f - |m_f|) |K_f|` of each query head: m_f = E[q_f] and
    e_f = E|q_f| of the calibration file, before RoPE; W_f = mean of e^{i w_f o} over o = 1, 2, 4 .. 65536. With keys as
    cached it needs no positions: it is the published sum of cosines of distances but for a common factor. z is taken
    over the entries that are not protected. The published code takes queries before q-norm; here they are those after.

    Attributes:
        calibration: file of the model.
        z: z-score of each query head; else T itself.
        sets (option `scope`): "local": each layer and KV head keeps a set of its own; "shared": each KV head keeps the
            same in all layers, by the mean over them (`per_head` in the published code).
    """

    name: ClassVar[str] = "triattention"
    variant: ClassVar[str] = "TriAttention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2604.04921"

    calibration: str = ""
    z: bool = True
    sets: Annotated[str, one_of("local", "shared")] = option("local", "scope")

    @property
    def calibration_arrays(self) -> tuple[str, ...]:
        return ("mean_real", "mean_imaginary", "mean_size")

    @property
    def needs_rotary_pairs(self) -> bool:
        return True

    @property
    def all_layers(self) -> bool:
        return self.sets == "shared"

    @property
    def shared_layers(self) -> bool:
        return self.sets == "shared"

    def rank(self, event: Event) -> Tensor:
        known = {name: event.calibration[name].double()[:, None] for name in self.calibration_arrays}
        mean = torch.complex(known["mean_real"], known["mean_imaginary"])
        query = mean * _turn(event)[:, None]
        queries = torch.cat((query.real, query.imag), dim=-1).float().unflatten(2, (event.num_heads, -1))
        spread = (known["mean_size"] - mean.abs()).float().unflatten(2, (event.num_heads, -1))
        scores = event.key_forms(queries, sizes=spread)
        if self.z:
            scores = _z_scores(event, scores)
        scores = scores.amax(dim=3)
        return scores.mean(dim=0, keepdim=True) if self.sets == "shared" else scores


def _turn(event: Event) -> Tensor:
    """`W_f e^{i w_f N}`, complex [R, d / 2]: the mean turn of the queries to come."""
    offsets = 2.0 ** torch.arange(DOUBLINGS, dtype=torch.float64, device=event.device)
    ends = event.logical_lens.double()[:, None] + offsets
    return torch.exp(1j * ends[..., None] * event.inv_freq).mean(dim=1)


def _z_scores(event: Event, scores: Tensor) -> Tensor:
    """[L, R, H, G, N], over each request's entries that are not protected."""
    counted = (event.valid & (event.slots >= event.protected[:, None, None]))[:, :, None]
    number = (event.lens - event.protected).clamp_min(1)[:, None, None, None]
    mean = torch.where(counted, scores, 0.0).sum(dim=-1, keepdim=True) / number
    centred = scores - mean
    variance = torch.where(counted, centred, 0.0).square().sum(dim=-1, keepdim=True) / number
    return centred / variance.sqrt().clamp_min(LEAST_STD)
