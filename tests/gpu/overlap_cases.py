"""Kernels that start before the ones ahead of them have ended (`kernels.dependent_launch`), against one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.add_rms_norm import add_rms_norm
from kernels.cache_view import shared
from kernels.decode_pieces import decode_pieces
from kernels.linear import linear
from kernels.paged_decode import paged_decode
from kernels.qk_norm_rope import qk_norm_rope
from kernels.silu_mul import silu_mul
from kernels.store_step import store_step
from tests.gpu.kernel_cases import DEVICE, Checks, differing, make_paged, rotation

WIDTH, INNER, HEADS, KV_HEADS, DIM, BLOCK = 1024, 3072, 16, 2, 128, 16
LAYERS, REPLAYS = 16, 60
WEIGHTS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * DIM, WIDTH),
    "output": (WIDTH, HEADS * DIM),
    "gate_up": (2 * INNER, WIDTH),
    "down": (WIDTH, INNER),
}


class Layers:
    """The kernels of a decode step over all layers, on one cache that each layer writes to and reads."""

    def __init__(self, rows: int) -> None:
        options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        contexts = tuple(37 + 211 * row % 1900 for row in range(rows))
        self.view = make_paged(contexts, BLOCK, KV_HEADS, DIM, torch.bfloat16).view()
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
        pieces = launched(decode_pieces(self.view))
        for weights in self.weights:
            normed = launched(add_rms_norm(hidden, delta, self.norm, 1e-6))
            qkv = launched(linear(normed, weights["qkv"]))
            q, k, v = launched(qk_norm_rope(qkv, None, None, 1e-6, *self.angles, HEADS, KV_HEADS))
            launched(store_step(k, v, q, *self.view[:2], self.queries, self.slots, self.indices))
            attended = launched(paged_decode(q, self.view, DIM**-0.5, pieces))
            delta = launched(linear(attended.flatten(1), weights["output"]))
            normed = launched(add_rms_norm(hidden, delta, self.norm, 1e-6))
            gated = launched(silu_mul(launched(linear(normed, weights["gate_up"]))))
            delta = launched(linear(gated, weights["down"]))
        return launched(add_rms_norm(hidden, delta, self.norm, 1e-6))


def check_overlap(checks: Checks) -> None:
    """A graph whose kernels overlap, replayed with other inputs each time: bit for bit what they give one at a time."""
    for rows in (3, 40, 96):
        layers = Layers(rows)
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
        checks.add("overlap", "bfloat16", changed, 0.0, rows=rows, launches=REPLAYS * LAYERS * 10)
