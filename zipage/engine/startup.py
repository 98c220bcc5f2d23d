"""From options to an engine that is ready: model, memory plan, caches, and the parts that work on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from zipage.config import EngineConfig
from zipage.engine.core import EngineCore, on_device
from zipage.engine.core_spec import CoreSpec
from zipage.engine.debug import DebugChecks
from zipage.engine.input_processor import InputProcessor
from zipage.engine.interface import Core
from zipage.engine.model_check import check_model
from zipage.engine.output_processor import OutputProcessor
from zipage.engine.replicas import start_replicas
from zipage.engine.telemetry import Telemetry
from zipage.host_memory import check_swap_space
from zipage.models.loading.loader import resolve_device
from zipage.models.loading.share import obtain_model
from zipage.models.loading.tokenizer import load_tokenizer
from zipage.models.spec import ModelSpec
from zipage.parallel.ranked_worker import RankedWorker, start_ranks
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.headroom import entries_to_keep
from zipage.scheduling.sliding_blocks import SlidingBlocks
from zipage.scheduling.swap_space import SwapCosts, SwapSpace
from zipage.scheduling.tile_pool import TilePool
from zipage.worker.memory_plan import MemoryPlan, large_states, plan_memory
from zipage.worker.worker import Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of an engine, as `LLM` drives them."""

    core: Core
    inputs: InputProcessor
    outputs: OutputProcessor
    spec: CoreSpec


def start(config: EngineConfig, *, apart: bool = False) -> Engine:
    """Load the model and build an engine around it.

    Args:
        apart: its core in a process of its own, as replicas have it.

    Raises:
        ValueError, FileNotFoundError: as `LLM`.
    """
    check_swap_space(config.swap_space, config.tensor_parallel_size * config.data_parallel_size)
    core, spec = start_replicas(config) if apart or config.data_parallel_size > 1 else build_core(config)
    try:
        inputs = build_inputs(config, spec)
    except BaseException:
        core.shut_down()
        raise
    return Engine(core, inputs, OutputProcessor(inputs.tokenizer, core.counters), spec)


def build_inputs(
    config: EngineConfig, spec: CoreSpec, clock: Callable[[], float] = time.perf_counter
) -> InputProcessor:
    """What turns prompts into samples for a core: it loads the tokenizer, and neither weights nor anything on a device.

    Raises:
        ValueError, FileNotFoundError: the tokenizer is missing or broken.
    """
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config.model)
    return InputProcessor(config, spec, tokenizer, clock)


def build_core(config: EngineConfig) -> tuple[EngineCore, CoreSpec]:
    """Load the model and build a core around it.

    Raises:
        ValueError, FileNotFoundError: as `LLM`, for all but the tokenizer.
    """
    if config.tensor_parallel_size > 1:
        worker = start_ranks(config)
        try:
            return core_on(worker, config, worker.model, worker.max_model_len)
        except BaseException:
            worker.close()
            raise
    with on_device(resolve_device(config.device)):
        return _build_core(config)


def _build_core(config: EngineConfig) -> tuple[EngineCore, CoreSpec]:
    """`build_core` on the current device."""
    loaded = obtain_model(
        config.model,
        load_format=config.load_format,
        dtype=config.dtype,
        device=config.device,
        seed=config.seed,
        check=partial(check_model, config),
    )
    max_model_len = config.model_len(loaded.spec.max_position)
    return core_on(Worker(config, loaded, max_model_len), config, loaded.spec, max_model_len)


def _pool(plan: MemoryPlan, config: EngineConfig, spec: ModelSpec) -> BlockPool:
    if config.is_tiled:
        return TilePool(plan.num_blocks, config.block_size, spec.num_layers * spec.num_kv_heads)
    caches = config.enable_prefix_caching and spec.recurrent is None
    if caches != config.enable_prefix_caching:
        logger.warning("prefix caching is off: blocks don't hold what recurrent layers of %s keep", spec.architecture)
    return BlockPool(plan.num_blocks, config.block_size, caches)


def _sliding_blocks(
    plan: MemoryPlan, config: EngineConfig, spec: ModelSpec, max_model_len: int
) -> SlidingBlocks | None:
    if not spec.sliding_layers:
        return None
    pool = BlockPool(plan.num_sliding_blocks, config.block_size, config.enable_prefix_caching)
    return SlidingBlocks(pool, spec.sliding_window, plan.num_windows, max_model_len)


def _swap_space(plan: MemoryPlan, config: EngineConfig, spec: ModelSpec) -> SwapSpace:
    operations = spec.token_operations, spec.pair_operations
    row_bytes = plan.state_bytes // config.max_num_seqs
    operations = (count // config.tensor_parallel_size for count in operations)
    costs = SwapCosts(plan.block_bytes, *operations, row_bytes, plan.sliding_block_bytes)
    return SwapSpace(plan.num_host_slabs, plan.slab_blocks, costs, max(1, plan.slab_sliding_blocks))


def core_on(
    worker: Worker | RankedWorker,
    config: EngineConfig,
    spec: ModelSpec,
    max_model_len: int,
    core_type: type[EngineCore] = EngineCore,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[EngineCore, CoreSpec]:
    """A core whose steps `worker` computes.

    Args:
        worker: or what stands for one.
        spec: of the whole model.
        core_type, clock: other ones for a simulation.
    """
    rule = config.largest_rule(max_model_len)
    memory = worker.memory
    plan = plan_memory(
        config, worker.spec, worker.dtype, memory.weights, memory.activations, memory.free,
        policy=worker.policy, max_blocks=rule and rule.peak_blocks, max_model_len=max_model_len,
    )  # fmt: skip
    logger.info("memory plan: %s", plan)
    if line := large_states(plan, config.max_num_seqs):
        logger.warning("%s", line)
    worker.attach(plan)
    swap_space = _swap_space(plan, config, spec)
    scheduler = core_type.scheduler_type(
        _pool(plan, config, spec),
        max_num_seqs=min(config.max_num_seqs, plan.num_windows or config.max_num_seqs),
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=config.enable_chunked_prefill,
        num_query_slots=plan.num_query_slots,
        trigger=config.trigger,
        scheduling=config.scheduling,
        swap_space=swap_space,
        headroom=entries_to_keep(swap_space, config.block_size),
        shares_prefixes=spec.recurrent is None,
        sliding=_sliding_blocks(plan, config, spec, max_model_len),
    )
    core = core_type(
        scheduler,
        worker.runner,
        worker.compressor,
        Telemetry(scheduler, plan.block_bytes, plan.sliding_block_bytes, strict=config.debug, clock=clock),
        DebugChecks(scheduler, worker.cache) if config.debug else None,
        overlaps=worker.device.type == "cuda" if config.async_scheduling is None else config.async_scheduling,
        async_compression=config.async_compression,
        heads=(spec.full.num_layers, spec.num_kv_heads),
        clock=clock,
    )
    return core, CoreSpec(plan, max_model_len, spec.vocab_size, spec.eos_token_ids)
