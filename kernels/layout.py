"""The paged cache's layout: what a valid argument of a kernel is.

One layer's K (or V) is `[num_blocks, kv_head, slot, head_dim]`, contiguous. The checks read shapes,
strides and dtypes only: they never wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAD_SLOT = -1
"""Slot of a token whose K and V are stored nowhere."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256
STATE_DTYPES = (torch.int32, torch.float32)

WORD = 32
"""Queries whose bits share an int32."""


def check_rows(name: str, x: Tensor) -> tuple[int, int]:
    if x.dim() != 2 or x.shape[1] == 0:
        fail(name, "shape", tuple(x.shape), "give [rows, columns], at least one column")
    if x.dtype not in DTYPES:
        fail(name, "dtype", x.dtype, "use float32, float16 or bfloat16")
    if x.stride(1) != 1 and x.shape[1] > 1:
        fail(name, "stride", x.stride(), "make its last dimension contiguous")
    return tuple(x.shape)


def check_scores(scores: Tensor) -> tuple[int, ...]:
    if scores.dim() != 4:
        fail("scores", "shape", tuple(scores.shape), "give [layers, requests, heads, slots]")
    if scores.dtype != torch.float32:
        fail("scores", "dtype", scores.dtype, "convert it to torch.float32")
    if not scores.is_contiguous():
        fail("scores", "stride", scores.stride(), "make it contiguous")
    return tuple(scores.shape)


def check_state(name: str, state: Tensor, shape: tuple[int, ...], dtypes: tuple, device: torch.device) -> None:
    if tuple(state.shape) != shape:
        fail(name, "shape", tuple(state.shape), f"give [{', '.join(map(str, shape))}]")
    if state.dtype not in dtypes:
        fail(name, "dtype", state.dtype, f"use {' or '.join(map(str, dtypes))}")
    if state.device != device:
        fail(name, "device", state.device, f"move it to {device}, where the other arguments are")
    if state.shape[0] == 0 or not state[0].is_contiguous():
        fail(name, "stride", state.stride(), "give at least one layer, each contiguous")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        fail(name, "value", repr(value), f"use one of {', '.join(choices)}")


def check_all_layers(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 5 or cache.shape[0] == 0:
            fail(name, "shape", tuple(cache.shape), "give all layers, [layers, num_blocks, heads, slots, head_dim]")
    check_caches(k_cache[0], v_cache[0])
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride():
        fail("v_cache", "shape", tuple(v_cache.shape), f"lay it out as k_cache, {tuple(k_cache.shape)}")


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4:
            fail(name, "shape", tuple(cache.shape), "give one layer, [num_blocks, heads, slots, head_dim]")
        if cache.dtype not in DTYPES:
            fail(name, "dtype", cache.dtype, "use float32, float16 or bfloat16")
        if not cache.is_contiguous():
            fail(name, "stride", cache.stride(), "make the layer contiguous")
    block_size, head_dim = k_cache.shape[2:]
    if block_size not in BLOCK_SIZES:
        fail("k_cache", "block size", block_size, "use a power of two from 16 to 256")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        fail("k_cache", "head_dim", head_dim, f"use 1 to {MAX_HEAD_DIM}")
    if v_cache.shape != k_cache.shape:
        fail("v_cache", "shape", tuple(v_cache.shape), f"lay it out as k_cache, {tuple(k_cache.shape)}")
    check_like("v_cache", v_cache, k_cache)


def check_queries(q: Tensor, k_cache: Tensor) -> None:
    heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] == 0 or q.shape[1] % heads:
        fail("q", "shape", tuple(q.shape), f"give [queries, a multiple of {heads} heads, {head_dim}]")
    check_values("q", q, k_cache)


def given_or_new(out: Tensor | None, q: Tensor) -> Tensor:
    """`out`, or uninitialised memory like q, contiguous. Raises ValueError where `out` is not like it."""
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.shape != q.shape or not out.is_contiguous():
        fail("out", "shape and stride", (tuple(out.shape), out.stride()), f"give a contiguous tensor {tuple(q.shape)}")
    check_like("out", out, q, "q")
    return out


def check_values(name: str, x: Tensor, cache: Tensor, where: str = "k_cache") -> None:
    check_like(name, x, cache, where)
    if x.stride(2) != 1 and x.shape[2] != 1:
        fail(name, "stride", x.stride(), "make its last dimension contiguous")


def check_like(name: str, x: Tensor, cache: Tensor, where: str = "k_cache") -> None:
    if x.dtype != cache.dtype:
        fail(name, "dtype", x.dtype, f"convert it to {cache.dtype}, as {where} is")
    if x.device != cache.device:
        fail(name, "device", x.device, f"move it to {cache.device}, where {where} is")


def check_index(
    name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, where: str = "k_cache"
) -> None:
    """As `check_numbers`, and the last dimension is contiguous."""
    check_numbers(name, x, dtype, shape, device, where)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        fail(name, "stride", x.stride(), "make its last dimension contiguous")


def check_numbers(
    name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, where: str = "k_cache"
) -> None:
    """A length of -1 in `shape` stands for any; strides may be any, 0 too."""
    if x.shape != shape and (x.dim() != len(shape) or any(n not in (-1, m) for n, m in zip(shape, x.shape))):
        fail(name, "shape", tuple(x.shape), f"give [{', '.join('any' if n < 0 else str(n) for n in shape)}]")
    if x.dtype != dtype:
        fail(name, "dtype", x.dtype, f"convert it to {dtype}")
    if x.device != device:
        fail(name, "device", x.device, f"move it to {device}, where {where} is")


def fail(name: str, what: str, value: object, remedy: str) -> None:
    raise ValueError(f"{name} has {what} {value}: {remedy}")
