"""From options to an engine that is ready: model, memory plan, caches, and the parts that work on them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from zipage.config import EngineConfig
from zipage.engine.core import EngineCore, on_device
from zipage.engine.core_spec import CoreSpec
from zipage.engine.debug import DebugChecks
from zipage.engine.input_processor import InputProcessor
from zipage.engine.interface import Core
from zipage.engine.output_processor import OutputProcessor
from zipage.engine.replicas import start_replicas
from zipage.engine.telemetry import Telemetry
from zipage.models.loading.loader import resolve_device
from zipage.models.loading.share import obtain_model
from zipage.models.loading.tokenizer import load_tokenizer
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.scheduler import Scheduler
from zipage.threads import warn_of_spinning
from zipage.worker.compression_runner import CompressionRunner
from zipage.worker.kv_cache import KVCache
from zipage.worker.memory_plan import plan_memory
from zipage.worker.model_runner import ModelRunner
from zipage.worker.peak import measure_peak

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of an engine, as `LLM` drives them."""

    core: Core
    inputs: InputProcessor
    outputs: OutputProcessor
    spec: CoreSpec


def start(config: EngineConfig) -> Engine:
    """Load the model and build an engine around it.

    Raises:
        ValueError, FileNotFoundError: as `LLM`.
    """
    core, spec = build_core(config) if config.data_parallel_size == 1 else start_replicas(config)
    try:
        inputs = build_inputs(config, spec)
    except BaseException:
        core.shut_down()
        raise
    return Engine(core, inputs, OutputProcessor(inputs.tokenizer, core.counters), spec)


def build_inputs(config: EngineConfig, spec: CoreSpec) -> InputProcessor:
    """What turns prompts into samples for a core: it loads the tokenizer, and neither weights nor anything on a device.

    Raises:
        ValueError, FileNotFoundError: the tokenizer is missing or broken.
    """
    return InputProcessor(config, spec, None if config.skip_tokenizer_init else load_tokenizer(config.model))


def build_core(config: EngineConfig) -> tuple[EngineCore, CoreSpec]:
    """Load the model and build a core around it.

    Raises:
        ValueError, FileNotFoundError: as `LLM`, for all but the tokenizer.
    """
    with on_device(resolve_device(config.device)):
        return _build_core(config)


def _build_core(config: EngineConfig) -> tuple[EngineCore, CoreSpec]:
    """`build_core` on the current device."""
    loaded = obtain_model(
        config.model, load_format=config.load_format, dtype=config.dtype, device=config.device, seed=config.seed
    )
    spec, decoder = loaded.spec, loaded.decoder
    max_model_len = _resolve_max_model_len(config, spec.max_position)
    dtype, device = decoder.dtype, decoder.device
    if device.type == "cpu":
        warn_of_spinning()
    policy = config.make_policy()
    # A prompt as long as can be: with it, protection takes as much as it ever does.
    rule = None if policy is None else config.rule(policy, config.budget_tokens, max_model_len)

    runner = ModelRunner(
        decoder,
        spec,
        device,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        enforce_eager=config.enforce_eager,
    )
    activation_bytes, free_bytes = 0, None
    if device.type == "cuda":
        activation_bytes = measure_peak(
            runner,
            config.max_num_batched_tokens,
            config.block_size,
            dtype,
            rule=rule,
            asynchronous=config.async_compression,
            layer_stride=config.layer_stride,
        )
        free, total = torch.cuda.mem_get_info(device)
        free_bytes = int(free - (1 - config.gpu_memory_utilization) * total - activation_bytes)
    weight_bytes = sum(p.numel() * p.itemsize for p in decoder.parameters())
    plan = plan_memory(
        config, spec, dtype, weight_bytes, activation_bytes, free_bytes,
        policy=policy, max_blocks=rule and rule.max_blocks, max_model_len=max_model_len,
    )  # fmt: skip
    logger.info("memory plan: %s", plan)
    cache = KVCache(
        spec,
        plan.num_blocks,
        config.block_size,
        dtype,
        device,
        positions=policy is not None,
        scores=policy is not None and policy.state,
        num_query_slots=plan.num_query_slots,
        window=0 if policy is None else policy.num_queries,
    )
    runner.attach(cache)
    compressor = CompressionRunner(
        cache,
        spec,
        asynchronous=config.async_compression,
        layer_stride=config.layer_stride,
        trace=config.trace_positions,
        debug=config.debug,
    )
    scheduler = Scheduler(
        BlockPool(plan.num_blocks, config.block_size, config.enable_prefix_caching),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=config.enable_chunked_prefill,
        num_query_slots=plan.num_query_slots,
        trigger=config.trigger,
        scheduling=config.scheduling,
    )
    telemetry = Telemetry(scheduler, strict=config.debug)
    core = EngineCore(
        scheduler,
        runner,
        compressor,
        telemetry,
        DebugChecks(scheduler, cache) if config.debug else None,
        overlaps=device.type == "cuda" if config.async_scheduling is None else config.async_scheduling,
        async_compression=config.async_compression,
    )
    return core, CoreSpec(plan, max_model_len, spec.vocab_size, spec.eos_token_ids)


def _resolve_max_model_len(config: EngineConfig, max_position: int) -> int:
    length = config.max_model_len or max_position
    if length > max_position:
        raise ValueError(f"max_model_len={length}: the model's positions end at {max_position}")
    if not config.enable_chunked_prefill and length > config.max_num_batched_tokens:
        raise ValueError(
            f"enable_chunked_prefill=False: max_num_batched_tokens={config.max_num_batched_tokens} must hold "
            f"max_model_len={length}; raise the one or lower the other"
        )
    return length
