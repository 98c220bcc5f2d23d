"""Compile every Triton kernel for a GPU that is not here: `python -m tests.kernels.compile_kernels`.

Triton's interpreter, which runs the kernels in the other tests, knows nothing of types, layouts and registers. This
calls the launchers, and compiles what they would launch down to Hopper's machine code. It prints the file and the name
of each kernel. The interpreter is chosen at import, hence a process of its own.
"""

import re
import sys
from functools import partial
from itertools import cycle, product
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels.add_rms_norm_triton import add_rms_norm_triton
from kernels.attention_form import AttentionForm
from kernels.attention_score_triton import attended_triton, attention_score_triton
from kernels.cache_view import CacheView, shared
from kernels.causal_conv_triton import causal_conv_triton
from kernels.clamped_swiglu_triton import clamped_swiglu_triton
from kernels.compact_stable_triton import compact_stable_triton
from kernels.copy_blocks_triton import copy_blocks_triton
from kernels.decode_pieces_triton import decode_pieces_triton
from kernels.delta_gates import DeltaGates
from kernels.expert_mlp_triton import expert_mlp_triton, group_by_expert
from kernels.expert_tiles import EXACT, TILES, ExpertTile
from kernels.gated_delta_step_triton import gated_delta_step_triton
from kernels.gated_delta_triton import gated_delta_triton
from kernels.gated_norm_triton import gated_norm_triton
from kernels.gelu_mul_triton import gelu_mul_triton
from kernels.key_forms_triton import key_forms_triton
from kernels.key_squares_triton import key_squares_triton
from kernels.lag_spread_triton import lag_spread_triton
from kernels.linear_tiles import Tile
from kernels.linear_triton import linear_triton
from kernels.output_norms_triton import output_norms_triton
from kernels.paged_decode_gluon import decode_shares, paged_decode_gluon
from kernels.paged_decode_triton import paged_decode_triton
from kernels.paged_prefill_gluon import paged_prefill_gluon
from kernels.paged_prefill_triton import paged_prefill_triton
from kernels.qk_norm_rope_triton import qk_norm_rope_triton
from kernels.redundancy_triton import redundancy_triton
from kernels.route_triton import route_triton
from kernels.sample_from_logits_triton import sample_from_logits_triton
from kernels.select_triton import select_triton
from kernels.silu_mul_triton import silu_mul_triton
from kernels.spans import Spans
from kernels.store_kv_triton import store_kv_triton
from kernels.store_positions_triton import store_positions_triton
from kernels.store_predictions_triton import store_predictions_triton
from kernels.store_step_triton import store_step_triton

LAYERS, REQUESTS, HEADS, GROUP, DIM, BLOCK, MAX_BLOCKS, TOKENS, WINDOW = 3, 5, 2, 4, 64, 16, 6, 7, 8
DTYPE = torch.bfloat16
SHARED_BYTES = 227 * 1024
"""That a program may use on Hopper. A kernel that wants more compiles, and fails when it is launched."""


