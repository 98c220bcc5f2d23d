"""Check every compiled kernel against the float32 reference on a CUDA machine, then time it.

    python tests/gpu/check_kernels.py --out kernels.json --commit $(git rev-parse HEAD) [--full]

Prints a table, writes a JSON record, and exits 1 if a case fails. Of dtypes, sizes and lengths any two meet in a case;
with `--full` all do. `--dry` runs a few small cases in Triton's
interpreter on a CPU, without timing, to check this script itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, product
from pathlib import Path

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from kernels.add_rms_norm import add_rms_norm_reference
from kernels.add_rms_norm_triton import add_rms_norm_triton
from kernels.attention_form import PLAIN, AttentionForm
from kernels.cache_view import CacheView, shared
from kernels.clamped_swiglu import clamped_swiglu, clamped_swiglu_reference
from kernels.copy_blocks import copy_blocks_reference
from kernels.copy_blocks_triton import copy_blocks_triton
from kernels.decode_pieces import decode_pieces
from kernels.decode_pieces_triton import decode_pieces_triton
from kernels.gelu_mul import gelu_mul, gelu_mul_reference
from kernels.linear import linear, linear_reference
from kernels.paged_decode import paged_decode, paged_decode_reference
from kernels.paged_decode_gluon import decode_shares, takes
from kernels.paged_decode_triton import paged_decode_triton
from kernels.paged_prefill import paged_prefill_reference
from kernels.qk_norm_rope import qk_norm_rope_reference
from kernels.qk_norm_rope_triton import qk_norm_rope_triton
from kernels.sample_from_logits_triton import sample_from_logits_triton
from kernels.silu_mul import silu_mul_reference
from kernels.silu_mul_triton import silu_mul_triton
from kernels.store_kv import store_kv_reference
from kernels.store_kv_triton import store_kv_triton
from kernels.store_step import store_queries_reference
from kernels.store_step_triton import store_step_triton
from tests.gpu.expert_cases import check_experts
from tests.gpu.kernel_cases import (
    BOUNDS,
    DEVICE,
    DRY,
    Checks,
    decode_kernels,
    differing,
    error,
    fused,
    make_apart,
    make_paged,
    prefill_kernels,
    provenance,
    rotation,
    upcast,
)
from tests.gpu.kernel_times import time_copy, time_decode, time_layer_ops, time_prefill, timing_table
from tests.gpu.overlap_cases import check_overlap
from tests.gpu.pairwise import pairwise
from tests.gpu.prompt_cases import check_prompts
from tests.gpu.score_forms import check_score_forms

KV_HEADS = 2


@dataclass(frozen=True)
class Grid:
    """Combinations of these are cases: all of them, or few in which any two values meet."""

    every: bool
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    block_sizes: tuple[int, ...]
    groups: tuple[int, ...]
    contexts: tuple[tuple[int, ...], ...]

    def combine(self, *factors):
        return product(*factors) if self.every else pairwise(*factors)


FULL = Grid(
    every=True,
    dtypes=("float32", "bfloat16", "float16"),
    head_dims=(64, 96, 128, 256),
    block_sizes=(16, 64, 256),
    groups=(1, 4, 8),
    contexts=((1,), (63,), (1000,), (4097,), (1, 4097, 0, 63, 256, 1000, 17)),
)
SMALL = Grid(False, ("float32", "float16"), (64, 96), (16, 256), (1, 4), ((63,), (140, 0, 1)))


def check_attention(checks: Checks, grid: Grid) -> None:
    factors = grid.dtypes, grid.head_dims, grid.block_sizes, grid.groups, grid.contexts
    for name, head_dim, block_size, group, contexts in grid.combine(*factors):
        dtype, bound, scale = getattr(torch, name), BOUNDS[name], head_dim**-0.5
        case = {"head_dim": head_dim, "block_size": block_size, "group": group, "contexts": list(contexts)}
        shape = contexts, block_size, KV_HEADS, head_dim, dtype
        for apart, view in ((False, make_paged(*shape).view()), (True, make_apart(*shape))):
            ref = upcast(view)
            q = fused(len(contexts), KV_HEADS * group, head_dim, dtype)
            expected = paged_decode_reference(q.float(), ref, scale)
            for kernel, decode in decode_kernels(view, group).items():
                for wanted in (1, None, 200):
                    value = error(decode(q, scale, wanted), expected)
                    checks.add(kernel, name, value, bound, wanted=wanted, apart=apart, **case)

            for chunk in ("whole", "part"):
                shortest = view.lens.amin(1).tolist()
                queries = [n if chunk == "whole" else -(-n // 3) for n in shortest]
                bounds = torch.tensor([0, *accumulate(queries)], dtype=torch.int32)
                if max(queries) == 0:
                    continue
                q = fused(sum(queries), KV_HEADS * group, head_dim, dtype)
                expected = paged_prefill_reference(q.float(), ref, bounds, max(queries), scale)
                for kernel, prefill in prefill_kernels(q).items():
                    out = prefill(q, view, bounds.to(DEVICE), max(queries), scale)
                    checks.add(kernel, name, error(out, expected), bound, chunk=chunk, apart=apart, **case)


def check_forms(checks: Checks, grid: Grid) -> None:
    """Windows, soft caps and sinks, of requests cut and uncut, and of chunks that start inside a request."""
    contexts = (140, 0, 33) if DRY else (4097, 1, 0, 130, 1000)
    factors = grid.dtypes, (64, 256), grid.block_sizes, (None, 1, 128, 1024), (None, 30.0), (False, True)
    for name, head_dim, block_size, window, soft_cap, sinks in pairwise(*factors):
        dtype, bound, scale = getattr(torch, name), 2 * BOUNDS[name], head_dim**-0.5
        case = {"head_dim": head_dim, "block_size": block_size, "window": window, "soft_cap": soft_cap, "sinks": sinks}
        logits = 2 * torch.randn(KV_HEADS * 4, device=DEVICE, dtype=dtype) if sinks else None
        form = AttentionForm(window, soft_cap, logits)
        view = make_paged(contexts, block_size, KV_HEADS, head_dim, dtype).view()
        ref = upcast(view)
        q = fused(len(contexts), KV_HEADS * 4, head_dim, dtype)
        expected = paged_decode_reference(q.float(), ref, scale, form)
        for kernel, decode in decode_kernels(view, 4, form).items():
            for wanted in (1, None, 200):
                value = error(decode(q, scale, wanted), expected)
                checks.add(f"{kernel}_forms", name, value, bound, wanted=wanted, **case)
        queries = [-(-n // 3) for n in contexts]
        bounds = torch.tensor([0, *accumulate(queries)], dtype=torch.int32)
        q = fused(sum(queries), KV_HEADS * 4, head_dim, dtype)
        expected = paged_prefill_reference(q.float(), ref, bounds, max(queries), scale, form)
        for kernel, prefill in prefill_kernels(q, form).items():
            out = prefill(q, view, bounds.to(DEVICE), max(queries), scale, form=form)
            checks.add(f"{kernel}_forms", name, error(out, expected), bound, **case)


def check_writes(checks: Checks, grid: Grid) -> None:
    """Stores and copies are exact: an error is the share of elements that differ."""
    kv_heads = (2, 8) if DRY else (2, 8, 20)
    cases = enumerate(grid.combine(grid.dtypes, grid.head_dims, grid.block_sizes, kv_heads))
    for number, (name, head_dim, block_size, heads) in cases:
        dtype = getattr(torch, name)
        case = {"head_dim": head_dim, "block_size": block_size, "kv_heads": heads}
        caches = torch.full((2, 3, 9, heads, block_size, head_dim), float("nan"), device=DEVICE, dtype=dtype)
        slots = torch.randperm(9 * block_size, device=DEVICE)[:40]
        slots[::7] = -1
        # As the engine has them, and in every other case each head's own.
        slots = shared(slots, heads) if number % 2 else torch.stack([slots.roll(7 * h) for h in range(heads)], dim=1)
        case["slots_apart"] = number % 2 == 0
        k, v = (fused(40, heads, head_dim, dtype) for _ in range(2))
        expected = caches.clone()
        store_kv_triton(k, v, caches[0, 1], caches[1, 1], slots)
        store_kv_reference(k, v, expected[0, 1], expected[1, 1], slots)
        checks.add("store_kv", name, differing(caches, expected), 0.0, **case)

        q = fused(40, 4 * heads, head_dim, dtype)
        rings = torch.full((2, 5, 16, 4 * heads, head_dim), float("nan"), device=DEVICE, dtype=dtype)
        places = torch.randperm(5 * 16, device=DEVICE)[:40]
        places[::3] = -1
        caches.fill_(float("nan"))
        expected_rings = rings.clone()
        store_step_triton(k, v, q, caches[0, 1], caches[1, 1], rings[1], slots, places)
        store_queries_reference(q, expected_rings[1], places)
        value = max(differing(caches, expected), differing(rings, expected_rings))
        checks.add("store_step", name, value, 0.0, **case)

        caches.normal_()
        expected = caches.clone()
        src, dst = torch.tensor([[8, 1, 1], [0, 3, 5]], device=DEVICE)
        copy_blocks_triton(caches[0], caches[1], src, dst)
        copy_blocks_reference(expected[0], expected[1], src, dst)
        checks.add("copy_blocks", name, differing(caches, expected), 0.0, **case)


def check_layer_ops(checks: Checks, grid: Grid) -> None:
    """Outputs within a rounding or two of the reference's; the residual stream exactly its own."""

    def rows(tokens: int, width: int) -> Tensor:
        return torch.randn(tokens, width + 16, device=DEVICE, dtype=dtype)[:, :width]

    for name, tokens in product(grid.dtypes, (1, 33)):
        dtype, bound = getattr(torch, name), BOUNDS[name]
        for width in (384, 896) if DRY else (384, 896, 2560, 4096, 12288, 16384):
            case = {"tokens": tokens, "width": width}
            for add, offset in ((False, 0.0), (True, 0.0), (True, 1.0)):
                hidden, delta = rows(tokens, width), rows(tokens, width) if add else None
                weight, expected_hidden = rows(1, width)[0], hidden.clone()
                out = add_rms_norm_triton(hidden, delta, weight, 1e-6, offset)
                expected = add_rms_norm_reference(expected_hidden, delta, weight, 1e-6, offset)
                value = error(out, expected) if differing(hidden, expected_hidden) == 0 else math.inf
                checks.add("add_rms_norm", name, value, bound, add=add, offset=offset, **case)
            gate_up = 4 * rows(tokens, 2 * width)
            out = silu_mul_triton(gate_up)
            checks.add("silu_mul", name, error(out, silu_mul_reference(gate_up)), bound, **case)
            checks.add("gelu_mul", name, error(gelu_mul(gate_up), gelu_mul_reference(gate_up)), bound, **case)
            out, expected = clamped_swiglu(gate_up, 1.702, 7.0), clamped_swiglu_reference(gate_up, 1.702, 7.0)
            checks.add("clamped_swiglu", name, error(out, expected), bound, **case)
        norms = (False, 0.0), (True, 0.0), (True, 1.0)
        for head_dim, heads, (norm, offset), quarters in product(grid.head_dims, ((14, 2), (32, 8)), norms, (3, 4)):
            rotary_dim = head_dim * quarters // 4
            case = {
                "tokens": tokens,
                "head_dim": head_dim,
                "rotary_dim": rotary_dim,
                "heads": heads,
                "norm": norm,
                "offset": offset,
            }
            qkv = rows(tokens, (heads[0] + 2 * heads[1]) * head_dim)
            weights = [torch.randn(head_dim, device=DEVICE, dtype=dtype) if norm else None for _ in range(2)]
            args = *weights, 1e-6, *rotation(tokens, rotary_dim), *heads, offset
            expected = qk_norm_rope_reference(qkv.clone(), *args)
            value = max(error(x, y) for x, y in zip(qk_norm_rope_triton(qkv, *args), expected, strict=True))
            checks.add("qk_norm_rope", name, value, bound, **case)


