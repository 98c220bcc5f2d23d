"""An event over tiles: each request, layer and KV head is a request of its own, of one layer and one head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zipage.counters import normal, uniform
from zipage.transfer import to_device
from zipage.worker.paged_event import PagedEvent


@dataclass(kw_only=True, eq=False)
class LineEvent(PagedEvent):
    """What a policy sees where heads hold unequal lengths: (L, R, H, N) is (1, lines, 1, N), and lengths are by line.

    A policy that ranks each head by itself can't tell the difference; what it asks of several heads is answered here.

    Attributes:
        size: layers, requests and heads whose lines these are, in this order.
        request_seeds, request_rounds: of each request; `seeds` and `rounds` are those of the lines.
        q_cache: [1, lines, w, G, d], the latest queries of each line in order.
        model_kv_heads: KV heads of a layer.
        first_layer: number of the first of the layers; `layer_offset` is 0, as is the number of its only one.
    """

    size: tuple[int, int, int]
    request_seeds: Sequence[int] = ()
    request_rounds: Sequence[int] = ()
    first_layer: int = 0
    model_kv_heads: int = 1

    def lines(self, x: Tensor) -> Tensor:
        """[L or 1, R or 1, H or 1, N] -> [1, lines, 1, N]."""
        return x.expand(*self.size, -1).reshape(1, -1, 1, x.shape[-1])

    def all_heads(self, scores: Tensor) -> Tensor:
        return scores.expand(self.shape).reshape(*self.size, -1)

    def mean_over_heads(self, scores: Tensor) -> Tensor:
        return self.lines(super().mean_over_heads(scores))

    def mean_over_layers_and_heads(self, scores: Tensor) -> Tensor:
        raise ValueError("heads of unequal lengths have no slots in common over layers: use allocation='uniform'")

    def output_norms(self) -> Tensor:
        if self.outputs is None:
            return super().output_norms()
        layers, requests, heads = self.size
        values = self.values().view(layers, requests, heads, *self.shape[3:], self.head_dim)
        first, last = self.head_offset, self.head_offset + heads
        norms = []
        for layer, of_layer in enumerate(values, start=self.first_layer):
            # Where these are some of the heads, the others are empty.
            every = of_layer.new_zeros((requests, self.model_kv_heads, *of_layer.shape[2:]))
            every[:, first:last] = of_layer
            norms.append(self.outputs.of(layer, every)[:, first:last])
        return self.lines(torch.stack(norms))

    def uniform(self, stream: int, *, per_layer: bool = True, per_head: bool = True, run: int = 1) -> Tensor:
        layers = range(self.first_layer, self.first_layer + self.size[0]) if per_layer else range(1)
        heads = range(self.head_offset, self.head_offset + self.size[2]) if per_head else range(1)
        return self.lines(uniform(self.request_seeds, stream, self.request_rounds, layers, heads, self.slots // run))

    def gaussian(self, stream: int, rows: int, columns: int) -> Tensor:
        layers, requests, heads = self.size
        numbers = normal(self.request_seeds, stream, self.request_rounds, rows * columns)
        matrices = to_device(numbers, self.device, np.float32).view(1, requests, 1, rows, columns)
        return matrices.expand(layers, -1, heads, -1, -1).reshape(-1, rows, columns)

    @property
    def _window_queries(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_cache, self.query_slots, torch.full_like(self.query_slots, self.window)

    @property
    def _in_order(self) -> Tensor:
        return self.q_cache
