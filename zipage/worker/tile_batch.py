"""Requests that are compressed together, where budgets are unequal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zipage.models.spec import ModelSpec
from zipage.scheduling.plan import CompressionOrder


class TileBatch:
    """Orders under one policy whose heads get unequal budgets; as `CompressionBatch`.

    Args:
        orders: not empty, and checked (`check_orders`).
        spec: of the model.
        block_size: b.

    Attributes:
        lens: int64 [L, H, R], entries.
        tables: int32 [L, H, R, tiles], -1 past a line's own.
        planned: int64 [L, 1, R], entries that each head will keep, or would under uniform budgets.
    """

    def __init__(self, orders: Sequence[CompressionOrder], spec: ModelSpec, block_size: int) -> None:
        self.orders = orders
        self.policy = orders[0].rule.policy
        self.block_size = block_size
        self.seeds = [order.sample_seed for order in orders]
        self.rounds = [order.num_compressions for order in orders]
        self.keep = [order.rule.keep for order in orders]
        self.must = [order.rule.must for order in orders]
        allocation, lines = orders[0].rule.allocation, (spec.num_layers, spec.num_kv_heads)
        lens = [order.block_ids.lens(order.num_entries).reshape(lines) for order in orders]
        self.lens = np.stack(lens, axis=2)
        width = -(-int(self.lens.max()) // block_size)
        self.tables = np.full((*self.lens.shape, width), -1, dtype=np.int32)
        for row, order in enumerate(orders):
            tiles = order.block_ids.tiles[:, :width]
            self.tables[:, :, row, : tiles.shape[1]] = tiles.reshape(*lines, -1)
        sizes = zip(self.keep, self.must, strict=True)
        planned = [allocation.planned(*size, block_size, spec.num_layers) for size in sizes]
        self.planned = np.array(planned).T[:, None]
