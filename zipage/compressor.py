"""One compression: scores, survivors, and the move of what survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels import dispatch as ops
from zipage.eviction.paged_event import PagedEvent
from zipage.eviction.policy import Policy

LAYER_STRIDE = 8
"""Layers of one launch, which bounds the memory that scores and dense copies take."""


@dataclass(frozen=True, eq=False)
class Compression:
    """What a compression did.

    Attributes:
        kept: int32 [L, R, H, max_keep], slots that survived, numbered as before the event: ascending, then -1.
        num_kept, num_evicted: int32 [R], entries of a request per layer and KV head.
    """

    kept: Tensor
    num_kept: Tensor
    num_evicted: Tensor


def compress(
    policy: Policy,
    event: PagedEvent,
    states: Sequence[Tensor],
    dst_tables: Tensor | None,
    *,
    max_keep: int,
    compaction: Literal["stable", "holes"] = "stable",
    stride: int = LAYER_STRIDE,
) -> Compression:
    """Evict what `policy` ranks lowest and move the survivors, K, V and states, into the first slots of a request.

    The policy's new state goes with the survivors into `event.state_cache`: afterwards a request has `num_kept` entries
    and as many that carry state (`Event.carried`). Only destination blocks are written, so that source blocks may be
    shared, in a launch and beyond it.

    Args:
        policy: one that evicts.
        event: all layers of the model, or any range of them if the policy does not need all at once.
        states: further int32 or float32 [L, num_blocks, H, b] to move along, such as the entries' logical positions;
            not `event.state_cache`.
        dst_tables: int32 [R, dst_blocks], read up to ceil(num_kept / b): a request's private blocks, either its own
            source block of the same place or an earlier one, or one that no request reads. None with `holes`.
        max_keep: largest `event.keep`, known on the host.
        compaction: "stable": survivors keep their order, which the next event relies on. "holes": only survivors
            beyond the kept length move, within the request's own blocks; entries are in time order no longer, which
            attention does not mind, but another event of the request would.
        stride: layers of one launch, for policies that may see them one by one.

    Raises:
        ValueError: arguments do not go together.
    """
    if event.window != policy.num_queries:
        raise ValueError(f"event.window={event.window}: {policy.name} reads {policy.num_queries} queries")
    if policy.state and event.state_cache is None:
        raise ValueError(f"{policy.name} carries state: give event.state_cache")
    if any(state is event.state_cache for state in states):
        raise ValueError("states holds event.state_cache, which moves anyway: give the others")
    if compaction not in ("stable", "holes"):
        raise ValueError(f"compaction={compaction!r}: use stable or holes")
    if (dst_tables is None) != (compaction == "holes"):
        raise ValueError(f"compaction={compaction!r}: give dst_tables with stable, and None with holes")
    if stride < 1:
        raise ValueError(f"stride={stride}: must be at least 1")
    step = event.num_layers if policy.all_layers else stride
    kept = []
    for first in range(0, event.num_layers, step):
        last = min(first + step, event.num_layers)
        layers = [state[first:last] for state in states]
        kept.append(_compress(policy, event.of_layers(first, last), layers, dst_tables, max_keep))
    num_kept = torch.minimum(event.keep, event.lens)
    return Compression(torch.cat(kept), num_kept, event.lens - num_kept)


def _compress(
    policy: Policy, event: PagedEvent, states: list[Tensor], dst_tables: Tensor | None, max_keep: int
) -> Tensor:
    """One launch. Without `dst_tables`, holes are filled. Returns int32 [L, R, H, max_keep]."""
    scores = policy.score(event).contiguous()
    kept = ops.select(scores, event.must, event.lens, event.keep, min(max_keep, event.num_slots))
    updates = [None] * len(states)
    if policy.state:
        states = [*states, event.state_cache]
        updates.append(event.new_state.expand(event.shape).contiguous())
    moved = event.k_cache, event.v_cache, states, kept, event.block_tables
    if dst_tables is None:
        ops.compact_holes(*moved, updates)
    else:
        ops.compact_stable(*moved, dst_tables, updates)
    return kept