def check_linear(checks: Checks, grid: Grid) -> None:
    """Few rows, which have a kernel of their own on Hopper in 16 bits, and more."""
    shapes = ((96, 256), (64, 128)) if DRY else ((6144, 4096), (24576, 4096), (1024, 3072), (1536, 8960), (1000, 4096))
    rows = (1, 17) if DRY else (1, 5, 16, 17, 48, 64, 65, 200)
    for name, (outputs, width), tokens, has_bias in product(grid.dtypes, shapes, rows, (False, True)):
        dtype = getattr(torch, name)
        x = torch.randn(tokens, width + 64, device=DEVICE, dtype=dtype)[:, :width]
        weight = torch.randn(outputs, width, device=DEVICE, dtype=dtype) * width**-0.5
        bias = torch.randn(outputs, device=DEVICE, dtype=dtype) if has_bias else None
        value = error(linear(x, weight, bias), linear_reference(x, weight, bias))
        case = {"rows": tokens, "outputs": outputs, "width": width, "bias": has_bias}
        checks.add("linear", name, value, BOUNDS[name], **case)


def check_sampling(checks: Checks, grid: Grid) -> None:
    """The middle of a token's share draws it, temperature 0 the first of the best: an error is the share of others."""
    for name, vocab, temperature in product(grid.dtypes, (1000, 9000) if DRY else (1000, 151936), (0.0, 0.5, 2.0)):
        logits = (3 * torch.randn(4 if DRY else 64, vocab, device=DEVICE)).to(getattr(torch, name))
        probs = (logits.double() / (temperature or 1.0)).softmax(dim=-1)
        tokens = probs.masked_fill(probs < 1e-6, 0.0).multinomial(1)  # wide enough a share for any rounding before it
        u = (probs.cumsum(dim=-1) - probs / 2).gather(1, tokens).squeeze(1)
        temperatures = torch.full_like(u, temperature, dtype=torch.float32)
        expected = tokens.squeeze(1) if temperature else (logits == logits.amax(1, keepdim=True)).int().argmax(dim=-1)
        value = differing(sample_from_logits_triton(logits, temperatures, u), expected)
        checks.add("sample_from_logits", name, value, 0.0, vocab=vocab, temperature=temperature)


