"""How a Triton program reads a tile of paged entries, and folds it into a running softmax.

Sources: PagedAttention (arXiv 2309.06180) for the block table, FlashAttention-2 (arXiv 2307.08691) for the softmax.
"""

import functools

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
"""Folded into the scale, so that the softmax uses exp2."""


def padded_dim(head_dim: int) -> int:
    """Width of a head in registers: `tl.arange` needs a power of two, `tl.dot` at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def decode_tile(head_dim: int, element_size: int) -> dict[str, int]:
    """Entries a tile of decode attention, and Triton's launch options.

    Tiles are of 8 to 16 KB, so that three programs share a multiprocessor.

    Args:
        head_dim: of the caches.
        element_size: bytes; 4 has no tensor cores (exact float32).
    """
    dim = padded_dim(head_dim)
    if element_size == 4:
        return {"TILE": 32 if dim <= 64 else 16, "num_warps": 4, "num_stages": 2}
    return {"TILE": 128 if dim <= 64 else 64 if dim <= 128 else 32, "num_warps": 4, "num_stages": 3}


def score_scale(scale: float, soft_cap: float | None) -> float:
    """What products of queries and keys are multiplied by in a kernel: what then goes into exp2, or into tanh."""
    return scale * LOG2_E if soft_cap is None else scale / soft_cap


LARGE_SHARED_MEMORY = 200 * 1024
"""Bytes that a program may use on Hopper (227 KB) and its successors; the A100 has 163 KB, desktop GPUs 99 KB."""


@functools.cache
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may use `LARGE_SHARED_MEMORY`."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= LARGE_SHARED_MEMORY


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 on a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def load_blocks(table_ptr, start, length, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block of each entry start .. start + TILE - 1 (one number where a block holds the tile), 0 past `length`.

    Called an iteration ahead: the address of a tile is then known in time for its K and V to be loaded ahead too.
    """
    if TILE <= BLOCK_SIZE:
        blocks = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < length, other=0)
    else:
        entries = start + tl.arange(0, TILE)
        blocks = tl.load(table_ptr + entries // BLOCK_SIZE, mask=entries < length, other=0)
    return blocks.to(tl.int64)


@triton.jit
def load_keys(
    k_ptr,
    blocks,
    block_stride,
    start,
    length,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """K of entries start .. start + TILE - 1, one per column: [DIM_PAD, TILE], 0 past `length`, where none is loaded.

    k_ptr is at the KV head, `blocks` is the tile's `load_blocks`, `start` a multiple of TILE. Not MASKED, columns past
    `length` hold anything, NaN too.
    """
    inside = tl.arange(0, TILE)
    dims = tl.arange(0, DIM_PAD)
    offsets = blocks * block_stride + (start % BLOCK_SIZE + inside) % BLOCK_SIZE * HEAD_DIM
    k_ptrs = k_ptr + offsets[None, :] + dims[:, None]
    if MASKED:
        k = tl.load(k_ptrs, mask=(start + inside < length)[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    elif HEAD_DIM == DIM_PAD:
        k = tl.load(k_ptrs)
    else:
        k = tl.load(k_ptrs, mask=(dims < HEAD_DIM)[:, None], other=0.0)
    return k


@triton.jit
def load_weight(pointers, mask, OFFSET: tl.constexpr):
    """A norm's weight and its offset, float32."""
    weight = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if OFFSET != 0.0:
        weight += OFFSET
    return weight


@triton.jit
def load_sinks(sinks_ptr, heads, mask):
    """Sinks of query heads as scores that exp2 takes, -inf where masked."""
    sinks = tl.load(sinks_ptr + heads, mask=mask, other=float("-inf"))
    return sinks.to(tl.float32) * 1.4426950408889634


@triton.jit
def load_softmax_sinks(
    sinks_ptr,
    group,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTMAXES: tl.constexpr,
    GROUP_MEAN: tl.constexpr,
):
    """Sink of each softmax, of base 2: [SOFTMAXES], reduced over the group as logits are. -inf for those of no head.

    sinks_ptr is at the KV head's first query head.
    """
    if SOFTMAXES == ROWS:
        member = tl.arange(0, ROWS) % GROUP_PAD
        return load_sinks(sinks_ptr, member, member < group)
    else:
        member = tl.arange(0, GROUP_PAD)
        sinks = load_sinks(sinks_ptr, member, member < group)
        if GROUP_MEAN:
            reduced = tl.sum(tl.where(member < group, sinks, 0.0), 0) / group
        else:
            reduced = tl.max(sinks, 0)
        return tl.zeros([SOFTMAXES], tl.float32) + reduced


@triton.jit
def attend_tile(
    q,
    acc,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    blocks,
    block_stride,
    start,
    length,
    limits,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Fold entries start .. start + TILE - 1 into (acc, row_max, row_sum).

    q [M, DIM_PAD]; row i sees the entries below limits[i], none of them past `length`, and of a WINDOW the last of
    these. k_ptr and v_ptr are at the KV head, `blocks` is the tile's `load_blocks`, `start` a multiple of TILE. Not
    MASKED promises that every row sees the whole tile. Entries past `length`, or before all windows, are never loaded:
    unused slots may hold NaN, and 0 * NaN is NaN. With a SOFT_CAP, `scale_log2` is `score_scale`'s.
    """
    inside = tl.arange(0, TILE)
    dims = tl.arange(0, DIM_PAD)
    entries = start + inside
    held = entries < length
    if WINDOW is not None:
        held &= entries >= tl.min(limits, 0) - WINDOW
    offsets = blocks * block_stride + (start % BLOCK_SIZE + inside) % BLOCK_SIZE * HEAD_DIM
    k_ptrs = k_ptr + offsets[None, :] + dims[:, None]
    v_ptrs = v_ptr + offsets[:, None] + dims[None, :]
    if MASKED:
        k = tl.load(k_ptrs, mask=held[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=held[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == DIM_PAD:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=(dims < HEAD_DIM)[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)

    scores = tl.dot(q, k, input_precision="ieee") * scale_log2
    if SOFT_CAP is not None:
        scores = (2.0 * tl.sigmoid(2.0 * scores) - 1.0) * (SOFT_CAP * 1.4426950408889634)  # tanh
    if MASKED:
        scores = tl.where(entries[None, :] < limits[:, None], scores, float("-inf"))
        if WINDOW is not None:
            scores = tl.where(entries[None, :] >= limits[:, None] - WINDOW, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    taken_off = new_max
    if WINDOW is not None:  # a row whose window begins after this tile has seen nothing yet
        taken_off = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - taken_off[:, None])
    shrink = tl.exp2(row_max - taken_off)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, row_sum * shrink + tl.sum(weights, 1)
