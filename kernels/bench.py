"""What this machine can move and multiply, and how near the kernels come to it.

Every kernel is first compared with `kernels.reference` on a slice of the same inputs; one that fails is not timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch, reference

ATTENTION_BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest relative error of a row of attention."""
SCORE_BOUND = 1e-4
"""Of scores, relative to a row's largest."""
WINDOW = 16
"""Queries of a compression."""
GATED = 2
"""Requests (or layers) of the slice that is compared with the reference."""


@dataclass(frozen=True)
class KernelShapes:
    """What is timed; the defaults are Qwen3-8B's shapes.

    Attributes:
        dtype: of K, V and queries.
        layers, query_heads, kv_heads, head_dim: of the model.
        batch, contexts, block_sizes: of decode attention: `batch` requests of each context in blocks of each size.
        prompts, prompt_tokens: of prefill attention, in blocks of each size.
        store_tokens: tokens stored in a launch, in blocks of each size.
        compressions, entries, budget: requests compressed in one launch, entries of each before and after; in blocks of
            the largest size, of which both are whole numbers.
        redundancy_chunk: keys compared with each other.
        copy_bytes, matmul: size of the tensor that is copied and read, and of the square matrices multiplied, for the
            ceilings.

    Raises:
        ValueError: a value is out of range.
    """

    dtype: str = "bfloat16"
    layers: int = 36
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 64
    contexts: tuple[int, ...] = (2048, 16384)
    block_sizes: tuple[int, ...] = (16, 256)
    prompts: int = 4
    prompt_tokens: int = 2048
    store_tokens: int = 8192
    compressions: int = 8
    entries: int = 2304
    budget: int = 2048
    redundancy_chunk: int = 256
    copy_bytes: int = 1 << 32
    matmul: int = 8192

    @classmethod
    def small(cls) -> KernelShapes:
        """Shapes that a CPU runs in a second."""
        return cls(
            dtype="float32", layers=2, query_heads=4, kv_heads=2, head_dim=32, batch=4, contexts=(64,), prompts=2,
            block_sizes=(16, 32), prompt_tokens=64, store_tokens=64, compressions=2, entries=96, budget=64,
            redundancy_chunk=32, copy_bytes=1 << 22, matmul=256,
        )  # fmt: skip

    @classmethod
    def of(cls, device: torch.device, options: dict[str, Any]) -> KernelShapes:
        """The defaults on CUDA, small shapes elsewhere, and `options` in their place.

        Raises:
            ValueError: an option is unknown or out of range.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown option; known: {', '.join(known)}")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return replace(cls() if device.type == "cuda" else cls.small(), **given)

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={self.dtype!r}: must be bfloat16, float16 or float32")
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = [value] if f.type == "int" else value if f.type.startswith("tuple") else [1]
            whole = isinstance(numbers, list | tuple) and all(isinstance(n, int) and n >= 1 for n in numbers)
            if not whole or not numbers:
                what = "a whole number" if f.type == "int" else "whole numbers"
                raise ValueError(f"{f.name}={value!r}: must be {what} from 1 up")
        size = max(self.block_sizes)
        if self.entries % size or self.budget % size or self.entries <= self.budget or self.budget < WINDOW:
            raise ValueError(
                f"entries={self.entries}, budget={self.budget}: must be whole blocks of {size}, entries the more"
            )
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads={self.query_heads}: must be a multiple of kv_heads={self.kv_heads}")


@dataclass(frozen=True)
class Ceilings:
    """What was measured on a device, in the units of 1 a second.

    Attributes:
        copy: bytes read and written by a large device-to-device copy.
        read: bytes read by a large sum.
        matmul: operations of a large square bfloat16 product.
    """

    copy: float
    read: float
    matmul: float


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


@dataclass(frozen=True)
class KernelRow:
    """One line of the benchmark. Times in milliseconds, over the rounds; a refused row has none.

    Attributes:
        of_copy: bytes over time, as a share of the copy's bandwidth.
        of_roofline: the roofline's time over the measured one. The roofline is the longer of bytes over bandwidth (the
            copy's, or the read's where next to nothing is written) and of operations over the matmul's rate.
        error, bound: of the gate.
        refused: why it was not timed.
    """

    kernel: str
    shape: str
    bytes: int
    flops: int
    error: float | None
    bound: float
    ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    of_copy: float | None = None
    of_roofline: float | None = None
    refused: str | None = None


@dataclass
class KernelReport:
    """`ceilings` is None without CUDA: then there is no roofline."""

    device: str
    shapes: KernelShapes
    ceilings: Ceilings | None
    rows: list[KernelRow] = field(default_factory=list)


def measure_kernels(device: str = "auto", options: dict[str, Any] | None = None, rounds: int = 30) -> KernelReport:
    """Time the kernels.

    Args:
        device: "auto", "cpu" or a CUDA device.
        options: of `KernelShapes`.
        rounds: timed launches of each, on CUDA of a graph of five.

    Raises:
        ValueError: an option is unknown or out of range, or there is no such device.
    """
    place = _place(device)
    shapes = KernelShapes.of(place, options or {})
    torch.manual_seed(0)
    report = KernelReport(str(place), shapes, measure_ceilings(device, shapes))
    with torch.inference_mode():
        for case in _cases(shapes, place):
            report.rows.append(_row(case, report.ceilings, place, rounds))
    return report


def measure_ceilings(device: str = "auto", shapes: KernelShapes | None = None) -> Ceilings | None:
    """What a CUDA device can do; None on a CPU. Raises ValueError where there is no such device."""
    place = _place(device)
    if place.type != "cuda":
        return None
    shapes = shapes or KernelShapes()
    copy, read = _bandwidths(shapes.copy_bytes, place)
    a, b = (torch.randn(shapes.matmul, shapes.matmul, device=place, dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(_seconds(lambda: a @ b, place, 15))
    return Ceilings(copy, read, 2 * shapes.matmul**3 / seconds)


def _place(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch {torch.__version__} sees no CUDA device; take cpu")
    return torch.device(device)


def _bandwidths(size: int, device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy of `size` bytes, read and written, and of a sum, read."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = statistics.median(_seconds(lambda: target.copy_(source), device, 15))
    summed = statistics.median(_seconds(source.sum, device, 15))
    return 2 * source.nbytes / copied, source.nbytes / summed


def _row(case: Case, ceilings: Ceilings | None, device: torch.device, rounds: int) -> KernelRow:
    error, bound = case.gate()
    finite = error if math.isfinite(error) else None
    moved = case.read + case.written
    row = KernelRow(case.kernel, case.shape, moved, case.flops, finite, bound)
    if not error <= bound:
        return replace(row, refused=f"error {error:.3g} against the reference exceeds {bound:.3g}")
    times = sorted(_seconds(case.run, device, rounds))
    median = statistics.median(times)
    low, high = (times[round(share * (len(times) - 1))] for share in (0.1, 0.9))
    row = replace(row, ms=1e3 * median, p10_ms=1e3 * low, p90_ms=1e3 * high)
    if ceilings is None:
        return row
    bandwidth = ceilings.copy if case.written > case.read / 100 else max(ceilings.copy, ceilings.read)
    floor = max(moved / bandwidth, case.flops / ceilings.matmul)
    return replace(row, of_copy=moved / median / ceilings.copy, of_roofline=floor / median)


def _seconds(run: Callable[[], Any], device: torch.device, rounds: int, repeats: int = 5) -> list[float]:
    """Seconds of a launch in each round: on CUDA of a graph of `repeats` launches, elsewhere by the host's clock."""
    run()
    times = []
    if device.type != "cuda":
        for _ in range(rounds):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return times
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats / 1e3)
    return times


