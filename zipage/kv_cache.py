"""Memory for keys and values: how much, and the tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zipage.config import EngineConfig
from zipage.model.spec import ModelSpec

GIB = 1024**3
DEFAULT_CPU_BYTES = GIB


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the engine reserves, in bytes unless said otherwise.

    Attributes:
        num_blocks: KV blocks in the pool.
        block_size: tokens in a block.
        block_bytes: one block over all layers, keys and values.
        weight_bytes: the model's parameters.
        activation_bytes: measured peak of a full step above the weights; 0 on a CPU, where none is measured.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    weight_bytes: int
    activation_bytes: int

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    def __str__(self) -> str:
        return (
            f"weights {self.weight_bytes / GIB:.2f} GiB, activations {self.activation_bytes / GIB:.2f} GiB, "
            f"KV cache {self.cache_bytes / GIB:.2f} GiB = {self.num_blocks} blocks of {self.block_size} tokens "
            f"({self.block_bytes / 2**20:.2f} MiB each; {self.num_slots} tokens)"
        )


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers: `2 * L * H * b * d * itemsize`."""
    return 2 * spec.num_layers * spec.num_kv_heads * block_size * spec.head_dim * dtype.itemsize


class KVCache:
    """Keys and values, each `[layer, block, kv_head, slot, head_dim]`."""

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (spec.num_layers, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.block_size = block_size

    def poison(self, blocks: int | slice, first_slot: int = 0) -> None:
        """Overwrite the entries of `blocks` from `first_slot` on with NaN, in every layer and head."""
        self.k[:, blocks, ..., first_slot:, :] = float("nan")
        self.v[:, blocks, ..., first_slot:, :] = float("nan")


def plan_memory(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    weight_bytes: int,
    activation_bytes: int = 0,
    free_bytes: int | None = None,
) -> MemoryPlan:
    """Size the pool.

    Args:
        weight_bytes, activation_bytes: as in `MemoryPlan`.
        free_bytes: what CUDA leaves the cache; None on a CPU.

    Raises:
        ValueError: there is no room for one block; the message says what would make room.
    """
    size = block_bytes(spec, config.block_size, dtype)
    num_blocks = config.num_blocks
    if num_blocks is None:
        available = config.kv_cache_memory_bytes
        if available is None:
            available = DEFAULT_CPU_BYTES if free_bytes is None else free_bytes
        num_blocks = available // size
    if num_blocks < 1:
        raise ValueError(
            f"no room for a KV block of {size} bytes: raise gpu_memory_utilization or kv_cache_memory_bytes, "
            "or lower block_size or max_num_batched_tokens"
        )
    return MemoryPlan(num_blocks, config.block_size, size, weight_bytes, activation_bytes)
