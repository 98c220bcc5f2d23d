"""Causal attention of new queries over paged entries on Hopper, in Gluon, Triton's language for one kind of GPU.

Of a program's warps one loads tiles of K and V, and two groups of four each attend with 64 queries. A group multiplies
queries and the next keys while it adds the values of the tile before, and takes the softmax while both products run.

Sources: FlashAttention-3 (arXiv 2407.08608) for the roles of warps and the order of the products, PagedAttention (arXiv
2309.06180) for the block table.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView
from kernels.layout import given_or_new
from kernels.tiles import score_scale

# Triton 3.6 and later versions name these differently.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

QUERIES = gl.constexpr(64)
"""Of a group of warps: the rows of a matrix instruction's tile."""
GROUPS = gl.constexpr(2)
TILE = 128
"""Entries."""
STAGES = 2
"""Tiles of K and of V in shared memory."""
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
HEAD_DIMS = (64, 128)
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _weigh(scores, row_max, row_sum, scale_log2, start, limits, TILE: gl.constexpr, MASKED: gl.constexpr):
    """A tile's softmax weights, the new maximum and sum, and the factor by which earlier sums shrink."""
    if MASKED:
        entries = start + gl.arange(0, TILE, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(entries[None, :] < limits[:, None], scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    offset = new_max * scale_log2
    if MASKED:  # a row that has seen no entry yet
        offset = gl.where(new_max == float("-inf"), 0.0, offset)
    weights = gl.exp2(scores * scale_log2 - offset[:, None])
    shrink = gl.exp2(row_max * scale_log2 - offset)
    return weights, new_max, row_sum * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _products(
    q,
    weights,
    acc,
    row_max,
    row_sum,
    k_tiles,
    v_tiles,
    k_full,
    v_full,
    k_empty,
    v_empty,
    i,
    tiles,
    limits,
    scale_log2,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """The scores and weights of a request's i-th tile from its end, while the values of the one before are added."""
    slot, before = i % STAGES, (i - 1) % STAGES
    scores_layout: gl.constexpr = row_max.type.layout.parent
    zeros = gl.zeros([QUERIES, TILE], gl.float32, scores_layout)
    scores = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(slot), count=1)
    new, row_max, row_sum, shrink = _weigh(
        scores, row_max, row_sum, scale_log2, (tiles - 1 - i) * TILE, limits, TILE, MASKED
    )
    new = gl.convert_layout(new.to(weights.dtype), weights.type.layout)
    # Without this wait, which is a branch, the assembler moves the softmax behind the end of the product above.
    mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=tiles > i + 1)
    acc, weights, new, shrink, row_sum = warpgroup_mma_wait(0, deps=[acc, weights, new, shrink, row_sum])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc *= gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return new, acc, row_max, row_sum


@gluon.jit
def _attend(
    GROUP: gl.constexpr,
    q_ptr,
    out_ptr,
    sinks_ptr,
    q_tiles,
    k_tiles,
    v_tiles,
    k_full,
    v_full,
    k_empty,
    v_empty,
    scale_log2,
    begin,
    queries,
    first_query,
    length,
    tiles,
    head,
    heads,
    q_row_stride,
    q_head_stride,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A group's queries, tile by tile from the last one that any of them sees."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    first = first_query + GROUP * QUERIES
    rows = first + gl.arange(0, QUERIES, gl.SliceLayout(1, rows_layout))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, rows_layout))
    tokens = (begin + rows).to(gl.int64)
    inside = (rows < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + tokens[:, None] * q_row_stride + head * q_head_stride + dims[None, :]
    q = q_tiles.index(GROUP)
    q.store(gl.load(q_ptrs, mask=inside, other=0.0))
    fence_async_shared()
    barrier()

    limits = length - queries + first + 1 + gl.arange(0, QUERIES, gl.SliceLayout(1, scores_layout))
    row_max = gl.full([QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
    row_sum = gl.full([QUERIES], 0.0, gl.float32, gl.SliceLayout(1, scores_layout))
    zeros = gl.zeros([QUERIES, TILE], gl.float32, scores_layout)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1)
    start = (tiles - 1) * TILE
    weights, row_max, row_sum, _ = _weigh(scores, row_max, row_sum, scale_log2, start, limits, TILE, True)
    weights = gl.convert_layout(weights.to(q_ptr.dtype.element_ty), weights_layout)
    acc = gl.zeros([QUERIES, HEAD_DIM], gl.float32, acc_layout)
    if length < start + TILE:  # a product with 0 would let NaN through from what lies past the last entry
        mbarrier.wait(v_full.index(0), 0)
        entries = start + gl.arange(0, TILE, gl.SliceLayout(1, rows_layout))
        v_tile = v_tiles.index(0)
        v_tile.store(gl.where((entries < length)[:, None], v_tile.load(rows_layout), 0.0))
        fence_async_shared()
        barrier()
    mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=tiles > 1)

    seen_by_all = gl.minimum((length - queries + first + 1) // TILE, tiles - 1)
    for i in range(1, tiles - seen_by_all):
        weights, acc, row_max, row_sum = _products(
            q, weights, acc, row_max, row_sum, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, i, tiles, limits,
            scale_log2, TILE, STAGES, True,
        )  # fmt: skip
    for i in range(tiles - seen_by_all, tiles):
        weights, acc, row_max, row_sum = _products(
            q, weights, acc, row_max, row_sum, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, i, tiles, limits,
            scale_log2, TILE, STAGES, False,
        )  # fmt: skip
    last = tiles - 1
    mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
    acc = warpgroup_mma(weights, v_tiles.index(last % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + head).to(gl.float32) * 1.4426950408889634
        offset = gl.maximum(row_max * scale_log2, sink)
        shrink = gl.exp2(row_max * scale_log2 - offset)
        row_sum = row_sum * shrink + gl.exp2(sink - offset)
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    acc /= gl.convert_layout(row_sum, gl.SliceLayout(1, acc_layout))[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), rows_layout)
    gl.store(out_ptr + (tokens[:, None] * heads + head) * HEAD_DIM + dims[None, :], out, mask=inside)


@gluon.jit
def _load_tiles(
    k_desc,
    v_desc,
    table_ptr,
    k_tiles,
    v_tiles,
    k_full,
    v_full,
    k_empty,
    v_empty,
    tiles,
    length,
    first_row,
    rows_of_block,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Of a request's KV head, from the last tile on; of blocks that no entry lies in, the request's last one."""
    PART: gl.constexpr = k_desc.block_type.shape[0]
    BYTES: gl.constexpr = TILE * HEAD_DIM * k_desc.dtype.primitive_bitwidth // 8
    last_block = (length - 1) // BLOCK_SIZE
    for i in range(tiles):
        start = (tiles - 1 - i) * TILE
        rows = ()
        for entry in gl.static_range(0, TILE, PART):
            block = gl.load(table_ptr + gl.minimum((start + entry) // BLOCK_SIZE, last_block))
            rows += (first_row + block * rows_of_block + (start + entry) % BLOCK_SIZE,)
        slot, phase = i % STAGES, (i // STAGES & 1) ^ 1
        mbarrier.wait(k_empty.index(slot), phase)
        mbarrier.expect(k_full.index(slot), BYTES)
        for part in gl.static_range(TILE // PART):
            load_tile(k_desc, [rows[part], 0], k_full.index(slot), k_tiles.index(slot).slice(part * PART, PART, 0))
        mbarrier.wait(v_empty.index(slot), phase)
        mbarrier.expect(v_full.index(slot), BYTES)
        for part in gl.static_range(TILE // PART):
            load_tile(v_desc, [rows[part], 0], v_full.index(slot), v_tiles.index(slot).slice(part * PART, PART, 0))


@gluon.jit
def _attend_tiles(
    q_ptr,
    k_desc,
    v_desc,
    table_ptr,
    starts_ptr,
    lens_ptr,
    out_ptr,
    sinks_ptr,
    scale_log2,
    group,
    heads,
    q_row_stride,
    q_head_stride,
    table_row_stride,
    table_head_stride,
    lens_row_stride,
    lens_head_stride,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One request, query head and tile of queries."""
    row, head = gl.program_id(1), gl.program_id(2)
    kv_head = head // group
    begin = gl.load(starts_ptr + row)
    queries = gl.load(starts_ptr + row + 1) - begin
    length = gl.load(lens_ptr + row * lens_row_stride + kv_head * lens_head_stride)
    first_query = (gl.num_programs(0) - 1 - gl.program_id(0)) * (GROUPS * QUERIES)  # the longest work starts first
    tiles = gl.cdiv(gl.minimum(length - queries + first_query + GROUPS * QUERIES, length), TILE)
    if (first_query >= queries) | (tiles < 1):
        return
    table = table_ptr + row.to(gl.int64) * table_row_stride + kv_head * table_head_stride

    dtype: gl.constexpr = k_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([QUERIES, HEAD_DIM], dtype)
    q_tiles = gl.allocate_shared_memory(dtype, [GROUPS, QUERIES, HEAD_DIM], q_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    barrier()
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    FIRST, q_ptr, out_ptr, sinks_ptr, q_tiles, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty,
                    scale_log2, begin, queries, first_query, length, tiles, head, heads, q_row_stride, q_head_stride,
                    HEAD_DIM, TILE, STAGES,
                ),
            ),
            (
                _attend,
                (
                    SECOND, q_ptr, out_ptr, sinks_ptr, q_tiles, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty,
                    scale_log2, begin, queries, first_query, length, tiles, head, heads, q_row_stride, q_head_stride,
                    HEAD_DIM, TILE, STAGES,
                ),
            ),
            (
                _load_tiles,
                (
                    k_desc, v_desc, table, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, tiles, length,
                    kv_head * BLOCK_SIZE, (heads // group) * BLOCK_SIZE, HEAD_DIM, BLOCK_SIZE, TILE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether the GPU has Hopper's matrix instructions, which neither its predecessors nor its successors have."""
    return torch.cuda.get_device_capability(device)[0] == 9


def takes(q: Tensor, form: AttentionForm) -> bool:
    """Whether `paged_prefill_gluon` has these queries' dtype and width, their attention's form, and their GPU."""
    return (
        q.dtype in ELEMENTS
        and q.shape[2] in HEAD_DIMS
        and form.window is None
        and form.soft_cap is None
        and has_warpgroups(q.device)
    )


def paged_prefill_gluon(
    q: Tensor,
    view: CacheView,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    out: Tensor | None = None,
    form: AttentionForm = PLAIN,
) -> Tensor:
    """`paged_prefill` in one launch, of what it `takes`; rows of a request past `max_seqlen` are left unwritten."""
    k_cache, v_cache, block_tables, lens = view
    query_heads, head_dim = q.shape[1:]
    kv_heads, block_size = k_cache.shape[1:3]
    batch = lens.shape[0]
    out = given_or_new(out, q)
    if max_seqlen == 0 or batch == 0:
        return out
    shape = [min(TILE, block_size), head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(shape, ELEMENTS[q.dtype])
    k_desc, v_desc = (
        TensorDescriptor(cache, [cache.numel() // head_dim, head_dim], [head_dim, 1], shape, layout)
        for cache in (k_cache, v_cache)
    )
    _attend_tiles[(triton.cdiv(max_seqlen, QUERIES.value * GROUPS.value), batch, query_heads)](
        q, k_desc, v_desc, block_tables, cu_seqlens, lens, out, form.sinks,
        score_scale(scale, None), query_heads // kv_heads, query_heads,
        *q.stride()[:2], *block_tables.stride()[:2], *lens.stride(),
        HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE=TILE, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return out