# Cases


def _cases(shapes: KernelShapes, device: torch.device) -> Iterator[Case]:
    """One after the other, so that the tensors of one at a time are held."""
    for context in shapes.contexts:
        for block_size in shapes.block_sizes:
            yield _decode(shapes, device, context, block_size)
        yield _decode(shapes, device, context, max(shapes.block_sizes), spread=True)
    for block_size in shapes.block_sizes:
        yield _prefill(shapes, device, block_size)
    for block_size in shapes.block_sizes:
        yield _store(shapes, device, block_size)
    yield from _compression(shapes, device)


def _decode(shapes: KernelShapes, device: torch.device, context: int, block_size: int, spread: bool = False) -> Case:
    """`spread`: lengths from nothing to twice the context, as of requests that began one after the other."""
    longest = 2 * context if spread else context
    k_cache, v_cache, tables, lens = _paged(shapes, device, shapes.batch, longest, block_size)
    if spread:
        lens = torch.linspace(1, longest, shapes.batch, device=device).int()
    pieces = dispatch.decode_pieces(lens, k_cache, tables.shape[1])
    q = torch.randn(shapes.batch, shapes.query_heads, shapes.head_dim, device=device, dtype=k_cache.dtype)
    scale = shapes.head_dim**-0.5

    def run() -> Tensor:
        return dispatch.paged_decode(q, k_cache, v_cache, tables, lens, scale, pieces)

    def gate() -> tuple[float, float]:
        host = _slice(k_cache, v_cache, tables[-GATED:])
        expected = reference.paged_decode(q[-GATED:].cpu().float(), *host, lens[-GATED:].cpu(), scale)
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


