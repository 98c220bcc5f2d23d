"""How long a step or a compression takes on a machine.

A roofline with shares: each part of a step reaches its own share of the machine's bandwidth or arithmetic.

    products   = ((weights / bandwidth)^4 + (tokens x operations / flops)^4)^(1/4)      a roofline with a round corner
               + number of products x a constant
    attention  = layers x a constant + (entries + blocks x a constant) x bytes / bandwidth
               + prefill pairs x operations / flops
               + deviation of entries x requests^(1/2) x a constant x bytes / whole bandwidth
    the rest   = layers x (a constant + tokens x bytes of a row / bandwidth) + sampled tokens x vocabulary x a constant
               - layers x a constant where kernels of few rows overlap, the less the more rows
    ranks      = 2 x layers x (latency + 2 x tokens x bytes of a row / link) + sampled tokens x bytes of logits / link
    moves      = blocks to host memory and back / host link, as far as the step beside them is shorter

`link` is what a GPU of N has for what the N - 1 others hold: N / (N - 1) of a share of the published bandwidth, one of
sums, one of gathers.

The host takes a constant and a constant a request. A step that is no graph also takes as long as the host launches its
kernels, a constant a layer. A graph that no step has asked for before is captured first, so that its kernels are
launched twice, once to warm up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.simulation.machine import Machine
from experiments.simulation.shape import SimulatedShape
from zipage import CompressionTime, CompressionWork, StepWork

CORNER = 4
"""How sharp the roofline's corner is: at 48, 128 and 256 rows of Qwen3-8B's shape it is as a profile shows it."""
OVERLAPPED_ROWS = 64
"""Rows of a step below which kernels are launched before those ahead of them have ended."""
LOGITS_COPIES = 48
"""Bytes of each logit that the largest step holds at once, as memory plans show them: float32, twelve times."""
MLP_BYTES = 3.4
"""The same of each token and number of the MLP's inner width."""
LOGIT_BYTES = 2
"""Of a logit that is gathered from the ranks, in bfloat16."""
LAYER_PRODUCTS = 4
"""Queries, keys and values; attention's output; gate and up; down."""
CAPTURE_LAUNCHES = 2
"""Times that a step's kernels are launched to make it a graph: to warm up, and to be captured."""
TIMED = 7
"""Fields of `StepWork` that the device's time depends on, the first ones."""


class StepModel:
    """`times` of `SimulatedLLM`: a machine, running a model.

    Args:
        block_bytes: of one KV block of a rank, for requests that are paused.
    """

    def __init__(self, machine: Machine, shape: SimulatedShape, block_size: int = 256) -> None:
        self.machine = machine
        self.shape = shape
        self.memory_bytes = int(machine.memory_bytes)
        self.block_size = block_size
        self._block_bytes = block_size * shape.sizes.kv_bytes

    def activation_bytes(self, spec: Any, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        logits = LOGITS_COPIES * min(max_num_seqs, max_num_batched_tokens) * spec.vocab_size
        return int(logits + MLP_BYTES * max_num_batched_tokens * spec.mlp_width / self.shape.ranks)

    def step(self, work: StepWork) -> float:
        return float(sum(self.parts(*work[:TIMED])))

    def parts(
        self, num_decodes: Any, decode_entries: Any, prefill_tokens: Any = 0, prefill_entries: Any = 0,
        all_decode: Any = 1, moved_blocks: Any = 0, decode_squares: Any = 0,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Seconds of the matrix products, of attention and of the rest; of numbers or of arrays."""
        m, shape, sizes = self.machine, self.shape, self.shape.sizes
        most = np.maximum if isinstance(num_decodes, np.ndarray) else max  # which is faster for numbers
        tokens = num_decodes + prefill_tokens
        reads = sizes.read_weights(tokens) / (m.bandwidth * m.weight_share)
        arithmetic = tokens * sizes.token_flops / (m.flops * m.product_share)
        products = (reads**CORNER + arithmetic**CORNER) ** (1 / CORNER)
        products += (LAYER_PRODUCTS * shape.layers + 1) * m.product_seconds
        entries = decode_entries + all_decode * prefill_entries
        # Their deviation from the mean, times the square root of how many they are.
        uneven = most(decode_squares - decode_entries * decode_entries / most(num_decodes, 1), 0) ** 0.5
        waited = entries * (1 + m.block_entries / self.block_size) / m.entry_share + m.imbalance * uneven
        attention = shape.layers * m.attention_seconds + waited * sizes.kv_bytes / m.bandwidth
        attention += (1 - all_decode) * prefill_entries * shape.pair_flops / (m.flops * m.prefill_share)
        row = 2 * shape.width  # bytes
        overlapped = m.overlap_seconds * most(1 - tokens / OVERLAPPED_ROWS, 0)
        rest = shape.layers * (m.layer_seconds - overlapped + m.row_passes * tokens * row / m.bandwidth)
        rest += m.sample_seconds * num_decodes * sizes.vocab_size
        if shape.ranks > 1:
            link = m.link_bandwidth * shape.ranks / (shape.ranks - 1)
            rest += 2 * shape.layers * (m.collective_seconds + 2 * tokens * row / (link * m.sum_share))
            rest += num_decodes * sizes.vocab_size * LOGIT_BYTES / (link * m.link_share)
        moves = moved_blocks * self._block_bytes / m.host_bandwidth
        return products, attention, most(rest, moves - products - attention)

    def host(self, work: StepWork) -> float:
        return self.machine.host_seconds + self.machine.host_row_seconds * work.num_decodes

    def launch(self, work: StepWork) -> float:
        m = self.machine
        is_eager = m.eager or (m.launches_prompts and not work.all_decode)
        times = CAPTURE_LAUNCHES * work.num_captures if work.is_graph and not is_eager else 1
        return times * self.shape.layers * m.launch_seconds

    def compression(self, work: CompressionWork) -> CompressionTime:
        m, kv_bytes = self.machine, self.shape.sizes.kv_bytes
        seconds = work.entries * kv_bytes / (m.bandwidth * m.move_share)
        if work.policy.num_queries:
            seconds += work.entries * kv_bytes / (m.bandwidth * m.score_share)
        compared = _compared_keys(work.policy)
        if compared:
            longest = work.entries / work.num_requests
            pairs = work.entries * min(compared, longest)
            seconds += pairs * self.shape.key_flops / (m.flops * m.redundancy_share)
        launch = m.compression_seconds + m.compression_score_seconds * (work.policy.num_queries > 0)
        return CompressionTime(launch, m.interpreter_share * launch, seconds, m.beside * seconds)


def _compared_keys(policy: Any) -> float:
    """Keys that a policy compares each key with."""
    kind = getattr(policy, "redundancy", "full" if hasattr(policy, "tau") else "none")
    return {"none": 0.0, "full": float("inf")}.get(kind, float(getattr(policy, "chunk", 0)))
