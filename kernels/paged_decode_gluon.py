"""Decode attention over block tables on Hopper, in Gluon, Triton's language for one kind of GPU.

Of a program's warps one loads tiles of K and V, as many ahead as there is room for, whichever lines they belong to.
Four attend: the queries of a KV head are the rows of a matrix instruction. Programs have equal shares of all lines
(`kernels.shares`); a line that several share is combined by the one that is done with it last.

Sources: Flash-Decoding (https://pytorch.org/blog/flash-decoding/), Stream-K (arXiv 2301.03598) for the shares,
FlashAttention-3 (arXiv 2407.08608) for the roles of warps, PagedAttention (arXiv 2309.06180) for the block table.
"""

from __future__ import annotations

import torch
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
from kernels.combine_shares import combine_shares
from kernels.decode_shares_triton import share_decodes
from kernels.dependent_launch import dependent_launch
from kernels.layout import fail, given_or_new
from kernels.shares import Shares
from kernels.tiles import multiprocessors, score_scale
from kernels.warpgroups import ELEMENTS, HEAD_DIMS, barrier, has_warpgroups, load_tile

ROWS = gl.constexpr(64)
"""Of a matrix instruction, of which a KV head's queries are the first."""
MOST_GROUP, FEW_HEADS = 16, 4
"""Query heads of a KV head, and those up to which parts are combined as if there were so many."""
MOST_LINES = 512
"""Requests times KV heads up to which this kernel is faster than the one in Triton, by measurement (docs/log.md)."""
TILE = 64
"""Entries."""
PART = gl.constexpr(16)
"""Entries that one copy brings, no more than any block has: of a line's last tile, what holds nothing is left out."""
STAGES = 3
"""Tiles of K and of V in shared memory, so that two programs share a multiprocessor."""
PROGRAMS_PER_SM, MOST_REGISTERS = 2, 128
LINE_COST = 2
"""What a line costs beside its tiles, in tiles: near what made unequal lengths fastest (docs/log.md)."""
CHUNK_ELEMENTS = 4096
"""Elements of parts that a program combines at a time."""
PRODUCER_REGISTERS = gl.constexpr(40)
POINTERS = ("table_ptr", "lens_ptr", "starts_ptr", "units_ptr", "arrived_ptr", "fresh_ptr", "max_ptr", "sum_ptr")
NUMBERS = ("group", "kv_heads", *(f"{of}_{by}_stride" for of in ("table", "lens") for by in ("row", "head")))


