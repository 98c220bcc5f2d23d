"""Times of the kernels of a forward pass on a CUDA machine, beside PyTorch's and a plain copy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.add_rms_norm import add_rms_norm_torch
from kernels.add_rms_norm_triton import add_rms_norm_triton
from kernels.cache_view import shared
from kernels.paged_decode_triton import paged_decode_triton
from kernels.paged_prefill import paged_prefill
from kernels.paged_prefill_triton import paged_prefill_triton
from kernels.qk_norm_rope import qk_norm_rope_torch
from kernels.qk_norm_rope_triton import qk_norm_rope_triton
from kernels.sample_from_logits import sample_from_logits_torch
from kernels.sample_from_logits_triton import sample_from_logits_triton
from kernels.silu_mul import silu_mul_torch
from kernels.silu_mul_triton import silu_mul_triton
from kernels.store_kv_triton import store_kv_triton
from kernels.store_step_triton import store_step_triton
from tests.gpu.kernel_cases import DEVICE, make_paged, rotation


def milliseconds(run, repeats: int = 5, rounds: int = 15) -> float:
    """Median time of a launch, from replays of a CUDA graph of `repeats` launches."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return median(times)


def time_copy() -> float:
    """Bytes a second of a large device-to-device copy, read and written counted."""
    source = torch.randn(1 << 30, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (milliseconds(lambda: target.copy_(source)) / 1e3)


def time_decode(bandwidth: float) -> list[dict[str, Any]]:
    """Qwen3-8B's layer (32 query heads, 8 KV heads of 128) in bfloat16. Bytes are K and V, each read once."""
    rows = []
    for batch, context in ((64, 2048), (64, 16384), (2, 32768)):
        for block_size in (16, 256):
            paged = make_paged((context,) * batch, block_size, 8, 128, torch.bfloat16)
            q = torch.randn(batch, 32, 128, device=DEVICE, dtype=torch.bfloat16)
            tables = paged.block_tables[:, : context // block_size].contiguous()
            view = replace(paged, block_tables=tables).view()
            elapsed = milliseconds(lambda args=(q, view, 0.09): paged_decode_triton(*args))
            moved = 2 * batch * context * 8 * 128 * 2
            rows.append(
                {"batch": batch, "context": context, "block_size": block_size, "ms": elapsed,
                 "bytes_per_second": moved / (elapsed / 1e3), "of_copy": moved / (elapsed / 1e3) / bandwidth}
            )  # fmt: skip
    return rows


def time_prefill() -> list[dict[str, Any]]:
    """4 prompts of 2048 at the same shape; PyTorch's attention on the same numbers, unpaged, beside it."""
    batch, length, heads, kv_heads, head_dim = 4, 2048, 32, 8, 128
    operations = 2 * batch * heads * length * length * head_dim  # two products, half of each masked
    bounds = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * length
    q = torch.randn(batch * length, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    rows = []
    for block_size in (16, 256):
        view = make_paged((length,) * batch, block_size, kv_heads, head_dim, torch.bfloat16).view()
        args = q, view, bounds, length, 0.09
        for kernel, prefill in (("Triton", paged_prefill_triton), ("as chosen", paged_prefill)):
            elapsed = milliseconds(lambda args=args, prefill=prefill: prefill(*args))
            rows.append({"what": f"block {block_size}, {kernel}", "ms": elapsed})
    dense = q.view(batch, length, heads, head_dim).transpose(1, 2).contiguous()
    k, v = torch.randn(2, *dense.shape, device=DEVICE, dtype=torch.bfloat16)
    elapsed = milliseconds(lambda: scaled_dot_product_attention(dense, k, v, is_causal=True, scale=0.09))
    rows.append({"what": "PyTorch, unpaged, no GQA", "ms": elapsed})
    return [{**row, "tflops": operations / (row["ms"] / 1e3) / 1e12} for row in rows]


def store_apart(k, v, q, k_cache, v_cache, q_cache, slots, indices) -> None:
    store_kv_triton(k, v, k_cache, v_cache, slots)
    q_cache.view(-1, *q_cache.shape[2:]).index_copy_(0, indices, q)


def time_layer_ops(bandwidth: float) -> list[dict[str, Any]]:
    """Qwen3-8B's sizes in bfloat16, beside the operations that were fused. Bytes are each input and output once."""
    width, mlp_width, heads, kv_heads, head_dim, vocab = 4096, 12288, 32, 8, 128, 151936
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    weight, head_weight = torch.randn(width, **options), torch.randn(head_dim, **options)
    rows = []

    def add(kernel: str, tokens: int, moved: int, run, unfused) -> None:
        elapsed = milliseconds(run)
        speed = moved / (elapsed / 1e3)
        rows.append(
            {"kernel": kernel, "tokens": tokens, "ms": elapsed, "unfused_ms": milliseconds(unfused),
             "bytes_per_second": speed, "of_copy": speed / bandwidth}
        )  # fmt: skip

    for tokens in (1, 256, 8192):
        hidden, delta = torch.randn(2, tokens, width, **options)
        args = hidden, delta, weight, 1e-6
        run, unfused = partial(add_rms_norm_triton, *args), partial(add_rms_norm_torch, *args)
        add("add_rms_norm", tokens, 4 * hidden.nbytes, run, unfused)

        gate_up = torch.randn(tokens, 2 * mlp_width, **options)
        run, unfused = partial(silu_mul_triton, gate_up), partial(silu_mul_torch, gate_up)
        add("silu_mul", tokens, 3 * gate_up.nbytes // 2, run, unfused)

        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, **options)
        cos, sin = rotation(tokens, head_dim)
        args = qkv, head_weight, head_weight, 1e-6, cos, sin, heads, kv_heads
        moved = 2 * tokens * (heads + kv_heads) * head_dim * 2 + cos.nbytes + sin.nbytes
        run, unfused = partial(qk_norm_rope_triton, *args), partial(qk_norm_rope_torch, *args)
        add("qk_norm_rope", tokens, moved, run, unfused)

        q, k, v = qkv.view(tokens, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
        caches = torch.empty(2, -(-tokens // 256), kv_heads, 256, head_dim, **options)
        rings = torch.empty(-(-tokens // 16), 16, heads, head_dim, **options)
        places = torch.randperm(tokens, device=DEVICE)

        args = k, v, q, *caches, rings, shared(places, kv_heads), places
        add("store_step", tokens, 2 * qkv.nbytes, partial(store_step_triton, *args), partial(store_apart, *args))

    for tokens in (1, 256):
        logits = torch.randn(tokens, vocab, **options)
        args = logits, torch.ones(tokens, device=DEVICE), torch.rand(tokens, device=DEVICE, dtype=torch.float64)
        run, unfused = partial(sample_from_logits_triton, *args), partial(sample_from_logits_torch, *args)
        add("sample_from_logits", tokens, logits.nbytes, run, unfused)
    return rows


def timing_table(timing: dict[str, Any]) -> list[str]:
    lines = [f"copy: {timing['copy_bytes_per_second'] / 1e12:.2f} TB/s read and written"]
    for row in timing["decode"]:
        lines.append(
            f"decode {row['batch']:>3} x {row['context']:<6} block {row['block_size']:<4}{row['ms']:>8.3f} ms"
            f"{row['bytes_per_second'] / 1e12:>6.2f} TB/s{row['of_copy']:>6.0%} of copy"
        )
    for row in timing["prefill"]:
        lines.append(f"prefill 4 x 2048 {row['what']:<26}{row['ms']:>8.3f} ms{row['tflops']:>6.0f} TFLOP/s")
    for row in timing["layer_ops"]:
        lines.append(
            f"{row['kernel']:<20}{row['tokens']:>5} rows{1e3 * row['ms']:>9.1f} us"
            f"{row['bytes_per_second'] / 1e12:>6.2f} TB/s{row['of_copy']:>6.0%} of copy"
            f", unfused{1e3 * row['unfused_ms']:>9.1f} us"
        )
    return lines
