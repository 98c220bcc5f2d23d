"""What is timed of each kernel: a launch, and the comparison with its reference that comes before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention_score import attention_score, attention_score_reference
from kernels.bench_shapes import WINDOW, KernelShapes
from kernels.cache_view import CacheView, shared
from kernels.compact_stable import compact_stable, compact_stable_reference
from kernels.decode_pieces import decode_pieces
from kernels.paged_decode import paged_decode, paged_decode_reference
from kernels.paged_prefill import paged_prefill, paged_prefill_reference
from kernels.redundancy import redundancy, redundancy_reference
from kernels.select import select
from kernels.store_kv import store_kv, store_kv_reference

ATTENTION_BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest relative error of a row of attention."""
SCORE_BOUND = 1e-4
"""Of scores, relative to a row's largest."""
GATED = 2
"""Requests (or layers) of the slice that is compared with the reference."""
GATED_QUERIES = 2048
"""Of a prompt, its last ones."""


@dataclass(frozen=True)
class Case:
    """A launch to time.

    Attributes:
        read, written: bytes that must move, each once.
        flops: arithmetic that must be done by matrix units.
        gate: compares a slice with the reference: the error and the bound it must keep.
    """

    kernel: str
    shape: str
    run: Callable[[], Any]
    gate: Callable[[], tuple[float, float]]
    read: int
    written: int
    flops: int = 0


def cases(shapes: KernelShapes, device: torch.device) -> Iterator[Case]:
    """One after the other, so that the tensors of one at a time are held."""
    for context in shapes.contexts:
        for block_size in shapes.block_sizes:
            yield _decode(shapes, device, context, block_size)
        yield _decode(shapes, device, context, max(shapes.block_sizes), spread=True)
    for block_size in shapes.block_sizes:
        yield _prefill(shapes, device, block_size, shapes.prompts, shapes.prompt_tokens)
    yield _prefill(shapes, device, max(shapes.block_sizes), 1, shapes.long_prompt)
    for block_size in shapes.block_sizes:
        yield _store(shapes, device, block_size)
    yield from _compression(shapes, device)


