"""The engine's options, checked once and never changed."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

logger = logging.getLogger(__name__)

EVICTION_DEFAULTS = {
    "budget_tokens": None,
    "protection": "none",
    "trigger": "block_full",
    "scheduling": "hybrid",
    "async_compression": True,
}
"""Options that mean nothing under policy "full", and the values that ask for nothing."""

DTYPES = ("auto", "float32", "float16", "bfloat16")


def check_names(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise a ValueError that names the first unknown key and the closest known one."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown option {name!r}; {hint}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of `LLM`, with the names vLLM's users know.

    Attributes:
        model: local folder, hub id, or GGUF file.
        load_format: "auto" reads weights; "dummy" draws random ones from `seed` for the model's config alone.
        skip_tokenizer_init: prompts and outputs are token ids only.
        dtype: of weights and KV cache. "auto" is the checkpoint's on CUDA and float32 on a CPU.
        device: "auto" is CUDA where there is one.
        seed: of dummy weights and of requests that bring none.
        tensor_parallel_size: GPUs that share the model; only 1.
        block_size: tokens in a KV block, a power of two from 16 to 256.
        num_blocks: KV blocks in the pool; None plans them from memory.
        kv_cache_memory_bytes: memory for the pool when `num_blocks` is None. None: on CUDA what
            `gpu_memory_utilization` leaves after the measured peak of a full step, on a CPU 1 GiB.
        gpu_memory_utilization: share of the GPU's memory the engine may use.
        max_model_len: longest prompt plus output; None takes the model's.
        max_num_seqs: requests in a step at most.
        max_num_batched_tokens: tokens in a step at most (decodes first, then prefill).
        enable_prefix_caching: find and share full blocks of equal prefixes.
        enable_chunked_prefill: prompts may be computed in pieces beside decodes; off, a prompt runs in one step.
        enforce_eager: never use CUDA graphs. The engine captures none yet, so both values run alike.
        policy, policy_options: the eviction policy and its options.
        budget_tokens: KV budget of a request, per layer and KV head. This option and those below it up to `debug` have
            no effect under policy "full", which is said in a warning where one is set.
        protection: "none", "sink:N", "prompt".
        trigger: "block_full", "pressure".
        scheduling: "hybrid", "constrained".
        async_compression: compress beside the decoding of the others.
        debug: check every invariant after every step and fill what nobody may read with NaN; slow.

    Raises:
        ValueError: a value is outside its range; the message names the field, the value and the remedy.
    """

    model: str
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    tensor_parallel_size: int = 1
    block_size: int = 256
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 8192
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    policy: str = "full"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    budget_tokens: int | None = None
    protection: str = "none"
    trigger: str = "block_full"
    scheduling: str = "hybrid"
    async_compression: bool = True
    debug: bool = False

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Build from keywords. Raises ValueError for an unknown one, naming the closest known."""
        check_names(kwargs, tuple(f.name for f in fields(cls)), "LLM")
        return cls(**kwargs)

    def __post_init__(self) -> None:
        self._one_of("load_format", ("auto", "dummy"))
        self._one_of("dtype", DTYPES)
        self._require("device", self.device in ("auto", "cpu") or self.device.startswith("cuda"), "auto, cpu or cuda")
        self._require("tensor_parallel_size", self.tensor_parallel_size == 1, "1; the model runs on one device")
        size = self.block_size
        self._require("block_size", 16 <= size <= 256 and size & (size - 1) == 0, "a power of two from 16 to 256")
        for name in ("num_blocks", "kv_cache_memory_bytes", "max_model_len", "budget_tokens"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1, or None")
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "in (0, 1]")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("num_blocks and kv_cache_memory_bytes both size the pool: give one of them")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least "
                f"max_num_seqs={self.max_num_seqs}, so that every running request can decode in a step"
            )
        self._one_of("policy", ("full",))
        self._require("policy_options", not self.policy_options, "empty: policy 'full' has no options")
        sink = self.protection.removeprefix("sink:")
        valid = self.protection in ("none", "prompt") or (sink != self.protection and sink.isdigit() and int(sink) > 0)
        self._require("protection", valid, "none, prompt or sink:N")
        self._one_of("trigger", ("block_full", "pressure"))
        self._one_of("scheduling", ("hybrid", "constrained"))
        idle = [name for name, default in EVICTION_DEFAULTS.items() if getattr(self, name) != default]
        if idle:
            logger.warning("policy 'full' never evicts: %s without effect", ", ".join(idle))

    def _require(self, name: str, ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {what}")

    def _one_of(self, name: str, values: tuple[str, ...]) -> None:
        self._require(name, getattr(self, name) in values, f"one of {', '.join(values)}")
