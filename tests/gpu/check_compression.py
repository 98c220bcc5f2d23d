"""Check every compiled kernel of a compression against the float32 reference on a CUDA machine, then time them.

    python tests/gpu/check_compression.py --out compression.json --commit $(git rev-parse HEAD) [--full]

Prints a table, writes a JSON record, and exits 1 if a case fails. `--full` takes twice as many shapes. `--dry` runs a
few small cases in Triton's interpreter on a CPU, without timing, to check this script itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from kernels.attention_score import attention_score, attention_score_reference
from kernels.attention_score_triton import attention_score_triton
from kernels.cache_view import shared
from kernels.compact_stable import compact_stable, compact_stable_reference, compact_stable_torch
from kernels.compact_stable_triton import compact_stable_triton
from kernels.redundancy import redundancy, redundancy_reference
from kernels.redundancy_triton import redundancy_triton
from kernels.select import select, select_reference
from kernels.select_triton import select_triton
from kernels.store_positions import store_positions_reference
from kernels.store_positions_triton import store_positions_triton
from tests.gpu.check_kernels import DEVICE, DRY, Checks, make_paged, milliseconds, provenance, time_copy

LAYERS, HEADS = 2, 2
BOUND = 1e-4
"""Of scores, relative to a row's largest: products are exact in float32, sums differ by their order."""

KINDS = {
    "zipage": {"softmax": "all", "group": "max", "window": "mean"},
    "snapkv": {"softmax": "all", "group": "mean", "window": "mean"},
    "r_kv": {"softmax": "group_cut", "group": "max", "window": "mean"},
    "morphkv": {"softmax": "cut", "group": "max", "window": "sum"},
    "morphkv_max": {"softmax": "cut", "group": "max", "window": "max"},
    "r_kv_mean": {"softmax": "group_cut", "group": "mean", "window": "max"},
}
SHAPES = [  # dtype, head_dim, block size, group, window; every dtype, head_dim and block size are in the first five
    ("bfloat16", 128, 256, 4, 16), ("bfloat16", 96, 64, 1, 40), ("bfloat16", 256, 16, 8, 16),
    ("float16", 64, 256, 1, 1), ("float32", 64, 16, 7, 5),
    ("bfloat16", 64, 16, 7, 16), ("bfloat16", 128, 64, 4, 64), ("float16", 128, 16, 4, 16),
    ("float32", 128, 256, 4, 16), ("float32", 256, 64, 2, 16),
]  # fmt: skip
LENS = (64, 700, 0, 257, 1301)
if DRY:
    SHAPES = [("float32", 64, 16, 3, 16), ("float16", 96, 64, 1, 8)]
    LENS = (16, 90, 0)


