"""One compression: scores, survivors, and the move of what survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.compact_stable import compact_stable
from kernels.select import select
from zipage.eviction.fault import FAULTS
from zipage.eviction.policy import Policy
from zipage.worker.paged_event import PagedEvent

LAUNCH_ENTRIES = 2**20
"""Entries (layers * R * H * N) of one launch, which bounds the memory that scores and dense copies take."""


class PartlyCompressed(RuntimeError):
    """Survivors of some layers were moved, those of others were not; the exception's cause is the reason.

    Attributes:
        first_layer: the layers before it are compressed, those from it on untouched. None where a move itself failed:
            what its layers hold is unknown, and the entries can't be used any more.
        counts: int64 [first_layer, R, H], entries of each head in those layers, where budgets are unequal.
    """

    def __init__(self, first_layer: int | None, failed: Sequence[Tensor], counts: Tensor | None = None) -> None:
        super().__init__("survivors of some layers were moved")
        self.first_layer = first_layer
        self.counts = counts
        self._failed = failed

    def failed(self) -> list[bool]:
        """Of each request, whether the policy ranked an entry of the layers before `first_layer` NaN."""
        return [any(of_request) for of_request in zip(*(launch.tolist() for launch in self._failed), strict=True)]


class Choice(NamedTuple):
    """What stays of R requests.

    Attributes:
        kept: int32 [L, R, H, K], the slots that stay, numbered as before the event: ascending, then -1.
        failed: bool [R], whether the policy ranked an entry NaN.
    """

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
    first_layer: int = 0,
) -> Choice:
    """Evict what `policy` ranks lowest and move the survivors, K, V and states, into the first slots of a request.

    The policy's new states go with the survivors into `event.state_caches`: afterwards a request has min(keep, n)
    entries, and as many that carry state (`Event.carried`). Only destination blocks are written, so that source blocks
    may be shared, in a launch and beyond it.

    Args:
        policy: one that evicts.
        event: all layers that are ranked, or any range of them if the policy does not need all at once.
        states: further int32 or float32 [L, num_blocks, H, b] to move along, such as the entries' logical positions;
            none of `event.state_caches`.
        dst_tables: int32 [R, dst_blocks], read up to ceil(min(keep, n) / b): a request's private blocks, either its own
            source block of the same place or an earlier one, or one that no request reads. -1 for any of a request's
            leading blocks whose entries are all protected: those stay where they are, slot j in slot j, and nothing of
            the block is written, neither K and V nor states, so that it may stay shared.
        max_keep: largest `event.keep`, known on the host.
        stride: layers of one launch, for policies that may see them one by one; None takes as many as make up
            `LAUNCH_ENTRIES`, and at least one.
        first_layer: of the event's layers, below their number; those before it are left alone.

    Returns:
        What stayed in the layers from `first_layer` on, K being max_keep.

    Raises:
        ValueError: arguments do not go together.
        PartlyCompressed: the policy or a kernel failed after survivors had been moved, or while they were. An exception
            from before that is raised unchanged.
    """
    if event.window != policy.num_queries:
        raise ValueError(f"event.window={event.window}: {policy.name} reads {policy.num_queries} queries")
    if len(event.state_caches) != policy.num_states:
        raise ValueError(f"{policy.name} carries state: give event.state_caches, {policy.num_states} of them")
    if any(state is own for state in states for own in event.state_caches):
        raise ValueError("states holds one of event.state_caches, which moves anyway: give the others")
    if stride is None:
        stride = max(1, LAUNCH_ENTRIES // (event.num_requests * event.num_heads * event.num_slots))
    if stride < 1:
        raise ValueError(f"stride={stride}: must be at least 1, or None")
    step = event.num_layers if policy.all_layers else stride
    choices: list[Choice] = []
    untouched: int | None = first_layer
    try:
        for first in range(first_layer, event.num_layers, step):
            last = min(first + step, event.num_layers)
            launch = event.of_layers(first, last)
            choice = choose(policy, launch, max_keep)
            moved, updates = _states_to_move(policy, launch, [state[first:last] for state in states])
            untouched = None
            compact_stable(launch.view, moved, choice.kept, launch.shared(dst_tables), updates)
            untouched = last
            choices.append(choice)
        kept, failed = zip(*choices, strict=True)
        return Choice(torch.cat(kept), torch.stack(failed).any(dim=0))
    except FAULTS as error:
        if untouched == first_layer:
            raise
        raise PartlyCompressed(untouched, [choice.failed for choice in choices]) from error


def choose(policy: Policy, event: PagedEvent, max_keep: int) -> Choice:
    """What stays, written nowhere; K is min(max_keep, N)."""
    # A policy that works in place changes copies only.
    seen = replace(event, forced=event.forced.clone(), lens=event.lens.clone(), keep=event.keep.clone())
    scores = policy.score(seen).contiguous()
    event.new_states = seen.new_states
    forced, keep = event.shared(event.forced), event.shared(event.keep)
    kept = select(scores, forced, event.view.lens, keep, min(max_keep, event.num_slots))
    highest = scores.amax(dim=(0, 2))  # NaN where one is
    return Choice(kept, highest.masked_fill(event.forced, 0).isnan().any(dim=-1))


def _states_to_move(
    policy: Policy, event: PagedEvent, states: list[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What moves beside K and V in one launch, and of each the values by source slot that replace the old ones."""
    updates: list[Tensor | None] = [None] * len(states)
    updates += [state.expand(event.shape).contiguous() for state in event.new_states[: policy.num_states]]
    return [*states, *event.state_caches], updates