@gluon.jit
def _wait():
    """For the kernels ahead (`kernels.dependent_launch`)."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _launch():
    """Let the next kernel's programs start."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load_parts(desc, rows, tile, full, left, SPAN: gl.constexpr, TILE: gl.constexpr):
    """A tile of which `left` entries are a line's, each SPAN of them from one of `rows` on. PART entries are a copy."""
    BYTES: gl.constexpr = PART * desc.block_type.shape[1] * desc.dtype.primitive_bitwidth // 8
    for at in gl.static_range(0, TILE, PART):
        held = at < left
        mbarrier.expect(full, BYTES, pred=held)
        mbarrier.arrive(full, count=1, pred=at >= left)
        load_tile(desc, [rows[at // SPAN] + at % SPAN, 0], full, tile.slice(at, PART, 0), pred=held)


@gluon.jit
def _load_tiles(
    k_desc,
    v_desc,
    table_ptr,
    lens_ptr,
    fresh_ptr,
    k_tiles,
    v_tiles,
    k_full,
    v_full,
    k_empty,
    v_empty,
    line,
    offset,
    last_line,
    last_tile,
    kv_heads,
    table_row_stride,
    table_head_stride,
    lens_row_stride,
    lens_head_stride,
    block_size,
    HEAD_DIM: gl.constexpr,
    SPAN: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LINE_COST: gl.constexpr,
    EARLY: gl.constexpr,
):
    """All tiles of a program, those of each line in order. What lies past a line's last part stays what it was. EARLY,
    entries that were there before this step are loaded while the kernels ahead still run.
    """
    if EARLY:  # noqa: SIM102 - known when it is compiled
        if gl.load(fresh_ptr) != 0:
            _wait()
    tile = gl.maximum(offset - LINE_COST, 0)
    i = 0
    while (line < last_line) | ((line == last_line) & (last_tile > 0)):
        row, head = (line // kv_heads).to(gl.int64), line % kv_heads
        length = gl.load(lens_ptr + row * lens_row_stride + head * lens_head_stride)
        table = table_ptr + row * table_row_stride + head * table_head_stride
        end = gl.maximum(gl.cdiv(length, TILE), 1)
        if line == last_line:
            end = last_tile
        for start in range(tile * TILE, end * TILE, TILE):
            rows = ()
            for entry in gl.static_range(0, TILE, SPAN):
                block = gl.load(table + (start + entry) // block_size, mask=start + entry < length, other=0)
                rows += ((block * kv_heads + head) * block_size + (start + entry) % block_size,)
            if EARLY:  # noqa: SIM102 - as above
                if start + TILE >= length:
                    _wait()  # the last entry is this step's
            slot, phase = i % STAGES, (i // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            _load_parts(k_desc, rows, k_tiles.index(slot), k_full.index(slot), length - start, SPAN, TILE)
            mbarrier.wait(v_empty.index(slot), phase)
            _load_parts(v_desc, rows, v_tiles.index(slot), v_full.index(slot), length - start, SPAN, TILE)
            i += 1
        line += 1
        tile = 0


@gluon.jit
def _next(
    line, end_line, lens_ptr, q_ptrs, q_held, group, kv_heads, q_row_stride, q_head_stride, lens_row_stride,
    lens_head_stride,
):  # fmt: skip
    """A line's length and queries; nothing is read from `end_line` on."""
    row, head = (line // kv_heads).to(gl.int64), line % kv_heads
    length = gl.load(lens_ptr + row * lens_row_stride + head * lens_head_stride, mask=line < end_line, other=0)
    of_line = q_ptrs + row * q_row_stride + head * group * q_head_stride
    return length, gl.load(of_line, mask=q_held & (line < end_line), other=0.0)


@gluon.jit
def _attend(
    q_ptr,
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    sinks_ptr,
    lens_ptr,
    arrived_ptr,
    k_tiles,
    v_tiles,
    k_full,
    v_full,
    k_empty,
    v_empty,
    line,
    offset,
    last_line,
    last_tile,
    units,
    scale_log2,
    group,
    kv_heads,
    q_row_stride,
    q_head_stride,
    lens_row_stride,
    lens_head_stride,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LINE_COST: gl.constexpr,
    GROUP: gl.constexpr,
    CHUNK: gl.constexpr,
    EARLY: gl.constexpr,
):
    """All tiles of a program. A line of which it has not all is combined by the program that is done with it last."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    tile_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    q_member = gl.arange(0, ROWS, gl.SliceLayout(1, q_layout))
    q_dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, q_layout))
    q_ptrs = q_ptr + q_member[:, None] * q_head_stride + q_dims[None, :]
    member = gl.arange(0, ROWS, gl.SliceLayout(1, acc_layout))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, acc_layout))
    inside = (member < group)[:, None] & (dims < HEAD_DIM)[None, :]
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
    entries = gl.arange(0, TILE, gl.SliceLayout(0, scores_layout))
    zeros = gl.zeros([ROWS, TILE], gl.float32, scores_layout)
    program, programs = gl.program_id(0), gl.minimum(gl.num_programs(0), units)
    if EARLY:
        _wait()
        _launch()
    first_line = line
    begin = program.to(gl.int64) * units // programs - offset
    tile = gl.maximum(offset - LINE_COST, 0)
    q_held = (q_member < group)[:, None]
    end_line = last_line + (last_tile > 0).to(gl.int32)
    next_length, next_q = _next(
        line, end_line, lens_ptr, q_ptrs, q_held, group, kv_heads, q_row_stride, q_head_stride, lens_row_stride,
        lens_head_stride,
    )  # fmt: skip
    i = 0
    while line < end_line:
        row, head = (line // kv_heads).to(gl.int64), line % kv_heads
        length = next_length
        tiles = gl.maximum(gl.cdiv(length, TILE), 1)
        end = tiles
        if line == last_line:
            end = last_tile
        q = next_q
        next_length, next_q = _next(
            line + 1, end_line, lens_ptr, q_ptrs, q_held, group, kv_heads, q_row_stride, q_head_stride,
            lens_row_stride, lens_head_stride,
        )  # fmt: skip
        whole = (tile == 0) & (end == tiles)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
        row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores_layout))
        if sinks_ptr is not None:
            sinks = gl.load(sinks_ptr + head * group + rows, mask=(rows < group) & whole, other=float("-inf"))
            row_max = sinks.to(gl.float32) * 1.4426950408889634
            row_sum += gl.where(whole, 1.0, 0.0)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, acc_layout)
        for start in range(tile * TILE, end * TILE, TILE):
            slot, phase = i % STAGES, i // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            scores = warpgroup_mma(q, k_tiles.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores, q = warpgroup_mma_wait(0, deps=[scores, q])  # until then the registers of both are read
            mbarrier.arrive(k_empty.index(slot), count=1)
            scores = gl.where((start + entries < length)[None, :], scores * scale_log2, float("-inf"))
            new_max = gl.maximum(row_max, gl.max(scores, 1))
            taken_off = gl.where(new_max == float("-inf"), 0.0, new_max)
            weights = gl.exp2(scores - taken_off[:, None])
            shrink = gl.exp2(row_max - taken_off)
            row_sum = row_sum * shrink + gl.sum(weights, 1)
            row_max = new_max
            weights = gl.convert_layout(weights.to(q_ptr.dtype.element_ty), weights_layout)
            acc *= gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
            mbarrier.wait(v_full.index(slot), phase)
            if length < start + TILE:  # a product with 0 would let NaN through from what lies past the last entry
                held = start + gl.arange(0, TILE, gl.SliceLayout(1, tile_layout)) < length
                v_tile = v_tiles.index(slot)
                v_tile.store(gl.where(held[:, None], v_tile.load(tile_layout), 0.0))
                fence_async_shared()
                barrier()
            acc = warpgroup_mma(weights, v_tiles.index(slot), acc, is_async=True)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_empty.index(slot), count=1)
            i += 1

        if whole:
            sums = gl.convert_layout(gl.where(row_sum > 0.0, row_sum, 1.0), gl.SliceLayout(1, acc_layout))
            heads = (row * kv_heads + head) * group + member
            out = (acc / sums[:, None]).to(out_ptr.dtype.element_ty)
            gl.store(out_ptr + heads[:, None] * HEAD_DIM + dims[None, :], out, mask=inside)
        else:
            place = (2 * program + (line != first_line).to(gl.int32)) * group
            gl.store(acc_ptr + (place + member)[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
            gl.store(max_ptr + place + rows, row_max, mask=rows < group)
            gl.store(sum_ptr + place + rows, row_sum, mask=rows < group)
            first = ((begin + LINE_COST + 1) * programs - 1) // units
            last = ((begin + LINE_COST + tiles) * programs - 1) // units
            # All threads' stores come before the count, and the count before the loads of whoever finds it full.
            barrier()
            if gl.atomic_add(arrived_ptr + line, 1, sem="acq_rel", scope="gpu") == (last - first).to(gl.int32):
                barrier()
                combine_shares(
                    out_ptr, acc_ptr, max_ptr, sum_ptr, sinks_ptr, row, head, begin, first.to(gl.int32),
                    last.to(gl.int32), units, group, kv_heads, HEAD_DIM, GROUP, CHUNK,
                )  # fmt: skip
                gl.store(arrived_ptr + line, 0)  # for the next layer
        begin += LINE_COST + tiles
        line += 1
        tile = 0


@gluon.jit(do_not_specialize=[*POINTERS, *NUMBERS])
def _attend_shares(
    q_ptr,
    k_desc,
    v_desc,
    table_ptr,
    lens_ptr,
    starts_ptr,
    units_ptr,
    arrived_ptr,
    fresh_ptr,
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    sinks_ptr,
    scale_log2,
    group,
    kv_heads,
    q_row_stride,
    q_head_stride,
    table_row_stride,
    table_head_stride,
    lens_row_stride,
    lens_head_stride,
    block_size,
    HEAD_DIM: gl.constexpr,
    SPAN: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LINE_COST: gl.constexpr,
    GROUP: gl.constexpr,
    CHUNK: gl.constexpr,
    DEPENDENT: gl.constexpr,
    EARLY: gl.constexpr,
):
    """One program's share."""
    if DEPENDENT and not EARLY:
        _wait()
        _launch()
    program, programs = gl.program_id(0), gl.num_programs(0)
    line, last_line = gl.load(starts_ptr + program), gl.load(starts_ptr + program + 1)
    offset = gl.load(starts_ptr + programs + 1 + program)
    last_tile = gl.maximum(gl.load(starts_ptr + programs + 2 + program) - LINE_COST, 0)
    units = gl.load(units_ptr)

    dtype: gl.constexpr = k_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], dtype)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=TILE // PART)
        mbarrier.init(v_full.index(i), count=TILE // PART)
        mbarrier.init(k_empty.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    q_ptr, out_ptr, acc_ptr, max_ptr, sum_ptr, sinks_ptr, lens_ptr, arrived_ptr, k_tiles, v_tiles,
                    k_full, v_full, k_empty, v_empty, line, offset, last_line, last_tile, units, scale_log2, group,
                    kv_heads, q_row_stride, q_head_stride, lens_row_stride, lens_head_stride, HEAD_DIM, TILE, STAGES,
                    LINE_COST, GROUP, CHUNK, EARLY,
                ),
            ),
            (
                _load_tiles,
                (
                    k_desc, v_desc, table_ptr, lens_ptr, fresh_ptr, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty,
                    line, offset, last_line, last_tile, kv_heads, table_row_stride, table_head_stride, lens_row_stride,
                    lens_head_stride, block_size, HEAD_DIM, SPAN, TILE, STAGES, LINE_COST, EARLY,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def takes(view: CacheView, group: int, form: AttentionForm) -> bool:
    """Whether `paged_decode_gluon` has such requests, `group` queries a KV head, attention's form, and the GPU."""
    cache, requests, kv_heads = view.k_cache, *view.lens.shape[-2:]
    return (
        cache.dtype in ELEMENTS
        and cache.shape[-1] in HEAD_DIMS
        and requests * kv_heads <= MOST_LINES
        and group <= MOST_GROUP
        and form.window is None
        and form.soft_cap is None
        and has_warpgroups(cache.device)
    )


def decode_shares(view: CacheView, programs: int | None = None) -> Shares:
    """How programs share these requests, of all layers where the view's lengths are; `programs` to compute with."""
    programs = programs or PROGRAMS_PER_SM * multiprocessors(view.lens.device)
    return share_decodes(view, TILE, LINE_COST, programs)


def paged_decode_gluon(
    q: Tensor,
    view: CacheView,
    scale: float,
    shares: Shares | None = None,
    out: Tensor | None = None,
    form: AttentionForm = PLAIN,
    early: bool = False,
) -> Tensor:
    """`paged_decode` in one launch; without `shares`, one more makes them here. ValueError unless it `takes` this."""
    k_cache, v_cache, block_tables, lens = view
    batch, query_heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    group, out = query_heads // kv_heads, given_or_new(out, q)
    if batch == 0:
        return out
    if not takes(view, group, form):
        fail("pieces", "type", "Shares", "its kernel has no such attention, give decode_pieces of this group and form")
    if shares is None:
        shares, early = decode_shares(view), False
    programs = shares.starts.shape[-1] - 1
    acc = torch.empty((2 * programs, group, head_dim), dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty((2, 2 * programs, group), dtype=torch.float32, device=q.device)
    shape = [PART.value, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(shape, ELEMENTS[q.dtype])
    k_desc, v_desc = (
        TensorDescriptor(cache, [cache.numel() // head_dim, head_dim], [head_dim, 1], shape, layout)
        for cache in (k_cache, v_cache)
    )
    launch = dependent_launch(q)
    group_pad = FEW_HEADS if group <= FEW_HEADS else MOST_GROUP
    _attend_shares[(programs,)](
        q, k_desc, v_desc, block_tables, lens, *shares, out, acc, maxima, sums, form.sinks,
        score_scale(scale, None), group, kv_heads,
        *q.stride()[:2], *block_tables.stride()[:2], *lens.stride(), block_size,
        HEAD_DIM=head_dim, SPAN=min(block_size, TILE), TILE=TILE, STAGES=STAGES, LINE_COST=LINE_COST,
        GROUP=group_pad, CHUNK=max(4, CHUNK_ELEMENTS // (group_pad * head_dim)),
        EARLY=early and launch["DEPENDENT"], num_warps=4, maxnreg=MOST_REGISTERS, **launch,
    )  # fmt: skip
    return out