@dataclass(frozen=True)
class Event:
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    lens: Tensor

    def upcast(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        caches = self.k_cache.cpu().float(), self.v_cache.cpu().float()
        return *caches, self.block_tables.cpu(), self.lens.cpu()


def make_event(
    lens: tuple[int, ...], block_size: int, head_dim: int, dtype, layers: int = LAYERS, heads: int = HEADS
) -> Event:
    """`make_paged` with layers, and near-duplicates among each longer request's keys."""
    paged = make_paged(lens, block_size, layers * heads, head_dim, dtype)
    caches = (x.unflatten(1, (layers, heads)).transpose(0, 1).contiguous() for x in (paged.k_cache, paged.v_cache))
    k_cache, v_cache = caches
    tables = paged.block_tables.cpu()
    for row, length in enumerate(lens):
        slots = [slot for slot in (3, 9, 40, 300, length - 1) if 0 <= slot < length]
        direction = torch.randn(layers, heads, head_dim, device=DEVICE)
        for i, slot in enumerate(slots):
            key = (i + 1) * direction + 0.05 * torch.randn_like(direction)
            k_cache[:, int(tables[row, slot // block_size]), :, slot % block_size] = key.to(dtype)
    return Event(k_cache, v_cache, paged.block_tables, paged.cache_lens)


def difference(out: Tensor, expected: Tensor) -> float:
    """Largest difference relative to a row's largest number; infinite where NaN is, or infinities are not the same."""
    out, expected = out.cpu().flatten(0, -2), expected.cpu().flatten(0, -2)
    if not torch.equal(out.isinf(), expected.isinf()):
        return math.inf
    finite = expected.masked_fill(expected.isinf(), 0)
    apart = (out.masked_fill(out.isinf(), 0) - finite).abs().amax(-1) / finite.abs().amax(-1).clamp(min=1e-30)
    return apart.nan_to_num(nan=math.inf).max().item()


def differing(actual: Tensor, expected: Tensor) -> float:
    """Share of elements that differ, NaN standing for itself."""
    actual = actual.to(expected.device)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return (~same).sum().item() / max(1, same.numel())


def ints(values, device=DEVICE) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def window_queries(event: Event, window: int, query_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(query cache, slots, ends), slots that no request has NaN."""
    requests, (layers, *_, head_dim) = len(event.lens), event.k_cache.shape
    q_cache = torch.randn(layers, requests + 2, window, query_heads, head_dim, device=DEVICE).to(event.k_cache.dtype)
    order = torch.randperm(requests + 2, device=DEVICE)
    q_cache[:, order[requests:]] = float("nan")
    return q_cache, order[:requests].int(), event.lens + 7 * torch.arange(requests, device=DEVICE).int()


def check_scores(checks: Checks, shapes: list[tuple]) -> None:
    for number, (name, head_dim, block_size, group, window) in enumerate(shapes):
        dtype = getattr(torch, name)
        lens = tuple(n if n == 0 or n >= window else window for n in LENS)
        event = make_event(lens, block_size, head_dim, dtype)
        k_ref, _, tables_ref, lens_ref = event.upcast()
        case = {"head_dim": head_dim, "block_size": block_size, "group": group, "window": window}

        q_cache, slots, ends = window_queries(event, window, HEADS * group)
        names = list(KINDS)
        host = q_cache.cpu().float(), k_ref, slots.cpu(), ends.cpu(), tables_ref, lens_ref
        for kind in ("zipage", names[1 + number % (len(names) - 1)]):
            scale = 2 * head_dim**-0.5
            args = q_cache, event.k_cache, slots, ends, event.block_tables, event.lens, scale
            expected = attention_score_reference(*host, scale, **KINDS[kind])
            for splits in (None, 4):
                out = attention_score_triton(*args, **KINDS[kind], num_splits=splits)
                checks.add("attention_score", name, difference(out, expected), BOUND, kind=kind, splits=splits, **case)

        for chunk, way in ((256, True), (64, True), (256, False), (None, True)):
            if number % 2 and chunk == 64:
                continue
            out = redundancy_triton(event.k_cache, event.block_tables, event.lens, tau=0.05, chunk=chunk, fused=way)
            expected = redundancy_reference(k_ref, tables_ref, lens_ref, tau=0.05, chunk=chunk)
            checks.add("redundancy", name, difference(out, expected), BOUND, chunk=chunk, fused=way, **case)


def check_selection(checks: Checks) -> None:
    for width in (256, 2304) if not DRY else (64,):
        lens, keep = (width, width - 37, 0, width // 2), (width * 8 // 9, 40, 16, width)
        for ties in (False, True):
            scores = torch.randn(LAYERS, 4, HEADS, width, device=DEVICE)
            scores = scores.mul(4).round() if ties else scores
            must = torch.zeros(4, width, dtype=torch.bool, device=DEVICE)
            for row, length in enumerate(lens):
                must[row, max(0, length - 16) : length] = True
            args = scores, must, ints(lens), ints(keep)
            expected = select_reference(*(x.cpu() for x in args), width)
            out = select_triton(*args, width)
            checks.add("select", "float32", differing(out.float(), expected.float()), 0.0, width=width, ties=ties)


def random_kept(lens: tuple[int, ...], keep: tuple[int, ...], width: int, layers: int, heads: int) -> Tensor:
    scores = torch.rand(layers, len(lens), heads, width, device=DEVICE)
    must = torch.zeros(len(lens), width, dtype=torch.bool, device=DEVICE)
    return select(scores, must, ints(lens), ints(keep), max(keep))


def check_moves(checks: Checks, shapes: list[tuple]) -> None:
    """Stores and moves are exact."""
    for name, head_dim, block_size, _, _ in shapes:
        dtype = getattr(torch, name)
        case = {"head_dim": head_dim, "block_size": block_size}
        lens = tuple(-(-n // block_size) * block_size for n in LENS)
        keep = tuple(n * 3 // 4 for n in lens)
        event = make_event(lens, block_size, head_dim, dtype)
        width = event.block_tables.shape[1] * block_size
        states = [
            torch.randint(0, 99999, event.k_cache.shape[:4], dtype=torch.int32, device=DEVICE),
            torch.rand(event.k_cache.shape[:4], device=DEVICE),
        ]
        update = torch.rand(LAYERS, len(lens), HEADS, width, device=DEVICE)
        kept = random_kept(lens, keep, width, LAYERS, HEADS)
        expected = [x.cpu().clone() for x in (event.k_cache, event.v_cache, *states)]
        tables = event.block_tables, event.block_tables
        compact_stable_triton(event.k_cache, event.v_cache, states, kept, *tables, updates=[None, update])
        host = *expected[:2], expected[2:], kept.cpu(), *(x.cpu() for x in tables)
        compact_stable_reference(*host, updates=[None, update.cpu()])
        moved = zip((event.k_cache, event.v_cache, *states), expected)
        checks.add("compact_stable", name, max(differing(x, y) for x, y in moved), 0.0, **case)

    state = torch.zeros(5, 9, 8, 16, dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(9 * 16, device=DEVICE)[:100]
    slots[::7] = -1
    positions, expected = torch.arange(100, dtype=torch.int32, device=DEVICE), state.cpu()
    apart = torch.stack([slots.roll(7 * i) for i in range(3 * 8)], dim=1).view(100, 3, 8).transpose(0, 1)
    for each in (shared(slots, 8, 3), apart):
        store_positions_triton(positions, state[1:4], each)
        store_positions_reference(positions.cpu(), expected[1:4], each.cpu())
        checks.add("store_positions", "int32", differing(state.float(), expected.float()), 0.0)


def check_in_place(checks: Checks) -> None:
    """Stable in-place moves at full size, several times: a race between a read and a write would show."""
    for requests in (1, 8):
        event = make_event((2304,) * requests, 256, 128, torch.bfloat16, layers=36 if requests == 1 else 4, heads=8)
        layers = event.k_cache.shape[0]
        for draw in range(5):
            kept = random_kept((2304,) * requests, (2048,) * requests, 2304, layers, 8)
            state = torch.rand(event.k_cache.shape[:4], device=DEVICE)
            expected = event.k_cache.clone(), event.v_cache.clone(), state.clone()
            # The CPU path reads all before it writes any, on any device.
            args = kept, event.block_tables, event.block_tables[:, :8].contiguous()
            compact_stable_torch(*expected[:2], [expected[2]], *args)
            compact_stable(event.k_cache, event.v_cache, [state], *args)
            value = max(differing(x, y) for x, y in zip((event.k_cache, event.v_cache, state), expected))
            checks.add("compact_stable", "bfloat16", value, 0.0, in_place=True, requests=requests, draw=draw)


def check_large_addresses(checks: Checks) -> None:
    """The last blocks of caches of more than 2^31 elements."""
    blocks = 2**31 // (256 * 128) + 3
    k_cache, v_cache = (torch.empty(1, blocks, 1, 256, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for cache in (k_cache, v_cache):
        cache[:, -2:].normal_()
    tables, lens = ints([[blocks - 1, blocks - 2]]), ints([500])
    small, small_tables = (k_cache[:, -2:].cpu().float(), v_cache[:, -2:].cpu().float()), ints([[1, 0]], "cpu")
    q_cache = torch.randn(1, 1, 16, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    args = ints([0]), ints([500])
    out = attention_score(q_cache, k_cache, *args, tables, lens, 0.1)
    host = q_cache.cpu().float(), small[0], *(x.cpu() for x in args), small_tables, lens.cpu(), 0.1
    value = difference(out, attention_score_reference(*host))
    checks.add("attention_score", "bfloat16", value, BOUND, elements=k_cache.numel())
    for chunk in (256, None):
        out = redundancy(k_cache, tables, lens, tau=0.1, chunk=chunk)
        expected = redundancy_reference(small[0], small_tables, lens.cpu(), tau=0.1, chunk=chunk)
        checks.add("redundancy", "bfloat16", difference(out, expected), BOUND, elements=k_cache.numel(), chunk=chunk)
    kept = random_kept((500,), (256,), 512, 1, 1)
    compact_stable(k_cache, v_cache, [], kept, tables, tables)
    compact_stable_reference(*small, [], kept.cpu(), small_tables, small_tables)
    value = max(differing(k_cache[:, -2:].float(), small[0]), differing(v_cache[:, -2:].float(), small[1]))
    checks.add("compact_stable", "bfloat16", value, 0.0, elements=k_cache.numel())


class Timing:
    """An event of `requests` at Qwen3-8B's shape: 2304 bfloat16 entries in blocks of 256, of which 2048 stay."""

    layers, heads, head_dim, block_size, length, budget, window = 36, 8, 128, 256, 2304, 2048, 16

    def __init__(self, requests: int) -> None:
        self.requests = requests
        lens, keep = (self.length,) * requests, (self.budget,) * requests
        event = make_event(lens, self.block_size, self.head_dim, torch.bfloat16, self.layers, self.heads)
        self.k_cache, self.v_cache, self.lens = event.k_cache, event.v_cache, event.lens
        self.tables = event.block_tables[:, : self.length // self.block_size].contiguous()
        self.dst = self.tables[:, : self.budget // self.block_size].contiguous()
        self.queries = window_queries(event, self.window, 32)
        self.positions = torch.zeros(event.k_cache.shape[:4], dtype=torch.int32, device=DEVICE)
        self.stored = torch.rand(event.k_cache.shape[:4], device=DEVICE)
        self.keep, self.must = ints(keep), torch.zeros(requests, self.length, dtype=torch.bool, device=DEVICE)
        self.must[:, -self.window :] = True
        self.scores = torch.rand(self.layers, requests, self.heads, self.length, device=DEVICE)
        self.kept = self.select(self.scores)

    def score(self, layers=slice(None)) -> Tensor:
        q_cache, slots, ends = self.queries
        return attention_score(q_cache[layers], self.k_cache[layers], slots, ends, self.tables, self.lens, 0.09)

    def redundancy(self, chunk: int | None, layers=slice(None)) -> Tensor:
        return redundancy(self.k_cache[layers], self.tables, self.lens, tau=0.4, chunk=chunk)

    def fold(self, scores: Tensor, layers=slice(None)) -> Tensor:
        """As `Event.stored` and the policy do, all entries carrying a score."""
        stored = self.stored[layers][:, self.tables.long()].transpose(2, 3).flatten(3)
        return torch.maximum(scores, 0.8 * stored)

    def select(self, scores: Tensor) -> Tensor:
        return select(scores, self.must, self.lens, self.keep, self.budget)

    def compact(self, kept: Tensor, update: Tensor | None = None, layers=slice(None)) -> None:
        states = [self.positions[layers]] + ([] if update is None else [self.stored[layers]])
        updates = [None] + ([] if update is None else [update])
        caches = self.k_cache[layers], self.v_cache[layers]
        compact_stable(*caches, states, kept, self.tables, self.dst, updates)

    def zipage(self, stride: int = 36) -> None:
        for first in range(0, self.layers, stride):
            layers = slice(first, first + stride)
            stored = self.fold(self.score(layers), layers)
            scores = torch.add(0.2 * stored, self.redundancy(256, layers), alpha=-0.8)
            self.compact(self.select(scores), stored, layers)

    def random(self) -> None:
        self.compact(self.select(self.scores))

    def rows(self, bandwidth: float) -> list[dict[str, Any]]:
        entry = 2 * self.head_dim  # bytes of K
        pairs = self.layers * self.requests * self.heads
        keys, line = pairs * self.length * entry, pairs * self.length * 4
        shifted = (self.kept != torch.arange(self.budget, device=DEVICE)).sum().item()
        state = 2 * self.kept.numel() * 4
        work = [
            ("attention score", self.score, 2 * keys + line),
            ("redundancy, chunks of 256", lambda: self.redundancy(256), keys + 3 * line),
            ("redundancy, full", lambda: self.redundancy(None), keys + 3 * line),
            ("global score", lambda: self.fold(self.scores), 3 * line),
            ("select", lambda: self.select(self.scores), line + self.kept.numel() * 4),
            ("compact", lambda: self.compact(self.kept), 4 * shifted * entry + state),
            ("zipage", self.zipage, None),
            ("zipage, 8 layers each", lambda: self.zipage(8), None),
            ("random", self.random, None),
        ]
        rows = []
        for what, run, size in work:
            row = {"what": what, "requests": self.requests, "ms": milliseconds(run), "bytes": size}
            if size is not None:
                rate = size / (row["ms"] / 1e3)
                row |= {"bytes_per_second": rate, "of_copy": rate / bandwidth}
            rows.append(row)
        return rows


GOALS = {"zipage": 1.5, "random": 0.5}
"""Milliseconds of one request."""


def timing_table(timing: dict[str, Any]) -> list[str]:
    lines = [f"copy: {timing['copy_bytes_per_second'] / 1e12:.2f} TB/s read and written"]
    for row in timing["rows"]:
        line = f"{row['requests']} x 2304 -> 2048  {row['what']:<30}{row['ms']:>8.3f} ms"
        if row["bytes"] is not None:
            line += f"{row['bytes'] / 1e6:>8.0f} MB{row['bytes_per_second'] / 1e12:>6.2f} TB/s{row['of_copy']:>6.0%}"
        elif row["requests"] == 1 and row["what"] in GOALS:
            goal = GOALS[row["what"]]
            line += f"  goal {goal} ms: {'met' if row['ms'] < goal else 'MISSED'}"
        lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the JSON record")
    parser.add_argument("--commit", default="unknown", help="git commit of the kernels, for the record")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; default: fresh ones")
    parser.add_argument("--dry", action="store_true", help="a few small cases, interpreted on a CPU, no timing")
    parser.add_argument("--full", action="store_true", help="all shapes")
    parser.add_argument("--no-timing", action="store_true", help="check, but time nothing: beside other processes")
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        parser.error("no CUDA device: use --dry to check the script on a CPU")

    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")
    record = provenance(options.commit, seed)
    checks, begin = Checks(), time.monotonic()
    shapes = SHAPES if options.full else SHAPES[:5]
    check_scores(checks, shapes)
    check_selection(checks)
    check_moves(checks, shapes)
    if not DRY:
        check_in_place(checks)
        check_large_addresses(checks)
    record["check_seconds"] = time.monotonic() - begin
    timing = None
    if not DRY and not options.no_timing:
        bandwidth = time_copy()
        timing = {"copy_bytes_per_second": bandwidth, "goals_ms": GOALS, "rows": []}
        for requests in (1, 8):
            timing["rows"] += Timing(requests).rows(bandwidth)
    record |= {"failures": checks.failures, "timing": timing, "cases": checks.cases}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([*checks.table(), *(timing_table(timing) if timing else [])]))
    print(f"{len(checks.cases)} cases, {checks.failures} failed, {record['check_seconds']:.0f} s")
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
