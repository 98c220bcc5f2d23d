"""`SimulatedLLM`: the face of `LLM` on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from typing import Any, NamedTuple

import torch

from zipage.config import EngineConfig
from zipage.engine.core import EngineCore
from zipage.engine.input_processor import InputProcessor
from zipage.engine.interface import TokenDelta
from zipage.engine.model_check import check_model
from zipage.engine.output_processor import OutputProcessor
from zipage.engine.startup import Engine, build_inputs, core_on
from zipage.eviction.allocation import UNIFORM
from zipage.llm import LLM
from zipage.models.loading.loader import read_shape
from zipage.models.registry import find_family
from zipage.models.shard import Shard
from zipage.models.spec import ModelSpec
from zipage.sampling_params import SamplingParams
from zipage.simulation.device import PlannedWork, SimulatedCompressor, SimulatedRunner, Timeline, VirtualClock
from zipage.simulation.graphs import SimulatedGraphs
from zipage.simulation.sleep import SleepingBatch, SleepingRequest, SleepingScheduler
from zipage.simulation.times import DeviceTimes, StepWork
from zipage.worker.memory_plan import MemoryPlan
from zipage.worker.model_runner import StepResult
from zipage.worker.worker import DeviceMemory

NUM_TOKENS = 1024
"""Distinct tokens that simulated requests draw."""
TokenListener = Callable[[float, list[str]], None]


class StepTokens(NamedTuple):
    """The tokens that came of a step.

    Attributes:
        time: when they were there.
        count: how many; one a request.
        firsts: ids of the requests whose first it is.
        gaps: of the others, seconds since their token before, and how many waited as long.
    """

    time: float
    count: int
    firsts: list[str]
    gaps: list[tuple[float, int]]


TokensListener = Callable[[StepTokens], None]


class SimulatedLLM(LLM):
    """`LLM` with its scheduler, pool, prefix index and limits, and no model: no weight is read and nothing computed.

    Every token is one that ends nothing, so a request ends at its length; the same one for all of a request's tokens.
    Time passes on `clock`, by `times` alone. Steps and compressions of GPUs overlap as `async_scheduling` and
    `async_compression` say.

    Args:
        model: as of `LLM`; only its config is read.
        times: of the device.
        **options: the fields of `EngineConfig`. The device is a GPU, whatever `device` says.

    Raises:
        ValueError: as `LLM`, or an option has no meaning here.

    Attributes:
        clock: seconds since the start.
        token_listeners: each is called in a step, with the time and the ids of the requests that got a token. That is
            much less work than a stream. Add them before any request.
        tokens_listeners: each is called in a step with a `StepTokens`, which is far less work again.
    """

    def __init__(self, model: str | PathLike[str], *, times: DeviceTimes, **options: Any) -> None:
        for name in ("debug", "trace_positions"):
            if options.get(name):
                raise ValueError(f"{name}=True: a simulated engine has no cache to look into; leave it out")
        if options.get("data_parallel_size", 1) > 1:
            raise ValueError(f"data_parallel_size={options['data_parallel_size']}: only one replica can be simulated")
        if options.get("allocation", UNIFORM) != UNIFORM:
            raise ValueError(f"allocation={options['allocation']!r}: scores decide it, and a simulation computes none")
        self.clock = VirtualClock()
        self._times = times
        super().__init__(model, **options)
        self.token_listeners: list[TokenListener] = self._core.token_listeners
        self.tokens_listeners: list[TokensListener] = self._core.tokens_listeners

    def _add(self, number: int, prompt: Any, tokenize: Any, params: SamplingParams | None, *more: Any) -> Any:
        for name, absent in (("logprobs", None), ("return_hidden_states", False)):
            if params is not None and getattr(params, name, absent) is not absent:
                raise ValueError(f"SamplingParams.{name}: a simulated engine computes none; leave it out")
        return super()._add(number, prompt, tokenize, params, *more)

    def _start(self) -> Engine:
        config, clock = self.config, self.clock
        spec, dtype = read_shape(config.model, load_format="dummy", dtype=config.dtype, device="cuda")
        check_model(config, spec)
        worker = SimulatedWorker(config, spec, dtype, self._times, Timeline(clock))
        max_model_len = config.model_len(spec.max_position)
        core, core_spec = core_on(worker, config, spec, max_model_len, SimulatedCore, clock)
        inputs: InputProcessor = build_inputs(config, core_spec, clock)
        core.set_ends(spec.eos_token_ids, spec.vocab_size)
        core.graphs = SimulatedGraphs(config.max_num_seqs, config.max_num_batched_tokens)
        core.token_listeners, core.tokens_listeners = [], []
        inputs.request_type = SleepingRequest
        return Engine(core, inputs, OutputProcessor(inputs.tokenizer, core.counters, clock), core_spec)


class SimulatedCore(EngineCore):
    """Hands its runner the work of a step in place of its plan."""

    scheduler_type = SleepingScheduler
    deferred_interrupts = nullcontext  # no device is left half-way
    scheduler: SleepingScheduler
    graphs: SimulatedGraphs
    token_listeners: list[TokenListener]
    tokens_listeners: list[TokensListener]

    def set_ends(self, ends: tuple[int, ...], vocab_size: int) -> None:
        """Which tokens end a request, so that none of them is drawn."""
        allowed = (token for token in range(vocab_size) if token not in ends)
        self.scheduler.tokens = [token for token, _ in zip(allowed, range(NUM_TOKENS))]

    def step(self) -> list[TokenDelta]:
        self.scheduler.may_sleep = not self.token_listeners
        return super().step()

    def _book(self, batch: SleepingBatch, result: StepResult, now: float) -> int:
        if self.token_listeners:
            heard = [request.request_id for request in batch.sampled if request.finish_reason is None]
            for listener in self.token_listeners:
                listener(now, heard)
        if self.tokens_listeners:
            tokens = self._tokens_of(batch, now)
            for listener in self.tokens_listeners:
                listener(tokens)
        return super()._book(batch, result, now) + batch.num_heard

    def _tokens_of(self, batch: SleepingBatch, now: float) -> StepTokens:
        live = [request for request in batch.sampled if request.finish_reason is None]
        firsts = [request.request_id for request in live if request.first_token_time is None]
        gaps = [(now - request.token_time, 1) for request in live if request.first_token_time is not None]
        if batch.num_heard:
            gaps.append((now - self.scheduler.booked_at, batch.num_heard))
        return StepTokens(now, len(live) + batch.num_heard, firsts, gaps)

    def _plan(self, batch: SleepingBatch) -> PlannedWork:
        self.scheduler.take_dropped()
        lengths = [request.cache_len + 1 for request in batch.decodes]
        asleep, squares = self.scheduler.asleep_reads
        entries = sum(lengths) + asleep
        squares += sum([length * length for length in lengths])
        tokens = reads = 0
        for request, count in batch.prefills:
            tokens += count
            reads += count * request.cache_len + count * (count + 1) // 2
        moved = sum(len(swap.block_ids) - swap.num_shared for swap in (*batch.paused, *batch.resumed))
        all_decode, in_all = self.graphs.all_decode(tokens, reads), batch.num_decodes + tokens
        is_graph = self.graphs.take(in_all, len(batch.prefills), all_decode)
        captures = self.graphs.capture(in_all, all_decode) if is_graph else 0
        work = StepWork(batch.num_decodes, entries, tokens, reads, all_decode, moved, squares, is_graph, captures)
        return PlannedWork(work, [request.token for request in batch.sampled])


class SimulatedWorker:
    """Stands for `Worker`: the same attributes, and no model."""

    device = torch.device("cuda")
    """Which it would be on."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, times: DeviceTimes, timeline: Timeline
    ) -> None:
        shard = Shard(size=config.tensor_parallel_size)
        shard.check(spec)
        if spec.recurrent is not None:
            raise ValueError(f"model={config.model!r}: recurrent layers can't be simulated; take a model without")
        decoder = find_family(spec.architecture).decoder(spec, dtype, torch.device("meta"), shard)
        weights = sum(parameter.nbytes for parameter in decoder.parameters())
        activations = times.activation_bytes(spec, config.max_num_seqs, config.max_num_batched_tokens)
        free = int(config.gpu_memory_utilization * times.memory_bytes) - weights - activations
        self.spec, self.dtype = shard.spec(spec), dtype
        self.policy = config.make_policy()
        self.memory = DeviceMemory(weights, activations, free)
        self.cache = None
        self.runner = SimulatedRunner(timeline, times)
        self.compressor = SimulatedCompressor(timeline, times, config.async_compression)

    def attach(self, plan: MemoryPlan) -> None:
        """There is no cache to make."""
