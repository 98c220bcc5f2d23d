"""The engine's options, checked once and never changed."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from typing import TYPE_CHECKING, Annotated, Any

from zipage.checks import (
    Count,
    Rule,
    Share,
    Text,
    at_least,
    check_fields,
    check_names,
    one_of,
    power_of_two,
    shown,
)
from zipage.eviction import allocation as allocations
from zipage.eviction import registry
from zipage.eviction.budget import Budget, is_enlarged
from zipage.eviction.fault import named
from zipage.eviction.protection import Protection
from zipage.eviction.rule import EvictionRule
from zipage.unsupported import LLM_OPTIONS, drop_unsupported

if TYPE_CHECKING:
    from zipage.eviction.allocation import Allocation
    from zipage.eviction.policy import Policy

logger = logging.getLogger(__name__)

rounding_logger = logging.getLogger(f"{__name__}.rounding")
"""Of its own, so that who points budgets out in other words can silence it."""

EVICTION_DEFAULTS = {
    "budget_tokens": None,
    "interval": None,
    "protection": "none",
    "allocation": "uniform",
    "allocation_options": {},
    "recent_tokens": 16,
    "trigger": "block_full",
    "scheduling": "hybrid",
    "async_compression": True,
    "layer_stride": None,
    "trace_positions": False,
}
"""Options that have no effect under policy "full", and their defaults."""


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
        tensor_parallel_size: GPUs (on a CPU: processes) over which the model is spread, each with its own query heads,
            KV heads, part of the MLP and of the vocabulary, and its heads' share of every block: sizes of memory are of
            each. It divides the KV heads, or is a multiple of them that divides the query heads.
        data_parallel_size: replicas of the model, each in a process of its own with `tensor_parallel_size` GPUs of its
            own, its own cache and its own limits: `num_blocks`, `max_num_seqs` and the like are of each. Requests go
            to the one that has the least left to compute.
        block_size: tokens in a KV block, a power of two from 16 to 256.
        num_blocks: KV blocks in the pool; None plans them from memory.
        kv_cache_memory_bytes: memory for the pool when `num_blocks` is None. None: on CUDA what
            `gpu_memory_utilization` leaves after the measured peak of a full step, on a CPU 1 GiB.
        gpu_memory_utilization: share of the GPU's memory the engine may use.
        swap_space: GiB of host memory beside each GPU, pinned at the start. A request that loses its blocks is copied
            there and back where there is room and that is cheaper than to compute it again. Those that were compressed
            can't be computed again, and are copied whatever this is. 0: only they are.
        max_model_len: longest prompt plus output; None takes the model's.
        max_num_seqs: requests in a step at most.
        max_num_batched_tokens: tokens in a step at most (decodes first, then prefill).
        enable_prefix_caching: find and share full blocks of equal prefixes.
        enable_chunked_prefill: prompts may be computed in pieces beside decodes; off, a prompt runs in one step.
        async_scheduling: plan and queue a step while the device computes the one before, so that the device does not
            wait for the host. A request that an end token ends is then computed for one step more, which is dropped.
            Steps after one that samples under a penalty or bad words wait for its tokens. None: on CUDA.
        enforce_eager: never use CUDA graphs. Otherwise, on CUDA, steps of decodes, alone or with up to 2,048 tokens of
            up to 8 prompts, are graphs, captured when a batch of their size first comes.
        policy, policy_options: the eviction policy, by its registered name or as "package.module:Class", and its
            options.
        budget_tokens: KV budget of a request, per layer and KV head, rounded up to whole blocks; needed by every policy
            but "full". This option and those below it up to `debug` have no effect under policy "full"; setting
            one there logs a warning.
        interval: entries that a request takes in between two of its compressions, rounded up to whole blocks; None: a
            block. It holds up to budget and interval together. Only with trigger "block_full".
        protection: leading entries that always stay: "none", "sink:N", "prompt".
        allocation, allocation_options: how many entries each layer and KV head keeps. "uniform": all as many;
            "pyramid": more in lower layers; "adaptive": heads of a layer share its budget by their scores; "threshold":
            those that score at least `tau`, the budget being the most. Memory is then handed out by layer and head.
            Options: `beta`; `alpha`; `tau`; of all three `round`, "page" or "entry".
        recent_tokens: latest entries that always stay.
        trigger: "block_full": a request is compressed when its last block is full and it owns the blocks of its budget
            and interval; "pressure": only when the pool needs the blocks, the most over budget first.
        scheduling: "hybrid": requests beyond the query slots run too, as long as they need none; "constrained": a
            request runs only with a query slot.
        async_compression: compress beside the decoding of the others, while the request sits out; off, between the
            step that filled the block and the next, and the request misses none.
        layer_stride: layers compressed in one launch; None takes as many as a bound on memory allows.
        trace_positions: hand the positions that each head keeps to `LLM.event_listeners`; slow.
        debug: check every invariant after every step and fill memory that must not be read with NaN; slow.

    Raises:
        ValueError: a value is of the wrong type or outside its range; the message names the field, the value and the
            remedy.
    """

    model: Text
    load_format: Annotated[str, one_of("auto", "dummy")] = "auto"
    skip_tokenizer_init: bool = False
    dtype: Annotated[str, one_of("auto", "float32", "float16", "bfloat16")] = "auto"
    device: Annotated[str, Rule(re.compile(r"auto|cpu|cuda(:[0-9]+)?").fullmatch, "auto, cpu, cuda or cuda:N")] = "auto"
    seed: int = 0
    tensor_parallel_size: Count = 1
    data_parallel_size: Count = 1
    block_size: Annotated[int, power_of_two(16, 256)] = 256
    num_blocks: Count | None = None
    kv_cache_memory_bytes: Count | None = None
    gpu_memory_utilization: Share = 0.9
    swap_space: Annotated[float, at_least(0)] = 0.0
    max_model_len: Count | None = None
    max_num_seqs: Count = 512
    max_num_batched_tokens: Count = 8192
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool | None = None
    enforce_eager: bool = False
    policy: Text = "full"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    budget_tokens: Count | None = None
    interval: Count | None = None
    protection: str = "none"
    allocation: str = "uniform"
    allocation_options: Mapping[str, Any] = field(default_factory=dict)
    recent_tokens: Annotated[int, at_least(0)] = 16
    trigger: Annotated[str, one_of("block_full", "pressure")] = "block_full"
    scheduling: Annotated[str, one_of("hybrid", "constrained")] = "hybrid"
    async_compression: bool = True
    layer_stride: Count | None = None
    trace_positions: bool = False
    debug: bool = False

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Build from keywords. Raises ValueError for one that is vLLM's alone, or unknown, naming the closest known."""
        kwargs = drop_unsupported("LLM", kwargs, LLM_OPTIONS)
        check_names(kwargs, [f.name for f in fields(cls)], "LLM")
        return cls(**kwargs)

    def __post_init__(self) -> None:
        if isinstance(self.model, PathLike):
            object.__setattr__(self, "model", fspath(self.model))
        check_fields(self)
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("num_blocks and kv_cache_memory_bytes both size the pool: give one of them")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least "
                f"max_num_seqs={self.max_num_seqs}, so that every running request can decode in a step"
            )
        for name, who in (("data_parallel_size", "replicas"), ("tensor_parallel_size", "ranks")):
            self._require(
                "device",
                getattr(self, name) == 1 or not self.device.startswith("cuda:"),
                f"'cuda' with {name}={getattr(self, name)}: {who} take the visible GPUs in their order, so choose them "
                "by CUDA_VISIBLE_DEVICES",
            )
        protection = Protection.parse(self.protection)
        allocation = allocations.make(self.allocation, self.allocation_options)
        if self.policy == "full":
            self._require("policy_options", not self.policy_options, "empty: policy 'full' has no options")
            return
        policy = self.make_policy()
        if policy is None:
            return
        self._require("budget_tokens", self.budget_tokens is not None, f"given with policy {self.policy!r}")
        with named(self.policy, "used"):
            self._budget(self.budget_tokens).check(policy, protection, self.recent_tokens)
        self._require(
            "interval",
            self.interval is None or self.trigger == "block_full",
            f"left out with trigger {self.trigger!r}, which compresses when the pool needs the blocks",
        )
        if allocation is not None:
            self._check_allocation(allocation, policy)

    def _check_allocation(self, allocation: Allocation, policy: Policy) -> None:
        with named(self.policy, "used"):
            allocation.check(policy)
        unequal = f"with allocation={self.allocation!r}"
        self._require(
            "enable_prefix_caching", not self.enable_prefix_caching, f"False {unequal}, whose tiles aren't shared"
        )
        self._require(
            "tensor_parallel_size", self.tensor_parallel_size == 1, f"1 {unequal}, or leave that at 'uniform'"
        )
        self._require("trigger", self.trigger == "block_full", f"'block_full' {unequal}")

    @property
    def is_tiled(self) -> bool:
        """Heads hold unequal lengths, so that memory is handed out by layer and head."""
        return self.allocation != allocations.UNIFORM and self.make_policy() is not None

    def warn_of_idle(self) -> None:
        """Log which options were set and mean nothing under full KV."""
        idle = [name for name, default in EVICTION_DEFAULTS.items() if getattr(self, name) != default]
        if self.policy == "full" and idle:
            have = "has" if len(idle) == 1 else "have"
            logger.warning("policy 'full' never evicts: %s %s no effect", ", ".join(idle), have)

    def warn_of_rounding(self) -> None:
        """Log a budget that whole blocks enlarge: 128 are 256 in blocks of 256."""
        if self.budget_tokens is None or self.policy == "full":
            return
        budget = self._budget(self.budget_tokens)
        if is_enlarged(budget.keep, self.budget_tokens):
            rounding_logger.warning("%s smaller blocks (block_size) keep nearer to it", budget)

    def make_policy(self) -> Policy | None:
        """The eviction policy; None for full KV.

        Raises:
            ValueError: the policy or one of its options is unknown, or a value is outside its range.
        """
        if self.policy == "full":
            return None
        policy = registry.make(self.policy, self.policy_options)
        return policy if policy.evicts else None

    def rule(self, policy: Policy, budget_tokens: int, prompt_len: int, protection: str | None = None) -> EvictionRule:
        """What bounds a request under `policy`; a `protection` of None is the engine's.

        Raises:
            ValueError: policy, budget and protection do not go together; the message names what to change.
        """
        leading = Protection.parse(protection or self.protection, policy.implied_protection)
        allocation = allocations.make(self.allocation, self.allocation_options)
        budget = self._budget(budget_tokens)
        return EvictionRule.of(policy, budget, leading, self.recent_tokens, prompt_len, allocation)

    def largest_rule(self, max_model_len: int) -> EvictionRule | None:
        """What bounds a request whose prompt is as long as can be: with it, protection takes as much as it ever does.
        None for full KV. Raises ValueError as `rule`.
        """
        policy = self.make_policy()
        return None if policy is None else self.rule(policy, self.budget_tokens, max_model_len)

    def model_len(self, max_position: int) -> int:
        """The longest prompt plus output, in tokens, of a model whose positions end at `max_position`.

        Raises:
            ValueError: `max_model_len` is beyond that, or no prompt of the length would fit into a step that must hold
                it.
        """
        length = self.max_model_len or max_position
        if length > max_position:
            raise ValueError(
                f"max_model_len={length}: the model's positions end at {max_position}, "
                "where its context or the sliding window of all its layers does"
            )
        if not self.enable_chunked_prefill and length > self.max_num_batched_tokens:
            raise ValueError(
                f"enable_chunked_prefill=False: max_num_batched_tokens={self.max_num_batched_tokens} must hold "
                f"max_model_len={length}; raise the one or lower the other"
            )
        return length

    def _budget(self, tokens: int) -> Budget:
        return Budget.from_tokens(tokens, self.block_size, self.interval)

    def _require(self, name: str, ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"{name}={shown(getattr(self, name))}: must be {what}")
