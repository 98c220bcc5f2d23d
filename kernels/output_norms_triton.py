"""How long values are once the output projection has taken them to the residual stream, in Triton.

A program has a tile of values of one layer, request and query head, and goes through the rows of the projection. Its
products are summed as they are made and never written. One launch reads the weights of all layers, by their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_view import CacheView
from kernels.tiles import has_large_shared_memory, load_blocks, load_keys, padded_dim

STRIDES = tuple(f"{of}_{by}_stride" for of in ("table", "lens", "start") for by in ("layer", "row", "head"))


@triton.jit(do_not_specialize=["table_ptr", "lens_ptr", "starts_ptr", *STRIDES])
def _output_norms(
    v_ptr,
    addresses_ptr,
    table_ptr,
    lens_ptr,
    starts_ptr,
    out_ptr,
    width,
    outputs,
    weight_stride,
    layer_stride,
    block_stride,
    head_stride,
    table_layer_stride,
    table_row_stride,
    table_head_stride,
    lens_layer_stride,
    lens_row_stride,
    lens_head_stride,
    start_layer_stride,
    start_row_stride,
    start_head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """WHOLE: tiles need no mask. ALIGNED: addresses are multiples of 16 bytes. SQUARED: the norm is l2."""
    line = tl.program_id(1)
    row, query_head = (line // (HEADS * GROUP)).to(tl.int64), line % (HEADS * GROUP)
    head = query_head // GROUP
    layer = tl.program_id(2).to(tl.int64)
    length = tl.load(lens_ptr + layer * lens_layer_stride + row * lens_row_stride + head * lens_head_stride)
    begin = tl.load(starts_ptr + layer * start_layer_stride + row * start_row_stride + head * start_head_stride)
    start = (begin // ROWS + tl.program_id(0)) * ROWS
    if start >= length:
        return
    v_head = v_ptr + layer * layer_stride + head * head_stride
    table = table_ptr + layer * table_layer_stride + row * table_row_stride + head * table_head_stride
    blocks = load_blocks(table, start, length, BLOCK_SIZE, ROWS)
    v = tl.trans(load_keys(v_head, blocks, block_stride, start, length, HEAD_DIM, DIM_PAD, BLOCK_SIZE, ROWS))

    weight_ptr = tl.load(addresses_ptr + layer).to(tl.pointer_type(v_ptr.dtype.element_ty))
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
    dims, places = tl.arange(0, DIM_PAD), tl.arange(0, TILE)
    weight_ptrs = weight_ptr + query_head * HEAD_DIM + places[None, :] * weight_stride + dims[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, outputs, TILE):
        if WHOLE:
            weight = tl.load(weight_ptrs)
        else:
            inside = (first + places < outputs)[None, :] & (dims < HEAD_DIM)[:, None]
            weight = tl.load(weight_ptrs, mask=inside, other=0.0)
        products = tl.dot(v, weight, input_precision="ieee")
        total += tl.sum(products * products if SQUARED else tl.abs(products), 1)
        weight_ptrs += TILE * weight_stride
    if SQUARED:
        total = tl.sqrt(total)
    entries = start + tl.arange(0, ROWS)
    out = out_ptr + (layer * tl.num_programs(1) + line) * width
    tl.store(out + entries, total, mask=(entries >= begin) & (entries < length))


@cache
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [L] on the device, copied there once."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def norm_tiles(dim_pad: int, element_size: int, large: bool) -> dict[str, int]:
    """Values and rows of the projection a tile, and Triton's launch options.

    As many values as registers hold the products of, for each is a product more for a weight that is read; and tiles of
    weights on their way as shared memory holds beside them.

    Args:
        dim_pad: of a head, padded.
        element_size: bytes; 4 has no tensor cores (exact float32).
        large: `has_large_shared_memory`; otherwise 99 KB must do.
    """
    if element_size == 4:
        rows, tile, warps, stages = 16, 32, 4, 2
    elif not large:
        rows, tile, warps, stages = 64, 64, 4, 2
    else:
        rows, tile, warps, stages = (256, 128, 8, 3) if dim_pad <= 128 else (128, 128, 8, 2)
    return {"ROWS": rows, "TILE": tile, "num_warps": warps, "num_stages": stages}


def output_norms_triton(view: CacheView, weights: Sequence[Tensor], starts: Tensor, norm: str = "l1") -> Tensor:
    """`kernels.output_norms` on CUDA, or interpreted."""
    v_cache, head_dim = view.v_cache, view.v_cache.shape[-1]
    layers, requests, heads = view.lens.shape
    outputs, query_heads = weights[0].shape[0], weights[0].shape[1] // head_dim
    out = torch.zeros(layers, requests, query_heads, view.width, device=v_cache.device)
    if out.numel() == 0:
        return out.unflatten(2, (heads, -1)).mean(dim=3)
    dim_pad = padded_dim(head_dim)
    tiles = norm_tiles(dim_pad, v_cache.element_size(), has_large_shared_memory(v_cache.device))
    pointers = tuple(weight.data_ptr() for weight in weights)
    _output_norms[(triton.cdiv(view.width, tiles["ROWS"]), requests * query_heads, layers)](
        v_cache,
        _addresses(pointers, v_cache.device),
        view.block_tables,
        view.lens,
        starts,
        out,
        view.width,
        outputs,
        weights[0].stride(0),
        *v_cache.stride()[:3],
        *view.block_tables.stride()[:3],
        *view.lens.stride(),
        *starts.stride(),
        HEADS=heads,
        GROUP=query_heads // heads,
        HEAD_DIM=head_dim,
        DIM_PAD=dim_pad,
        BLOCK_SIZE=v_cache.shape[3],
        WHOLE=outputs % tiles["TILE"] == 0 and dim_pad == head_dim,
        ALIGNED=all(pointer % 16 == 0 for pointer in pointers),
        SQUARED=norm == "l2",
        **tiles,
    )
    return out.unflatten(2, (heads, -1)).mean(dim=3)
