"""Causal attention of new queries over paged entries on Hopper, in Gluon, Triton's language for one kind of GPU.

A work item is a request, a query head and a tile of 128 queries. Of a program's warps one loads the item's queries and
its tiles of K and V, and two groups of four each attend with 64 queries. A group multiplies queries and the next keys
while it adds the values of the tile before, and takes the softmax while both products run.

Programs are persistent, one for each multiprocessor: the loading warp draws item after item from a counter, and has the
next one's queries and first tiles on their way while the groups still finish the one before.

Sources: FlashAttention-3 (arXiv 2407.08608) for the roles of warps, the order of the products and the persistent
programs, PagedAttention (arXiv 2309.06180) for the block table.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView
from kernels.layout import given_or_new
from kernels.tiles import multiprocessors, score_scale
from kernels.warpgroups import ELEMENTS, HEAD_DIMS, barrier, has_warpgroups, load_tile

QUERIES = gl.constexpr(64)
"""Of a group of warps: the rows of a matrix instruction's tile."""
GROUPS = gl.constexpr(2)
TILE = gl.constexpr(128)
"""Entries."""
STAGES = gl.constexpr(2)
"""Tiles of K and of V in shared memory."""
AHEAD = gl.constexpr(2)
"""Items whose queries are in shared memory."""
FIELDS = gl.constexpr(5)
"""Of an item: its tiles of entries (0: there is no further item), its head, the length of the KV head, its first token,
and the number of the request's queries from that on."""
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
ALIGNED = 8
"""Elements: rows of queries must begin at multiples of 16 bytes, or no descriptor can be made of them."""


@gluon.jit
def _weigh(scores, row_max, row_sum, scale_log2, start, limits, MASKED: gl.constexpr):
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
    rings,
    i,
    end,
    limits,
    scale_log2,
    MASKED: gl.constexpr,
):
    """The scores and weights of the program's i-th tile, while the values of the one before are added.

    An item's tiles come from its last one on: tile `end - 1` holds its first entries.
    """
    k_tiles, v_tiles, k_full, v_full, k_empty, v_empty = rings
    slot, before = i % STAGES, (i - 1) % STAGES
    scores_layout: gl.constexpr = row_max.type.layout.parent
    zeros = gl.zeros([QUERIES, TILE], gl.float32, scores_layout)
    scores = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(slot), count=1)
    new, row_max, row_sum, shrink = _weigh(scores, row_max, row_sum, scale_log2, (end - 1 - i) * TILE, limits, MASKED)
    new = gl.convert_layout(new.to(weights.dtype), weights.type.layout)
    # Without this wait, which is a branch, the assembler moves the softmax behind the end of the product above.
    mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=end > i + 1)
    acc, weights, new, shrink, row_sum = warpgroup_mma_wait(0, deps=[acc, weights, new, shrink, row_sum])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc *= gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return new, acc, row_max, row_sum


