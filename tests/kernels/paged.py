"""Paged caches as hostile as the engine's may be, and how far a result is from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from kernels.cache_view import CacheView

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

# Triton's interpreter gets bfloat16 products wrong (3.6 to 3.9): bfloat16 kernels run on a GPU only.
TRITON_DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
BACKENDS = [pytest.param("triton", dtype, id=f"triton-{str(dtype)[6:]}") for dtype in TRITON_DTYPES]
BACKENDS += [
    pytest.param("torch", dtype, id=f"torch-{str(dtype)[6:]}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]

BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error of a row: some roundings of float32; one of the output and of the softmax weights for the others."""

GARBAGE = 2**31 - 1
"""A block table's entry past the context: reading the block it names would be far outside the cache."""


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def upcast(view: CacheView) -> CacheView:
    """The same numbers on the CPU in float32, for the reference."""
    return CacheView(view.k_cache.cpu().float(), view.v_cache.cpu().float(), view.block_tables.cpu(), view.lens.cpu())


def make_paged(
    contexts: Sequence[int | tuple[int, ...]], block_size: int, kv_heads: int, head_dim: int, dtype, device="cpu"
) -> CacheView:
    """Random entries in shuffled blocks. Every other slot is NaN, block 0 among them, and tables end in garbage.

    Args:
        contexts: of each request, the same for all heads; or of each of its heads, which then have blocks of their own.
    """
    apart = any(isinstance(context, tuple) for context in contexts)
    lens = [n for context in contexts for n in context] if apart else contexts
    counts = [-(-n // block_size) for n in lens]
    total = sum(counts) + 3
    ids = iter((torch.randperm(total - 1) + 1).tolist())
    tables = torch.full((len(lens), max(counts) + 2), GARBAGE, dtype=torch.int32)
    held = torch.zeros(total, kv_heads, block_size, dtype=torch.bool)
    for row, (count, n) in enumerate(zip(counts, lens)):
        heads = row % kv_heads if apart else slice(None)
        for column in range(count):
            block = next(ids)
            tables[row, column] = block
            held[block, heads, : n - column * block_size] = True
    caches = torch.randn(2, total, kv_heads, block_size, head_dim).masked_fill(~held[..., None], float("nan"))
    k_cache, v_cache = caches.to(device, dtype)
    tables, lens = tables.to(device), torch.tensor(lens, dtype=torch.int32, device=device)
    if apart:
        return CacheView(k_cache, v_cache, tables.view(-1, kv_heads, tables.shape[1]), lens.view(-1, kv_heads))
    return CacheView.shared(k_cache, v_cache, tables, lens)


def fused(tokens: int, heads: int, head_dim: int, dtype, device="cpu") -> Tensor:
    """[tokens, heads, head_dim] as a slice of a wider projection's output, as the model hands q, k and v over."""
    return torch.randn(tokens, heads + 3, head_dim).to(device, dtype)[:, 2 : 2 + heads]


def starts(lengths: list[int], device="cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def error(out: Tensor, expected: Tensor) -> float:
    """Largest relative error of a row, ||out - expected|| / ||expected||; infinite where anything is NaN."""
    out, expected = out.cpu().float().flatten(1), expected.float().flatten(1)
    rows = (out - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return rows.nan_to_num(nan=float("inf")).max().item()