class HopperDriver:
    """What Triton asks of a GPU's driver when it compiles and launches nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_one(kernel: JITFunction, *args, grid, **kwargs) -> None:
    compiled = kernel.warmup(*args, grid=grid, **kwargs)
    if compiled.metadata.shared > SHARED_BYTES:
        raise AssertionError(f"{kernel.fn.__name__}: {compiled.metadata.shared} bytes of shared memory")
    if compiled.metadata.launch_pdl and not kwargs.get("EARLY"):
        check_waits(kernel.fn.__name__, compiled.asm["ptx"])
    print(Path(kernel.fn.__code__.co_filename).stem, kernel.fn.__name__, flush=True)


def check_waits(name: str, ptx: str) -> None:
    """A kernel that may start before its inputs are there touches no memory, and ends nowhere, before it waits."""
    body = ptx[ptx.index(".entry") :]
    wait, early = body.find("griddepcontrol.wait"), re.search(r"\b(?:ld|st|red|atom|cp)\.(?!param)|\bret;", body)
    if wait < 0 or (early and early.start() < wait):
        raise AssertionError(f"{name}: {early and early.group()} comes before it waits for the kernels ahead of it")


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=DTYPE)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def longs(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def compile_view_kernels(apart: bool) -> None:
    """What reads or moves entries: heads and layers share tables, lengths and slots, or each has its own."""

    def spread(x: Tensor, layers: int | None = None) -> Tensor:
        x = shared(x, HEADS, layers)
        return x.contiguous() if apart else x

    width = MAX_BLOCKS * BLOCK
    tables, lens = ints(REQUESTS, MAX_BLOCKS), ints(REQUESTS)
    caches = floats(2, LAYERS, REQUESTS * MAX_BLOCKS, HEADS, BLOCK, DIM)
    layer = CacheView(*caches[:, 0], spread(tables), spread(lens))
    layers = CacheView(*caches, spread(tables, LAYERS), spread(lens, LAYERS))
    q, k, v = floats(TOKENS, HEADS * GROUP, DIM), floats(TOKENS, HEADS, DIM), floats(TOKENS, HEADS, DIM)
    state, windows = ints(*caches.shape[1:5]), floats(LAYERS, REQUESTS, WINDOW, HEADS * GROUP, DIM)

    store_kv_triton(k, v, *layer[:2], spread(longs(TOKENS)))
    store_step_triton(k, v, q, *layer[:2], windows[0], spread(longs(TOKENS)), longs(TOKENS))
    store_positions_triton(ints(TOKENS), state, spread(longs(TOKENS), LAYERS))
    hidden, predicted = floats(TOKENS, 256), torch.zeros(caches.shape[2:5])
    store_predictions_triton(hidden, torch.zeros(HEADS, 256), torch.zeros(HEADS), predicted, spread(longs(TOKENS)))
    paged_decode_triton(q[:REQUESTS], layer, 0.1, decode_pieces_triton(layer))
    paged_prefill_triton(q, layer, ints(REQUESTS + 1), TOKENS, 0.1)
    if not apart:
        form = AttentionForm(window=128, soft_cap=30.0, sinks=floats(HEADS * GROUP))
        paged_decode_triton(q[:REQUESTS], layer, 0.1, decode_pieces_triton(layer), form=form)
        paged_prefill_triton(q, layer, ints(REQUESTS + 1), TOKENS, 0.1, form=form)
    attention_score_triton(windows, layers, lens, lens, 0.1)
    attended_triton(windows, layers, lens, lens, 0.1, 1e-4)
    if not apart:
        form = {"soft_cap": 30.0, "sinks": floats(LAYERS, HEADS * GROUP)}
        for softmax in ("all", "group_cut"):
            attention_score_triton(windows, layers, lens, lens, 0.1, softmax=softmax, **form)
        attended_triton(windows, layers, lens, lens, 0.1, 1e-4, **form)
    redundancy_triton(layers, tau=0.4, chunk=32 if apart else None)
    linear, pairs = torch.zeros(LAYERS, REQUESTS, HEADS, GROUP, DIM), torch.zeros(LAYERS, REQUESTS, HEADS, GROUP, 3, 32)
    key_forms_triton(layers, linear)
    key_forms_triton(layers, linear, pairs[..., 0, :], pairs)
    for place, (dim, dtype) in enumerate(product((DIM, 128), (DTYPE, torch.float16, torch.float32))):
        if place % 2 == apart:  # any two of width, type and layout meet
            caches = floats(2, LAYERS, REQUESTS * MAX_BLOCKS, HEADS, BLOCK, dim).to(dtype)
            matrices, turn = torch.zeros(LAYERS, REQUESTS, HEADS, GROUP, dim, dim), torch.zeros(REQUESTS, 2, dim // 2)
            key_squares_triton(CacheView(*caches, *layers[2:]), matrices[..., 0], matrices, turn)
    lag_spread_triton(layers, layers.lens, 24, 2.0**-12)
    projections = [floats(256, HEADS * GROUP * DIM)] * LAYERS
    output_norms_triton(layers, projections, layers.lens)
    forced = torch.zeros(REQUESTS, width, dtype=torch.bool)
    scores = torch.zeros(LAYERS, REQUESTS, HEADS, width)
    kept = select_triton(scores, spread(forced, LAYERS), layers.lens, layers.lens, BLOCK)
    compact_stable_triton(layers, [state, state], kept, layers.block_tables, [None, scores.int()])


def compile_wide_heads() -> None:
    """What has tiles of its own for the widest heads."""
    dim = 256
    caches = floats(2, LAYERS, REQUESTS * MAX_BLOCKS, HEADS, BLOCK, dim)
    view = CacheView.shared(*caches, ints(REQUESTS, MAX_BLOCKS), ints(REQUESTS))
    output_norms_triton(view, [floats(512, HEADS * GROUP * dim)] * LAYERS, view.lens)
    redundancy_triton(view, tau=0.4)
    linear, pairs = (
        torch.zeros(LAYERS, REQUESTS, HEADS, GROUP, dim),
        torch.zeros(LAYERS, REQUESTS, HEADS, GROUP, 3, 128),
    )
    key_forms_triton(view, linear, pairs[..., 0, :], pairs)


def compile_experts(dtype: torch.dtype, width: int, *tiles: ExpertTile) -> None:
    """Biases, which take no shared memory, with every other tile, and the first tile with them and without."""
    experts, inner = 32, width // 2
    gate_up, down = torch.zeros(experts, 2 * inner, width, dtype=dtype), torch.zeros(experts, width, inner, dtype=dtype)
    biases = gate_up[:, :, 0].contiguous(), down[:, :, 0].contiguous()
    x, shares = torch.zeros(TOKENS, width, dtype=dtype), torch.zeros(TOKENS, 4)
    for bias in (None, torch.zeros(experts)):
        route_triton(torch.zeros(TOKENS, width, dtype=dtype), torch.zeros(experts, width), bias, 4, normalized=True)
    group_by_expert(longs(2048, 4), experts, tiles[0], {"DEPENDENT": False})
    for tile, given in [*zip(tiles, cycle((None, biases))), (tiles[0], biases)]:
        expert_mlp_triton(x, longs(TOKENS, 4), shares, gate_up, down, given, silu_mul_triton, tile)


def compile_other_kernels() -> None:
    hidden = floats(TOKENS, 256)
    add_rms_norm_triton(hidden, hidden, hidden[0], 1e-6)
    add_rms_norm_triton(hidden, hidden, hidden[0], 1e-6, 1.0)
    silu_mul_triton(hidden)
    for rows, tile in ((1, Tile(16, 256, 4)), (32, Tile(32, 256, 6)), (64, Tile(64, 128, 6)), (64, Tile(128, 64, 4))):
        linear_triton(floats(rows, 512), floats(128, 512), floats(128), None, tile)
    gelu_mul_triton(hidden)
    gated_norm_triton(torch.zeros(TOKENS, HEADS, DIM), floats(TOKENS, HEADS, DIM), floats(DIM), 1e-6)
    clamped_swiglu_triton(hidden, 1.702, 7.0)
    qkv, weight = floats(TOKENS, (GROUP + 2) * HEADS * DIM), floats(DIM)
    for rotary_dim in (DIM, DIM // 4):
        cos, sin = torch.zeros(TOKENS, 1, rotary_dim), torch.zeros(TOKENS, 1, rotary_dim // 2)
        qk_norm_rope_triton(qkv, weight, weight, 1e-6, cos, sin, HEADS * GROUP, HEADS)
    sample_from_logits_triton(hidden, torch.zeros(TOKENS), torch.zeros(TOKENS, dtype=torch.float64))
    cache = floats(LAYERS, 2, HEADS, BLOCK, DIM)
    copy_blocks_triton(cache, cache, longs(1), longs(1))


def compile_prompts() -> None:
    """For Hopper: blocks larger than a tile, and smaller with tables and lengths of each head and a sink."""
    for dim, block, dtype, apart in ((128, 256, torch.bfloat16, False), (64, 16, torch.float16, True)):
        caches = torch.zeros(2, REQUESTS * MAX_BLOCKS, HEADS, block, dim, dtype=dtype)
        view = CacheView.shared(*caches, ints(REQUESTS, MAX_BLOCKS), ints(REQUESTS))
        if apart:
            view = CacheView(*caches, view.block_tables.contiguous(), view.lens.contiguous())
        q = torch.zeros(TOKENS, HEADS * GROUP, dim, dtype=dtype)
        form = AttentionForm(sinks=q[0, :, 0] if apart else None)
        paged_prefill_gluon(q, view, ints(REQUESTS + 1), TOKENS, 0.1, form=form)


def compile_decodes() -> None:
    """As `compile_prompts`, the first early."""
    for dim, block, dtype, apart in ((128, 256, torch.bfloat16, False), (64, 16, torch.float16, True)):
        caches = torch.zeros(2, REQUESTS * MAX_BLOCKS, HEADS, block, dim, dtype=dtype)
        view = CacheView.shared(*caches, ints(REQUESTS, MAX_BLOCKS), ints(REQUESTS))
        if apart:
            view = CacheView(*caches, view.block_tables.contiguous(), view.lens.contiguous())
        q = torch.zeros(REQUESTS, HEADS * GROUP, dim, dtype=dtype)
        form = AttentionForm(sinks=q[0, :, 0] if apart else None)
        paged_decode_gluon(q, view, 0.1, decode_shares(view), form=form, early=not apart)
    decode_shares(CacheView(*caches, ints(LAYERS, 1, 1, 1), ints(LAYERS, REQUESTS * HEADS, 1)))


def compile_recurrence(dtype: torch.dtype, dim: int) -> None:
    """Of tokens each alone, and of spans."""
    widths = 2 * dim, 2 * dim, 4 * dim
    x = torch.zeros(TOKENS, sum(widths), dtype=dtype)
    q, k, v = (part.unflatten(1, (-1, dim)) for part in x.split(widths, dim=1))
    gates = DeltaGates(*torch.zeros(2, TOKENS, 4, dtype=dtype), *torch.zeros(2, 4))
    inputs, states, out = torch.zeros(9, 3, x.shape[1], dtype=dtype), torch.zeros(9, 4, dim, dim), torch.zeros(v.shape)
    each, some = Spans(longs(TOKENS)), Spans(longs(3), ints(4), torch.zeros(3, dtype=torch.bool))
    for spans in (each, some):
        causal_conv_triton(x, torch.zeros(x.shape[1], 4, dtype=dtype), inputs, spans, torch.zeros_like(x))
    gated_delta_step_triton(q, k, v, gates, states, each, out)
    gated_delta_triton(q, k, v, gates, states, some, out)


if __name__ == "__main__":
    triton.runtime.driver.set_active(HopperDriver())
    for module in (output_norms_triton, paged_prefill_triton):
        vars(sys.modules[module.__module__])["has_large_shared_memory"] = lambda device: True
    vars(sys.modules[paged_decode_gluon.__module__])["has_warpgroups"] = lambda device: True
    JITFunction.__getitem__ = lambda kernel, grid: partial(compile_one, kernel, grid=grid)
    compile_view_kernels(apart=False)
    compile_view_kernels(apart=True)
    compile_wide_heads()
    compile_prompts()
    compile_decodes()
    compile_other_kernels()
    compile_recurrence(DTYPE, 128)  # Qwen3-Next's and Qwen3.5's
    compile_recurrence(torch.float32, 16)
    compile_experts(DTYPE, 2048, *TILES)
    compile_experts(DTYPE, 1440, TILES[0])  # half of gpt-oss's width
    compile_experts(torch.float32, 2048, EXACT)
