"""How long values are once the output projection has taken them to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

PROJECTED = 2**24
"""Numbers that a product holds at once."""


class OutputNorms:
    """Mean over a KV head's group of |V W_o|, W_o the rows of the output projection that belong to a query head.

    Args:
        weights: of each layer, [width, Hq * d], the heads in order; kept, not copied.
        num_heads: H.
        norm: "l1": by the products themselves. "l2": by `W_o W_o^T`, float32 [H, G, d, d] a layer, made here.
    """

    def __init__(self, weights: Sequence[Tensor], num_heads: int, head_dim: int, norm: Literal["l1", "l2"]) -> None:
        self.norm = norm
        self._weights = [weight.unflatten(1, (num_heads, -1, head_dim)).permute(1, 2, 3, 0) for weight in weights]
        if norm == "l2":
            wide = (weight.float() for weight in self._weights)
            self._weights = [weight @ weight.mT for weight in wide]

    def of(self, layer: int, values: Tensor) -> Tensor:
        """Values float32 [R, H, N, d] of a layer -> float32 [R, H, N]."""
        requests, _, slots, _ = values.shape
        # All entries of a KV head in one product.
        entries = values.transpose(0, 1).flatten(1, 2)
        norms = self._l1 if self.norm == "l1" else self._l2
        heads = self._weights[layer].unbind(dim=1)
        mean = torch.stack([norms(entries, head) for head in heads]).mean(dim=0)
        return mean.unflatten(1, (requests, slots)).transpose(0, 1)

    @staticmethod
    def _l1(entries: Tensor, weight: Tensor) -> Tensor:
        """[H, E, d] and [H, d, width] -> [H, E]."""
        parts = entries.to(weight.dtype).split(max(1, PROJECTED // (len(weight) * weight.shape[2])), dim=1)
        return torch.cat([(part @ weight).abs().sum(dim=-1, dtype=torch.float32) for part in parts], dim=1)

    @staticmethod
    def _l2(entries: Tensor, gram: Tensor) -> Tensor:
        """[H, E, d] and [H, d, d] -> [H, E]."""
        return ((entries @ gram) * entries).sum(dim=-1).clamp_min(0.0).sqrt()