@gluon.jit
def _tell(queue, turn, item):
    """Write an item, a number in each of its FIELDS, for the groups."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for field in gl.static_range(FIELDS):
        queue.index(turn % AHEAD * FIELDS + field).store(gl.full([1], item[field], gl.int32, layout))


@gluon.jit
def _hear(queue, q_full, turn):
    """The program's item `turn`, when its queries are there."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(q_full.index(turn % AHEAD), turn // AHEAD & 1)
    item = ()
    for field in gl.static_range(FIELDS):
        item += (gl.sum(queue.index(turn % AHEAD * FIELDS + field).load(layout), 0),)
    return item


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """Of COUNT slots: those for the loading warp to fill, and those for both groups to empty."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    return full, empty


@gluon.jit
def _attend(
    GROUP: gl.constexpr,
    out_ptr,
    sinks_ptr,
    items,
    rings,
    scale_log2,
    heads,
    HEAD_DIM: gl.constexpr,
):
    """A group's queries of each item, tile by tile from the last one that any of them sees."""
    queue, q_tiles, q_full, q_empty = items
    k_tiles, v_tiles, k_full, v_full, k_empty, v_empty = rings
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    turn, begin = 0, 0  # items and tiles before this item
    tiles, head, length, first_token, queries = _hear(queue, q_full, turn)
    while tiles > 0:
        end = begin + tiles
        slot = begin % STAGES
        q = q_tiles.index(turn % AHEAD * GROUPS + GROUP)
        first_limit = length - queries + GROUP * QUERIES + 1
        limits = first_limit + gl.arange(0, QUERIES, gl.SliceLayout(1, scores_layout))
        row_max = gl.full([QUERIES], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
        row_sum = gl.full([QUERIES], 0.0, gl.float32, gl.SliceLayout(1, scores_layout))
        zeros = gl.zeros([QUERIES, TILE], gl.float32, scores_layout)
        mbarrier.wait(k_full.index(slot), begin // STAGES & 1)
        scores = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(slot), count=1)
        start = (tiles - 1) * TILE
        weights, row_max, row_sum, _ = _weigh(scores, row_max, row_sum, scale_log2, start, limits, True)
        weights = gl.convert_layout(weights.to(dtype), weights_layout)
        acc = gl.zeros([QUERIES, HEAD_DIM], gl.float32, acc_layout)
        if length < start + TILE:  # a product with 0 would let NaN through from what lies past the last entry
            mbarrier.wait(v_full.index(slot), begin // STAGES & 1)
            entries = start + gl.arange(0, TILE, gl.SliceLayout(1, rows_layout))
            v_tile = v_tiles.index(slot)
            v_tile.store(gl.where((entries < length)[:, None], v_tile.load(rows_layout), 0.0))
            fence_async_shared()
            barrier()
        mbarrier.wait(k_full.index((begin + 1) % STAGES), (begin + 1) // STAGES & 1, pred=tiles > 1)

        unmasked = end - gl.minimum(first_limit // TILE, tiles - 1)  # from here on, every query sees every entry
        for i in range(begin + 1, unmasked):
            weights, acc, row_max, row_sum = _products(
                q, weights, acc, row_max, row_sum, rings, i, end, limits, scale_log2, True
            )
        for i in range(unmasked, end):
            weights, acc, row_max, row_sum = _products(
                q, weights, acc, row_max, row_sum, rings, i, end, limits, scale_log2, False
            )
        slot = (end - 1) % STAGES
        mbarrier.wait(v_full.index(slot), (end - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_tiles.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(slot), count=1)
        mbarrier.arrive(q_empty.index(turn % AHEAD), count=1)

        if sinks_ptr is not None:
            sink = gl.load(sinks_ptr + head).to(gl.float32) * 1.4426950408889634
            offset = gl.maximum(row_max * scale_log2, sink)
            shrink = gl.exp2(row_max * scale_log2 - offset)
            row_sum = row_sum * shrink + gl.exp2(sink - offset)
            acc *= gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
        acc /= gl.convert_layout(row_sum, gl.SliceLayout(1, acc_layout))[:, None]
        out = gl.convert_layout(acc.to(dtype), rows_layout)
        rows = GROUP * QUERIES + gl.arange(0, QUERIES, gl.SliceLayout(1, rows_layout))
        dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, rows_layout))
        out_ptrs = out_ptr + ((first_token + rows).to(gl.int64)[:, None] * heads + head) * HEAD_DIM + dims[None, :]
        gl.store(out_ptrs, out, mask=(rows < queries)[:, None] & (dims < HEAD_DIM)[None, :])
        begin = end
        turn += 1
        tiles, head, length, first_token, queries = _hear(queue, q_full, turn)


@gluon.jit
def _load_tiles(
    k_desc,
    v_desc,
    table_ptr,
    rings,
    begin,
    tiles,
    length,
    first_row,
    rows_of_block,
    BLOCK_SIZE: gl.constexpr,
):
    """Of an item's KV head, from the last tile on; of blocks that no entry lies in, the request's last one."""
    PART: gl.constexpr = k_desc.block_type.shape[0]
    BYTES: gl.constexpr = TILE * k_desc.block_type.shape[1] * k_desc.dtype.primitive_bitwidth // 8
    k_tiles, v_tiles, k_full, v_full, k_empty, v_empty = rings
    last_block = (length - 1) // BLOCK_SIZE
    for i in range(begin, begin + tiles):
        start = (begin + tiles - 1 - i) * TILE
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
def _locate(item, heads, group):
    """An item's tile of queries, counted over all requests, of each from the last on; its head, and its KV head."""
    return item // heads, item % heads, item % heads // group


@gluon.jit
def _load(
    q_desc,
    k_desc,
    v_desc,
    table_ptr,
    starts_ptr,
    lens_ptr,
    drawn_ptr,
    items,
    rings,
    batch,
    max_seqlen,
    most_items,
    group,
    heads,
    q_head_stride,
    table_row_stride,
    table_head_stride,
    lens_row_stride,
    lens_head_stride,
    BLOCK_SIZE: gl.constexpr,
):
    """Draw items, find the request of each, on from that of the one before, and load them.

    Rows of queries past a request's last one hold whatever lies there. A row touches no other.
    """
    Q_BYTES: gl.constexpr = GROUPS * QUERIES * q_desc.block_type.shape[1] * q_desc.dtype.primitive_bitwidth // 8
    queue, q_tiles, q_full, q_empty = items
    turn, begin = 0, 0  # items and tiles loaded
    row, before = 0, 0  # a request, and the tiles of queries of all before it
    query_tile, head, kv_head = _locate(gl.program_id(0), heads, group)
    while row < batch:
        first_token = gl.load(starts_ptr + row)
        queries = gl.load(starts_ptr + row + 1) - first_token
        length = gl.load(lens_ptr + row * lens_row_stride + kv_head * lens_head_stride)
        after = before + gl.cdiv(gl.minimum(queries, max_seqlen), GROUPS * QUERIES)
        first_query = (after - 1 - query_tile) * (GROUPS * QUERIES)
        queries -= first_query
        tiles = gl.cdiv(gl.minimum(length - queries + GROUPS * QUERIES, length), TILE)
        if (query_tile < after) & (tiles > 0):
            slot = turn % AHEAD
            first_token += first_query
            mbarrier.wait(q_empty.index(slot), (turn // AHEAD & 1) ^ 1)
            _tell(queue, turn, (tiles, head, length, first_token, queries))
            mbarrier.expect(q_full.index(slot), Q_BYTES)
            for of in gl.static_range(GROUPS):
                place = [first_token + of * QUERIES, head * q_head_stride]
                load_tile(q_desc, place, q_full.index(slot), q_tiles.index(slot * GROUPS + of))
            table = table_ptr + row.to(gl.int64) * table_row_stride + kv_head * table_head_stride
            _load_tiles(
                k_desc, v_desc, table, rings, begin, tiles, length, kv_head * BLOCK_SIZE,
                (heads // group) * BLOCK_SIZE, BLOCK_SIZE,
            )  # fmt: skip
            turn += 1
            begin += tiles
        if query_tile >= after:
            row, before = row + 1, after
        elif gl.num_programs(0) < most_items:
            drawn = gl.atomic_add(drawn_ptr, 1, sem="relaxed")
            query_tile, head, kv_head = _locate(gl.num_programs(0) + drawn, heads, group)
        else:
            row = batch
    mbarrier.wait(q_empty.index(turn % AHEAD), (turn // AHEAD & 1) ^ 1)
    _tell(queue, turn, (0, 0, 0, 0, 0))
    mbarrier.arrive(q_full.index(turn % AHEAD), count=1)


@gluon.jit(do_not_specialize=["batch", "max_seqlen", "most_items"])
def _attend_items(
    q_desc,
    k_desc,
    v_desc,
    table_ptr,
    starts_ptr,
    lens_ptr,
    drawn_ptr,
    out_ptr,
    sinks_ptr,
    scale_log2,
    batch,
    max_seqlen,
    most_items,
    group,
    heads,
    q_head_stride,
    table_row_stride,
    table_head_stride,
    lens_row_stride,
    lens_head_stride,
    BLOCK_SIZE: gl.constexpr,
):
    """A program's first item is that of its number; it draws others where there are more items than programs."""
    HEAD_DIM: gl.constexpr = q_desc.block_type.shape[1]
    queue = gl.allocate_shared_memory(gl.int32, [AHEAD * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [AHEAD * GROUPS, QUERIES, HEAD_DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, HEAD_DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE, HEAD_DIM], v_desc.layout)
    q_full, q_empty = _barriers(AHEAD)
    k_full, k_empty = _barriers(STAGES)
    v_full, v_empty = _barriers(STAGES)
    fence_async_shared()
    barrier()
    items = queue, q_tiles, q_full, q_empty
    rings = k_tiles, v_tiles, k_full, v_full, k_empty, v_empty
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_attend, (FIRST, out_ptr, sinks_ptr, items, rings, scale_log2, heads, HEAD_DIM)),
            (_attend, (SECOND, out_ptr, sinks_ptr, items, rings, scale_log2, heads, HEAD_DIM)),
            (
                _load,
                (
                    q_desc, k_desc, v_desc, table_ptr, starts_ptr, lens_ptr, drawn_ptr, items, rings,
                    batch, max_seqlen, most_items, group, heads, q_head_stride, table_row_stride, table_head_stride,
                    lens_row_stride, lens_head_stride, BLOCK_SIZE,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def takes(q: Tensor, form: AttentionForm) -> bool:
    """Whether `paged_prefill_gluon` has these queries' dtype, width and strides, their attention's form, their GPU."""
    row_stride, head_stride, _ = q.stride()
    return (
        q.dtype in ELEMENTS
        and q.shape[2] in HEAD_DIMS
        and form.window is None
        and form.soft_cap is None
        and row_stride >= (q.shape[1] - 1) * head_stride + q.shape[2]
        and row_stride % ALIGNED == 0
        and q.data_ptr() % (ALIGNED * q.element_size()) == 0
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
    """`paged_prefill` of what it `takes`; tiles of queries past `max_seqlen` of a request are left unwritten."""
    k_cache, v_cache, block_tables, lens = view
    tokens, query_heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    batch = lens.shape[0]
    out = given_or_new(out, q)
    if max_seqlen == 0 or batch == 0:
        return out

    def describe(x: Tensor, rows: int, row_stride: int, width: int, tile_rows: int) -> TensorDescriptor:
        tile = [tile_rows, head_dim]
        layout = gl.NVMMASharedLayout.get_default_for(tile, ELEMENTS[q.dtype])
        return TensorDescriptor(x, [rows, width], [row_stride, 1], tile, layout)

    row_stride, head_stride, _ = q.stride()
    q_desc = describe(q, tokens, row_stride, (query_heads - 1) * head_stride + head_dim, QUERIES.value)
    k_desc, v_desc = (
        describe(cache, cache.numel() // head_dim, head_dim, head_dim, min(TILE.value, block_size))
        for cache in (k_cache, v_cache)
    )
    queries = QUERIES.value * GROUPS.value
    most_items = min(triton.cdiv(max_seqlen, queries) * batch, tokens // queries + batch) * query_heads
    programs = min(most_items, multiprocessors(q.device))
    # Its memory is set anew for each launch: launches may run at the same time.
    drawn = (torch.zeros if programs < most_items else torch.empty)(1, dtype=torch.int32, device=q.device)
    _attend_items[(programs,)](
        q_desc, k_desc, v_desc, block_tables, cu_seqlens, lens, drawn, out, form.sinks,
        score_scale(scale, None), batch, max_seqlen, most_items, query_heads // kv_heads, query_heads, head_stride,
        *block_tables.stride()[:2], *lens.stride(),
        BLOCK_SIZE=block_size, num_warps=4,
    )  # fmt: skip
    return out
