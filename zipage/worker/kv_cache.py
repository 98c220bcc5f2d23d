"""The tensors of keys and values, and of what is kept beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from zipage.models.spec import ModelSpec
from zipage.worker.recurrent_states import RecurrentStates

NOWHERE = -7
"""The position of a slot that holds no entry, where slots are poisoned."""


class KVCache:
    """Keys and values in blocks, what is kept of each entry beside them, and the latest queries of some requests.

    Args:
        positions, predictions: keep them.
        scores: numbers that an eviction policy stores for each entry.
        num_query_slots: M.
        window: w, queries kept in a query slot.
        tiled: heads hold unequal lengths.
        recurrent: what recurrent layers keep of each row of the batch, for those who move requests; or None.
        num_sliding_blocks: of the layers of the model that slide, where there are any; those of `num_blocks` are of the
            others.

    Attributes:
        sliding: keys and values of sliding layers, in blocks of their own; None where there are none.
        k, v: [L, num_blocks, H, b, d] of `dtype`, L being the other layers. Where heads hold unequal lengths, the same
            memory is tiles of any layer and head, [1, L * num_blocks * H, 1, b, ...], as is what is kept beside it.
        positions: int32 [L, num_blocks, H, b], the entries' logical positions, which differ by layer and head once
            some were evicted; or None.
        scores: float32 [L, num_blocks, H, b] each, what an eviction policy stored for each entry.
        predictions: float32 [L, num_blocks, H, b], what a trained scorer says of each entry; or None.
        queries: [L, M, w, Hq, d] of `dtype`; the query of logical position p is at p % w. None without slots or window.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        positions: bool = False,
        scores: int = 0,
        predictions: bool = False,
        num_query_slots: int = 0,
        window: int = 0,
        tiled: bool = False,
        recurrent: RecurrentStates | None = None,
        num_sliding_blocks: int = 0,
    ) -> None:
        self.sliding = None
        if spec.sliding_layers:
            sliding = spec.of_layers(spec.sliding_layers)
            self.sliding = KVCache(sliding, num_sliding_blocks, block_size, dtype, device)
            spec = spec.full
        self.tiled = tiled
        self.block_size = block_size
        self.window = window
        self.recurrent = recurrent
        shape = (spec.num_layers, num_blocks, spec.num_kv_heads, block_size)
        if tiled:
            shape = (1, spec.num_layers * num_blocks * spec.num_kv_heads, 1, block_size)
        self.k = torch.empty((*shape, spec.head_dim), dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.positions = torch.empty(shape, dtype=torch.int32, device=device) if positions else None
        self.scores = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(scores)]
        self.predictions = torch.empty(shape, dtype=torch.float32, device=device) if predictions else None
        self.queries = None
        if num_query_slots and window:
            shape = (spec.num_layers, num_query_slots, window, spec.num_heads, spec.head_dim)
            self.queries = torch.empty(shape, dtype=dtype, device=device)

    @property
    def entry_tensors(self) -> list[Tensor]:
        """All that a block holds: the tensors [L, num_blocks, ...] that are there."""
        return [self.k, self.v, *self.scores, *self.states]

    @property
    def unit_bytes(self) -> int:
        """Of a block, or of a tile."""
        return sum(x[:, 0].nbytes for x in self.entry_tensors)

    @property
    def states(self) -> list[Tensor]:
        """What is stored with each new entry and goes with it, beside K and V: positions and predictions."""
        return [x for x in (self.positions, self.predictions) if x is not None]

    def poison(self, blocks: int | slice, first_slot: int = 0) -> None:
        """Overwrite the entries of `blocks` from `first_slot` on, in every layer and head.

        Keys, values, scores and predictions become NaN, positions `NOWHERE`.
        """
        self.k[:, blocks, ..., first_slot:, :] = float("nan")
        self.v[:, blocks, ..., first_slot:, :] = float("nan")
        if self.positions is not None:
            self.positions[:, blocks, ..., first_slot:] = NOWHERE
        for x in (*self.scores, *([] if self.predictions is None else [self.predictions])):
            x[:, blocks, ..., first_slot:] = float("nan")

    def poison_queries(self, slot: int | slice) -> None:
        """Overwrite the queries of `slot` with NaN, in every layer."""
        if self.queries is not None:
            self.queries[:, slot] = float("nan")
