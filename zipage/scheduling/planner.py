"""From live requests to the plain data that the worker gets."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from zipage.scheduling.batch import Batch
from zipage.scheduling.compression import Compression
from zipage.scheduling.plan import CompressionOrder, Restore, RowStart, Save, StepPlan, TableGrowth
from zipage.scheduling.request import PENDING, Request


def plan_step(batch: Batch, drops: Sequence[int] = ()) -> StepPlan:
    """The plan of a batch, before it is advanced. Growth of block tables counts as sent once it is in a plan.

    Args:
        drops: numbers of paused requests that have ended.
    """
    decodes, chunks = batch.decodes, batch.prefills
    requests = decodes + [chunk.request for chunk in chunks] if chunks else decodes
    counts, samples = np.ones(len(requests), dtype=np.int64), np.ones(len(requests), dtype=bool)
    token_ids = [_column([request.token_ids[-1] for request in decodes])]
    for place, (request, num_tokens) in enumerate(chunks, len(decodes)):
        end = request.num_computed + num_tokens
        counts[place], samples[place] = num_tokens, end == request.num_tokens
        token_ids.append(np.array(request.token_ids[request.num_computed : end], dtype=np.int64))
    return StepPlan(
        drops=list(drops),
        saves=[Save(request.number, blocks[:], slot, row, ids) for request, blocks, _, slot, row, ids in batch.paused],
        restores=[Restore(swap.request.number, swap.block_ids[:], *swap[2:]) for swap in batch.resumed],
        copies=batch.copies,
        sliding_copies=batch.sliding_copies,
        starts=[_start(request) for request in batch.entered],
        tables=[TableGrowth(r.row, *r.take_growth()) for r in requests if r.num_blocks_told != len(r.block_ids)],
        sliding_tables=_sliding_growth(requests) if batch.slides else [],
        num_decodes=len(decodes),
        rows=_column([request.row for request in requests]),
        counts=counts,
        positions=_column([request.num_computed for request in requests]),
        lens=_column([request.cache_len for request in requests]),
        query_slots=_column([request.query_slot if request.window else -1 for request in requests]),
        token_rows=_column([request.token_row if request.token_ids[-1] == PENDING else -1 for request in requests]),
        samples=samples,
        token_ids=np.concatenate(token_ids),
    )


def _sliding_growth(requests: Sequence[Request]) -> list[TableGrowth]:
    return [
        TableGrowth(request.row, *request.sliding.take_growth()) for request in requests if request.sliding.has_grown
    ]


def plan_compression(compression: Compression) -> CompressionOrder:
    """What the worker gets of a compression."""
    request = compression.request
    return CompressionOrder(
        compression.number,
        request.rule,
        compression.block_ids[:],
        compression.new_ids[:],
        num_entries=request.cache_len,
        window_end=request.num_computed,
        query_slot=request.query_slot,
        num_compressions=request.num_compressions,
        num_prompt_tokens=request.num_prompt_tokens,
        seed=request.seed,
        index=request.index,
    )


def _start(request: Request) -> RowStart:
    params = request.sampling_params
    return RowStart(
        request.row,
        params,
        request.num_prompt_tokens,
        request.seed,
        request.index,
        request.stop_ids,
        request.bad_words,
        request.token_ids[:] if params.needs_history else None,
    )


def _column(values: list[int]) -> np.ndarray:
    """int64 [n]; by way of an array, which takes a list of integers faster than numpy does."""
    return np.array(array("q", values))