def _prefill(shapes: KernelShapes, device: torch.device, block_size: int) -> Case:
    count, length = shapes.prompts, shapes.prompt_tokens
    k_cache, v_cache, tables, lens = _paged(shapes, device, count, length, block_size)
    q = torch.randn(count * length, shapes.query_heads, shapes.head_dim, device=device, dtype=k_cache.dtype)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    scale = shapes.head_dim**-0.5

    def run() -> Tensor:
        return dispatch.paged_prefill(q, k_cache, v_cache, tables, bounds, lens, length, scale)

    def gate() -> tuple[float, float]:
        host = _slice(k_cache, v_cache, tables[:1])
        expected = reference.paged_prefill(
            q[:length].cpu().float(), *host, bounds[:2].cpu(), lens[:1].cpu(), length, scale
        )
        return _row_error(run()[:length], expected), ATTENTION_BOUNDS[q.dtype]

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
        dispatch.store_kv(k, v, *caches, slots)

    def gate() -> tuple[float, float]:
        run()
        some = slots[: 32 * GATED].cpu()
        expected = [torch.zeros(cache.shape, dtype=dtype) for cache in caches]
        reference.store_kv(k[: len(some)].cpu(), v[: len(some)].cpu(), *expected, some)
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
    host_tables, host_lens = tables.cpu(), lens.cpu()

    q_cache = torch.randn(layers, count, WINDOW, shapes.query_heads, shapes.head_dim, device=device).to(k_cache.dtype)
    slots, ends = torch.arange(count, dtype=torch.int32, device=device), lens.clone()

    def score(depth: slice = slice(None)) -> Tensor:
        return dispatch.attention_score(q_cache[depth], k_cache[depth], slots, ends, tables, lens, scale)

    def score_gate() -> tuple[float, float]:
        first = q_cache[:1].cpu().float(), k_cache[:1].cpu().float()
        expected = reference.attention_score(*first, slots.cpu(), ends.cpu(), host_tables, host_lens, scale)
        return _score_error(score()[:1], expected), SCORE_BOUND

    flops = 2 * layers * count * WINDOW * shapes.query_heads * shapes.entries * shapes.head_dim
    yield Case("attention_score", shape, score, score_gate, read=keys + q_cache.nbytes, written=line, flops=flops)

    chunk = shapes.redundancy_chunk

    def redundancy(depth: slice = slice(None)) -> Tensor:
        return dispatch.redundancy(k_cache[depth], tables, lens, tau=tau, chunk=chunk)

    def redundancy_gate() -> tuple[float, float]:
        expected = reference.redundancy(k_cache[:1].cpu().float(), host_tables, host_lens, tau=tau, chunk=chunk)
        return _score_error(redundancy()[:1], expected), SCORE_BOUND

    flops = 2 * pairs * shapes.entries * chunk * shapes.head_dim
    shape_of = f"{shape}, chunks of {chunk}"
    yield Case("redundancy", shape_of, redundancy, redundancy_gate, read=keys, written=line, flops=flops)

    scores = torch.rand(layers, count, heads, shapes.entries, device=device)
    must = torch.zeros(count, shapes.entries, dtype=torch.bool, device=device)
    must[:, -WINDOW:] = True
    keep = torch.full_like(lens, shapes.budget)
    kept = dispatch.select(scores, must, lens, keep, shapes.budget)
    new_tables = tables[:, : shapes.budget // size].contiguous()
    # Survivors that move, each read and written once in K and in V.
    shifted = int((kept != torch.arange(shapes.budget, device=device)).sum())
    entry = 2 * shapes.head_dim * k_cache.itemsize

    def stable() -> None:
        dispatch.compact_stable(k_cache, v_cache, [], kept, tables, new_tables)

    def stable_gate() -> tuple[float, float]:
        moved = k_cache[:1].clone(), v_cache[:1].clone()
        expected = tuple(cache.to("cpu", copy=True) for cache in moved)
        first = kept[:1].contiguous()
        dispatch.compact_stable(*moved, [], first, tables, new_tables)
        reference.compact_stable(*expected, [], first.cpu(), host_tables, new_tables.cpu())
        return max(_differing(a.cpu(), b) for a, b in zip(moved, expected)), 0.0

    yield Case("compact_stable", shape, stable, stable_gate, read=shifted * entry, written=shifted * entry)


# Inputs and comparisons


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
