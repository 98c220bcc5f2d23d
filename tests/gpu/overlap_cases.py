"""Kernels that start before the ones ahead of them have ended (`kernels.dependent_launch`), against one at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernels.add_rms_norm import add_rms_norm
from kernels.cache_view import shared
from kernels.decode_pieces import decode_pieces
from kernels.dependent_launch import dependent_launch
from kernels.expert_mlp_triton import combine_experts, group_by_expert, multiply_experts
from kernels.expert_tiles import find_tile
from kernels.linear import linear
from kernels.paged_decode import paged_decode
from kernels.qk_norm_rope import qk_norm_rope
from kernels.route_triton import choose_experts, logit_parts
from kernels.silu_mul import silu_mul
from kernels.store_step import store_step
from tests.gpu.kernel_cases import DEVICE, Checks, differing, make_paged, rotation

WIDTH, INNER, HEADS, KV_HEADS, DIM, BLOCK = 1024, 3072, 16, 2, 128, 16
LAYERS, REPLAYS = 16, 60
EXPERT_INNER = 512
WEIGHTS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * DIM, WIDTH),
    "output": (WIDTH, HEADS * DIM),
    "gate_up": (2 * INNER, WIDTH),
    "down": (WIDTH, INNER),
}


class Layers:
    """The kernels of a decode step over all layers, on one cache that each layer writes to and reads."""

    PROMPT = 0
    """Tokens of a prompt among the rows, each of which attends to the entries of those before it."""

    def __init__(self, rows: int) -> None:
        options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        contexts = tuple(37 + 211 * row % 1900 for row in range(rows))
        paged = make_paged(contexts, BLOCK, KV_HEADS, DIM, torch.bfloat16)
        if self.PROMPT:
            contexts = *contexts[: -self.PROMPT], *range(contexts[-1] - self.PROMPT + 1, contexts[-1] + 1)
            paged.block_tables[-self.PROMPT :] = paged.block_tables[-1]
            paged.cache_lens.copy_(torch.tensor(contexts, dtype=torch.int32))
        self.view = paged.view()
        last = torch.tensor(contexts, device=DEVICE) - 1
        blocks = self.view.block_tables[:, 0].gather(1, last[:, None] // BLOCK)[:, 0]
        self.slots = shared(blocks * BLOCK + last % BLOCK, KV_HEADS)
        self.indices = torch.arange(rows, device=DEVICE)
        self.queries = torch.zeros(rows, 1, HEADS, DIM, **options)
        self.angles = rotation(rows, DIM)
        self.norm = torch.ones(WIDTH, **options)
        self.weights = [
            {name: torch.randn(*shape, **options) * shape[1] ** -0.5 for name, shape in WEIGHTS.items()}
            for _ in range(LAYERS)
        ]

    def __call__(self, inputs: Tensor, between: Callable[[], None]) -> Tensor:
        """[rows, WIDTH] after all layers; `between` is called after each launch."""

        def launched(result: Any) -> Any:
            between()
            return result

        hidden, delta = launched(inputs.clone()), None
        pieces = launched(decode_pieces(self.view, HEADS // KV_HEADS))
        for layer, weights in enumerate(self.weights):
            normed = launched(add_rms_norm(hidden, delta, self.norm, 1e-6))
            qkv = launched(linear(normed, weights["qkv"]))
            q, k, v = launched(qk_norm_rope(qkv, None, None, 1e-6, *self.angles, HEADS, KV_HEADS))
            launched(store_step(k, v, q, *self.view[:2], self.queries, self.slots, self.indices))
            attended = launched(paged_decode(q, self.view, DIM**-0.5, pieces, early=layer > 0))
            delta = launched(linear(attended.flatten(1), weights["output"]))
            normed = launched(add_rms_norm(hidden, delta, self.norm, 1e-6))
            gated = launched(silu_mul(launched(linear(normed, weights["gate_up"]))))
            delta = launched(linear(gated, weights["down"]))
        return launched(add_rms_norm(hidden, delta, self.norm, 1e-6))


class PromptLayers(Layers):
    PROMPT = 30


class ExpertLayers:
    """The kernels of sparse layers, with one router for all."""

    EXPERTS, ACTIVE = 32, 4

    def __init__(self, rows: int) -> None:
        self.tile = find_tile(rows, self.ACTIVE, self.EXPERTS, 2, large=True)
        self.norm = torch.ones(WIDTH, device=DEVICE, dtype=torch.bfloat16)
        self.router = torch.randn(self.EXPERTS, WIDTH, device=DEVICE) * WIDTH**-0.5
        shapes = (2 * EXPERT_INNER, WIDTH), (WIDTH, EXPERT_INNER)
        self.weights = [
            [
                torch.randn(self.EXPERTS, *shape, device=DEVICE, dtype=torch.bfloat16) * shape[1] ** -0.5
                for shape in shapes
            ]
            for _ in range(LAYERS)
        ]

    def __call__(self, inputs: Tensor, between: Callable[[], None]) -> Tensor:
        """As `Layers`, with the launches of `expert_mlp_triton`."""

        def launched(result: Any) -> Any:
            between()
            return result

        hidden, delta, launch = launched(inputs.clone()), None, dependent_launch(inputs[:1])
        for gate_up, down in self.weights:
            normed = launched(add_rms_norm(hidden, delta, self.norm, 1e-6))
            logits = launched(logit_parts(normed, self.router))
            shares, experts = launched(choose_experts(logits, None, self.ACTIVE, normalized=True))
            grouped = launched(group_by_expert(experts, self.EXPERTS, self.tile, launch))
            inner = launched(multiply_experts(normed, gate_up, None, *grouped, self.tile, launch))
            gated = launched(silu_mul(inner))
            parts = launched(multiply_experts(gated, down, None, *grouped, self.tile, launch))
            delta = launched(combine_experts(parts, shares, launch))
        return launched(add_rms_norm(hidden, delta, self.norm, 1e-6))


def check_overlap(checks: Checks) -> None:
    """A graph whose kernels overlap, replayed with other inputs each time: bit for bit what they give one at a time."""
    for make, rows in (*product((Layers, ExpertLayers), (3, 40, 96)), (PromptLayers, 40)):
        layers = make(rows)
        inputs = torch.randn(rows, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        layers(inputs, torch.cuda.synchronize)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layers(inputs, lambda: None)
        changed = 0.0
        for _ in range(REPLAYS):
            inputs.normal_()
            graph.replay()
            overlapped = out.clone()
            changed = max(changed, differing(overlapped, layers(inputs, torch.cuda.synchronize)))
        case = {"layers": make.__name__, "rows": rows, "replays": REPLAYS}
        checks.add("overlap", "bfloat16", changed, 0.0, **case)
