"""One compression: scores, survivors, and the move of what survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch as ops
from zipage.eviction.paged_event import PagedEvent
from zipage.eviction.policy import Policy

LAUNCH_ENTRIES = 2**20
"""Entries (layers * R * H * N) of one launch, which bounds the memory that scores and dense copies take."""


@dataclass(frozen=True, eq=False)
class Compression:
    """What a compression did.

    Attributes:
        kept: int32 [L, R, H, max_keep], slots that survived, numbered as before the event: ascending, then -1.
        num_kept, num_evicted: int32 [R], entries of a request per layer and KV head.
        failed: bool [R], whether the policy ranked an entry NaN.
    """

    kept: Tensor
    num_kept: Tensor
    num_evicted: Tensor
    failed: Tensor


class Choice(NamedTuple):
    """What shall stay: `kept` and `failed` as in `Compression`."""

    kept: Tensor
    failed: Tensor


def compress(
    policy: Policy,
    event: PagedEvent,
    states: Sequence[Tensor],
    dst_tables: Tensor,
    *,
    max_keep: int,
    stride: int | None = None,
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
            source block of the same place or an earlier one, or one that no request reads. -1 for any of a request's
            leading blocks whose entries are all protected: those stay where they are, slot j in slot j, and nothing of
            the block is written, neither K and V nor states, so that it may stay shared.
        max_keep: largest `event.keep`, known on the host.
        stride: layers of one launch, for policies that may see them one by one; None takes as many as make up
            `LAUNCH_ENTRIES`, and at least one.

    Raises:
        ValueError: arguments do not go together.
    """
    if event.window != policy.num_queries:
        raise ValueError(f"event.window={event.window}: {policy.name} reads {policy.num_queries} queries")
    if policy.state and event.state_cache is None:
        raise ValueError(f"{policy.name} carries state: give event.state_cache")
    if any(state is event.state_cache for state in states):
        raise ValueError("states holds event.state_cache, which moves anyway: give the others")
    if stride is None:
        stride = max(1, LAUNCH_ENTRIES // (event.num_requests * event.num_heads * event.num_slots))
    if stride < 1:
        raise ValueError(f"stride={stride}: must be at least 1, or None")
    step = event.num_layers if policy.all_layers else stride
    choices = []
    for first in range(0, event.num_layers, step):
        last = min(first + step, event.num_layers)
        layers = [state[first:last] for state in states]
        choices.append(_compress(policy, event.of_layers(first, last), layers, dst_tables, max_keep))
    num_kept = torch.minimum(event.keep, event.lens)
    kept, failed = zip(*choices, strict=True)
    return Compression(torch.cat(kept), num_kept, event.lens - num_kept, torch.stack(failed).any(dim=0))


def choose(policy: Policy, event: PagedEvent, max_keep: int) -> Choice:
    """The slots that stay, written nowhere: int32 [L, R, H, min(max_keep, N)], ascending, then -1."""
    scores = policy.score(event).contiguous()
    kept = ops.select(scores, event.must, event.lens, event.keep, min(max_keep, event.num_slots))
    highest = scores.amax(dim=(0, 2))  # NaN where one is
    return Choice(kept, highest.masked_fill(event.must, 0).isnan().any(dim=-1))


def _compress(policy: Policy, event: PagedEvent, states: list[Tensor], dst_tables: Tensor, max_keep: int) -> Choice:
    """One launch."""
    kept, failed = choose(policy, event, max_keep)
    updates = [None] * len(states)
    if policy.state:
        states = [*states, event.state_cache]
        updates.append(event.new_state.expand(event.shape).contiguous())
    ops.compact_stable(event.k_cache, event.v_cache, states, kept, event.block_tables, dst_tables, updates)
    return Choice(kept, failed)
