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
from itertools import product
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from kernels.attended import attended_reference
from kernels.attention_score import attention_score, attention_score_reference
from kernels.attention_score_triton import attended_triton, attention_score_triton
from kernels.cache_view import CacheView, once, shared
from kernels.compact_stable import compact_stable, compact_stable_reference, compact_stable_torch
from kernels.compact_stable_triton import compact_stable_triton
from kernels.redundancy import redundancy, redundancy_reference
from kernels.redundancy_triton import redundancy_triton
from kernels.select import select, select_reference
from kernels.select_triton import select_triton
from kernels.store_positions import store_positions_reference
from kernels.store_positions_triton import store_positions_triton
from kernels.store_predictions import store_predictions_reference
from kernels.store_predictions_triton import store_predictions_triton
from tests.gpu.kernel_cases import DEVICE, DRY, QUARTERS, Checks, make_paged, provenance
from tests.gpu.kernel_times import milliseconds, time_copy
from tests.gpu.policy_cases import policy_cases

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


def make_event(
    lens: tuple[int, ...], block_size: int, head_dim: int, dtype, layers: int = LAYERS, heads: int = HEADS
) -> CacheView:
    """`make_paged` with layers, and near-duplicates among each longer request's keys."""
    paged = make_paged(lens, block_size, layers * heads, head_dim, dtype)
    caches = (x.unflatten(1, (layers, heads)).transpose(0, 1).contiguous() for x in (paged.k_cache, paged.v_cache))
    view = CacheView.shared(*caches, paged.block_tables, paged.cache_lens)
    add_duplicates(view)
    return view