def check_large_addresses(checks: Checks) -> None:
    """The last block of a cache of more than 2^31 elements, written and read."""
    blocks = 2**31 // (256 * 128) + 2
    cache = torch.empty(blocks, 1, 256, 128, dtype=torch.bfloat16, device=DEVICE)
    cache[0].fill_(float("nan"))
    k = fused(100, 1, 128, torch.bfloat16)
    store_kv_triton(k, k, cache, cache, (blocks - 1) * 256 + torch.arange(100, device=DEVICE)[:, None])
    tables = torch.tensor([[blocks - 1]], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([100], dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, 100], dtype=torch.int32, device=DEVICE)
    q = fused(100, 4, 128, torch.bfloat16)
    last = torch.zeros(1, 1, 256, 128, device=DEVICE)
    last[0, 0, :100] = k[:, 0].float()
    view = CacheView.shared(cache, cache, tables, lens)
    host = CacheView.shared(last, last, torch.zeros(1, 1, dtype=torch.int32), lens.cpu())
    out = paged_decode_triton(q[:1], view, 0.1)
    expected = paged_decode_reference(q[:1].float(), host, 0.1)
    checks.add("paged_decode", "bfloat16", error(out, expected), BOUNDS["bfloat16"], elements=cache.numel())
    expected = paged_prefill_reference(q.float(), host, bounds.cpu(), 100, 0.1)
    for kernel, prefill in prefill_kernels(q).items():
        out = prefill(q, view, bounds, 100, 0.1)
        checks.add(kernel, "bfloat16", error(out, expected), BOUNDS["bfloat16"], elements=cache.numel())


