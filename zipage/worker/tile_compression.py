"""One compression over tiles: scores, counts by layer and head, survivors, and the move of what survives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.compact_stable import compact_stable
from kernels.select import select
from zipage.eviction.allocation import Candidates
from zipage.eviction.fault import FAULTS
from zipage.eviction.protection import forced_mask
from zipage.models.spec import ModelSpec
from zipage.transfer import to_device
from zipage.worker.compressor import LAUNCH_ENTRIES, PartlyCompressed
from zipage.worker.kv_cache import KVCache
from zipage.worker.line_event import LineEvent
from zipage.worker.output_norms import OutputNorms
from zipage.worker.tile_batch import TileBatch


class TileChoice(NamedTuple):
    """What stays of R requests.

    Attributes:
        counts: int64 [L, R, H], entries of each head.
        failed: bool [R], whether the policy ranked an entry NaN.
    """

    counts: Tensor
    failed: Tensor


class TileCompressor:
    """Compresses batches in a cache of tiles.

    Survivors go to the first slots of their own head's tiles, so that no tile is taken, and those behind them come
    back to the pool once the host knows the counts.

    Args:
        cache: of tiles, with positions.
        inv_freq, calibration: as `Event` has them, of all layers.
        outputs: of all layers, where a policy asks for them.
        stride: layers of one launch; None takes what a bound on memory allows.
    """

    def __init__(
        self,
        cache: KVCache,
        spec: ModelSpec,
        inv_freq: Tensor,
        calibration: Mapping[str, Tensor],
        outputs: OutputNorms | None,
        stride: int | None,
    ) -> None:
        self._cache = cache
        self._spec = spec
        self._inv_freq = inv_freq
        self._calibration = calibration
        self._outputs = outputs
        self._stride = stride

    def compress(self, batch: TileBatch, first_layer: int = 0, stride: int | None = None) -> TileChoice:
        """Compress the layers from `first_layer` on, `stride` in a launch.

        Returns:
            What stayed in those layers.

        Raises:
            PartlyCompressed: the policy or a kernel failed after survivors had been moved, or while they were.
        """
        spec, size = self._spec, self._spec.num_kv_heads * batch.tables.shape[3] * batch.block_size
        step = stride or self._stride or max(1, LAUNCH_ENTRIES // (size * len(batch.orders)))
        if len({layer.scale for layer in spec.attention}) > 1:  # a launch has one scale
            step = 1
        choices: list[TileChoice] = []
        untouched: int | None = first_layer
        try:
            for first in range(first_layer, spec.num_layers, step):
                last = min(first + step, spec.num_layers)
                event, kept, choice, new_states = self._choose(batch, first, last)
                untouched = None
                self._move(event, kept, new_states)
                untouched = last
                choices.append(choice)
            counts, failed = zip(*choices, strict=True)
            return TileChoice(torch.cat(counts), torch.stack(failed).any(dim=0))
        except FAULTS as error:
            if untouched == first_layer:
                raise
            counts = torch.cat([choice.counts for choice in choices]) if choices else None
            raise PartlyCompressed(untouched, [choice.failed for choice in choices], counts) from error

    def _choose(
        self, batch: TileBatch, first: int, last: int
    ) -> tuple[LineEvent, Tensor, TileChoice, Sequence[Tensor]]:
        """The event of layers first .. last-1, the slots that stay [1, lines, 1, N], and the policy's new states."""
        policy, allocation = batch.policy, batch.orders[0].rule.allocation
        heads, requests = self._spec.num_kv_heads, len(batch.orders)
        size = last - first, requests, heads
        event = self._event(batch, range(first, last), range(heads))
        if policy.calibration_arrays:  # what is calibrated of a head goes with its lines alone
            parts = []
            for layer, head in product(range(first, last), range(heads)):
                part = self._event(batch, range(layer, layer + 1), range(head, head + 1))
                scores = policy.score(part)
                parts.append([scores, *(state.expand(part.shape) for state in part.new_states)])
            joined = [
                torch.stack([x[0, :, 0] for x in of_parts]).unflatten(0, (last - first, heads)).transpose(1, 2)
                for of_parts in zip(*parts, strict=True)
            ]
            scores, new_states = joined[0].contiguous(), [event.lines(state) for state in joined[1:]]
        else:
            # A policy that works in place changes copies only.
            seen = replace(event, forced=event.forced.clone(), lens=event.lens.clone(), keep=event.keep.clone())
            scores = policy.score(seen).reshape(*size, -1).contiguous()
            new_states = seen.new_states
        forced, lens = event.forced.view(*size, -1), event.lens.view(size)
        positions = self._cache.positions[0, event.block_tables.clamp_min(0).long(), 0].view(*size, -1)
        counts = allocation.counts(
            Candidates(
                scores, forced, positions, lens, batch.keep, batch.must, batch.block_size,
                num_layers=self._spec.num_layers, first_layer=first,
            )
        )  # fmt: skip
        kept = select(scores, forced, lens, counts.int(), event.num_slots)
        failed = (scores.isnan() & ~forced).any(dim=3).any(dim=2).any(dim=0)
        return event, kept.view(1, -1, 1, event.num_slots), TileChoice(counts, failed), new_states

    def _move(self, event: LineEvent, kept: Tensor, new_states: Sequence[Tensor]) -> None:
        moved = [*self._cache.states, *event.state_caches]
        updates = [None] * len(self._cache.states)
        updates += [state.expand(event.shape).contiguous() for state in new_states[: len(event.state_caches)]]
        compact_stable(event.view, moved, kept, event.view.block_tables, updates)

    def _event(self, batch: TileBatch, layers: range, heads: range) -> LineEvent:
        cache, spec, policy = self._cache, self._spec, batch.policy
        device, orders = cache.k.device, batch.orders
        size = len(layers), len(orders), len(heads)

        def lines(x: np.ndarray) -> np.ndarray:
            """[all layers, all heads, R, ...] -> [lines, ...], layer by layer, request by request, head by head."""
            some = x[layers.start : layers.stop, heads.start : heads.stop].swapaxes(1, 2)
            return some.reshape(-1, *x.shape[3:])

        def of_requests(values: Sequence[int]) -> np.ndarray:
            return lines(np.broadcast_to(np.array(values), batch.lens.shape))

        carried = of_requests([order.num_compressions > 0 and policy.state for order in orders])
        # What the last event left: the cache length was k then, and each head is as far from it as it was.
        since = of_requests([order.num_entries - order.rule.keep for order in orders])
        numbers = [
            lines(batch.lens),
            lines(np.broadcast_to(batch.planned, batch.lens.shape)),
            of_requests([order.rule.protected for order in orders]),
            (lines(batch.lens) - since) * carried,
            of_requests([order.window_end for order in orders]),
            np.arange(len(carried)),
        ]
        lens, keep, protected, carried, logical, rows = to_device(np.stack(numbers), device, np.int32).unbind()
        tables = to_device(lines(batch.tables), device)
        groups = spec.num_heads // spec.num_kv_heads
        calibration = {}
        for name in policy.calibration_arrays:
            array = self._calibration[name]
            count = array.shape[1] // spec.num_kv_heads
            calibration[name] = array[layers.start : layers.stop, heads.start * count : heads.stop * count]
        return LineEvent(
            num_layers=1,
            num_heads=1,
            group_size=groups,
            head_dim=spec.head_dim,
            window=policy.num_queries,
            lens=lens,
            keep=keep,
            forced=forced_mask(lens, protected, orders[0].rule.recent, tables.shape[1] * cache.block_size),
            protected=protected,
            carried=carried,
            seeds=of_requests(batch.seeds).tolist(),
            rounds=of_requests(batch.rounds).tolist(),
            prompt_lens=of_requests([order.num_prompt_tokens for order in orders]).tolist(),
            logical_lens=logical,
            inv_freq=self._inv_freq,
            rope_factor=spec.rope_attention_factor,
            calibration=calibration,
            scales=(spec.attention[layers.start].scale,),
            k_cache=cache.k,
            v_cache=cache.v,
            block_tables=tables,
            q_cache=self._queries(batch, layers, heads) if policy.needs_queries else None,
            query_slots=rows,
            state_caches=cache.scores[: policy.num_states],
            prediction_cache=cache.predictions if policy.predicts else None,
            outputs=self._outputs if policy.output_norm else None,
            head_offset=heads.start,
            size=size,
            request_seeds=batch.seeds,
            request_rounds=batch.rounds,
            first_layer=layers.start,
        )

    def _queries(self, batch: TileBatch, layers: range, heads: range) -> Tensor:
        """The latest queries of each line in order: [1, lines, w, G, d]."""
        queries, width, window = self._cache.queries, self._cache.queries.shape[2], batch.policy.num_queries
        ends = np.array([order.window_end for order in batch.orders])
        places = (ends[:, None] - window + np.arange(window)) % width
        slots = np.array([order.query_slot for order in batch.orders])
        places, slots = (to_device(x, queries.device, np.int64) for x in (places, slots))
        some = queries[layers.start : layers.stop][:, slots[:, None], places]  # [L, R, w, Hq, d]
        some = some.unflatten(3, (self._spec.num_kv_heads, -1))[:, :, :, heads.start : heads.stop]
        return some.permute(0, 1, 3, 2, 4, 5).flatten(0, 2)[None].contiguous()
