"""How much memory the pool of blocks and the query slots take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zipage.config import EngineConfig
from zipage.models.spec import ModelSpec
from zipage.sliding_table import most_blocks
from zipage.worker.swap import slab_blocks

if TYPE_CHECKING:
    from zipage.eviction.policy import Policy

GIB = 1024**3
DEFAULT_CPU_BYTES = GIB
LARGE_SHARE = 0.25
"""Of what states and blocks take together: recurrent states beyond it are told of."""

BLOCKS_BESIDE_WINDOW = 4
"""Blocks of full layers for each block of a request's window, where memory is too small for `max_num_seqs` windows: as
if requests were four windows long. With less, windows stand empty for want of blocks beside them; with more, fewer
short requests run at once.
"""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the engine reserves, in bytes unless said otherwise.

    Attributes:
        num_blocks: KV blocks in the pool, of full layers where others slide.
        block_size: tokens in a block.
        block_bytes: one block over all these layers: keys, values and what is kept of each entry beside them.
        weight_bytes: the model's parameters.
        activation_bytes: measured peak of a full step above the weights; 0 on a CPU, where none is measured.
        num_query_slots: M, requests whose latest queries are kept, or that may run at once under constrained
            scheduling.
        query_slot_bytes: m_q, one query slot over all layers; 0 where the policy reads no queries.
        max_blocks_per_request: N_max, blocks a request decodes in at most; 0 under full KV, which has no such bound.
        num_host_slabs: pieces of pinned host memory of `slab_blocks` blocks each, for requests that leave the pool.
        state_bytes: what recurrent layers keep, for as many requests as may run; 0 where there are none.
        num_sliding_blocks, sliding_block_bytes: the same of sliding layers; 0 where there are none.
        num_windows: requests whose windows these hold, so that no more run at once; 0 where there are none.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    weight_bytes: int
    activation_bytes: int
    num_query_slots: int = 0
    query_slot_bytes: int = 0
    max_blocks_per_request: int = 0
    num_host_slabs: int = 0
    state_bytes: int = 0
    num_sliding_blocks: int = 0
    sliding_block_bytes: int = 0
    num_windows: int = 0

    @property
    def slab_bytes(self) -> int:
        return slab_bytes(self.block_size, self.block_bytes, self.sliding_block_bytes)

    @property
    def slab_blocks(self) -> int:
        """Blocks that a slab holds."""
        return self.slab_bytes // self.block_bytes

    @property
    def slab_sliding_blocks(self) -> int:
        """The same of sliding layers."""
        return self.slab_bytes // self.sliding_block_bytes if self.sliding_block_bytes else 0

    @property
    def host_bytes(self) -> int:
        return self.num_host_slabs * self.slab_bytes

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes + self.sliding_bytes

    @property
    def sliding_bytes(self) -> int:
        return self.num_sliding_blocks * self.sliding_block_bytes

    @property
    def query_bytes(self) -> int:
        return self.num_query_slots * self.query_slot_bytes

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    def __str__(self) -> str:
        text = (
            f"weights {self.weight_bytes / GIB:.2f} GiB, activations {self.activation_bytes / GIB:.2f} GiB, "
            f"KV cache {(self.cache_bytes - self.sliding_bytes) / GIB:.2f} GiB = {self.num_blocks} blocks of "
            f"{self.block_size} tokens ({self.block_bytes / 2**20:.2f} MiB each; {self.num_slots} tokens)"
        )
        if self.num_sliding_blocks:
            text += (
                f", sliding layers {self.sliding_bytes / GIB:.2f} GiB = {self.num_sliding_blocks} blocks "
                f"({self.sliding_block_bytes / 2**20:.2f} MiB each) for windows of {self.num_windows} requests"
            )
        if self.state_bytes:
            text += f", recurrent states {self.state_bytes / GIB:.2f} GiB"
        if self.num_query_slots:
            text += (
                f", {self.num_query_slots} query slots of {self.query_slot_bytes / 2**20:.2f} MiB, "
                f"at most {self.max_blocks_per_request} blocks a request"
            )
        if self.num_host_slabs:
            text += f", {self.host_bytes / GIB:.2f} GiB of host memory for preempted requests"
        return text


def block_bytes(
    spec: ModelSpec,
    block_size: int,
    dtype: torch.dtype,
    *,
    positions: bool = False,
    scores: int = 0,
    predictions: bool = False,
) -> int:
    """Bytes of one block over the layers that don't slide:
    `L * H * b * (2 * d * itemsize + 4 * (positions + scores + predictions))`.
    """
    entry_bytes = 2 * spec.head_dim * dtype.itemsize + 4 * (positions + scores + predictions)
    return (spec.num_layers - len(spec.sliding_layers)) * spec.num_kv_heads * block_size * entry_bytes


def sliding_block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """The same of the layers that slide, which keep nothing beside keys and values: `L * H * b * 2 * d * itemsize`."""
    return len(spec.sliding_layers) * spec.num_kv_heads * block_size * 2 * spec.head_dim * dtype.itemsize


def slab_bytes(block_size: int, block_bytes: int, sliding_block_bytes: int = 0) -> int:
    """Bytes of a slab of host memory, which takes blocks of full layers or of sliding ones."""
    return slab_blocks(block_size) * max(block_bytes, sliding_block_bytes)


def query_slot_bytes(spec: ModelSpec, window: int, dtype: torch.dtype) -> int:
    """Bytes of the latest `window` queries of a request over these layers: `L * w * Hq * d * itemsize`."""
    return (spec.num_layers - len(spec.sliding_layers)) * window * spec.num_heads * spec.head_dim * dtype.itemsize


def state_bytes(spec: ModelSpec, dtype: torch.dtype, max_num_seqs: int) -> int:
    """Bytes of `RecurrentStates`."""
    return 0 if spec.recurrent is None else max_num_seqs * spec.recurrent.row_bytes(dtype.itemsize)


def check_states_fit(spec: ModelSpec, dtype: torch.dtype, max_num_seqs: int, free_bytes: int) -> None:
    """Raise a ValueError where recurrent states of so many requests leave nothing of `free_bytes`."""
    needed = state_bytes(spec, dtype, max_num_seqs)
    if needed and needed >= free_bytes:
        raise ValueError(
            f"max_num_seqs={max_num_seqs}: recurrent states of {needed / GIB:.2f} GiB exceed what is free, "
            f"{max(free_bytes, 0) / GIB:.2f} GiB: lower max_num_seqs or raise gpu_memory_utilization"
        )


def large_states(plan: MemoryPlan, max_num_seqs: int) -> str | None:
    """One line where recurrent states take much of what blocks could have, and what to do about it."""
    both = plan.state_bytes + plan.cache_bytes
    if plan.state_bytes <= LARGE_SHARE * both:
        return None
    return (
        f"max_num_seqs={max_num_seqs}: recurrent states take {plan.state_bytes / GIB:.2f} GiB, "
        f"{plan.state_bytes / both:.0%} of what they and the KV cache have, whether requests run or not "
        f"({plan.state_bytes / max_num_seqs / 2**20:.1f} MiB each): lower max_num_seqs to what runs at a time"
    )


def bounded_sizes(spec: ModelSpec, block_size: int, dtype: torch.dtype, policy: Policy) -> tuple[int, int]:
    """Bytes of a block and of a query slot, as above, under a policy that evicts."""
    kept = {"positions": True, "scores": policy.num_states, "predictions": policy.predicts}
    size = block_bytes(spec, block_size, dtype, **kept)
    return size, query_slot_bytes(spec, policy.num_queries, dtype)


def plan_memory(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    weight_bytes: int,
    activation_bytes: int = 0,
    free_bytes: int | None = None,
    *,
    policy: Policy | None = None,
    max_blocks: int | None = None,
    max_model_len: int | None = None,
) -> MemoryPlan:
    """Size the pool, and under an evicting policy the query slots beside it.

    Of the bytes available, M query slots take m_q each, and the blocks, m_kv each, the rest. M is as large as leaves
    N_max blocks to each of M requests, which then run to their end without waiting for one another (Zipage, arXiv
    2603.08743):

        M = min(max_num_seqs, floor(available / (m_kv * N_max + m_q)))
        num_blocks = floor((available - M * m_q) / m_kv)

    With `config.num_blocks`, M = min(max_num_seqs, max(1, floor(num_blocks / N_max))).

    Where layers slide, the windows of as many requests as may run come first (`_windows`), and what is available is
    what they leave. `config.num_blocks` are blocks of full layers.

    Args:
        weight_bytes, activation_bytes: as in `MemoryPlan`.
        free_bytes: what CUDA leaves the cache; None on a CPU.
        policy: of the engine; None or one that never evicts plans for full KV.
        max_blocks: N_max of the engine's budget; with `max_model_len` required of a policy that evicts.
        max_model_len: longest request, in tokens: it bounds N_max too.

    Raises:
        ValueError: there is no room for one block, or for one request under an evicting policy; the message says what
            would make room.
    """
    num_blocks, states = config.num_blocks, state_bytes(spec, dtype, config.max_num_seqs)
    available = config.kv_cache_memory_bytes
    if available is None:
        available = DEFAULT_CPU_BYTES if free_bytes is None else free_bytes
    evicts = policy is not None and policy.evicts
    sizes = spec, config.block_size, dtype
    size, slot_size = bounded_sizes(*sizes, policy) if evicts else (block_bytes(*sizes), 0)
    most = -(-max_model_len // config.block_size) if max_model_len else None
    if evicts:
        most = min(max_blocks, most)
    windows = _windows(config, spec, dtype, available, size, most, max_model_len)
    of_sliding = windows["num_sliding_blocks"] * windows["sliding_block_bytes"]
    beside_sliding = f" beside {of_sliding} bytes of sliding layers" if of_sliding else ""
    available -= of_sliding
    held = weight_bytes, activation_bytes
    slabs = _host_slabs(config, size, windows["sliding_block_bytes"])
    if not evicts:
        if num_blocks is None:
            num_blocks = available // size
        if num_blocks < 1:
            raise ValueError(
                f"no room for a KV block of {size} bytes{beside_sliding}: raise gpu_memory_utilization or "
                "kv_cache_memory_bytes, or lower block_size or max_num_batched_tokens"
            )
        beside = {"num_host_slabs": slabs, "state_bytes": states}
        return MemoryPlan(num_blocks, config.block_size, size, *held, **beside, **windows)

    if num_blocks is None:
        num_query_slots = min(config.max_num_seqs, available // (size * most + slot_size))
        num_blocks = (available - num_query_slots * slot_size) // size
    else:
        num_query_slots = min(config.max_num_seqs, max(1, num_blocks // most))
    if num_query_slots < 1:
        raise ValueError(
            f"no room for one request: {most} KV blocks of {size} bytes and {slot_size} bytes of queries exceed "
            f"{max(available, 0)} bytes{beside_sliding}: raise gpu_memory_utilization or kv_cache_memory_bytes, or "
            "lower budget_tokens, interval, max_model_len, block_size or max_num_batched_tokens"
        )
    return MemoryPlan(
        num_blocks,
        config.block_size,
        size,
        *held,
        num_query_slots,
        slot_size,
        most,
        slabs,
        states,
        **windows,
    )


def _windows(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    available: int,
    block_bytes: int,
    most: int | None,
    max_model_len: int | None,
) -> dict[str, int]:
    """Fields of a plan for sliding layers: R windows of W blocks each, and blocks for the chunks of a step, where these
    may be longer than W.

        R = min(max_num_seqs, floor((available - chunks) / (W * sliding block + min(4 * W, most) * block)))

    With `config.num_blocks`, R = min(max_num_seqs, num_blocks): each request that runs holds one at least.

    Args:
        most: blocks of full layers that a request holds at most; None: there is no bound.
    """
    if not spec.sliding_layers:
        return {"num_sliding_blocks": 0, "sliding_block_bytes": 0, "num_windows": 0}
    each = most_blocks(spec.sliding_window, config.block_size, max_model_len)
    size = sliding_block_bytes(spec, config.block_size, dtype)
    fits_whole = max_model_len is not None and each * config.block_size >= max_model_len
    for_chunks = 0 if fits_whole else 1 - (-config.max_num_batched_tokens // config.block_size)
    if config.num_blocks is None:
        beside = BLOCKS_BESIDE_WINDOW * each
        beside = beside if most is None else min(beside, most)
        fit = (available - for_chunks * size) // (each * size + beside * block_bytes)
    else:
        fit = config.num_blocks
    num_windows = max(1, min(config.max_num_seqs, fit))
    count = num_windows * each + for_chunks
    return {"num_sliding_blocks": count, "sliding_block_bytes": size, "num_windows": num_windows}


def _host_slabs(config: EngineConfig, block_bytes: int, sliding_block_bytes: int) -> int:
    return int(config.swap_space * GIB) // slab_bytes(config.block_size, block_bytes, sliding_block_bytes)