def check_graph(checks: Checks) -> None:
    """A captured decode follows lengths and tables that change between replays."""
    paged = make_paged((3000, 700, 64), 64, KV_HEADS, 128, torch.bfloat16)
    view = paged.view()
    q = fused(3, KV_HEADS * 4, 128, torch.bfloat16)
    paged_decode(q, view, 0.1, decode_pieces(view, 4))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = paged_decode(q, view, 0.1), paged_decode(q, view, 0.1, decode_pieces(view, 4))
    for contexts in ((3000, 700, 64), (65, 0, 1), (2999, 129, 33)):
        paged.cache_lens.copy_(torch.tensor(contexts, dtype=torch.int32))
        q.normal_()
        graph.replay()
        expected = paged_decode_reference(q.float(), upcast(view), 0.1)
        value = max(error(out, expected) for out in outs)
        checks.add("paged_decode", "bfloat16", value, BOUNDS["bfloat16"], graph=True, contexts=list(contexts))


def check_combining(checks: Checks, replays: int = 300, layers: int = 24) -> None:
    """Pieces combined over and over, the layers of a graph in the same memory: any that came too late, or of the layer
    before, would change a bit from one replay to another, or all from what uncut requests give.
    """
    view = make_paged(range(1, 4000, 83), 16, 8, 128, torch.bfloat16).view()
    queries = [fused(len(view.lens), 32, 128, torch.bfloat16) for _ in range(layers)]
    whole = decode_pieces_triton(view, 1)
    expected = [paged_decode_triton(q, view, 0.1, whole) for q in queries]
    divided = [(decode_pieces_triton, wanted) for wanted in (50, 100, 400)]
    if takes(view, 4, PLAIN):
        divided += [(decode_shares, programs) for programs in (17, 264, 1000)]
    for divide, wanted in divided:
        paged_decode(queries[0], view, 0.1, divide(view, wanted))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pieces = divide(view, wanted)
            outs = [paged_decode(q, view, 0.1, pieces, early=i > 0) for i, q in enumerate(queries)]
        graph.replay()
        first = torch.stack(outs).clone()
        changed = torch.zeros((), device=DEVICE, dtype=torch.int64)
        for _ in range(replays):
            graph.replay()
            changed += (torch.stack(outs) != first).sum()
        case = {"combining": wanted, "by": divide.__name__, "launches": replays * layers}
        checks.add("paged_decode", "bfloat16", int(changed), 0, **case)
        value = max(error(out, other) for out, other in zip(first, expected))
        checks.add("paged_decode", "bfloat16", value, 2 * BOUNDS["bfloat16"], **case)


