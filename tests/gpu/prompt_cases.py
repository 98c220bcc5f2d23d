"""Prompts whose work items are fewer or more than a GPU's programs, and what a kernel that draws them newly risks."""

from __future__ import annotations

from itertools import accumulate

import torch

from kernels.attention_form import AttentionForm
from kernels.paged_prefill import paged_prefill_reference
from kernels.paged_prefill_triton import paged_prefill_triton
from tests.gpu.kernel_cases import BOUNDS, DEVICE, DRY, Checks, differing, error, make_paged, prefill_kernels, upcast
from tests.gpu.pairwise import pairwise

KV_HEADS, GROUP = 2, 4
RAGGED = [(1, 1)] * 20 + [(0, 40), (2000, 2000)] + [(1, 700), (0, 1)] * 10
CHUNKS = {  # queries and entries of each request
    "fewer items than programs": [(300, 300), (0, 0), (17, 1000)],
    "more": [(500 + 37 * row, 500 + 37 * row + 300 * (row % 3)) for row in range(12)],
    "one query each": [(1, 1 + 50 * row) for row in range(70)],
    "one tile each": [(128, 128)] * 60,
    "nobody in the middle": [(200, 200), *[(0, 100)] * 50, (129, 400), *[(0, 0)] * 50, (64, 64)],
    "ragged": RAGGED,
    "ragged, last one long": RAGGED[::-1],
}
SMALL = {
    "fewer items than programs": [(30, 30), (0, 0), (17, 40)],
    "one query each": [(1, 1 + row) for row in range(5)],
}


def check_prompts(checks: Checks, names: tuple[str, ...]) -> None:
    chunks = SMALL if DRY else CHUNKS
    dtypes = [name for name in names if name in ("bfloat16", "float16")]
    factors = tuple(chunks), dtypes, (64, 128), (16, 64, 128, 256), (False, True)
    for what, name, head_dim, block_size, sinks in pairwise(*factors):
        check_chunks(checks, chunks[what], name, head_dim, block_size, sinks, what=what)
    if not DRY:
        check_launches(checks)


def check_chunks(
    checks: Checks, chunks: list[tuple[int, int]], name: str, head_dim: int, block_size: int, sinks: bool, **case
) -> None:
    """Rows of nobody hold NaN as queries, and keep what `out` holds."""
    dtype, scale, nobody = getattr(torch, name), head_dim**-0.5, 150
    queries, contexts = zip(*chunks)
    view = make_paged(contexts, block_size, KV_HEADS, head_dim, dtype).view()
    tokens = sum(queries)
    q = torch.randn(tokens + nobody, KV_HEADS * (GROUP + 2), head_dim, device=DEVICE, dtype=dtype)
    q[tokens:] = float("nan")
    q = q[:, : KV_HEADS * GROUP]
    form = AttentionForm(sinks=torch.randn(KV_HEADS * GROUP, device=DEVICE, dtype=dtype) if sinks else None)
    bounds = torch.tensor([0, *accumulate(queries)], dtype=torch.int32)
    expected = paged_prefill_reference(q.float(), upcast(view), bounds, max(queries), scale, form)[:tokens]
    for kernel, prefill in prefill_kernels(q, form).items():
        for longest in (max(queries), min(max(queries) + 300, len(q))):
            out = torch.full(q.shape, 7.0, device=DEVICE, dtype=dtype)
            prefill(q, view, bounds.to(DEVICE), longest, scale, out, form)
            case |= {"head_dim": head_dim, "block_size": block_size, "sinks": sinks, "longest": longest}
            checks.add(kernel, name, error(out[:tokens], expected), 2 * BOUNDS[name], **case)
            checks.add(f"{kernel}_kept", name, (out[tokens:] != 7).double().mean().item(), 0.0, **case)


def check_launches(checks: Checks, replays: int = 200) -> None:
    """Launches of a graph, and of two streams at once: an item drawn twice or by nobody would change a bit."""
    queries = (700, 0, 2100, 1, 64, *[130] * 20)
    bounds = torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=DEVICE)
    view = make_paged([n + 100 for n in queries], 64, KV_HEADS, 128, torch.bfloat16).view()
    q = torch.randn(sum(queries), KV_HEADS * GROUP, 128, device=DEVICE, dtype=torch.bfloat16)
    for kernel, prefill in prefill_kernels(q).items():
        first = prefill(q, view, bounds, max(queries), 0.09)
        value = error(first, paged_prefill_triton(q, view, bounds, max(queries), 0.09).float())
        checks.add(kernel, "bfloat16", value, 2 * BOUNDS["bfloat16"], launches=1)
        graphs, outs, streams = [], [], [torch.cuda.Stream(), torch.cuda.Stream()]
        for _ in streams:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                outs.append([prefill(q, view, bounds, max(queries), 0.09) for _ in range(3)])
        changed = 0.0
        for _ in range(replays):
            for group in outs:
                for out in group:
                    out.zero_()
            torch.cuda.synchronize()
            for graph, stream in zip(graphs, streams):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            changed = max(changed, *(differing(out, first) for group in outs for out in group))
        checks.add(kernel, "bfloat16", changed, 0.0, launches=6 * replays)
