"""The shapes at which the kernels are timed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

WINDOW = 16
"""Queries of a compression."""


@dataclass(frozen=True)
class KernelShapes:
    """What is timed; the defaults are Qwen3-8B's shapes.

    Attributes:
        dtype: of K, V and queries.
        layers, query_heads, kv_heads, head_dim: of the model.
        batch, contexts, block_sizes: of decode attention: `batch` requests of each context in blocks of each size.
        prompts, prompt_tokens: of prefill attention, in blocks of each size.
        long_prompt: tokens of one prompt, in blocks of the largest size.
        store_tokens: tokens stored in a launch, in blocks of each size.
        compressions, entries, budget: requests compressed in one launch, entries of each before and after; in blocks of
            the largest size, of which both are whole numbers.
        redundancy_chunk: keys compared with each other.
        copy_bytes, matmul: size of the tensor that is copied and read, and of the square matrices multiplied, for the
            ceilings.

    Raises:
        ValueError: a value is out of range.
    """

    dtype: str = "bfloat16"
    layers: int = 36
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 64
    contexts: tuple[int, ...] = (2048, 16384)
    block_sizes: tuple[int, ...] = (16, 256)
    prompts: int = 4
    prompt_tokens: int = 2048
    long_prompt: int = 16384
    store_tokens: int = 8192
    compressions: int = 8
    entries: int = 2304
    budget: int = 2048
    redundancy_chunk: int = 256
    copy_bytes: int = 1 << 32
    matmul: int = 8192

    @classmethod
    def small(cls) -> KernelShapes:
        """Shapes that a CPU runs in a second."""
        return cls(
            dtype="float32", layers=2, query_heads=4, kv_heads=2, head_dim=32, batch=4, contexts=(64,), prompts=2,
            block_sizes=(16, 32), prompt_tokens=64, long_prompt=128, store_tokens=64, compressions=2,
            entries=96, budget=64, redundancy_chunk=32, copy_bytes=1 << 22, matmul=256,
        )  # fmt: skip

    @classmethod
    def of(cls, device: torch.device, options: dict[str, Any]) -> KernelShapes:
        """The defaults on CUDA, small shapes elsewhere, and `options` in their place.

        Raises:
            ValueError: an option is unknown or out of range.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown option; known: {', '.join(known)}")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return replace(cls() if device.type == "cuda" else cls.small(), **given)

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={self.dtype!r}: must be bfloat16, float16 or float32")
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = [value] if f.type == "int" else value if f.type.startswith("tuple") else [1]
            whole = isinstance(numbers, list | tuple) and all(isinstance(n, int) and n >= 1 for n in numbers)
            if not whole or not numbers:
                what = "a whole number" if f.type == "int" else "whole numbers"
                raise ValueError(f"{f.name}={value!r}: must be {what} from 1 up")
        size = max(self.block_sizes)
        if self.entries % size or self.budget % size or self.entries <= self.budget or self.budget < WINDOW:
            raise ValueError(
                f"entries={self.entries}, budget={self.budget}: must be whole blocks of {size}, entries the more"
            )
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads={self.query_heads}: must be a multiple of kv_heads={self.kv_heads}")