def _decode(shapes: KernelShapes, device: torch.device, context: int, block_size: int, spread: bool = False) -> Case:
    """`spread`: lengths from nothing to twice the context, as of requests that began one after the other."""
    longest = 2 * context if spread else context
    k_cache, v_cache, tables, lens = _paged(shapes, device, shapes.batch, longest, block_size)
    if spread:
        lens = torch.linspace(1, longest, shapes.batch, device=device).int()
    view = CacheView.shared(k_cache, v_cache, tables, lens)
    pieces = decode_pieces(view, shapes.query_heads // shapes.kv_heads)
    q = torch.randn(shapes.batch, shapes.query_heads, shapes.head_dim, device=device, dtype=k_cache.dtype)
    scale = shapes.head_dim**-0.5

    def run() -> Tensor:
        return paged_decode(q, view, scale, pieces)

    def gate() -> tuple[float, float]:
        host = CacheView.shared(*_slice(k_cache, v_cache, tables[-GATED:]), lens[-GATED:].cpu())
        expected = paged_decode_reference(q[-GATED:].cpu().float(), host, scale)
        return _row_error(run()[-GATED:], expected), ATTENTION_BOUNDS[q.dtype]

    entries = int(lens.sum())
    return Case(
        "paged_decode",
        f"{shapes.batch} x {'1 to ' if spread else ''}{longest:,}, block {block_size}",
        run,
        gate,
        read=2 * entries * shapes.kv_heads * shapes.head_dim * q.itemsize + q.nbytes,
        written=q.nbytes,
        flops=4 * entries * shapes.query_heads * shapes.head_dim,
    )


def _prefill(shapes: KernelShapes, device: torch.device, block_size: int, count: int, length: int) -> Case:
    k_cache, v_cache, tables, lens = _paged(shapes, device, count, length, block_size)
    q = torch.randn(count * length, shapes.query_heads, shapes.head_dim, device=device, dtype=k_cache.dtype)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    view = CacheView.shared(k_cache, v_cache, tables, lens)
    scale = shapes.head_dim**-0.5

    def run() -> Tensor:
        return paged_prefill(q, view, bounds, length, scale)

    def gate() -> tuple[float, float]:
        host = CacheView.shared(*_slice(k_cache, v_cache, tables[:1]), lens[:1].cpu())
        some = slice(max(0, length - GATED_QUERIES), length)
        queries = q[some].cpu().float()
        bounds_of_some = torch.tensor([0, len(queries)], dtype=torch.int32)
        expected = paged_prefill_reference(queries, host, bounds_of_some, len(queries), scale)
        return _row_error(run()[some], expected), ATTENTION_BOUNDS[q.dtype]

    entries = count * length * shapes.kv_heads * shapes.head_dim
    return Case(
        "paged_prefill",
        f"{count} x {length:,}, block {block_size}",
        run,
        gate,
        read=2 * entries * q.itemsize + q.nbytes,
        written=q.nbytes,
        flops=2 * count * length * (length + 1) * shapes.query_heads * shapes.head_dim,  # half of both products
    )


def _store(shapes: KernelShapes, device: torch.device, block_size: int) -> Case:
    tokens, dtype = shapes.store_tokens, getattr(torch, shapes.dtype)
    k, v = (torch.randn(tokens, shapes.kv_heads, shapes.head_dim, device=device, dtype=dtype) for _ in range(2))
    blocks = -(-tokens // block_size) + 1
    shape = (blocks, shapes.kv_heads, block_size, shapes.head_dim)
    caches = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)]
    slots = torch.randperm(blocks * block_size, device=device)[:tokens]

    def run() -> None:
        store_kv(k, v, *caches, shared(slots, shapes.kv_heads))

    def gate() -> tuple[float, float]:
        run()
        some = slots[: 32 * GATED].cpu()
        expected = [torch.zeros(cache.shape, dtype=dtype) for cache in caches]
        store_kv_reference(k[: len(some)].cpu(), v[: len(some)].cpu(), *expected, shared(some, shapes.kv_heads))
        block, offset = some // block_size, some % block_size
        found = [cache.cpu()[block, :, offset] for cache in caches]
        return max(_differing(a, b[block, :, offset]) for a, b in zip(found, expected)), 0.0

    return Case(
        "store_kv", f"{tokens:,} tokens, block {block_size}", run, gate, read=k.nbytes + v.nbytes + slots.nbytes,
        written=k.nbytes + v.nbytes,
    )  # fmt: skip


