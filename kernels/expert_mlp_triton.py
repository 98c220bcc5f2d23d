"""A mixture of experts in Triton: a program multiplies a tile of one expert's tokens with its own part of the weight.

The rows of a product are pairs of a token and one of its experts, numbered token by token. They stay where they are:
only their numbers are sorted by expert. A tile is up to `ExpertTile.rows` pairs of one expert. How many tiles there are
is known on the device alone, so as many programs start as any routing needs, and those without a tile return.
A row is summed in the same order wherever in a tile it stands, so a token's output depends on no other token.

The sorted list of tokens as a list of tiles: MegaBlocks (arXiv:2211.15841) and vLLM's fused mixture of experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import dependent_launch, wait_for_inputs
from kernels.expert_tiles import ExpertTile, find_tile
from kernels.tiles import has_large_shared_memory

Options = dict[str, bool]
"""`dependent_launch`'s."""

FEW_PAIRS, MANY_PAIRS = 1024, 4096
"""Pairs that a program looks through at a time for those of its expert; MANY_PAIRS where there are more."""
COMBINED = 512
"""Columns that a program combines."""


@triton.jit
def _load_experts(experts_ptr, pairs, start, NONE: tl.constexpr, CHUNK: tl.constexpr):
    """Numbers of CHUNK pairs from `start` on, and their experts: NONE past the last."""
    pair = start + tl.arange(0, CHUNK)
    return pair, tl.load(experts_ptr + pair, mask=pair < pairs, other=NONE).to(tl.int32)


