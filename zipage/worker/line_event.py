"""An event over tiles: each request, layer and KV head is a request of its own, of one layer and one head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.output_norms import output_norms
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
        first_layer: number of the first of the layers; `layer_offset` is 0, as is the number of its only one.
    """

    size: tuple[int, int, int]
    request_seeds: Sequence[int] = ()
    request_rounds: Sequence[int] = ()
    first_layer: int = 0

    def lines(self, x: Tensor) -> Tensor:
        """[L or 1, R or 1, H or 1, N] -> [1, lines, 1, N]."""
        return x.expand(*self.size, -1).reshape(1, -1, 1, x.shape[-1])

    def all_heads(self, scores: Tensor) -> Tensor:
        return scores.expand(self.shape).reshape(*self.size, -1)

    def mean_over_heads(self, scores: Tensor) -> Tensor:
        return self.lines(super().mean_over_heads(scores))

    def mean_over_layers_and_heads(self, scores: Tensor) -> Tensor:
        raise ValueError("heads of unequal lengths have no slots in common over layers: use allocation='uniform'")

    def output_norms(self, starts: Tensor) -> Tensor:
        if self.outputs is None:
            return super().output_norms(starts)
        layers, _, heads = self.size
        columns = self.group_size * self.head_dim
        own = slice(self.head_offset * columns, (self.head_offset + heads) * columns)
        weights = [weight[:, own] for weight in self.outputs.weights[self.first_layer : self.first_layer + layers]]
        # Each layer and head sees the one pool of tiles.
        caches = (cache.expand(layers, -1, heads, -1, -1) for cache in (self.k_cache, self.v_cache))
        view = CacheView(*caches, self.block_tables.view(*self.size, -1), self.lens.view(self.size))
        return self.lines(output_norms(view, weights, starts.int().view(self.size), self.outputs.norm))

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
