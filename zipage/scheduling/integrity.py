"""Invariants of a scheduler, for tests and debug runs."""

from __future__ import annotations

from collections.abc import Sequence

from zipage.scheduling.compression_scheduler import CompressionScheduler
from zipage.scheduling.request import Request
from zipage.scheduling.sliding_blocks import SlidingBlocks


def check_requests(
    running: Sequence[Request], compressions: CompressionScheduler, sliding: SlidingBlocks | None = None
) -> None:
    """Check pools, block tables and lengths.

    Raises:
        RuntimeError: an invariant is broken; the message says which.
    """
    fresh = [compression.fresh for compression in compressions.in_flight.values()]
    compressions.pool.check_integrity([request.block_ids for request in running] + fresh)
    compressions.check_integrity()
    if sliding is not None:
        sliding.check_integrity(running)
    for request in running:
        _check_request(request, compressions)


def _check_request(request: Request, compressions: CompressionScheduler) -> None:
    pool, trigger, rule = compressions.pool, compressions.trigger, request.rule
    size = pool.block_size
    if not request.cache_len <= len(request.block_ids) * size:
        raise RuntimeError(f"{request}: more entries than its blocks hold")
    num_expected = request.num_tokens + (request.finish_reason is not None)  # it may end a step late
    if not request.cache_len <= request.num_computed < num_expected:
        raise RuntimeError(f"{request}: its lengths are out of order")
    if (request.cache_len < request.num_computed) != (request.num_compressions > 0):
        raise RuntimeError(f"{request}: entries were lost")
    if not pool.shares_blocks:
        if request.block_ids:
            request.block_ids.check(request.cache_len, size)
    elif any(pool.ref_counts[block] != 1 for block in request.block_ids[request.cache_len // size :]):
        raise RuntimeError(f"{request}: a block it will write into is shared")
    if rule is None:
        return
    most = trigger.most_entries(request)
    if request.cache_len > most:
        raise RuntimeError(f"{request}: more entries than its budget allows ({most})")
    compacted = request.block_ids[rule.pinned_blocks :] if request.num_compressions and not rule.cuts_table else []
    if any(map(pool.is_indexed, compacted)):
        raise RuntimeError(f"{request}: the prefix index finds a block that was compacted")