def make_apart(lens: tuple[int, ...], block_size: int, head_dim: int, dtype, window: int = 1) -> CacheView:
    """As `make_event`, but each layer and head has blocks of its own and some quarters of a request's entries.

    None of them, or at least `window`.
    """
    shape = LAYERS, len(lens), HEADS
    some = []
    for layer, row, head in product(*map(range, shape)):
        quarters = QUARTERS[(row + 2 * head + 3 * layer) % len(QUARTERS)]
        some.append(0 if quarters == 0 or lens[row] == 0 else max(window, lens[row] * quarters // 4))
    paged = make_paged(tuple(some), block_size, LAYERS * HEADS, head_dim, dtype)
    caches = (x.unflatten(1, (LAYERS, HEADS)).transpose(0, 1).contiguous() for x in (paged.k_cache, paged.v_cache))
    view = CacheView(*caches, paged.block_tables.view(*shape, -1), paged.cache_lens.view(shape))
    # What other layers and heads hold in the blocks of one is NaN too.
    for layer, head in product(range(LAYERS), range(HEADS)):
        others = torch.ones(LAYERS, len(lens), HEADS, dtype=torch.bool, device=DEVICE)
        others[layer, :, head] = False
        blocks = view.block_tables[others].flatten()
        blocks = blocks[blocks < view.k_cache.shape[1]].long()
        for cache in (view.k_cache, view.v_cache):
            cache[layer, blocks, head] = float("nan")
    add_duplicates(view)
    return view


def add_duplicates(view: CacheView) -> None:
    """Make a few keys of each request near-duplicates of each other."""
    block_size, head_dim = view.k_cache.shape[3:]
    lens, tables = once(view.lens).cpu(), once(view.block_tables).cpu()
    for line in product(*map(range, lens.shape)):
        layer, _, head = (i if n > 1 else slice(None) for i, n in zip(line, lens.shape))
        length = int(lens[line])
        slots = [slot for slot in (3, 9, 40, 300, length - 1) if 0 <= slot < length]
        keys = view.k_cache[layer, :, head] if isinstance(layer, int) else view.k_cache.transpose(1, 2)
        direction = torch.randn(*keys.shape[:-3], head_dim, device=DEVICE)
        for i, slot in enumerate(slots):
            key = (i + 1) * direction + 0.05 * torch.randn_like(direction)
            keys[..., int(tables[line][slot // block_size]), slot % block_size, :] = key.to(keys.dtype)


def host_of(view: CacheView) -> CacheView:
    """For the reference: float32, on the host."""
    return CacheView(view.k_cache.cpu().float(), view.v_cache.cpu().float(), view.block_tables.cpu(), view.lens.cpu())


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


def window_queries(event: CacheView, window: int, query_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(query cache, slots, ends), slots that no request has NaN."""
    requests, (layers, *_, head_dim) = event.lens.shape[1], event.k_cache.shape
    q_cache = torch.randn(layers, requests + 2, window, query_heads, head_dim, device=DEVICE).to(event.k_cache.dtype)
    order = torch.randperm(requests + 2, device=DEVICE)
    q_cache[:, order[requests:]] = float("nan")
    ends = event.lens.amax((0, 2)).clamp(min=window) + 7 * torch.arange(requests, device=DEVICE)
    return q_cache, order[:requests].int(), ends.int()


def check_scores(checks: Checks, shapes: list[tuple]) -> None:
    for number, (name, head_dim, block_size, group, window) in enumerate(shapes):
        dtype = getattr(torch, name)
        lens = tuple(n if n == 0 or n >= window else window for n in LENS)
        shape = lens, block_size, head_dim, dtype
        for apart, event in ((False, make_event(*shape)), (True, make_apart(*shape, window))):
            host = host_of(event)
            case = {"head_dim": head_dim, "block_size": block_size, "group": group, "window": window, "apart": apart}

            q_cache, slots, ends = window_queries(event, window, HEADS * group)
            names = list(KINDS)
            for kind in ("zipage", names[1 + number % (len(names) - 1)]):
                scale = 2 * head_dim**-0.5
                args = q_cache.cpu().float(), host, slots.cpu(), ends.cpu(), scale
                expected = attention_score_reference(*args, **KINDS[kind])
                for splits in (None, 4):
                    args = q_cache, event, slots, ends, scale
                    out = attention_score_triton(*args, **KINDS[kind], num_splits=splits)
                    value = difference(out, expected)
                    checks.add("attention_score", name, value, BOUND, kind=kind, splits=splits, **case)

            scale, threshold = 2 * head_dim**-0.5, 0.01
            args = q_cache.cpu().float(), host, slots.cpu(), ends.cpu(), scale
            more, fewer = (attended_reference(*args, threshold * factor) for factor in (1 - BOUND, 1 + BOUND))
            for splits in (None, 4):
                out = attended_triton(q_cache, event, slots, ends, scale, threshold, num_splits=splits).cpu()
                wrong = ((out & ~more) | (fewer & ~out)).count_nonzero().item()  # elsewhere than at the threshold
                checks.add("attended", name, wrong, 0, splits=splits, **case)

            for chunk, way in ((256, True), (64, True), (256, False), (None, True)):
                if number % 2 and chunk == 64:
                    continue
                out = redundancy_triton(event, tau=0.05, chunk=chunk, fused=way)
                expected = redundancy_reference(host, tau=0.05, chunk=chunk)
                checks.add("redundancy", name, difference(out, expected), BOUND, chunk=chunk, fused=way, **case)

            for kernel, out, expected, more in policy_cases(event, host, group, number):
                checks.add(kernel, name, difference(out, expected), BOUND, **more, **case)


def check_selection(checks: Checks) -> None:
    for width in (256, 2304) if not DRY else (64,):
        lens, keep = (width, width - 37, 0, width // 2), (width * 8 // 9, 40, 16, width)
        for ties, apart in product((False, True), (False, True)):
            scores = torch.randn(LAYERS, 4, HEADS, width, device=DEVICE)
            scores = scores.mul(4).round() if ties else scores
            held, most = (shared(ints(x), HEADS, LAYERS) for x in (lens, keep))
            if apart:
                held, most = ((x * torch.rand(x.shape, device=DEVICE)).int() for x in (held, most))
            slots = torch.arange(width, device=DEVICE)
            # The last entries of each head, no more than stay of it.
            forced = (slots < held[..., None]) & (slots >= (held - most.clamp(max=16))[..., None])
            args = scores, forced, held, most
            expected = select_reference(*(x.cpu() for x in args), width)
            out = select_triton(*args, width)
            case = {"width": width, "ties": ties, "apart": apart}
            checks.add("select", "float32", differing(out.float(), expected.float()), 0.0, **case)


def random_kept(lens: Tensor, keep: Tensor, width: int, max_keep: int) -> Tensor:
    """Up to keep [L, R, H] of lens [L, R, H] slots."""
    scores = torch.rand(*lens.shape, width, device=DEVICE)
    return select(scores, torch.zeros_like(scores, dtype=torch.bool), lens, keep, max_keep)


def check_moves(checks: Checks, shapes: list[tuple]) -> None:
    """Stores and moves are exact."""
    for name, head_dim, block_size, _, _ in shapes:
        dtype = getattr(torch, name)
        lens = tuple(-(-n // block_size) * block_size for n in LENS)
        shape = lens, block_size, head_dim, dtype
        for apart, event in ((False, make_event(*shape)), (True, make_apart(*shape))):
            states = [
                torch.randint(0, 99999, event.k_cache.shape[:4], dtype=torch.int32, device=DEVICE),
                torch.rand(event.k_cache.shape[:4], device=DEVICE),
            ]
            updates = [None, torch.rand(*event.lens.shape, event.width, device=DEVICE)]
            kept = random_kept(event.lens, event.lens * 3 // 4, event.width, max(lens) * 3 // 4)
            written = event.k_cache, event.v_cache, *states
            expected = [x.cpu().clone() for x in written]
            compact_stable_triton(event, states, kept, event.block_tables, updates)
            host = CacheView(*expected[:2], event.block_tables.cpu(), event.lens.cpu())
            host_updates = [None, updates[1].cpu()]
            compact_stable_reference(host, expected[2:], kept.cpu(), host.block_tables, host_updates)
            value = max(differing(x, y) for x, y in zip(written, expected))
            case = {"head_dim": head_dim, "block_size": block_size, "apart": apart}
            checks.add("compact_stable", name, value, 0.0, **case)

    state = torch.zeros(5, 9, 8, 16, dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(9 * 16, device=DEVICE)[:100]
    slots[::7] = -1
    positions, expected = torch.arange(100, dtype=torch.int32, device=DEVICE), state.cpu()
    apart = torch.stack([slots.roll(7 * i) for i in range(3 * 8)], dim=1).view(100, 3, 8).transpose(0, 1)
    for each in (shared(slots, 8, 3), apart):
        store_positions_triton(positions, state[1:4], each)
        store_positions_reference(positions.cpu(), expected[1:4], each.cpu())
        checks.add("store_positions", "int32", differing(state.float(), expected.float()), 0.0)

    hidden = torch.randn(100, 4096, device=DEVICE).bfloat16()
    scorer = torch.randn(8, 4096, device=DEVICE) / 64, torch.randn(8, device=DEVICE)
    for each in (shared(slots, 8), apart[0]):
        state, expected = torch.zeros(9, 8, 16, device=DEVICE), torch.zeros(9, 8, 16)
        store_predictions_triton(hidden, *scorer, state, each)
        store_predictions_reference(hidden.cpu(), *(x.cpu() for x in scorer), expected, each.cpu())
        checks.add("store_predictions", "bfloat16", float((state.cpu() - expected).abs().max()), 2e-5)


def check_in_place(checks: Checks) -> None:
    """Stable in-place moves at full size, several times: a race between a read and a write would show."""
    for requests in (1, 8):
        event = make_event((2304,) * requests, 256, 128, torch.bfloat16, layers=36 if requests == 1 else 4, heads=8)
        for draw in range(5):
            kept = random_kept(event.lens, torch.full_like(event.lens, 2048), event.width, 2048)
            state = torch.rand(event.k_cache.shape[:4], device=DEVICE)
            expected = event.k_cache.clone(), event.v_cache.clone(), state.clone()
            # The CPU path reads all before it writes any, on any device.
            dst = event.block_tables[..., :8]
            compact_stable_torch(CacheView(*expected[:2], *event[2:]), [expected[2]], kept, dst)
            compact_stable(event, [state], kept, dst)
            value = max(differing(x, y) for x, y in zip((event.k_cache, event.v_cache, state), expected))
            checks.add("compact_stable", "bfloat16", value, 0.0, in_place=True, requests=requests, draw=draw)


def check_large_addresses(checks: Checks) -> None:
    """The last blocks of caches of more than 2^31 elements."""
    blocks = 2**31 // (256 * 128) + 3
    k_cache, v_cache = (torch.empty(1, blocks, 1, 256, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for cache in (k_cache, v_cache):
        cache[:, -2:].normal_()
    tables, lens = ints([[blocks - 1, blocks - 2]]), ints([500])
    view = CacheView.shared(k_cache, v_cache, tables, lens)
    small = CacheView.shared(*(x[:, -2:].cpu().float() for x in view[:2]), ints([[1, 0]], "cpu"), lens.cpu())
    q_cache = torch.randn(1, 1, 16, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    args = ints([0]), ints([500])
    out = attention_score(q_cache, view, *args, 0.1)
    value = difference(out, attention_score_reference(q_cache.cpu().float(), small, *(x.cpu() for x in args), 0.1))
    checks.add("attention_score", "bfloat16", value, BOUND, elements=k_cache.numel())
    for chunk in (256, None):
        out = redundancy(view, tau=0.1, chunk=chunk)
        expected = redundancy_reference(small, tau=0.1, chunk=chunk)
        checks.add("redundancy", "bfloat16", difference(out, expected), BOUND, elements=k_cache.numel(), chunk=chunk)
    kept = random_kept(view.lens, view.lens - 244, 512, 256)
    compact_stable(view, [], kept, view.block_tables)
    compact_stable_reference(small, [], kept.cpu(), small.block_tables)
    value = max(differing(x[:, -2:].float(), y) for x, y in zip(view[:2], small))
    checks.add("compact_stable", "bfloat16", value, 0.0, elements=k_cache.numel())


class Timing:
    """An event of `requests` at Qwen3-8B's shape: 2304 bfloat16 entries in blocks of 256, of which 2048 stay."""

    layers, heads, head_dim, block_size, length, budget, window = 36, 8, 128, 256, 2304, 2048, 16

    def __init__(self, requests: int) -> None:
        self.requests = requests
        event = make_event(
            (self.length,) * requests, self.block_size, self.head_dim, torch.bfloat16, self.layers, self.heads
        )
        self.tables = event.block_tables[0, :, 0, : self.length // self.block_size].contiguous()
        self.view = event._replace(block_tables=self.shared(self.tables))
        self.dst = self.shared(self.tables[:, : self.budget // self.block_size].contiguous())
        self.queries = window_queries(event, self.window, 32)
        self.positions = torch.zeros(event.k_cache.shape[:4], dtype=torch.int32, device=DEVICE)
        self.stored = torch.rand(event.k_cache.shape[:4], device=DEVICE)
        forced = torch.zeros(requests, self.length, dtype=torch.bool, device=DEVICE)
        forced[:, -self.window :] = True
        self.keep, self.forced = self.shared(ints((self.budget,) * requests)), self.shared(forced)
        self.scores = torch.rand(self.layers, requests, self.heads, self.length, device=DEVICE)
        self.kept = self.select(self.scores)

    def shared(self, x: Tensor) -> Tensor:
        return shared(x, self.heads, self.layers)

    def score(self, layers=slice(None)) -> Tensor:
        q_cache, slots, ends = self.queries
        return attention_score(q_cache[layers], self.view_of(layers), slots, ends, 0.09)

    def view_of(self, layers: slice) -> CacheView:
        return CacheView(*(x[layers] for x in self.view))

    def redundancy(self, chunk: int | None, layers=slice(None)) -> Tensor:
        return redundancy(self.view_of(layers), tau=0.4, chunk=chunk)

    def fold(self, scores: Tensor, layers=slice(None)) -> Tensor:
        """As `Event.stored` and the policy do, all entries carrying a score."""
        stored = self.stored[layers][:, self.tables.long()].transpose(2, 3).flatten(3)
        return torch.maximum(scores, 0.8 * stored)

    def select(self, scores: Tensor) -> Tensor:
        layers = slice(len(scores))  # all alike
        return select(scores, self.forced[layers], self.view.lens[layers], self.keep[layers], self.budget)

    def compact(self, kept: Tensor, update: Tensor | None = None, layers=slice(None)) -> None:
        states = [self.positions[layers]] + ([] if update is None else [self.stored[layers]])
        updates = [None] + ([] if update is None else [update])
        compact_stable(self.view_of(layers), states, kept, self.dst[layers], updates)

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
