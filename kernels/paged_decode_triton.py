"""Flash decoding over block tables, in Triton: requests are cut into pieces, and the results of pieces combined.

Sources: Flash-Decoding (https://pytorch.org/blog/flash-decoding/), PagedAttention (arXiv 2309.06180).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView
from kernels.decode_pieces_triton import decode_pieces_triton
from kernels.dependent_launch import dependent_launch, wait_for_inputs
from kernels.layout import given_or_new
from kernels.pieces import Pieces
from kernels.tiles import attend_tile, decode_tile, load_blocks, load_sinks, padded_dim, score_scale

FEW_REQUESTS = 4

CHUNK_ELEMENTS = 16384, 4096
"""Elements of pieces that a program combines at a time, of few requests, which have many pieces each, and of more."""

POINTERS = ("table_ptr", "lens_ptr", "ranges_ptr", "starts_ptr", "arrived_ptr", "max_ptr", "sum_ptr")
NUMBERS = ("num_pieces", "group", "table_row_stride", "table_head_stride", "lens_row_stride", "lens_head_stride")


@triton.jit
def _combined(
    acc_ptr,
    max_ptr,
    sum_ptr,
    sinks_ptr,
    begin,
    end,
    all_heads,
    heads,
    held,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pieces begin .. end - 1 of `heads` [GROUP], rescaled to their common maximum and added: [GROUP, DIM_PAD]. Here
    sinks take their share, once."""
    dims = tl.arange(0, DIM_PAD)
    acc = tl.zeros([GROUP, DIM_PAD], tl.float32)
    all_max = tl.full([GROUP], float("-inf"), tl.float32)
    all_sum = tl.zeros([GROUP], tl.float32)
    if sinks_ptr is not None:
        all_max = load_sinks(sinks_ptr, heads, held)
        all_sum += 1.0
    for chunk in range(begin, end, CHUNK):
        piece = chunk + tl.arange(0, CHUNK)
        part = piece.to(tl.int64)[:, None] * all_heads + heads[None, :]
        there = (piece < end)[:, None] & held[None, :]
        piece_max = tl.load(max_ptr + part, mask=there, other=float("-inf"), cache_modifier=".cg")
        piece_sum = tl.load(sum_ptr + part, mask=there, other=0.0, cache_modifier=".cg")
        inside = there[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        acc_ptrs = acc_ptr + part[:, :, None] * HEAD_DIM + dims[None, None, :]
        piece_acc = tl.load(acc_ptrs, mask=inside, other=0.0, cache_modifier=".cg")
        new_max = tl.where(held, tl.maximum(all_max, tl.max(piece_max, 0)), 0.0)
        weights = tl.exp2(piece_max - new_max[None, :])
        shrink = tl.exp2(all_max - new_max)
        acc = acc * shrink[:, None] + tl.sum(piece_acc * weights[:, :, None], 0)
        all_sum = all_sum * shrink + tl.sum(piece_sum * weights, 0)
        all_max = new_max
    return acc / tl.where(held, all_sum, 1.0)[:, None]


@triton.jit(do_not_specialize=[*POINTERS, *NUMBERS])
def _attend_pieces(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    ranges_ptr,
    starts_ptr,
    arrived_ptr,
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    sinks_ptr,
    scale_log2,
    num_pieces,
    group,
    q_row_stride,
    q_head_stride,
    block_stride,
    head_stride,
    table_row_stride,
    table_head_stride,
    lens_row_stride,
    lens_head_stride,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One piece and KV head: all query heads of the KV head are the rows of one tile. Of a request's programs, the one
    that ends last combines what all found.
    """
    wait_for_inputs(DEPENDENT)
    piece = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(ranges_ptr + piece).to(tl.int64)
    first = tl.load(ranges_ptr + num_pieces + piece)
    last = tl.load(ranges_ptr + 2 * num_pieces + piece)
    length = tl.load(lens_ptr + tl.maximum(row, 0) * lens_row_stride + head * lens_head_stride)
    # No piece, or one of which this head has nothing, being shorter than the longest one.
    if (row < 0) | ((first > 0) & (first * TILE >= length)):
        return
    last = tl.minimum(last, tl.cdiv(length, TILE))
    begins, read_from, skipped = first == 0, first, 0
    if WINDOW is not None:
        # Tiles before the window are not read, and pieces of no others are as if there were none.
        skipped = tl.maximum(length - WINDOW, 0) // TILE
        if (skipped > 0) & (last <= skipped):
            return
        begins, read_from = first <= skipped, tl.maximum(first, skipped)

    member = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    heads = head * group + member
    inside = (member < group)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + row * q_row_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptrs, mask=inside, other=0.0)
    limits = tl.zeros([GROUP_PAD], tl.int32) + length
    k_head = k_ptr + head * head_stride
    v_head = v_ptr + head * head_stride
    table = table_ptr + row * table_row_stride + head * table_head_stride

    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    row_max = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    row_sum = tl.zeros([GROUP_PAD], tl.float32)
    if sinks_ptr is not None:  # noqa: SIM102 - known when it is compiled
        if begins & (last * TILE >= length):  # else where pieces are combined
            row_max = load_sinks(sinks_ptr, heads, member < group)
            row_sum += 1.0
    blocks = load_blocks(table, read_from * TILE, length, BLOCK_SIZE, TILE)
    for tile in range(read_from, last):
        next_blocks = load_blocks(table, (tile + 1) * TILE, length, BLOCK_SIZE, TILE)
        acc, row_max, row_sum = attend_tile(
            q, acc, row_max, row_sum, k_head, v_head, blocks, block_stride, tile * TILE, length, limits, scale_log2,
            HEAD_DIM, DIM_PAD, BLOCK_SIZE, TILE, True, WINDOW, SOFT_CAP,
        )  # fmt: skip
        blocks = next_blocks

    all_heads = tl.num_programs(1) * group
    if begins and last * TILE >= length:
        out = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        out_ptrs = out_ptr + (row * all_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = piece * all_heads + heads
        tl.store(acc_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
        tl.store(max_ptr + part, row_max, mask=member < group)
        tl.store(sum_ptr + part, row_sum, mask=member < group)
        begin = tl.load(starts_ptr + row)
        size = tl.where(first == 0, last, first // tl.maximum((piece - begin).to(tl.int32), 1))
        end = begin + tl.cdiv(tl.cdiv(length, TILE), size)
        if WINDOW is not None:
            begin += skipped // size
        arrived = arrived_ptr + row * tl.num_programs(1) + head
        # All threads' stores come before the count, and the count before the loads of the program that finds it full.
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == end - begin - 1:
            tl.debug_barrier()
            some = tl.arange(0, GROUP)
            held = some < group
            out = _combined(
                acc_ptr, max_ptr, sum_ptr, sinks_ptr, begin, end, all_heads, head * group + some, held,
                HEAD_DIM, DIM_PAD, GROUP, CHUNK,
            )  # fmt: skip
            out_ptrs = out_ptr + (row * all_heads + head * group + some)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=held[:, None] & (dims < HEAD_DIM)[None, :])
            tl.store(arrived, 0)  # for the next layer


def paged_decode_triton(
    q: Tensor,
    view: CacheView,
    scale: float,
    pieces: Pieces | None = None,
    out: Tensor | None = None,
    form: AttentionForm = PLAIN,
) -> Tensor:
    """`paged_decode` in one launch; without `pieces`, one more cuts them here."""
    k_cache, v_cache, block_tables, lens = view
    batch, query_heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    out = given_or_new(out, q)
    if batch == 0:
        return out
    if pieces is None:
        pieces = decode_pieces_triton(view)
    options = decode_tile(head_dim, q.element_size())
    dim_pad, group = padded_dim(head_dim), query_heads // kv_heads
    num_pieces = pieces.ranges.shape[1]
    acc = torch.empty((num_pieces, query_heads, head_dim), dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty((2, num_pieces, query_heads), dtype=torch.float32, device=q.device)

    group_tile = triton.next_power_of_2(group)
    _attend_pieces[(num_pieces, kv_heads)](
        q, k_cache, v_cache, block_tables, lens, *pieces, out, acc, maxima, sums, form.sinks,
        score_scale(scale, form.soft_cap), num_pieces, group,
        *q.stride()[:2], *k_cache.stride()[:2], *block_tables.stride()[:2], *lens.stride(),
        GROUP_PAD=max(16, group_tile), HEAD_DIM=head_dim, DIM_PAD=dim_pad, BLOCK_SIZE=block_size,
        GROUP=group_tile, CHUNK=max(1, CHUNK_ELEMENTS[batch > FEW_REQUESTS] // (group_tile * dim_pad)),
        WINDOW=form.window, SOFT_CAP=form.soft_cap, **options, **dependent_launch(q),
    )  # fmt: skip
    return out