@triton.jit
def _group(
    experts_ptr,
    sorted_ptr,
    tiles_ptr,
    pairs,
    slots,
    num_experts,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Sort the pairs of one expert into their places, and list its tiles: expert, first place, place after the last.

    EXPERTS is more than `num_experts`. Slots without a tile get expert -1.
    """
    wait_for_inputs(DEPENDENT)
    expert = tl.program_id(0)
    counts = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, pairs, CHUNK):
        pair, of = _load_experts(experts_ptr, pairs, start, EXPERTS - 1, CHUNK)
        counts += tl.histogram(of, EXPERTS)
    number = tl.arange(0, EXPERTS)
    tiles = tl.where(number < num_experts, (counts + ROWS - 1) // ROWS, 0)
    begin = tl.sum(tl.where(number < expert, counts, 0), 0)
    end = begin + tl.sum(tl.where(number == expert, counts, 0), 0)
    slot_ptr = tiles_ptr + 3 * tl.sum(tl.where(number < expert, tiles, 0), 0)
    for first in range(begin, end, ROWS):
        tl.store(slot_ptr, expert)
        tl.store(slot_ptr + 1, first)
        tl.store(slot_ptr + 2, tl.minimum(first + ROWS, end))
        slot_ptr += 3
    for slot in range(tl.sum(tiles, 0) + expert, slots, num_experts):
        tl.store(tiles_ptr + 3 * slot, -1)
    place = begin
    for start in range(0, pairs, CHUNK):
        pair, of = _load_experts(experts_ptr, pairs, start, EXPERTS - 1, CHUNK)
        own = (of == expert).to(tl.int32)
        tl.store(sorted_ptr + place + tl.cumsum(own, 0) - 1, pair, mask=own > 0)
        place += tl.sum(own, 0)


@triton.jit
def _multiply(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sorted_ptr,
    tiles_ptr,
    outputs,
    width,
    x_stride,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    SWAPPED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A tile of pairs and OUTPUTS columns. PAIRS of them share a row of x.

    WHOLE: OUTPUTS and DEPTH divide the weight. SWAPPED: the weights are the left matrix, of which Hopper's matrix units
    take 64 rows at least.
    """
    wait_for_inputs(DEPENDENT)
    tile_ptr = tiles_ptr + 3 * tl.program_id(1)
    expert = tl.load(tile_ptr).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(tile_ptr + 1) + tl.arange(0, ROWS)
    held = place < tl.load(tile_ptr + 2)
    pair = tl.load(sorted_ptr + place, mask=held, other=0).to(tl.int64)
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = column < outputs
    depth = tl.arange(0, DEPTH)
    x_rows = x_ptr + pair // PAIRS * x_stride
    weights = weight_ptr + expert * outputs * width + column.to(tl.int64) * width
    acc = tl.zeros([OUTPUTS, ROWS] if SWAPPED else [ROWS, OUTPUTS], tl.float32)
    for start in range(0, width, DEPTH):
        at = start + depth
        if SWAPPED:
            x_ptrs, weight_ptrs = x_rows[None, :] + at[:, None], weights[:, None] + at[None, :]
            x_mask = held[None, :] if WHOLE else held[None, :] & (at < width)[:, None]
            weight_mask = inside[:, None] & (at < width)[None, :]
        else:
            x_ptrs, weight_ptrs = x_rows[:, None] + at[None, :], weights[None, :] + at[:, None]
            x_mask = held[:, None] if WHOLE else held[:, None] & (at < width)[None, :]
            weight_mask = inside[None, :] & (at < width)[:, None]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        weight = tl.load(weight_ptrs) if WHOLE else tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        if SWAPPED:
            acc = tl.dot(weight, x, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, weight, acc, input_precision="ieee")
    if SWAPPED:
        acc = tl.trans(acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * outputs + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + pair[:, None] * outputs + column[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=held[:, None] & inside[None, :])


@triton.jit
def _combine(
    parts_ptr, shares_ptr, out_ptr, width, ACTIVE: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr
):
    """COLUMNS of a token: its parts, each by its share, summed in the order of its experts."""
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    acc = tl.zeros([COLUMNS], tl.float32)
    for i in tl.static_range(ACTIVE):
        pair = token * ACTIVE + i
        part = tl.load(parts_ptr + pair * width + column, mask=inside, other=0.0).to(tl.float32)
        acc += tl.load(shares_ptr + pair) * part
    tl.store(out_ptr + token * width + column, acc.to(out_ptr.dtype.element_ty), mask=inside)


def group_by_expert(experts: Tensor, num_experts: int, tile: ExpertTile, launch: Options) -> tuple[Tensor, Tensor]:
    """Pairs of a token and one of its experts, sorted by expert, and their tiles.

    Args:
        experts: int64 [T, k], contiguous.

    Returns:
        int32 [T * k], numbers of pairs; int32 [n, 3], expert, first place and place after the last of each tile,
        expert -1 where there is none.
    """
    pairs = experts.numel()
    slots = tile.most_tiles(pairs, num_experts)
    chunk = FEW_PAIRS if pairs <= MANY_PAIRS else MANY_PAIRS
    order = torch.empty(pairs, dtype=torch.int32, device=experts.device)
    tiles = torch.empty((slots, 3), dtype=torch.int32, device=experts.device)
    _group[(num_experts,)](
        experts, order, tiles, pairs, slots, num_experts,
        ROWS=tile.rows, EXPERTS=max(128, triton.next_power_of_2(num_experts + 1)), CHUNK=chunk,
        num_warps=chunk // 256, **launch,
    )  # fmt: skip
    return order, tiles


def multiply_experts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    tiles: Tensor,
    tile: ExpertTile,
    launch: Options,
) -> Tensor:
    """Each pair's row of x times the weight of its expert.

    Args:
        x: [n, width], last dimension contiguous; T * k pairs, the first T * k / n of them of the first row and so on.
        weight: [E, outputs, width], contiguous.
        bias: [E, outputs], contiguous, or None.
        order, tiles: `group_by_expert`'s.

    Returns:
        [T * k, outputs], in the order of the pairs.
    """
    outputs, width = weight.shape[1:]
    out = torch.empty((len(order), outputs), dtype=x.dtype, device=x.device)
    _multiply[(triton.cdiv(outputs, tile.outputs), len(tiles))](
        x, weight, bias, out, order, tiles, outputs, width, x.stride(0),
        PAIRS=len(order) // len(x), ROWS=tile.rows, OUTPUTS=tile.outputs, DEPTH=tile.depth,
        WHOLE=outputs % tile.outputs == 0 and width % tile.depth == 0, SWAPPED=tile.rows < 64 <= tile.outputs,
        num_warps=tile.warps, num_stages=tile.stages, **launch,
    )  # fmt: skip
    return out


def combine_experts(parts: Tensor, shares: Tensor, launch: Options) -> Tensor:
    """The sum of each token's parts by their shares, in float32 and rounded once.

    Args:
        parts: [T * k, width], contiguous.
        shares: float32 [T, k], contiguous.

    Returns:
        [T, width], parts' dtype.
    """
    (tokens, active), width = shares.shape, parts.shape[1]
    out = torch.empty((tokens, width), dtype=parts.dtype, device=parts.device)
    grid = tokens, triton.cdiv(width, COMBINED)
    _combine[grid](parts, shares, out, width, ACTIVE=active, COLUMNS=COMBINED, num_warps=2, **launch)
    return out


def expert_mlp_triton(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    gate: Callable[[Tensor], Tensor],
    tile: ExpertTile | None = None,
) -> Tensor:
    """`expert_mlp` in four launches and the gate's.

    Args:
        x, experts, shares, gate_up, down, biases, gate: `expert_mlp`'s.
        tile: of both products; None: `find_tile`'s.

    Returns:
        [T, width], contiguous.
    """
    if len(x) == 0:
        return torch.empty_like(x)
    if tile is None:
        tile = find_tile(*experts.shape, len(down), x.itemsize, has_large_shared_memory(x.device))
    first, second = (None, None) if biases is None else biases
    launch = dependent_launch(x[:1])  # however many rows: no product here is cuBLAS's
    order, tiles = group_by_expert(experts.contiguous(), len(down), tile, launch)
    inner = gate(multiply_experts(x, gate_up, first, order, tiles, tile, launch))
    parts = multiply_experts(inner, down, second, order, tiles, tile, launch)
    return combine_experts(parts, shares.contiguous(), launch)
