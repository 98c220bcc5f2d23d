"""Paged caches as hostile as the engine's may be, and how far a result is from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Paged:
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    cache_lens: Tensor

    def upcast(self) -> Paged:
        """The same numbers on the CPU in float32, for the reference."""
        return Paged(
            self.k_cache.cpu().float(), self.v_cache.cpu().float(), self.block_tables.cpu(), self.cache_lens.cpu()
        )

    def tuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_cache, self.v_cache, self.block_tables, self.cache_lens


def make_paged(contexts: list[int], block_size: int, kv_heads: int, head_dim: int, dtype, device="cpu") -> Paged:
    """Random entries in shuffled blocks. Every other slot is NaN, block 0 among them, and tables end in garbage."""
    counts = [-(-n // block_size) for n in contexts]
    total = sum(counts) + 3
    ids = iter((torch.randperm(total - 1) + 1).tolist())
    tables = torch.full((len(contexts), max(counts) + 2), GARBAGE, dtype=torch.int32)
    held = torch.zeros(total, block_size, dtype=torch.bool)
    for row, (count, context) in enumerate(zip(counts, contexts)):
        for column in range(count):
            block = next(ids)
            tables[row, column] = block
            held[block, : context - column * block_size] = True
    caches = torch.randn(2, total, kv_heads, block_size, head_dim).masked_fill(~held[:, None, :, None], float("nan"))
    k_cache, v_cache = caches.to(device, dtype)
    lens = torch.tensor(contexts, dtype=torch.int32, device=device)
    return Paged(k_cache, v_cache, tables.to(device), lens)


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