def check_replays(checks: Checks, grid: Grid) -> None:
    """What an interpreter on a CPU can't show: large addresses, and launches that follow or overlap each other."""
    check_experts(checks, grid.dtypes)
    check_prompts(checks, grid.dtypes)
    if not DRY:
        check_large_addresses(checks)
        check_graph(checks)
        check_combining(checks)
        check_overlap(checks)


PARTS = {
    "attention": check_attention,
    "forms": check_forms,
    "score_forms": lambda checks, grid: check_score_forms(checks, grid.dtypes, grid.every),
    "replays": check_replays,
    "writes": check_writes,
    "layer_ops": check_layer_ops,
    "linear": check_linear,
    "sampling": check_sampling,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the JSON record")
    parser.add_argument("--commit", default="unknown", help="git commit of the kernels, for the record")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; default: fresh ones")
    parser.add_argument("--dry", action="store_true", help="a few small cases, interpreted on a CPU, no timing")
    parser.add_argument("--only", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--dtypes", default=None, help="some of those of the grid, separated by commas; default: all")
    parser.add_argument("--full", action="store_true", help="every combination of the grid")
    parser.add_argument("--no-timing", action="store_true", help="check, but time nothing: beside other processes")
    options = parser.parse_args()
    parts = options.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only {options.only}: name some of {', '.join(PARTS)}")
    if not DRY and not torch.cuda.is_available():
        parser.error("no CUDA device: use --dry to check the script on a CPU")

    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")
    record = provenance(options.commit, seed)
    grid = replace(SMALL if DRY else FULL, every=options.full)
    if options.dtypes:
        dtypes = tuple(options.dtypes.split(","))
        if not set(dtypes) <= set(grid.dtypes):
            parser.error(f"--dtypes {options.dtypes}: name some of {', '.join(grid.dtypes)}")
        grid = replace(grid, dtypes=dtypes)
    checks, begin = Checks(), time.monotonic()
    for part in parts:
        PARTS[part](checks, grid)
    timing = None
    record["check_seconds"] = time.monotonic() - begin
    if not DRY and not options.no_timing:
        bandwidth = time_copy()
        timing = {"copy_bytes_per_second": bandwidth, "decode": [], "prefill": [], "layer_ops": []}
        if "attention" in parts:
            timing |= {"decode": time_decode(bandwidth), "prefill": time_prefill()}
        if "layer_ops" in parts:
            timing["layer_ops"] = time_layer_ops(bandwidth)
    record |= {
        "failures": checks.failures,
        "grid": asdict(grid),
        "timing": timing,
        "cases": checks.cases,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([*checks.table(), *(timing_table(timing) if timing else [])]))
    print(f"{len(checks.cases)} cases, {checks.failures} failed, {record['check_seconds']:.0f} s")
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
