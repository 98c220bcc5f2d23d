"""What this machine can move and multiply, and how near the kernels come to it.

Every kernel is first compared with its reference on a slice of the same inputs; one that fails is not timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kernels.bench_cases import Case, cases
from kernels.bench_shapes import KernelShapes


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
        for case in cases(shapes, place):
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
