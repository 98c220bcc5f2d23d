"""Inputs and verdicts of the checks of kernels: caches with NaN wherever nothing is held, errors, cases, the machine.

`--dry` on the command line chooses the CPU and Triton's interpreter, if this is imported before Triton.
"""

# ruff: noqa: E402 - Triton's interpreter must be chosen before Triton is imported

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from torch import Tensor

from kernels import paged_decode_gluon, paged_prefill_gluon
from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView
from kernels.decode_pieces_triton import decode_pieces_triton
from kernels.paged_decode_triton import paged_decode_triton
from kernels.paged_prefill_triton import paged_prefill_triton

DEVICE = "cpu" if DRY else "cuda"
BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}


@dataclass(frozen=True)
class Paged:
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    cache_lens: Tensor

    def view(self) -> CacheView:
        return CacheView.shared(self.k_cache, self.v_cache, self.block_tables, self.cache_lens)


def make_paged(contexts: tuple[int, ...], block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Paged:
    """Random entries in shuffled blocks; every slot past a context is NaN, every table entry past it out of range."""
    counts = [-(-n // block_size) for n in contexts]
    total = sum(counts) + 3
    ids = (torch.randperm(total - 1) + 1).to(torch.int32)  # block 0 belongs to nobody
    tables = torch.full((len(contexts), max(counts) + 2), 2**31 - 1, dtype=torch.int32)
    held = torch.zeros(total, block_size, dtype=torch.bool)
    for row, (blocks, context) in enumerate(zip(ids.split([*counts, 2]), contexts)):
        tables[row, : len(blocks)] = blocks
        for column, block in enumerate(blocks.tolist()):
            held[block, : context - column * block_size] = True
    unused = ~held[:, None, :, None].to(DEVICE)
    shape = (total, kv_heads, block_size, head_dim)
    k_cache, v_cache = (
        torch.randn(shape, device=DEVICE, dtype=dtype).masked_fill_(unused, float("nan")) for _ in range(2)
    )
    return Paged(k_cache, v_cache, tables.to(DEVICE), torch.tensor(contexts, dtype=torch.int32, device=DEVICE))


QUARTERS = 4, 1, 3, 0, 2


def make_apart(contexts: tuple[int, ...], block_size: int, kv_heads: int, head_dim: int, dtype) -> CacheView:
    """As `make_paged`, but each head of a request has blocks of its own, and some quarters of the context."""
    lens = tuple(n * QUARTERS[(row + 2 * head) % 5] // 4 for row, n in enumerate(contexts) for head in range(kv_heads))
    paged = make_paged(lens, block_size, kv_heads, head_dim, dtype)
    # What the other heads hold in a head's blocks is NaN too.
    shape = len(contexts), kv_heads
    tables = paged.block_tables.view(*shape, -1)
    for head in range(kv_heads):
        others = tables[:, torch.arange(kv_heads, device=DEVICE) != head].flatten()
        others = others[others < len(paged.k_cache)].long()
        for cache in (paged.k_cache, paged.v_cache):
            cache[others, head] = float("nan")
    return CacheView(paged.k_cache, paged.v_cache, tables, paged.cache_lens.view(shape))


def upcast(view: CacheView) -> CacheView:
    """For the reference: float32 entries, and tables on the host, which it reads one by one."""
    return CacheView(view.k_cache.float(), view.v_cache.float(), view.block_tables.cpu(), view.lens.cpu())


def fused(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Queries as a slice of a fused projection's output."""
    return torch.randn(tokens, heads + 2, head_dim, device=DEVICE, dtype=dtype)[:, :heads]


def error(out: Tensor, expected: Tensor) -> float:
    """Largest relative error of a row, ||out - expected|| / ||expected||; infinite where anything is NaN."""
    out, expected = out.double().flatten(1), expected.double().flatten(1)
    rows = (out - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return rows.nan_to_num(nan=math.inf).max().item()


def differing(actual: Tensor, expected: Tensor) -> float:
    """Share of elements that differ, NaN standing for itself."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return (~same).double().mean().item()


class Checks:
    """The cases run so far."""

    def __init__(self) -> None:
        self.cases: list[dict[str, Any]] = []

    def add(self, kernel: str, dtype: str, value: float, bound: float, **case: Any) -> None:
        passed = value <= bound
        self.cases.append(
            {"kernel": kernel, "dtype": dtype, **case, "error": value if math.isfinite(value) else str(value),
             "bound": bound, "passed": passed}
        )  # fmt: skip
        if not passed:
            print(f"FAILED {kernel} {dtype} {case}: error {value:.3g}, bound {bound:.3g}", flush=True)

    @property
    def failures(self) -> int:
        return sum(not case["passed"] for case in self.cases)

    def table(self) -> list[str]:
        groups = defaultdict(list)
        for case in self.cases:
            groups[case["kernel"], case["dtype"]].append(case)
        lines = [f"{'kernel':<20}{'dtype':<10}{'cases':>6}{'failed':>8}{'worst error':>13}{'bound':>9}"]
        for (kernel, dtype), cases in groups.items():
            worst = max(float(case["error"]) for case in cases)
            failed = sum(not case["passed"] for case in cases)
            lines.append(f"{kernel:<20}{dtype:<10}{len(cases):>6}{failed:>8}{worst:>13.2e}{cases[0]['bound']:>9.0e}")
        return lines


def rotation(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos [T, 1, d] and sin [T, 1, d / 2] of random angles, lengthened by a factor."""
    angles = torch.randn(tokens, 1, head_dim // 2, device=DEVICE) * 1000
    cos, sin = 1.2 * angles.cos(), 1.2 * angles.sin()
    return torch.cat((cos, cos), dim=-1), sin


def provenance(commit: str, seed: int) -> dict[str, Any]:
    record = {
        "commit": commit,
        "seed": seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dry": DRY,
    }
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return record


def prefill_kernels(q: Tensor, form: AttentionForm = PLAIN) -> dict[str, Callable]:
    """Those that take such queries on this GPU. Each is checked, whichever `paged_prefill` chooses."""
    if DRY or not paged_prefill_gluon.takes(q, form):
        return {"paged_prefill": paged_prefill_triton}
    return {"paged_prefill": paged_prefill_triton, "paged_prefill_gluon": paged_prefill_gluon.paged_prefill_gluon}


def decode_kernels(view: CacheView, group: int, form: AttentionForm = PLAIN) -> dict[str, Callable]:
    """As `prefill_kernels`, with how many pieces, or programs, to divide requests among; None: as many as it takes."""

    def in_pieces(q: Tensor, scale: float, wanted: int | None) -> Tensor:
        return paged_decode_triton(q, view, scale, decode_pieces_triton(view, wanted), form=form)

    def in_shares(q: Tensor, scale: float, wanted: int | None) -> Tensor:
        shares = paged_decode_gluon.decode_shares(view, wanted)
        return paged_decode_gluon.paged_decode_gluon(q, view, scale, shares, form=form)

    if DRY or not paged_decode_gluon.takes(view, group, form):
        return {"paged_decode": in_pieces}
    return {"paged_decode": in_pieces, "paged_decode_gluon": in_shares}
