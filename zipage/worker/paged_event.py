"""An event over the paged cache, answered by the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kernels.attended import attended
from kernels.attention_score import attention_score
from kernels.cache_view import CacheView, shared
from kernels.key_forms import key_forms
from kernels.key_squares import MOST_DIM, key_squares
from kernels.lag_spread import lag_spread
from kernels.output_norms import output_norms
from kernels.pool_scores import pool_scores
from kernels.redundancy import redundancy
from kernels.select import select
from zipage.eviction.event import Event, Softmax
from zipage.models.shard import WHOLE, Shard
from zipage.worker.output_norms import OutputNorms

POOLINGS = {"max": "max", "mean": "avg"}
"""Pooling as policies call it -> as the kernel does."""


@dataclass(kw_only=True, eq=False)
class PagedEvent(Event):
    """R requests of at least `window` entries each, wherever their blocks lie. N = max_blocks * b.

    Nothing here writes to the cache: blocks may be shared by requests of this launch and by others.

    Attributes:
        scales: of the attention logits, one per layer of this launch.
        soft_caps: of the same, as `attention_score` has them; None: of no layer.
        sinks: float [L, Hq], contiguous, as `attention_score` has them.
        k_cache, v_cache: [L, num_blocks, H, b, d], the layers of this launch.
        block_tables: int32 [R, max_blocks]; never read past ceil(n / b).
        q_cache: [L, num_query_slots, w_cache, Hq, d] of k_cache's dtype, w_cache >= window: a slot is a ring, with the
            queries of logical position p at p % w_cache. None for a policy that reads no queries.
        query_slots: int32 [R].
        state_caches: float32 [L, num_blocks, H, b] each, what the policy stored for each entry.
        prediction_cache: float32 [L, num_blocks, H, b], of the trained scorer. None for a policy that asks for none.
        outputs: of all layers of the model. None for a policy that asks for none.
        shard: whose heads these are; its collectives serve this event.
        model_heads: KV heads of a layer of the whole model; read where it is spread over ranks.
    """

    scales: tuple[float, ...]
    soft_caps: tuple[float | None, ...] | None = None
    sinks: Tensor | None = None
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    q_cache: Tensor | None = None
    query_slots: Tensor | None = None
    state_caches: Sequence[Tensor] = ()
    prediction_cache: Tensor | None = None
    outputs: OutputNorms | None = None
    shard: Shard = WHOLE
    model_heads: int = 0

    def __post_init__(self) -> None:
        layers, _, heads, block_size, head_dim = self.k_cache.shape
        requests, max_blocks = self.block_tables.shape
        wanted = layers, requests, heads, max_blocks * block_size, head_dim
        if (*self.shape, self.head_dim) != wanted:
            raise ValueError(
                f"(L, R, H, N, d) = {(*self.shape, self.head_dim)}, but caches and block tables are of {wanted}: "
                "slice the caches to the layers of the launch and give `forced` max_blocks * b slots"
            )
        if self.window and (self.q_cache is None or self.query_slots is None):
            raise ValueError(f"window={self.window}: give q_cache and query_slots")
        if self.window and self.q_cache.shape[2] < self.window:
            raise ValueError(f"q_cache holds {self.q_cache.shape[2]} queries of a request: the window is {self.window}")

    def of_layers(self, first: int, last: int) -> PagedEvent:
        """The same event over layers first .. last - 1 of this one."""
        some = slice(first, last)
        return replace(
            self,
            num_layers=last - first,
            layer_offset=self.layer_offset + first,
            calibration={name: array[some] for name, array in self.calibration.items()},
            scales=self.scales[some],
            soft_caps=self.soft_caps and self.soft_caps[some],
            sinks=None if self.sinks is None else self.sinks[some].contiguous(),
            k_cache=self.k_cache[some],
            v_cache=self.v_cache[some],
            q_cache=None if self.q_cache is None else self.q_cache[some],
            state_caches=[state[some] for state in self.state_caches],
            prediction_cache=None if self.prediction_cache is None else self.prediction_cache[some],
            new_states=tuple(state[some] for state in self.new_states),
        )

    @cached_property
    def view(self) -> CacheView:
        """Where the entries are, as kernels take it: every layer and head has the same tables and lengths."""
        return CacheView.shared(self.k_cache, self.v_cache, self.block_tables, self.lens)

    def all_heads(self, scores: Tensor) -> Tensor:
        return self.shard.all_heads(scores.expand(*scores.shape[:2], self.num_heads, -1), self.model_heads)

    def shared(self, x: Tensor) -> Tensor:
        """`x` [R, ...], the same for all layers and heads, as kernels take it: [L, R, H, ...], not copied."""
        return shared(x, self.num_heads, self.num_layers)

    def attention(
        self,
        softmax: Softmax = "all",
        group: Literal["max", "mean"] = "max",
        window: Literal["mean", "sum", "max"] = "mean",
    ) -> Tensor:
        self._check_queries("attention")
        if self._logits_differ:
            layers = [self.of_layers(i, i + 1).attention(softmax, group, window) for i in range(self.num_layers)]
            return torch.cat(layers)
        q_cache, query_slots, window_ends = self._window_queries
        return attention_score(
            q_cache,
            self.view,
            query_slots,
            window_ends,
            self.scales[0],
            softmax=softmax,
            # The kernel reduces the logits by `group` there; here it is the maximum, whatever `group` says.
            group="max" if softmax == "group_cut" else group,
            window=window,
            soft_cap=self.soft_caps and self.soft_caps[0],
            sinks=self.sinks,
        )

    def attended(self, threshold: float) -> Tensor:
        self._check_queries("attended")
        if self._logits_differ:
            return torch.cat([self.of_layers(i, i + 1).attended(threshold) for i in range(self.num_layers)], dim=1)
        q_cache, query_slots, window_ends = self._window_queries
        form = {"soft_cap": self.soft_caps and self.soft_caps[0], "sinks": self.sinks}
        return attended(q_cache, self.view, query_slots, window_ends, self.scales[0], threshold, **form)

    def redundancy(self, tau: float, chunk: int | None = None, threshold: float = 0.5) -> Tensor:
        return redundancy(self.view, tau=tau, threshold=threshold, chunk=chunk)

    def pool(self, scores: Tensor, width: int, kind: Literal["max", "mean"], limit: Tensor) -> Tensor:
        return pool_scores(scores.contiguous(), self.view.lens, width, POOLINGS[kind], self.shared(limit))

    def carried_states(self) -> list[Tensor]:
        if not self.state_caches:
            raise ValueError("the policy carries state: give state_caches")
        return [self._gathered(state[..., None])[..., 0] for state in self.state_caches]

    def predictions(self) -> Tensor:
        if self.prediction_cache is None:
            raise ValueError("event.predictions needs a trained scorer, and the policy asked for none: set predicts")
        return self._gathered(self.prediction_cache[..., None])[..., 0]

    def queries(self) -> Tensor:
        self._check_queries("queries")
        return self._in_order.float()

    def keys(self) -> Tensor:
        return self._gathered(self.k_cache)

    def values(self) -> Tensor:
        return self._gathered(self.v_cache)

    def output_norms(self, starts: Tensor) -> Tensor:
        if self.outputs is None:
            raise ValueError("event.output_norms needs a norm, and the policy asked for none: set output_norm")
        weights = [self.outputs.weights[layer] for layer in self.layers]
        return output_norms(self.view, weights, self.shared(starts.int()), self.outputs.norm)

    def key_forms(self, linear: Tensor, sizes: Tensor | None = None, squares: Tensor | None = None) -> Tensor:
        if not self.k_cache.is_cuda:
            return super().key_forms(linear, sizes, squares)
        lines = self.shape[:3]
        weights = (None if x is None else x.expand(*lines, *x.shape[3:]) for x in (linear, sizes, squares))
        return key_forms(self.view, *weights)

    def key_squares(self, linear: Tensor, matrices: Tensor, turn: Tensor) -> Tensor:
        if not self.k_cache.is_cuda or self.head_dim > MOST_DIM:
            return super().key_squares(linear, matrices, turn)
        weights = (x.expand(*self.shape[:3], *x.shape[3:]) for x in (linear, matrices))
        return key_squares(self.view, *weights, torch.stack((turn.real, turn.imag), dim=1).float())

    def key_norms(self) -> Tensor:
        return self._norms(self.k_cache)

    def value_norms(self) -> Tensor:
        return self._norms(self.v_cache)

    def value_ranges(self) -> Tensor:
        low, high = self.v_cache[:, self._blocks].aminmax(dim=-1)
        return (high.float() - low.float()).transpose(2, 3).flatten(3)

    def lag_spread(self, starts: Tensor, partition: int) -> Tensor:
        if not self.k_cache.is_cuda:
            return super().lag_spread(starts, partition)
        return lag_spread(self.view, self.shared(starts.int()), partition)

    def top(self, values: Tensor, count: Tensor) -> Tensor:
        values, none = values.expand(self.shape).contiguous(), torch.zeros_like(self.forced)
        chosen = select(values, self.shared(none), self.view.lens, self.shared(count.int()), self.num_slots)
        # Slot N takes what is none.
        top = torch.zeros((*self.shape[:3], self.num_slots + 1), dtype=torch.bool, device=self.device)
        return top.scatter_(-1, torch.where(chosen < 0, self.num_slots, chosen).long(), True)[..., :-1]

    @property
    def _logits_differ(self) -> bool:
        """A launch of kernels has one scale and one soft cap."""
        return len({*self.scales}) > 1 or (self.soft_caps is not None and len({*self.soft_caps}) > 1)

    @cached_property
    def _window_queries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q_cache, query_slots, window_ends) of a cache that holds `window` queries a request.

        A wider ring is unrolled: the latest `window` queries of each request in order, [L, R, window, Hq, d].
        """
        width = self.q_cache.shape[2]
        if width == self.window:
            return self.q_cache, self.query_slots, self.logical_lens
        rows = torch.arange(self.num_requests, dtype=torch.int32, device=self.device)
        return self._in_order.contiguous(), rows, torch.full_like(rows, self.window)

    @property
    def _in_order(self) -> Tensor:
        """The latest `window` queries of each request by position, [L, R, window, Hq, d]."""
        width = self.q_cache.shape[2]
        places = (self.logical_lens[:, None] - self.window + torch.arange(self.window, device=self.device)) % width
        return self.q_cache[:, self.query_slots.long()[:, None], places.long()]

    def _check_queries(self, asked: str) -> None:
        if self.q_cache is None:
            raise ValueError(f"event.{asked} needs queries, and the policy asked for none: set num_queries or window")

    @cached_property
    def _blocks(self) -> Tensor:
        """int64 [R, max_blocks], the block tables with block 0 wherever a request has none."""
        first_slots = self.slots[:: self.k_cache.shape[3]]
        return torch.where(first_slots < self.lens[:, None], self.block_tables, 0).long()

    def _norms(self, cache: Tensor) -> Tensor:
        """[L, num_blocks, H, b, d] -> float32 [L, R, H, N]."""
        norms = torch.linalg.vector_norm(cache[:, self._blocks], dim=-1, dtype=torch.float32)
        return norms.transpose(2, 3).flatten(3)

    def _gathered(self, cache: Tensor) -> Tensor:
        """[L, num_blocks, H, b, c] -> float32 [L, R, H, N, c], zero past a request's n entries."""
        entries = cache[:, self._blocks].transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)
        return entries.flatten(3, 4).masked_fill_(~self.valid[..., None], 0.0)
