"""One device's part of an engine: the model, or a rank's shard of it, its cache, and what computes on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zipage.config import EngineConfig
from zipage.eviction.calibration import read_calibration
from zipage.models.decoder import Decoder
from zipage.models.loading.identity import model_identity
from zipage.models.loading.loader import LoadedModel
from zipage.models.shard import WHOLE, Shard
from zipage.models.spec import ModelSpec
from zipage.threads import warn_of_spinning
from zipage.worker.compression_runner import CompressionRunner
from zipage.worker.entry_scorer import EntryScorer
from zipage.worker.kv_cache import KVCache
from zipage.worker.memory_plan import (
    MemoryPlan,
    block_bytes,
    bounded_sizes,
    check_states_fit,
    slab_bytes,
    sliding_block_bytes,
)
from zipage.worker.model_runner import ModelRunner
from zipage.worker.output_norms import OutputNorms
from zipage.worker.peak import measure_peak


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device has for the cache, in bytes.

    Attributes:
        weights: that the model, or its shard, takes.
        activations: all else that the engine takes beside its cache: what policies read, what libraries keep, and the
            measured peak of a full step above that; 0 on a CPU, where none is measured.
        free: what is left to the cache; None on a CPU.
    """

    weights: int
    activations: int = 0
    free: int | None = None

    @classmethod
    def of(cls, weights: int, left: int, peak: int, free: int, spared: float) -> DeviceMemory:
        """What is free for the cache where an engine spares so much of a device.

        Args:
            left: taken beside the weights by now, and missing from what is `free`.
            peak: what a step takes above that.
        """
        return cls(weights, left + peak, int(free - spared - peak))


class Worker:
    """Loads the model, tells what memory there is, and gets its cache with `attach`.

    Args:
        config: of the engine.
        loaded: the model on its device, or a shard of it.
        max_model_len: longest prompt plus output, in tokens.
        compression_shard: the decoder's with collectives of its own, for compressions beside the forward pass.

    Attributes:
        spec: of the heads that are here.
        device, dtype: of model and cache.
        memory: as of now.
        runner, compressor, cache: once there is a cache.
    """

    runner: ModelRunner
    compressor: CompressionRunner
    cache: KVCache

    def __init__(
        self,
        config: EngineConfig,
        loaded: LoadedModel,
        max_model_len: int,
        compression_shard: Shard = WHOLE,
    ) -> None:
        self._before = torch.cuda.memory_allocated(loaded.decoder.device) if loaded.decoder.device.type == "cuda" else 0
        decoder = loaded.decoder.for_context(max_model_len)
        self.config = config
        self.spec = decoder.spec
        self.device, self.dtype = decoder.device, decoder.dtype
        self._model_heads = loaded.spec.num_kv_heads
        self._compression_shard = compression_shard
        if self.device.type == "cpu":
            warn_of_spinning()
        self.policy = config.make_policy()
        if self.policy is not None and self.policy.needs_rotary_pairs:
            self.spec.check_rotary_pairs(self.policy.name)
        self._calibration = self._read_calibration(loaded.spec)
        self._outputs = self._output_norms(decoder)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            spared = (1 - config.gpu_memory_utilization) * total
            check_states_fit(self.spec, self.dtype, config.max_num_seqs, int(free - spared))
        self.runner = ModelRunner(
            decoder,
            self.spec,
            self.device,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            enforce_eager=config.enforce_eager,
            scorer=self._scorer(),
        )
        self.memory = self._measure(max_model_len)

    def _read_calibration(self, whole: ModelSpec) -> dict[str, Tensor]:
        """The arrays that the policy asks for, of the heads that are here."""
        policy, config = self.policy, self.config
        if policy is None or not policy.calibration_arrays:
            return {}
        identity = model_identity(config.model, load_format=config.load_format, seed=config.seed)
        wanted = policy.calibration_kind, policy.calibration_arrays, identity, policy.calibration_command
        arrays = read_calibration(policy.calibration, *wanted)
        heads, found = self._compression_shard.kv_heads(whole.num_kv_heads), {}
        for name, array in arrays.items():
            rows = array.shape[1] // whole.num_kv_heads
            found[name] = array[:, heads.start * rows : heads.stop * rows].to(self.device)
        return found

    def _scorer(self) -> EntryScorer | None:
        """Of new entries, where the policy asks for their scores."""
        if self.policy is None or not self.policy.predicts:
            return None
        return EntryScorer.of(self.policy, self._calibration, self.spec)

    def _output_norms(self, decoder: Decoder) -> OutputNorms | None:
        """Of values, where the policy asks for them."""
        if self.policy is None or self.policy.output_norm is None:
            return None
        if decoder.shard.size > self._model_heads:
            raise ValueError(
                f"tensor_parallel_size={decoder.shard.size}: policy {self.policy.name!r} needs the output projection "
                f"of whole groups, so at most as many ranks as the model has KV heads, {self._model_heads}"
            )
        weights = [decoder.attending[layer].output_weight for layer in self.spec.full_layers]
        return OutputNorms(weights, self.policy.output_norm)

    def _measure(self, max_model_len: int) -> DeviceMemory:
        weights = sum(p.numel() * p.itemsize for p in self.runner.decoder.parameters())
        if self.device.type == "cpu":
            return DeviceMemory(weights)
        config = self.config
        peak = measure_peak(
            self.runner,
            config.block_size,
            self.dtype,
            rule=config.largest_rule(max_model_len),
            asynchronous=config.async_compression,
            layer_stride=config.layer_stride,
            shard=self._compression_shard,
            model_heads=self._model_heads,
            calibration=self._calibration,
            outputs=self._outputs,
        )
        if self.policy is not None or config.swap_space:
            sizes = self.spec, config.block_size, self.dtype
            size = block_bytes(*sizes) if self.policy is None else bounded_sizes(*sizes, self.policy)[0]
            # Through which requests go to host memory.
            peak += slab_bytes(config.block_size, size, sliding_block_bytes(*sizes))
        free, total = torch.cuda.mem_get_info(self.device)
        recurrent = self.runner.recurrent
        states = 0 if recurrent is None else recurrent.nbytes  # of which the memory plan tells
        left = max(0, torch.cuda.memory_allocated(self.device) - self._before - states)
        return DeviceMemory.of(weights, left, peak, free, (1 - config.gpu_memory_utilization) * total)

    def attach(self, plan: MemoryPlan) -> None:
        """Make the cache, and what works on it."""
        config, policy = self.config, self.policy
        self.cache = KVCache(
            self.spec,
            plan.num_blocks,
            config.block_size,
            self.dtype,
            self.device,
            positions=policy is not None,
            scores=0 if policy is None else policy.num_states,
            predictions=policy is not None and policy.predicts,
            num_query_slots=plan.num_query_slots,
            window=0 if policy is None else policy.num_queries,
            tiled=config.is_tiled,
            recurrent=self.runner.recurrent,
            num_sliding_blocks=plan.num_sliding_blocks,
        )
        self.runner.attach(self.cache, plan.num_host_slabs)
        self.compressor = CompressionRunner(
            self.cache,
            self.spec.full,
            asynchronous=config.async_compression,
            layer_stride=config.layer_stride,
            trace=config.trace_positions,
            debug=config.debug,
            shard=self._compression_shard,
            model_heads=self._model_heads,
            calibration=self._calibration,
            outputs=self._outputs,
            forms=self.runner.groups.full.forms,
        )
