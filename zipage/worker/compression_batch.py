"""Requests that are compressed together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from zipage.eviction.protection import forced_mask
from zipage.models.shard import Shard
from zipage.models.spec import ModelSpec
from zipage.scheduling.plan import CompressionOrder
from zipage.transfer import to_device
from zipage.worker.compressor import LAUNCH_ENTRIES
from zipage.worker.kv_cache import KVCache
from zipage.worker.output_norms import OutputNorms
from zipage.worker.paged_event import PagedEvent
from zipage.worker.tile_batch import TileBatch


class CompressionBatch:
    """Orders under one policy, and what their event needs.

    Args:
        orders: under one policy and one number of recent entries; not empty, and checked (`check_orders`).
        block_size: b.

    Attributes:
        policy: of all orders.
        keep: entries of each request after the event: k, or all of them where they are fewer.
        sources: of each request, the blocks that hold its entries.
        tables: its `new_ids`.
    """

    def __init__(self, orders: Sequence[CompressionOrder], block_size: int) -> None:
        policy = orders[0].rule.policy
        self.orders = orders
        self.policy = policy
        self.keep = [min(order.rule.keep, order.num_entries) for order in orders]
        self.sources = [order.block_ids[: -(-order.num_entries // block_size)] for order in orders]
        self.tables = [order.new_ids for order in orders]
        self._recent = orders[0].rule.recent
        self._pinned = [order.rule.pinned_blocks for order in orders]
        self._numbers = (
            [order.num_entries for order in orders],
            self.keep,
            [order.rule.protected for order in orders],
            [order.rule.keep if order.num_compressions and policy.state else 0 for order in orders],
            [order.query_slot for order in orders],
            [order.window_end for order in orders],
        )
        self._seeds = [order.sample_seed for order in orders]
        self._rounds = [order.num_compressions for order in orders]
        self._prompt_lens = [order.num_prompt_tokens for order in orders]

    def event(
        self,
        cache: KVCache,
        spec: ModelSpec,
        shard: Shard,
        model_heads: int,
        inv_freq: Tensor,
        calibration: Mapping[str, Tensor],
        outputs: OutputNorms | None,
        sinks: Tensor | None = None,
    ) -> PagedEvent:
        """The event over all layers of `cache`. On CUDA its tensors belong to the current stream.

        Args:
            spec: of the heads in `cache`, the share `shard` of the `model_heads` KV heads of the model.
            inv_freq, calibration: as `Event` has them, of all layers and the heads in `cache`.
            outputs: of all layers and these heads, where a policy asks for them.
            sinks: as `PagedEvent` has them, of all layers.
        """
        device = cache.k.device
        lens, keep, protected, carried, query_slots, logical_lens = to_device(self._numbers, device, np.int32).unbind()
        tables = to_device(_rectangle(self.sources), device)
        return PagedEvent(
            num_layers=spec.num_layers,
            num_heads=spec.num_kv_heads,
            group_size=spec.num_heads // spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=self.policy.num_queries,
            lens=lens,
            keep=keep,
            forced=forced_mask(lens, protected, self._recent, tables.shape[1] * cache.block_size),
            protected=protected,
            carried=carried,
            seeds=self._seeds,
            rounds=self._rounds,
            prompt_lens=self._prompt_lens,
            logical_lens=logical_lens,
            inv_freq=inv_freq,
            rope_factor=spec.rope_attention_factor,
            calibration=calibration if self.policy.calibration_arrays else {},
            scales=tuple(layer.scale for layer in spec.attention),
            soft_caps=tuple(layer.soft_cap for layer in spec.attention),
            sinks=sinks,
            k_cache=cache.k,
            v_cache=cache.v,
            block_tables=tables,
            q_cache=cache.queries if self.policy.needs_queries else None,
            query_slots=query_slots,
            state_caches=cache.scores[: self.policy.num_states],
            prediction_cache=cache.predictions if self.policy.predicts else None,
            outputs=outputs if self.policy.output_norm else None,
            head_offset=shard.kv_heads(model_heads).start,
            shard=shard,
            model_heads=model_heads,
        )

    def destinations(self, device: torch.device) -> Tensor:
        """int32 [R, dst_blocks] for `compress`: -1 for the blocks that no event writes to."""
        rows = [[-1] * pinned + ids[pinned:] for pinned, ids in zip(self._pinned, self.tables, strict=True)]
        return to_device(_rectangle(rows), device)


def check_orders(orders: Iterable[CompressionOrder], block_size: int) -> None:
    """Check that each request has what its policy needs.

    Raises:
        RuntimeError: a request has no query slot under a policy that reads queries, or is not in whole pages under one
            that drops blocks.
    """
    for order in orders:
        policy = order.rule.policy
        if policy.needs_queries and order.query_slot < 0:
            raise RuntimeError(f"{order}: {policy.name} reads queries, and the request has no query slot")
        if policy.drops_blocks and order.num_entries % block_size:
            raise RuntimeError(f"{order}: {policy.name} drops blocks, and the last one is not full")


def batch_of(orders: Sequence[CompressionOrder], spec: ModelSpec, block_size: int) -> CompressionBatch | TileBatch:
    """Orders under one policy."""
    if orders[0].rule.allocation is not None:
        return TileBatch(orders, spec, block_size)
    return CompressionBatch(orders, block_size)


def batches(
    orders: Iterable[CompressionOrder], spec: ModelSpec, block_size: int
) -> Iterator[CompressionBatch | TileBatch]:
    """Orders under equal policies, as many as keep R * H * N within `LAUNCH_ENTRIES`, and at least one."""
    groups: dict[tuple, list[CompressionOrder]] = {}
    for order in orders:
        groups.setdefault((order.rule.policy, order.rule.recent), []).append(order)
    most = LAUNCH_ENTRIES // (spec.num_kv_heads * block_size)
    for group in groups.values():
        batch, width = [], 0
        for order in group:
            wider = max(width, order.num_places)
            if batch and (len(batch) + 1) * wider > most:
                yield batch_of(batch, spec, block_size)
                batch, wider = [], order.num_places
            batch.append(order)
            width = wider
        yield batch_of(batch, spec, block_size)


def _rectangle(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Tables of different lengths as one, -1 past each, which is never read."""
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