def _compression(shapes: KernelShapes, device: torch.device) -> Iterator[Case]:
    """The kernels of one launch that compresses several requests in all layers."""
    size, count, layers, heads = max(shapes.block_sizes), shapes.compressions, shapes.layers, shapes.kv_heads
    k_flat, v_flat, tables, lens = _paged(shapes, device, count, shapes.entries, size, layers)
    k_cache, v_cache = (x.unflatten(1, (layers, heads)).transpose(0, 1).contiguous() for x in (k_flat, v_flat))
    del k_flat, v_flat
    pairs = layers * count * heads
    keys, line = pairs * shapes.entries * shapes.head_dim * k_cache.itemsize, pairs * shapes.entries * 4
    shape = f"{count} x {shapes.entries:,} -> {shapes.budget:,}, {layers} layers, block {size}"
    scale, tau = shapes.head_dim**-0.5, 0.4
    view = CacheView.shared(k_cache, v_cache, tables, lens)

    def host_view(*caches: Tensor) -> CacheView:
        """The first layer's, on the host; its keys in float32, or other caches."""
        keys = k_cache[:1].cpu().float()
        return CacheView.shared(*(caches or (keys, keys)), tables.cpu(), lens.cpu())

    q_cache = torch.randn(layers, count, WINDOW, shapes.query_heads, shapes.head_dim, device=device).to(k_cache.dtype)
    slots, ends = torch.arange(count, dtype=torch.int32, device=device), lens.clone()

    def score() -> Tensor:
        return attention_score(q_cache, view, slots, ends, scale)

    def score_gate() -> tuple[float, float]:
        expected = attention_score_reference(q_cache[:1].cpu().float(), host_view(), slots.cpu(), ends.cpu(), scale)
        return _score_error(score()[:1], expected), SCORE_BOUND

    flops = 2 * layers * count * WINDOW * shapes.query_heads * shapes.entries * shapes.head_dim
    yield Case("attention_score", shape, score, score_gate, read=keys + q_cache.nbytes, written=line, flops=flops)

    chunk = shapes.redundancy_chunk

    def repeat() -> Tensor:
        return redundancy(view, tau=tau, chunk=chunk)

    def repeat_gate() -> tuple[float, float]:
        expected = redundancy_reference(host_view(), tau=tau, chunk=chunk)
        return _score_error(repeat()[:1], expected), SCORE_BOUND

    flops = 2 * pairs * shapes.entries * chunk * shapes.head_dim
    shape_of = f"{shape}, chunks of {chunk}"
    yield Case("redundancy", shape_of, repeat, repeat_gate, read=keys, written=line, flops=flops)

    scores = torch.rand(layers, count, heads, shapes.entries, device=device)
    forced = torch.zeros(count, shapes.entries, dtype=torch.bool, device=device)
    forced[:, -WINDOW:] = True
    keep = torch.full_like(lens, shapes.budget)
    kept = select(scores, shared(forced, heads, layers), view.lens, shared(keep, heads, layers), shapes.budget)
    new_tables = tables[:, : shapes.budget // size].contiguous()
    # Survivors that move, each read and written once in K and in V.
    shifted = int((kept != torch.arange(shapes.budget, device=device)).sum())
    entry = 2 * shapes.head_dim * k_cache.itemsize

    def stable() -> None:
        compact_stable(view, [], kept, shared(new_tables, heads, layers))

    def stable_gate() -> tuple[float, float]:
        moved = k_cache[:1].clone(), v_cache[:1].clone()
        expected = tuple(cache.to("cpu", copy=True) for cache in moved)
        first = kept[:1].contiguous()
        compact_stable(CacheView.shared(*moved, tables, lens), [], first, shared(new_tables, heads, 1))
        compact_stable_reference(host_view(*expected), [], first.cpu(), shared(new_tables.cpu(), heads, 1))
        return max(_differing(a.cpu(), b) for a, b in zip(moved, expected)), 0.0

    yield Case("compact_stable", shape, stable, stable_gate, read=shifted * entry, written=shifted * entry)


def _paged(
    shapes: KernelShapes, device: torch.device, count: int, length: int, block_size: int, layers: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random K and V of `count` requests in shuffled blocks: caches [blocks, layers * H, b, d], tables and lengths."""
    each = -(-length // block_size)
    shape = (count * each, layers * shapes.kv_heads, block_size, shapes.head_dim)
    k_cache, v_cache = (torch.randn(shape, device=device, dtype=getattr(torch, shapes.dtype)) for _ in range(2))
    tables = torch.randperm(count * each, device=device).int().view(count, each)
    return k_cache, v_cache, tables, torch.full((count,), length, dtype=torch.int32, device=device)


def _slice(k_cache: Tensor, v_cache: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of some requests alone, float32 on the host, and their tables there."""
    blocks = tables.flatten().long()
    host = tuple(cache[blocks].cpu().float() for cache in (k_cache, v_cache))
    return *host, torch.arange(len(blocks), dtype=torch.int32).view(tables.shape)


def _row_error(out: Tensor, expected: Tensor) -> float:
    """Largest relative error of a row; infinite where anything is NaN."""
    out, expected = out.cpu().double().flatten(1), expected.double().flatten(1)
    rows = (out - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return rows.nan_to_num(nan=math.inf).max().item()


def _score_error(out: Tensor, expected: Tensor) -> float:
    """Largest difference relative to a row's largest number; infinite where NaN is, or infinities differ."""
    out, expected = out.cpu().flatten(0, -2), expected.flatten(0, -2)
    if not torch.equal(out.isinf(), expected.isinf()):
        return math.inf
    out, expected = (x.masked_fill(expected.isinf(), 0) for x in (out, expected))
    apart = (out - expected).abs().amax(-1) / expected.abs().amax(-1).clamp(min=1e-30)
    return apart.nan_to_num(nan=math.inf).max().item()


def _differing(actual: Tensor, expected: Tensor) -> float:
    """Share of elements that differ."""
    return (actual != expected).float().mean().item()
