"""What calibration files hold: statistics of a model's queries, gathered sequence by sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """L, Hq, H and d of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class QueryStatistics(ABC):
    """Sums over tokens, in float64; all tokens weigh alike.

    Args:
        heads: of the model.
        num_tokens: that will come in all.
        seed: of what is drawn.
        device: where queries lie.

    Attributes:
        kind: of the calibration file.
    """

    kind: ClassVar[str]

    def __init__(self, heads: Heads, num_tokens: int, seed: int, device: torch.device) -> None:
        self.heads = heads
        self.num_tokens = num_tokens

    @abstractmethod
    def add(self, layer: int, first: int, before: Tensor, after: Tensor) -> None:
        """Tokens first, first + 1 .. of all, in one layer.

        Args:
            before, after: float64 [T, Hq, d], queries before and after RoPE, after q-norm.
        """

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """Of the calibration file: float64 [L, rows, ...] by name."""


class TriAttention(QueryStatistics):
    """`mean_real`, `mean_imaginary`: E[q_f]; `mean_size`: E|q_f|; [L, Hq, d / 2], queries before RoPE."""

    kind: ClassVar[str] = "triattention"

    def __init__(self, heads: Heads, num_tokens: int, seed: int, device: torch.device) -> None:
        super().__init__(heads, num_tokens, seed, device)
        shape = heads.num_layers, heads.num_heads, heads.head_dim // 2
        self._sum = torch.zeros(shape, dtype=torch.complex128, device=device)
        self._sizes = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, layer: int, first: int, before: Tensor, after: Tensor) -> None:
        pairs = torch.complex(*before.chunk(2, dim=-1))
        self._sum[layer] += pairs.sum(dim=0)
        self._sizes[layer] += pairs.abs().sum(dim=0)

    def arrays(self) -> dict[str, Tensor]:
        mean = self._sum / self.num_tokens
        return {"mean_real": mean.real, "mean_imaginary": mean.imag, "mean_size": self._sizes / self.num_tokens}


class QFilters(QueryStatistics):
    """`filters` [L, H, d]: mean over the group of `sigma v` of `queries` tokens, the same in all heads.

    v: first right singular vector of the sampled queries after RoPE, uncentred; sigma: the sign on which most of them
    project positively, or their sum does where they are as many on either.
    """

    kind: ClassVar[str] = "q_filters"
    queries: ClassVar[int] = 3000

    def __init__(self, heads: Heads, num_tokens: int, seed: int, device: torch.device) -> None:
        super().__init__(heads, num_tokens, seed, device)
        generator = torch.Generator().manual_seed(seed)
        self._sample = torch.randperm(num_tokens, generator=generator)[: self.queries].sort().values.to(device)
        self._found: list[list[Tensor]] = [[] for _ in range(heads.num_layers)]

    def add(self, layer: int, first: int, before: Tensor, after: Tensor) -> None:
        chosen = self._sample[(self._sample >= first) & (self._sample < first + len(after))] - first
        self._found[layer].append(after[chosen].float().cpu())

    def arrays(self) -> dict[str, Tensor]:
        filters = []
        for parts in self._found:
            queries = torch.cat(parts).double().transpose(0, 1)
            axis = torch.linalg.eigh(queries.transpose(1, 2) @ queries).eigenvectors[..., -1:]
            along = queries @ axis
            most, mean = along.sign().sum(dim=1, keepdim=True), along.sum(dim=1, keepdim=True)
            sign = torch.where(torch.where(most == 0, mean, most) >= 0, 1.0, -1.0)
            directions = (sign * axis).squeeze(-1)
            filters.append(directions.unflatten(0, (self.heads.num_kv_heads, -1)).mean(dim=1))
        return {"filters": torch.stack(filters)}


class ExpectedAttention(QueryStatistics):
    """`mean` [L, Hq, d]; `pairs` [L, Hq, d / 2, 3], the products xx, xy, yy of each rotary pair, centred; and, where it
    is `full`, `covariance` [L, Hq, d, d]. Queries before RoPE.
    """

    kind: ClassVar[str] = "expected_attention"

    def __init__(self, heads: Heads, num_tokens: int, seed: int, device: torch.device, *, full: bool = True) -> None:
        super().__init__(heads, num_tokens, seed, device)
        self._full = full
        shape, dim = (heads.num_layers, heads.num_heads), heads.head_dim
        self._sum = torch.zeros(*shape, dim, dtype=torch.float64, device=device)
        inner = (dim, dim) if full else (dim // 2, 3)
        self._products = torch.zeros(*shape, *inner, dtype=torch.float64, device=device)

    def add(self, layer: int, first: int, before: Tensor, after: Tensor) -> None:
        self._sum[layer] += before.sum(dim=0)
        if self._full:
            queries = before.transpose(0, 1)
            self._products[layer] += queries.mT @ queries
        else:
            x, y = before.chunk(2, dim=-1)
            self._products[layer] += torch.stack((x * x, x * y, y * y), dim=-1).sum(dim=0)

    def arrays(self) -> dict[str, Tensor]:
        mean, products = self._sum / self.num_tokens, self._products / self.num_tokens
        if not self._full:
            x, y = mean.chunk(2, dim=-1)
            return {"mean": mean, "pairs": products - torch.stack((x * x, x * y, y * y), dim=-1)}
        covariance = products - mean[..., :, None] * mean[..., None, :]
        half = self.heads.head_dim // 2
        xy = covariance.diagonal(offset=half, dim1=-2, dim2=-1)
        xx, yy = covariance.diagonal(dim1=-2, dim2=-1).chunk(2, dim=-1)
        return {"mean": mean, "pairs": torch.stack((xx, xy, yy), dim=-1), "covariance": covariance}


KINDS = TriAttention, QFilters, ExpectedAttention
STATISTICS: dict[str, type[QueryStatistics]] = {statistics.kind: statistics for statistics in KINDS}
"""Kind of a calibration file -> what it is made of."""
